"""Copies of weights in the order that a CPU multiplies fastest, for as long as a rollout lasts.

BLAS is slow where a large matrix meets a few rows, which is what every decode step is. oneDNN, which torch brings
along, is up to three times as fast, if the matrix lies in an order of its own."""

from contextlib import contextmanager

import torch
from torch import Tensor, nn

from grpo.engine.sizes import PACKED


def pack(weight: Tensor) -> Tensor:
    """(out, in) → a copy for `packed_linear`. The weight itself where it is not whole, not float32 or not on a CPU."""
    whole = type(weight) in (Tensor, nn.Parameter) and weight.device.type == "cpu" and weight.dtype == torch.float32
    packs = whole and torch.backends.mkldnn.is_available()
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None) if packs else weight


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class PackedLinear(nn.Linear):
    """In a linear layer's place. Inside `packed`, what needs no gradient is computed with `copy`."""

    copy: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        packs = self.copy is not None and not torch.is_grad_enabled()
        return packed_linear(x, self.copy, self.bias) if packs else super().forward(x)


@contextmanager
def packed(network: nn.Module, wanted: bool):
    """Inside, the network's linear layers have packed copies, if all together take no more than PACKED bytes."""
    layers = [module for module in network.modules() if isinstance(module, PackedLinear)]
    fits = 4 * sum(layer.weight.numel() for layer in layers) <= PACKED
    for layer in layers if wanted and fits else ():
        layer.copy = copy if (copy := pack(layer.weight)).is_mkldnn else None
    try:
        yield
    finally:
        for layer in layers:
            layer.copy = None
