"""LoRA (arXiv 2106.09685): frozen matrices W and a trained update of low rank, y = W x + (α / r) B A x.

After a run the adapter stands alone in <output>/adapter, in PEFT's file format, and merged in <output>/model, an
ordinary checkpoint. The next stage may begin with either. With --adapter it goes on with A and B themselves, and the
reference is the same network with A and B as they were. From the merged checkpoint it begins with a fresh adapter, and
the reference is the network with the adapter off. Neither costs a second copy of the weights.

The language model alone is adapted, never the vision encoder, whose MLP has matrices of the same names."""

import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo.engine.files import model_file, read_json
from grpo.engine.packed import PackedLinear
from grpo.engine.policy import Policy
from grpo.engine.sizes import target_names
from grpo.engine.weights import copy_rows, local, match, open_weights, rows_of

PEFT = "base_model.model."  # before every name in PEFT's files
# What PEFT can do besides: what it stands at where it is not used.
UNUSED = {"bias": "none", "use_dora": False, "use_rslora": False, "fan_in_fan_out": False, "modules_to_save": None,
          "rank_pattern": {}, "alpha_pattern": {}}


class LoraLinear(PackedLinear):
    """A linear layer with its update beside it; `weight` and `bias` keep their names and are the base's own.

    lora_A (r, in) begins Kaiming-uniform as in PEFT, lora_B (out, r) zero: before training the layer is the base's,
    to the bit. Dropout falls on the update's input, and only where a gradient is recorded: in the update pass, not
    in sampling, reference or evaluation. (`training` cannot tell: gradient checkpointing wants it on throughout.)"""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, rank, device=base.weight.device))
        self.scale, self.dropout, self.on = alpha / rank, dropout, True

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if not self.on:
            return y
        x = F.dropout(x, self.dropout, training=torch.is_grad_enabled())
        return y + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def add_adapter(policy: Policy, rank: int, alpha: float, targets: str, dropout: float = 0.0, seed: int = 0) -> Policy:
    """Freeze everything and put an update beside each matrix whose name ends in one of `targets` (comma-separated).

    Before sharding. On the meta device `begin_adapter` or `AdapterFile.fill` gives it numbers once there is memory.
    ValueError names a target that is no linear layer of the language model."""
    policy.requires_grad_(False)
    layers = policy.language_model
    linear = {name: module for name, module in layers.named_modules() if isinstance(module, nn.Linear)}
    known, wanted = sorted({name.split(".")[-1] for name in linear}), target_names(targets)
    if unknown := [target for target in wanted or [targets] if target not in known]:
        raise ValueError(f"--lora_targets: no matrix {unknown[0]!r} in the language model; it has {', '.join(known)}")
    for name, module in linear.items():
        parent, _, end = name.rpartition(".")
        if end in wanted:
            setattr(layers.get_submodule(parent), end, LoraLinear(module, rank, alpha, dropout))
    if policy.device.type != "meta":
        begin_adapter(policy, seed)
    return policy


@torch.no_grad()
def begin_adapter(policy: Policy, seed: int) -> None:
    """A at random, B zero. A depends on `seed` alone: every rank draws all of it and keeps its rows."""
    random = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # of dropout: nothing else draws from torch's own generator
    for layer in adapted(policy).values():
        start, stop = rows_of(layer.lora_A)
        whole = nn.init.kaiming_uniform_(torch.empty(layer.lora_A.shape), a=math.sqrt(5), generator=random)
        local(layer.lora_A).copy_(whole[start:stop])
        local(layer.lora_B).zero_()


class AdapterFile:
    """A folder in PEFT's format: an adapter's rank, alpha, targets and rows. ValueError for more than linear layers."""

    def __init__(self, folder: str):
        config, self.folder = read_json(folder, "adapter_config.json"), folder
        for name, unused in UNUSED.items():
            if (found := config.get(name)) not in (unused, None):
                raise ValueError(f"{folder}: an adapter with {name} {found!r}; expected a plain one ({unused!r})")
        try:
            self.rank, self.alpha = int(config["r"]), float(config["lora_alpha"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{folder}: adapter_config.json: expected numbers r and lora_alpha") from None
        file = open_weights(model_file(folder, "adapter_model.safetensors"))
        self.slices = {name.removeprefix(PEFT).removesuffix(".weight"): file.get_slice(name) for name in file.keys()}
        self.targets = ",".join(sorted({name.rpartition(".")[0].rpartition(".")[2] for name in self.slices}))

    def fill(self, policy: Policy) -> None:
        """This rank's rows of A and B. ValueError names what does not fit the model."""
        tensors = adapter_tensors(policy.model)
        copy_rows(self.slices, match(self.slices, tensors, f"{self.folder}: an adapter of another model"), tensors)


def adapted(model: nn.Module) -> dict[str, LoraLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def adapter_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """A and B of every adapted layer by name."""
    return {f"{name}.{part}": getattr(layer, part) for name, layer in adapted(model).items()
            for part in ("lora_A", "lora_B")}


def keep_start(policy: Policy) -> None:
    """From here on `adapter_off` goes back to the adapter as it is now, not to the base."""
    tensors = adapter_tensors(policy.model).values()
    policy.adapter_start = {parameter: local(parameter).detach().clone() for parameter in tensors}


@contextmanager
def adapter_off(policy: Policy):
    """Inside, the policy is what the run began with; a policy without an adapter is left as it is."""
    start = policy.adapter_start
    now = {parameter: local(parameter).detach().clone() for parameter in start}

    def switch(values: dict[Tensor, Tensor], on: bool) -> None:
        for parameter, value in values.items():
            local(parameter).detach().copy_(value)
        for layer in adapted(policy).values():
            layer.on = on

    switch(start, bool(start))
    try:
        yield policy
    finally:
        switch(now, True)
