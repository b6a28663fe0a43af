"""LoRA (arXiv 2106.09685): frozen matrices W and a trained update of low rank, y = W x + (α / r) B A x.

Where the adapter goes after a run is a choice. Here it is merged into the exported <output>/model, an ordinary
checkpoint, and saved once more by itself in PEFT's file format, for the checkpoint that the run began with. So
Stage 2, evaluation and stock transformers need not know of adapters, and Stage 2 begins with a fresh one on the
merged weights: "adapter off" is then the Stage-1 policy exactly, and the reference costs no second copy. Keeping
Stage 1's adapter as a second, frozen layer would say the same with more work in every forward.

The language model alone is adapted, never the vision encoder, whose MLP has matrices of the same names.
"""

import json
import math
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from grpo.engine.files import replace_folder
from grpo.engine.policy import Policy
from grpo.engine.sizes import target_names


class LoraLinear(nn.Linear):
    """A linear layer with its update beside it; `weight` and `bias` keep their names and are the base's own.

    lora_A (r, in) begins Kaiming-uniform as in PEFT, lora_B (out, r) zero: before training the layer is the base's,
    to the bit. Dropout falls on the update's input, and only where a gradient is recorded: in the update pass, not
    in sampling, reference or evaluation. (`training` cannot tell: gradient checkpointing wants it on throughout.)
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float, random: torch.Generator):
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5), generator=random)
        self.scale, self.dropout, self.on = alpha / rank, dropout, True

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if not self.on:
            return y
        x = F.dropout(x, self.dropout, training=torch.is_grad_enabled())
        return y + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def add_adapter(policy: Policy, rank: int, alpha: float, targets: str, dropout: float = 0.0, seed: int = 0) -> Policy:
    """Freeze everything and put an update beside each matrix whose name ends in one of `targets` (comma-separated).

    Before sharding: A depends on `seed` alone, so every process draws the same. ValueError names a target that is
    no linear layer of the language model.
    """
    policy.requires_grad_(False)
    random = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # of dropout: nothing else draws from torch's own generator
    layers = policy.language_model
    linear = {name: module for name, module in layers.named_modules() if isinstance(module, nn.Linear)}
    known, wanted = sorted({name.split(".")[-1] for name in linear}), target_names(targets)
    if unknown := [target for target in wanted or [targets] if target not in known]:
        raise ValueError(f"--lora_targets: no matrix {unknown[0]!r} in the language model; it has {', '.join(known)}")
    for name, module in linear.items():
        parent, _, end = name.rpartition(".")
        if end in wanted:
            setattr(layers.get_submodule(parent), end, LoraLinear(module, rank, alpha, dropout, random))
    return policy


def adapted(model: nn.Module) -> dict[str, LoraLinear]:
    """The adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


@contextmanager
def adapter_off(policy: Policy):
    """Inside, the policy is what the run began with; a policy without an adapter is left as it is."""
    layers = adapted(policy).values()
    for layer in layers:
        layer.on = False
    try:
        yield policy
    finally:
        for layer in layers:
            layer.on = True


def merged(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole weights with adapter → without: W + (α / r) B A, under the names of an ordinary checkpoint."""
    plain = {name: tensor for name, tensor in weights.items() if not name.endswith((".lora_A", ".lora_B"))}
    for name, layer in adapted(model).items():
        update = layer.scale * (weights[f"{name}.lora_B"] @ weights[f"{name}.lora_A"])
        plain[f"{name}.weight"] = plain[f"{name}.weight"] + update
    return plain


def export_adapter(policy: Policy, weights: dict[str, Tensor], targets: str, source: str, place: Path) -> None:
    """Write the adapter of whole `weights` for PEFT: `PeftModel.from_pretrained(model of source, place)`."""
    layers = adapted(policy.model)
    layer = next(iter(layers.values()))
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": source, "inference_mode": True,
        "r": len(layer.lora_A), "lora_alpha": layer.scale * len(layer.lora_A), "lora_dropout": layer.dropout,
        "bias": "none",
        # a pattern and not a list, which PEFT would look for in the vision encoder too
        "target_modules": re.escape(policy.backbone.LANGUAGE_MODEL) + rf"\..*\.({'|'.join(target_names(targets))})",
    }
    tensors = {f"base_model.model.{name}.{part}.weight": weights[f"{name}.{part}"].contiguous()
               for name in layers for part in ("lora_A", "lora_B")}
    new = place.with_name(place.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    (new / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, new / "adapter_model.safetensors", metadata={"format": "pt"})
    replace_folder(new, place)
