"""What MLPs and norms keep for the backward pass: nothing that a pass over memory makes again.

As transformers writes them, a gated MLP keeps gate, silu(gate), up and their product, and an RMSNorm beside its input
what it made of it (in bf16 two float32 copies and one more): two fifths of what an update's packed pass keeps. Here an
MLP keeps gate and up, a norm its input. Values are the same to the bit (on a GPU, like gradients, to rounding)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from grpo.engine.head import wide
from grpo.engine.packed import PackedLinear


def inverse_length(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.to(wide(x)).pow(2).mean(-1, keepdim=True) + eps)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight · x / √(mean x² + ε), in float32 up to the weight."""
    if x.dtype == weight.dtype and (x.is_cuda or x.dtype == torch.float32):  # one call
        return F.rms_norm(x, weight.shape, weight, eps)
    return weight * (x.to(wide(x)) * inverse_length(x, eps)).to(x.dtype)


class Norm(torch.autograd.Function):
    """`norm`, which keeps its input alone."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.eps = eps
        ctx.save_for_backward(x, weight)
        return norm(x, weight, eps)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        scale = inverse_length(x, ctx.eps)
        normed = x.to(scale.dtype) * scale
        grad_weight = (grad * normed.to(x.dtype)).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        grad_normed = (grad * weight).to(scale.dtype)
        along = (grad_normed * normed).mean(-1, keepdim=True)  # the part of it that changes x's length alone
        return grad_normed.sub_(normed.mul_(along)).mul_(scale).to(x.dtype), grad_weight, None


class Gated(torch.autograd.Function):
    """silu(gate) · up."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


class GatedLinear(torch.autograd.Function):
    """(silu(gate) · up) Wᵀ + b; the linear layer's gradient, too, is the product made again."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return F.linear(F.silu(gate).mul_(up), weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        gate, up, weight = ctx.saved_tensors
        grad_product, act = grad @ weight, F.silu(gate)
        grad_up, rows = grad_product * act, grad.flatten(0, -2)
        grad_weight = rows.T @ act.mul_(up).flatten(0, -2) if ctx.needs_input_grad[2] else None
        grad_bias = rows.sum(0) if ctx.needs_input_grad[3] else None
        return torch.ops.aten.silu_backward(grad_product.mul_(up), gate), grad_up, grad_weight, grad_bias


class LeanNorm(nn.Module):
    """In a norm's place, with its weight."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.weight, self.eps = base.weight, base.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        keeps_little = x.is_cuda and x.dtype == self.weight.dtype  # torch's own, which is one kernel each way
        return (Norm.apply if torch.is_grad_enabled() and not keeps_little else norm)(x, self.weight, self.eps)


class LeanMLP(nn.Module):
    """In a gated MLP's place, with its three matrices, which keep their names."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = base.gate_proj, base.up_proj, base.down_proj

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj(x), self.up_proj(x), self.down_proj
        if not torch.is_grad_enabled():
            return down(F.silu(gate, inplace=True).mul_(up))
        if type(down) in (nn.Linear, PackedLinear):
            return GatedLinear.apply(gate, up, down.weight, down.bias)
        return down(Gated.apply(gate, up))  # an adapter beside it needs the product itself


class LeanAttention:
    """Before a language model's attention: in a decode step queries, keys and values are one tensor from here on."""

    def forward(self, hidden_states: Tensor, position_embeddings=None, layout=None, **more):
        if not hasattr(layout, "decode"):
            return super().forward(hidden_states, position_embeddings=position_embeddings, layout=layout, **more)
        query, key, value = (matrix(hidden_states)[0].unflatten(-1, (-1, self.head_dim))
                             for matrix in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        qkv = torch.cat([query, key, value], 1)  # (N, H + 2 H_kv, d)
        return self.o_proj(layout.decode(self.layer_idx, qkv, position_embeddings, self.scaling)[None]), None


def make_lean(network: nn.Module) -> None:
    """Put these in the places of the network's linear layers, norms and SwiGLUs (vision encoder too), and attention."""
    for parent in list(network.modules()):
        if type(parent) is nn.Linear:
            parent.__class__ = PackedLinear
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm") and hasattr(child, "variance_epsilon"):
                setattr(parent, name, LeanNorm(child))
            elif hasattr(child, "gate_proj") and isinstance(child.act_fn, type(ACT2FN["silu"])):
                setattr(parent, name, LeanMLP(child))
            elif hasattr(child, "o_proj") and not isinstance(child, LeanAttention):
                child.__class__ = type(type(child).__name__, (LeanAttention, type(child)), {})
