"""A device that is not the CPU, emulated on a CPU: what a GPU will meet, without one.

Its tensors hold a CPU tensor (`raw`) and run every operation on it, and
  an operation whose tensors lie on two devices raises, as on a GPU (numbers of no dimension may come from the CPU);
  every operation that would start a kernel counts as a launch (views do not; rms_norm and SDPA are one each);
  every reading by the host (.item, .tolist, nonzero, a copy to the CPU) counts.
`is_cuda` is True, so that branches for a GPU run; the device's type is its own, "emulated", so that what needs the real
thing asks for the type.

    @apart                              # a process of its own; skipped, with the reason, where torch lacks the hook
    def test_claim():
        with emulated() as device:
            policy = move(tiny_policy(), device)
            with counted() as count: ...
            count.launches, count.reads
"""

import functools
import importlib
import json
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import library
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

NAME = "emulated"
COUNT = SimpleNamespace(on=True, launches=0, reads=0, names=[], read_at=[])
aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.nonzero, aten.equal, aten.masked_select, aten._unique2, aten.bincount}
NOT_LAUNCHED = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.detach,
                aten._unsafe_view, aten.resize_, aten.set_, aten.lift_fresh, aten._reshape_alias, aten.is_same_size}
INDEXED = {aten.index, aten.index_put, aten.index_put_}
_library = None


class Emulated(torch.Tensor):
    is_cuda = True

    @staticmethod
    def __new__(cls, raw: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
            device=torch.device(NAME, 0), requires_grad=raw.requires_grad)
        made.raw = raw
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self):
        return f"Emulated({self.raw!r})"

    @classmethod
    def __torch_dispatch__(cls, operation, types, arguments=(), keywords=None):
        keywords = dict(keywords or {})
        flat, _ = tree_flatten((arguments, keywords))
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        strangers = [x for x in tensors if not isinstance(x, Emulated) and x.dim()]
        packet = operation.overloadpacket
        if packet in INDEXED and not [x for x in strangers if x.dtype.is_floating_point]:
            strangers = []  # a GPU, too, takes indices of the host
        if strangers and packet is not aten.copy_:
            reason = f"{operation}: tensors on two devices, {NAME} and {strangers[0].device}"
            if torch._C._current_graph_task_id() != -1:
                print(reason, file=sys.stderr, flush=True)  # raised within a backward it ends the process unsaid
            raise RuntimeError(reason)
        to_host = packet is aten._to_copy and keywords.get("device", torch.device(NAME)).type != NAME
        if strangers:  # copy_: from the host, or a reading by it
            to_host = isinstance(arguments[1], Emulated)
        note(operation, packet, tensors, to_host)
        by_raw = {id(x.raw): x for x in tensors if isinstance(x, Emulated)}
        if "device" in keywords:
            keywords["device"] = torch.device("cpu")
        unwrap = lambda x: x.raw if isinstance(x, Emulated) else x
        out = operation(*tree_map(unwrap, arguments), **tree_map(unwrap, keywords))
        if to_host:
            return out
        wrap = lambda x: by_raw[id(x)] if id(x) in by_raw else Emulated(x) if isinstance(x, torch.Tensor) else x
        return tree_map(wrap, out)


def note(operation, packet, tensors, to_host: bool) -> None:
    if not COUNT.on:
        return
    by_mask = packet in INDEXED and any(x.dtype == torch.bool for x in tensors[1:])
    if to_host or by_mask or packet in READS or (packet is aten.repeat_interleave and len(tensors) == 1):
        COUNT.reads += 1
        COUNT.read_at.append(str(packet))
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in operation._schema.returns)
    if not views and packet not in NOT_LAUNCHED and packet is not aten._local_scalar_dense:
        COUNT.launches += 1
        COUNT.names.append(str(packet).removeprefix("aten."))


@contextmanager
def uncounted():
    before, COUNT.on = COUNT.on, False
    try:
        yield
    finally:
        COUNT.on = before


def one_launch(name: str) -> None:
    if COUNT.on:
        COUNT.launches += 1
        COUNT.names.append(name)


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """By its definition."""
    assert not enable_gqa and not dropout_p, "a GPU's kernels that take a mask know no grouped heads"
    scores = query @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        scores = scores.masked_fill(future, float("-inf"))
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1) @ value


def rms_norm(x, normalized_shape, weight=None, eps=None):
    high = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    high = high * torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + (eps or torch.finfo(high.dtype).eps))
    return (high if weight is None else high * weight).to(x.dtype)


WHOLE = {F.scaled_dot_product_attention: attention, F.rms_norm: rms_norm, torch.rms_norm: rms_norm}


def is_ours(device) -> bool:
    return device is not None and torch.device(device).type == NAME


class Mode(TorchFunctionMode):
    """Factories and `.to` on the device; what counts as one launch."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = dict(keywords or {})
        ours = any(isinstance(x, Emulated) for x in arguments)
        if ours and function in WHOLE:
            one_launch(function.__name__)
            with uncounted():
                return WHOLE[function](*arguments, **keywords)
        if function is torch.Tensor.tolist and ours:
            return arguments[0].to("cpu").tolist()
        if function in (torch.Tensor.to, torch.Tensor.cpu):
            return self.moved(function, arguments, keywords)
        if function is torch.Tensor.is_cuda.__get__ and ours:
            return True
        if is_ours(keywords.get("device")) and not ours:
            keywords["device"] = "cpu"
            made = Emulated(function(*arguments, **keywords).detach())
            if function not in (torch.empty, torch.Tensor.new_empty):
                one_launch(getattr(function, "__name__", str(function)))
            return made.requires_grad_(keywords.get("requires_grad", False))
        return function(*arguments, **keywords)

    def moved(self, function, arguments, keywords):
        tensor, *rest = arguments
        if function is torch.Tensor.cpu:
            rest = ["cpu"]
        other = rest[0] if rest else keywords.get("device", keywords.get("other"))
        device = other.device if isinstance(other, torch.Tensor) else other
        if device is None or isinstance(device, torch.dtype) or is_ours(device) == isinstance(tensor, Emulated):
            return torch.Tensor.to(tensor, *rest, **keywords)
        dtype = other.dtype if isinstance(other, torch.Tensor) else next(
            (x for x in [*rest, *keywords.values()] if isinstance(x, torch.dtype)), tensor.dtype)
        needs_gradient = tensor.requires_grad and torch.is_grad_enabled() and not tensor.is_leaf
        assert not needs_gradient, "no gradient between devices"
        if isinstance(tensor, Emulated):
            note(aten._to_copy.default, aten._to_copy, [tensor], True)
            return tensor.raw.detach().to(dtype, copy=True)
        one_launch("copy from the host")
        return Emulated(tensor.detach().to(dtype, copy=True)).requires_grad_(tensor.requires_grad and tensor.is_leaf)


def set_up() -> None:
    """Once a process, before its first backward."""
    global _library
    torch.utils.backend_registration._setup_privateuseone_for_python_backend(NAME)
    _library = library.Library("aten", "IMPL")
    cpu = lambda keywords: {**keywords, "device": torch.device("cpu")}
    _library.impl("empty.memory_format", lambda *a, **k: Emulated(aten.empty(*a, **cpu(k))), "PrivateUse1")
    _library.impl("empty_strided", lambda *a, **k: Emulated(aten.empty_strided(*a, **cpu(k))), "PrivateUse1")
    _library.impl("_copy_from", copy_from, "PrivateUse1")


def copy_from(source, target, non_blocking=False):
    """Between host and device, asked for inside torch, as where an element is set to a Python number."""
    note(aten._copy_from.default, aten._copy_from, [source, target], not isinstance(target, Emulated))
    source, to = (x.raw if isinstance(x, Emulated) else x for x in (source, target))
    to.copy_(source)
    return target


@contextmanager
def emulated():
    with Mode(), torch.autograd.set_multithreading_enabled(False):  # a backward in another thread would not know Mode
        yield torch.device(NAME, 0)


@contextmanager
def counted():
    """What is launched and read inside."""
    COUNT.launches = COUNT.reads = 0
    COUNT.names, COUNT.read_at = [], []
    now = SimpleNamespace()
    yield now
    now.launches, now.reads, now.names, now.read_at = COUNT.launches, COUNT.reads, COUNT.names, COUNT.read_at


def move(module: torch.nn.Module, device) -> torch.nn.Module:
    """A module's parameters and buffers on the device; shared ones stay shared."""
    moved = {}

    def on_device(tensor):
        if id(tensor) not in moved:
            new = tensor.to(device)
            a_parameter = isinstance(tensor, torch.nn.Parameter)
            moved[id(tensor)] = torch.nn.Parameter(new, tensor.requires_grad) if a_parameter else new
        return moved[id(tensor)]

    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = on_device(tensor)
        for name, value in vars(part).items():  # constants that are no buffers
            if type(value) is torch.Tensor:
                setattr(part, name, value.to(device))
    return module


def apart(test):
    """Run a test function in a process of its own: a device is set up once and for good, and threads wait for it."""

    @functools.wraps(test)
    def run(**arguments):
        from programs import TESTS, begin, end

        if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
            pytest.skip(f"torch {torch.__version__} lacks _setup_privateuseone_for_python_backend")
        status, text = end(begin(TESTS / "emulated.py", test.__module__, test.__name__, json.dumps(arguments)))
        assert status == 0, text

    return run


if __name__ == "__main__":
    import emulated as here  # not __main__: tests import it by its name

    here.set_up()
    torch.manual_seed(0)
    function = getattr(importlib.import_module(sys.argv[1]), sys.argv[2])
    function.__wrapped__(**json.loads(sys.argv[3]))
