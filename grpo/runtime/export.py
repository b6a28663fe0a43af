"""Weights out: the source checkpoint with the numbers that have trained in their places.

Names, files, index, config.json and what the encoder reads are the source's own; what is frozen is copied from its
files. Rank 0 writes, and holds the tensors of one file at a time, in host memory."""

import math
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from grpo.engine.files import TRAINING
from grpo.engine.lora import PEFT, LoraLinear, adapted, adapter_tensors
from grpo.engine.policy import Policy
from grpo.engine.sizes import target_names
from grpo.engine.weights import INDEX, SINGLE, Checkpoint, find, local
from grpo.group import within
from grpo.runtime.dist import rank
from grpo.runtime.files import sync, write_json
from grpo.runtime.folder import FolderWriter
from grpo.runtime.log import say

FILE_LIMIT = 5 * 10**9  # bytes
PIECE = 2**24  # numbers that are merged at once: five times as many are held beside what is written
TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # what can be cast: in a file's header → in torch
COPIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "chat_template.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "tokenizer.model")


def gathered(tensor: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
    """All of a tensor on rank 0, cast, on the CPU; None on the other ranks, which send their rows meanwhile."""
    sharded = isinstance(tensor, DTensor)
    holders = tensor.device_mesh.mesh.reshape(-1, tensor.device_mesh.shape[-1])[0].tolist() if sharded else [0]
    mine = local(tensor.detach()).to("cpu", dtype).contiguous() if rank() in holders else None
    if rank():
        if mine is not None and len(mine):
            dist.send(mine.view(torch.uint8), 0)
        return None
    whole = torch.empty(tensor.shape, dtype=dtype)
    for holder, rows in zip(holders, whole.split(-(-len(whole) // len(holders)))):  # as rows_of counts them
        if holder:
            dist.recv(rows.view(torch.uint8), holder)
        else:
            rows.copy_(mine)
    return whole


class Content:
    """What is written in the source's tensors' places, of which type, in which files. Names are the source's."""

    def __init__(self, policy: Policy, source: str, dtype: str):
        self.source = Checkpoint(source).fit(policy.model)
        self.parameters = dict(policy.model.named_parameters(remove_duplicate=False))
        self.layers = {f"{name}.weight": layer for name, layer in adapted(policy.model).items()}
        self.own_name = {name: own for own, name in self.source.names.items()}
        # rounding W + ΔW would lose most of a small ΔW
        wanted = dtype if dtype != "auto" else "float32" if self.layers else ""
        found = {name: TYPES.get(lazy.get_dtype()) for name, lazy in self.source.slices.items()}
        self.types = {name: kind and getattr(torch, wanted or kind) for name, kind in found.items()}  # None: as it is
        self.retyped = wanted if set(found.values()) - {wanted, None} else ""
        self.files = {path.name: list(names) for path, names in self.source.files.items()}
        size = lambda name: math.prod(self.source.slices[name].get_shape()) * (self.types[name] or torch.int64).itemsize
        if max(sum(map(size, names)) for names in self.files.values()) > FILE_LIMIT:
            parts = within(FILE_LIMIT, list(found), size)
            self.files = {f"model-{i:05}-of-{len(parts):05}.safetensors": names for i, names in enumerate(parts, 1)}
        self.bytes = self.moved = self.kept = 0  # of an adapter's update: entries, those that rounding leaves

    def write(self, file: Path, tensors: dict[str, torch.Tensor]) -> None:
        self.bytes += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, file, metadata={"format": "pt"})
        sync(file)

    def tensor(self, name: str) -> torch.Tensor | None:
        """What is written under this name, on rank 0; every rank must call it."""
        own, dtype, rows = self.own_name.get(name), self.types[name], self.source.slices[name]
        if own in self.layers:
            return self.merged(rows, self.layers[own], dtype)
        if own in self.parameters and self.parameters[own].requires_grad:
            return gathered(self.parameters[own], dtype)
        return rows[:].to(dtype) if rank() == 0 else None

    def merged(self, rows, layer: LoraLinear, dtype: torch.dtype) -> torch.Tensor | None:
        """W + (α / r) B A, W from the source's file."""
        a, b = gathered(layer.lora_A), gathered(layer.lora_B)
        if a is None:
            return None
        new, each = torch.empty(layer.weight.shape, dtype=dtype), max(1, PIECE // len(a[0]))
        for start in range(0, len(new), each):
            stop = min(start + each, len(new))
            base, update = rows[start:stop], layer.scale * (b[start:stop] @ a)
            new[start:stop] = base.float() + update
            self.moved += int(update.count_nonzero())
            self.kept += int((new[start:stop] != base.to(dtype)).sum())
        return new

    def write_rest(self, folder: Path) -> None:
        """The index, config.json and what the encoder reads, byte for byte where the types are the source's."""
        own_files = [path.name for path in self.source.files] == list(self.files) and not self.retyped
        for name in (*COPIED, INDEX) if own_files else COPIED:
            if path := find(self.source.model, name):
                shutil.copyfile(path, folder / name)
        if self.retyped:  # else stock transformers would round the weights to the source's type again
            path = folder / "config.json"
            text = re.sub(r'("(?:torch_)?dtype": *)"\w+"', rf'\1"{self.retyped}"', path.read_text(encoding="utf-8"))
            path.write_text(text, encoding="utf-8")
        if list(self.files) != [SINGLE] and not (folder / INDEX).exists():
            places = {name: file for file, names in self.files.items() for name in names}
            write_json(folder / INDEX, {"metadata": {"total_size": self.bytes}, "weight_map": places})


def export(policy: Policy, source: str, place: Path, dtype: str = "auto", training: dict = {}) -> None:
    """The policy, a merged adapter with it, as a checkpoint at `place`, and `training`, what the next stage is to know.

    dtype: "auto" is the source's own, tensor by tensor, and float32 for a merged adapter.
    Every rank must call it. OSError where it cannot be written; what was at `place` before then still is."""
    content = Content(policy, source, dtype)
    writer = FolderWriter(place, "the weights", "what was there before still is")
    for file, names in content.files.items():
        tensors = {name: content.tensor(name) for name in names}
        writer.do(lambda: content.write(writer.new / file, tensors))
        tensors.clear()  # before those of the next file come
    writer.do(lambda: content.write_rest(writer.new))
    writer.do(lambda: write_json(writer.new / TRAINING, training))
    writer.end()
    if content.moved and dtype in ("bfloat16", "float16"):
        say(f"{place}: of the adapter's update {content.kept / content.moved:.1%} of the entries survive the rounding "
            f"to {dtype}; {place.with_name('adapter')} holds all of it")


def export_adapter(policy: Policy, targets: str, training: dict, place: Path) -> None:
    """As `export`, the adapter alone, for PEFT; training["model"] is the model that it belongs to."""
    layer = next(iter(adapted(policy.model).values()))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": training["model"],
        "inference_mode": True, "bias": "none", "r": len(layer.lora_A), "lora_alpha": layer.scale * len(layer.lora_A),
        "lora_dropout": layer.dropout,
        # a pattern and not a list, which PEFT would look for in the vision encoder too
        "target_modules": re.escape(policy.backbone.LANGUAGE_MODEL) + rf"\..*\.({'|'.join(target_names(targets))})"}
    tensors = {f"{PEFT}{name}.weight": gathered(tensor) for name, tensor in adapter_tensors(policy.model).items()}
    writer = FolderWriter(place, "the adapter", "what was there before still is")
    writer.do(lambda: write_json(writer.new / "adapter_config.json", config))
    writer.do(lambda: write_json(writer.new / TRAINING, training))
    writer.do(lambda: save_file(tensors, writer.new / "adapter_model.safetensors", metadata={"format": "pt"}))
    writer.end()
