"""Attention of a whole pack in two calls: on a GPU, in bfloat16, flash attention takes ragged rows and grouped heads.

    1. every prompt and every completion causally on itself
    2. all completions of a group on their prompt

Each call gives an output and its log-sum-exp over the keys that it saw; joined by these they are one softmax over all
keys. The backward calls each part's own with the joined output and log-sum-exp, as ring attention does
(arXiv 2310.01889): exp(score − lse) is then a share of the whole softmax. One call for each completion, as elsewhere
(attention.py), would be thousands a pass. The vision encoder's attention, within images and windows, is one call."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from transformers import AttentionInterface


def in_two_calls(query: Tensor) -> bool:
    """Whether torch has the kernels for these queries (…, d)."""
    return (query.device.type == "cuda" and query.dtype == torch.bfloat16 and query.shape[-1] in range(8, 257, 8)
            and torch.cuda.get_device_capability(query.device) >= (8, 0))


@dataclass
class Ends:
    """Segments end to end: (n + 1,) offsets, and the longest of them."""

    offsets: Tensor
    longest: int


def flash(query: Tensor, key: Tensor, value: Tensor, queries: Ends, keys: Ends, causal: bool,
        scaling: float) -> tuple[Tensor, Tensor]:
    """(T, H, d), keys and values (S, H_kv, d) → (T, H, d) and log-sum-exp (H, T)."""
    return torch.ops.aten._flash_attention_forward(query, key, value, queries.offsets, keys.offsets, queries.longest,
        keys.longest, 0.0, causal, False, scale=scaling)[:2]


def flash_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, queries: Ends,
        keys: Ends, causal: bool, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values."""
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device), query.new_empty(0)
    return torch.ops.aten._flash_attention_backward(grad, query, key, value, out, lse, queries.offsets, keys.offsets,
        queries.longest, keys.longest, 0.0, causal, *no_dropout, scale=scaling)


@dataclass
class Cuts:
    """What belongs to what in a pass; the same in every layer.

    own      every segment
    places   (T_c,) of the completions' tokens among all
    behind   the completions' tokens of each group, `prompts` the keys of its prompt; of groups that have any"""

    own: Ends
    places: Tensor | None = None
    behind: Ends | None = None
    prompts: Ends | None = None
    causal: bool = True  # within a segment

    @staticmethod
    def of(sizes: list[int], segments: list[tuple[int, list[int]]], prompts: list[int], device: torch.device) -> "Cuts":
        """Sizes of all segments; of each group those of its prompt in the row and of its completions; its prompt's."""
        ends = lambda some: Ends(torch.tensor([0, *accumulate(some)], dtype=torch.int32, device=device), max(some))
        stops = accumulate(own + sum(lengths) for own, lengths in segments)
        groups = [(range(stop - sum(lengths), stop), prompt)
                  for stop, (_, lengths), prompt in zip(stops, segments, prompts) if sum(lengths)]
        cuts = [ends(some) for some in zip(*((len(places), prompt) for places, prompt in groups))]
        places = torch.tensor([place for places, _ in groups for place in places], dtype=torch.long, device=device)
        return Cuts(ends([size for size in sizes if size]), places, *(cuts or (None, None)))


class Joined(torch.autograd.Function):
    """Queries, keys and values (T, heads, d) of all segments, and keys and values (S, H_kv, d) of the prompts that
    completions are behind, if there are any → (T, H, d)."""

    @staticmethod
    def forward(ctx, cuts: Cuts, scaling: float, query, key, value, *prompt) -> Tensor:
        out, lse = flash(query, key, value, cuts.own, cuts.own, cuts.causal, scaling)
        if prompt:
            at = cuts.places
            far, far_lse = flash(query[at], *prompt, cuts.behind, cuts.prompts, False, scaling)
            joined = torch.logaddexp(lse[:, at], far_lse)
            share = (far_lse - joined).exp().T[..., None]
            out[at] = out[at].to(share.dtype).lerp(far.to(share.dtype), share).to(out.dtype)
            lse[:, at] = joined
        ctx.save_for_backward(query, key, value, out, lse, *prompt)
        ctx.cuts, ctx.scaling = cuts, scaling
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        query, key, value, out, lse, *prompt = ctx.saved_tensors
        cuts, grad, far = ctx.cuts, grad.contiguous(), []
        grads = flash_backward(grad, query, key, value, out, lse, cuts.own, cuts.own, cuts.causal, ctx.scaling)
        if prompt:
            at = cuts.places
            far_query, *far = flash_backward(
                grad[at], query[at], *prompt, out[at], lse[:, at], cuts.behind, cuts.prompts, False, ctx.scaling)
            grads[0].index_add_(0, at, far_query)
        return None, None, *grads, *far


def vision_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling: float,
        cu_seq_lens_q: Tensor, max_length_q, **_) -> tuple[Tensor, None]:
    """(1, H, T, d) → (1, T, H, d): each image or window on itself. Transformers hands the segments' ends to an
    attention with "flash" in its name, and goes through them one by one for any other."""
    cuts = Cuts(Ends(cu_seq_lens_q.int(), int(max_length_q)), causal=False)
    return Joined.apply(cuts, scaling, *(x[0].transpose(0, 1) for x in (query, key, value)))[None], None


AttentionInterface.register("flash_segments", vision_attention)


def choose_vision_attention(encoder) -> None:
    """One call a layer where torch has the kernel, else transformers' own way."""
    config, weight = encoder.config, encoder.patch_embed.proj.weight
    query = weight.new_empty(0, config.hidden_size // config.num_heads)
    config._attn_implementation = "flash_segments" if in_two_calls(query) else "sdpa"
