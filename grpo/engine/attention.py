"""What attends to what: one prompt, G continuations, no mask over the whole, no padding of the tokens.

transformers lets a model's attention be a registered function and hands extra keyword arguments of the
forward down to it. Ours is called "layout": it passes queries, keys and values (rope already applied) to the
layout of the pass at hand, which is one of
    Packed   score and prefill: whole groups end to end in one row, (1, heads, T, head size)
    Decode   sample: some new tokens of every row, end to end; see decode.py and LeanAttention in lean.py
Only the language model is switched to it; the vision encoder has its own, see joined.py."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from grpo.engine.joined import Cuts, Joined, in_two_calls


def layout_attention(module, query, key, value, attention_mask, scaling, layout, **_):
    """The registered function: `layout.attend` with the index of the layer, whose cache it may keep."""
    return layout.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register("layout", layout_attention)


class Packed:
    """Groups end to end: [prompt, c₁ … c_G, prompt, c₁ …], prompts causal, each c_i behind its prompt and itself.

    segments: one (P, [C₁ … C_G]) per group. `prompt_cache`, if given, is a list that receives, layer by layer,
    the keys and values of every prompt: [(heads, P, head size), …] twice; that is what makes a pass a prefill.

    One call for the prompt, then one lower-right causal call per continuation on [prompt, own] keys: P² + Σ C_i (P +
    C_i) scores. Other forms are slower, or slower where ragged (benchmarks/RESULTS.md). In two calls: joined.py."""

    def __init__(self, segments: list[tuple[int, list[int]]], prompt_cache: list | None = None):
        # a prompt and one continuation are one causal sequence
        self.segments = [(p + lengths[0], []) if len(lengths) == 1 else (p, lengths) for p, lengths in segments]
        self.prompt_cache = prompt_cache
        self._masks: dict[tuple, Tensor] = {}
        self.cuts: Cuts | None = None  # like the masks the same in every layer

    def _lower_right(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """(C, P + C): row j of a continuation sees the prompt and its own first j + 1 tokens; 0 there, −∞ elsewhere.

        Added and not bool: torch would make this of a bool mask in every layer, and keep each for the backward."""
        at = (rows, columns, like.dtype, like.device)
        if at not in self._masks:
            self._masks[at] = like.new_full((rows, columns), float("-inf")).triu_(columns - rows + 1)
        return self._masks[at]

    def prompts(self, layer: int, own: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (1, H_kv, P, d) of every group's prompt. own: those that stand in the row."""
        return own

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(1, H, T, d), keys and values (1, H_kv, T, d) → (1, T, H, d)."""
        sizes = [size for prompt, lengths in self.segments for size in (prompt, *lengths)]
        # split, not slices: the gradient of a slice is a tensor of zeros as large as the whole, one for every slice
        parts = iter(zip(*(x.split(sizes, dim=2) for x in (query, key, value))))
        groups = [(next(parts), [next(parts) for _ in lengths]) for _, lengths in self.segments]
        prompts = self.prompts(layer, [own[1:] for own, _ in groups])
        if self.prompt_cache is not None and layer == len(self.prompt_cache):  # a recomputation does not fill it again
            self.prompt_cache.append([(key[0], value[0]) for key, value in prompts])
        if in_two_calls(query):
            return self.joined(sizes, query, key, value, prompts, scaling)
        outputs = []
        for (own, continuations), prompt in zip(groups, prompts):
            outputs += [attention(*own, scaling)] if own[0].shape[2] else []
            outputs += [self.behind(prompt, *one, scaling) for one in continuations]
        return torch.cat(outputs, dim=2).transpose(1, 2)

    def joined(self, sizes: list, query: Tensor, key: Tensor, value: Tensor, prompts: list, scaling: float) -> Tensor:
        if self.cuts is None:
            self.cuts = Cuts.of(sizes, self.segments, [len(key[0, 0]) for key, _ in prompts], query.device)
        behind = [pair for pair, (_, lengths) in zip(prompts, self.segments) if sum(lengths)]
        given = [query, key, value, *(torch.cat(some, dim=2) for some in zip(*behind))]
        return Joined.apply(self.cuts, scaling, *(x[0].transpose(0, 1) for x in given))[None]

    def behind(self, prompt: tuple, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """One continuation's C queries on its prompt's and its own keys: (1, H, C, d)."""
        key, value = (torch.cat(pair, dim=2) for pair in zip(prompt, (key, value)))
        mask = self._lower_right(query.shape[2], key.shape[2], query)
        return attention(query, key, value, scaling, mask) if query.shape[2] else query


def attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """torch's own, causal or by `mask`; (1, H, T, d) with keys and values (1, H_kv, S, d) → (1, H, T, d)."""
    if query.is_cuda:  # there only the kernels that take no mask know grouped heads
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=scaling,
        enable_gqa=not query.is_cuda)
