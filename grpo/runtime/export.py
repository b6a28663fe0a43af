"""Weights out: the source checkpoint with the numbers that have trained in their places, written tensor by tensor.

Names, files, index, config.json and what the encoder reads are the source's own; what is frozen is copied from its
files. Rank 0 writes, and of what has trained it holds a piece of one rank's rows at a time. A folder is written beside
its place and renamed, so that one that is there is whole.
"""

import json
import math
import re
import shutil
import struct
from contextlib import suppress
from pathlib import Path
from typing import Iterator

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from grpo.engine.files import TRAINING, replace_folder
from grpo.engine.lora import PEFT, LoraLinear, adapted
from grpo.engine.policy import Policy
from grpo.engine.sizes import target_names
from grpo.engine.weights import INDEX, SINGLE, Checkpoint, find, local
from grpo.group import within
from grpo.runtime.dist import broadcast_from_rank_0, rank
from grpo.runtime.files import sync, write_json
from grpo.runtime.log import say

FILE_LIMIT = 5 * 10**9  # bytes
PIECE = 2**24  # numbers that are on their way at once; a merge holds five times as many
TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # of --export_dtype
COPIED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "chat_template.json",
    "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json", "tokenizer.model")


class Writing:
    """A folder on rank 0, beside its place until it is whole. After a failure there is nothing left to do but to take
    what the other ranks send; all raise in the end, and what was at the place before still is."""

    def __init__(self, place: Path):
        self.place, self.new, self.fault, self.file = place, place.with_name(place.name + ".new"), "", None
        self.do(shutil.rmtree, self.new, True)
        self.do(lambda: self.new.mkdir(parents=True))

    def do(self, action, *arguments) -> None:
        """On rank 0, unless something has failed."""
        if rank() == 0 and not self.fault:
            try:
                action(*arguments)
            except (OSError, SafetensorError) as error:
                self.fault = str(error) or type(error).__name__

    def open(self, name: str) -> None:
        self.file = open(self.new / name, "wb")

    def close(self) -> None:
        self.file.close()
        sync(Path(self.file.name))

    def end(self) -> None:
        self.do(replace_folder, self.new, self.place)
        if self.fault:
            with suppress(OSError):  # what is still buffered has no room either
                self.file and self.file.close()
            shutil.rmtree(self.new, ignore_errors=True)
        if fault := broadcast_from_rank_0(lambda: self.fault):
            raise OSError(f"{self.place}: the weights cannot be written ({fault}); what was there before still is")


# ── rows from whichever rank holds them ──────────────────────────────────────────────────────────────────────────


def pieces(tensor: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """On rank 0 the tensor's rows in order, cast, on the CPU, some at a time; the other ranks send theirs meanwhile."""
    sharded = isinstance(tensor, DTensor)
    holders = tensor.device_mesh.mesh.reshape(-1, tensor.device_mesh.shape[-1])[0].tolist() if sharded else [0]
    each = -(-len(tensor) // len(holders))  # rows, as rows_of counts them
    for index, holder in enumerate(holders):
        rows = max(0, min(each, len(tensor) - index * each))
        for start, stop in spans(rows, tensor.shape):
            if rank() == holder:
                piece = local(tensor.detach())[start:stop].to("cpu", dtype).contiguous()
            elif rank() == 0:
                piece = torch.empty(stop - start, *tensor.shape[1:], dtype=dtype)
            if rank() == 0 != holder:
                dist.recv(piece.view(torch.uint8), holder)
            elif rank() == holder != 0:
                dist.send(piece.view(torch.uint8), 0)
            if rank() == 0:
                yield piece


def spans(rows: int, shape) -> Iterator[tuple[int, int]]:
    """[start, stop) of as many rows at a time as PIECE allows."""
    step = max(1, PIECE // max(1, shape[1:].numel()))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def gathered(tensor: Tensor) -> Tensor:
    """All of a small tensor on rank 0; nothing elsewhere."""
    found = list(pieces(tensor, torch.float32))
    return torch.cat(found) if found else torch.empty(0)


# ── a checkpoint ─────────────────────────────────────────────────────────────────────────────────────────────────


class Content:
    """What is written in the source's tensors' places, of which type, in which files. Names are the source's."""

    def __init__(self, policy: Policy, source: str, dtype: str):
        self.source = Checkpoint(source).fit(policy.model)
        self.parameters = dict(policy.model.named_parameters(remove_duplicate=False))
        self.layers = {f"{name}.weight": layer for name, layer in adapted(policy.model).items()}
        self.own_name = {name: own for own, name in self.source.names.items()}
        found = {name: lazy.get_dtype() for name, lazy in self.source.slices.items()}
        wanted = CODES.get(dtype, "F32" if self.layers else "")  # rounding W + ΔW would lose most of a small ΔW
        self.types = {name: wanted if wanted and kind in TYPES else kind for name, kind in found.items()}
        self.retyped = {kind for name, kind in self.types.items() if kind != found[name]}
        self.bytes = {name: math.prod(lazy.get_shape()) * self.width(name) for name, lazy in self.source.slices.items()}
        self.files = {path.name: list(names) for path, names in self.source.files.items()}
        if max(sum(map(self.bytes.get, names)) for names in self.files.values()) > FILE_LIMIT:
            parts = within(FILE_LIMIT, list(self.bytes), self.bytes.get)
            self.files = {f"model-{i:05}-of-{len(parts):05}.safetensors": names for i, names in enumerate(parts, 1)}
        self.moved = self.kept = 0  # entries of an adapter's update, and those that differ from W's when rounded

    def width(self, name: str) -> int:
        kind = TYPES.get(self.types[name])
        return kind.itemsize if kind else self.source.slices[name][:1].element_size()

    def rows(self, name: str) -> Iterator[Tensor]:
        """On rank 0 the tensor's new rows, some at a time. Every rank must go through it."""
        own, lazy, dtype = self.own_name.get(name), self.source.slices[name], TYPES.get(self.types[name])
        parameter = self.parameters.get(own)
        if own in self.layers:
            yield from self.merged(lazy, self.layers[own], dtype)
        elif parameter is not None and parameter.requires_grad:
            yield from pieces(parameter, dtype)
        elif rank() == 0:
            shape = torch.Size(lazy.get_shape())
            yield from (lazy[start:stop].to(dtype) for start, stop in spans(shape[0], shape))

    def merged(self, lazy, layer: LoraLinear, dtype: torch.dtype) -> Iterator[Tensor]:
        """W + (α / r) B A, W from the source's file."""
        a, b = gathered(layer.lora_A), gathered(layer.lora_B)
        for start, stop in spans(len(b), layer.weight.shape):
            base, update = lazy[start:stop], layer.scale * (b[start:stop] @ a)
            new = (base.float() + update).to(dtype)
            self.moved += int(update.count_nonzero())
            self.kept += int((new != base.to(dtype)).sum())
            yield new

    def header(self, names: list[str]) -> bytes:
        """What a safetensors file begins with."""
        entries, at = {"__metadata__": {"format": "pt"}}, 0
        for name in names:
            end = at + self.bytes[name]
            entries[name] = {"dtype": self.types[name], "shape": self.source.slices[name].get_shape(),
                "data_offsets": [at, end]}
            at = end
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    def write_rest(self, folder: Path) -> None:
        """The index, config.json and what the encoder reads, byte for byte where the types are the source's."""
        for name in COPIED:
            if path := find(self.source.model, name):
                shutil.copyfile(path, folder / name)
        if self.retyped:  # else stock transformers would round the weights to the source's type again
            path, (kind,) = folder / "config.json", self.retyped
            said = next(name for name, code in CODES.items() if code == kind)
            path.write_text(re.sub(r'("(?:torch_)?dtype": *)"\w+"', rf'\1"{said}"', path.read_text(encoding="utf-8")),
                encoding="utf-8")
        own = [path.name for path in self.source.files] == list(self.files)
        if own and not self.retyped and (path := find(self.source.model, INDEX)):
            shutil.copyfile(path, folder / INDEX)
        elif list(self.files) != [SINGLE]:
            places = {name: file for file, names in self.files.items() for name in names}
            write_json(folder / INDEX, {"metadata": {"total_size": sum(self.bytes.values())}, "weight_map": places})


def export(policy: Policy, source: str, place: Path, dtype: str = "auto", training: dict = {}) -> None:
    """The policy, a merged adapter with it, as a checkpoint at `place`, and `training`, what the next stage is to know.
    Every rank must call it.

    dtype: "auto" is the source's own, tensor by tensor, and float32 for a merged adapter.
    OSError, on every rank, where it cannot be written; what was at `place` before then still is.
    """
    content, writing = Content(policy, source, dtype), Writing(place)
    for file, names in content.files.items():
        names.sort(key=content.width, reverse=True)  # what is narrower may end at an odd byte
        writing.do(writing.open, file)
        writing.do(lambda: writing.file.write(content.header(names)))
        for name in names:
            for rows in content.rows(name):
                writing.do(lambda: writing.file.write(rows.contiguous().view(-1).view(torch.uint8).numpy()))
        writing.do(writing.close)
    writing.do(content.write_rest, writing.new)
    writing.do(write_json, writing.new / TRAINING, training)
    writing.end()
    if content.moved and dtype in ("bfloat16", "float16"):
        say(f"{place}: of the adapter's update {content.kept / content.moved:.1%} of the entries survive the rounding "
            "to "
            f"{dtype}; {place.with_name('adapter')} holds all of it")


def export_adapter(policy: Policy, targets: str, training: dict, place: Path) -> None:
    """The adapter alone, for PEFT, and `training`, what the next stage is to know, the model that it belongs to too.
    Every rank must call it."""
    layers = adapted(policy.model)
    layer = next(iter(layers.values()))
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": training["model"],
        "inference_mode": True,
        "r": len(layer.lora_A), "lora_alpha": layer.scale * len(layer.lora_A), "lora_dropout": layer.dropout,
        "bias": "none",
        # a pattern and not a list, which PEFT would look for in the vision encoder too
        "target_modules": re.escape(policy.backbone.LANGUAGE_MODEL) + rf"\..*\.({'|'.join(target_names(targets))})"}
    tensors = {f"{PEFT}{name}.{part}.weight": gathered(getattr(layer, part)) for name, layer in layers.items()
               for part in ("lora_A", "lora_B")}
    writing = Writing(place)
    writing.do(write_json, writing.new / "adapter_config.json", config)
    writing.do(write_json, writing.new / TRAINING, training)
    writing.do(lambda: save_file(tensors, writing.new / "adapter_model.safetensors", metadata={"format": "pt"}))
    writing.end()
