"""What attends to what: one prompt, G continuations, no mask over the whole, no padding of the tokens.

transformers lets a model's attention be a registered function and hands extra keyword arguments of the
forward down to it. Ours is called "layout": it passes queries, keys and values (rope already applied) to the
layout of the pass at hand, which is one of
    Packed   score and prefill: whole groups end to end in one row, (1, heads, T, head size)
    Decode   sample: some new tokens of every row, end to end; see decode.py and LeanAttention in lean.py
Only the language model is switched to it; the vision encoder keeps its own attention."""

from itertools import chain

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
    C_i) scores. Other forms were measured and are slower, or slower where ragged (benchmarks/RESULTS.md)."""

    def __init__(self, segments: list[tuple[int, list[int]]], prompt_cache: list | None = None):
        # a prompt and one continuation are one causal sequence
        self.segments = [(p + lengths[0], []) if len(lengths) == 1 else (p, lengths) for p, lengths in segments]
        self.prompt_cache = prompt_cache
        self._masks: dict[tuple, Tensor] = {}
        self.cuts: Cuts | None = None  # the same in every layer

    def _lower_right(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """(C, P + C): row j of a continuation sees the whole prompt and its own first j + 1 tokens; 0 there, −∞
        elsewhere.

        Added and not bool: torch would make this of a bool mask in every layer, and keep each for the backward."""
        at = (rows, columns, like.dtype, like.device)
        if at not in self._masks:  # the same in every layer
            self._masks[at] = like.new_full((rows, columns), float("-inf")).triu_(columns - rows + 1)
        return self._masks[at]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(1, H, T, d), keys and values (1, H_kv, T, d) → (1, T, H, d)."""
        sizes = [size for prompt, continuations in self.segments for size in (prompt, *continuations)]
        if in_two_calls(query):
            return self.joined(layer, sizes, query, key, value, scaling)
        # split, not slices: the gradient of a slice is a tensor of zeros as large as the whole, one for every slice
        queries, keys, values = (iter(x.split(sizes, dim=2)) for x in (query, key, value))
        outputs, cached = [], []
        for _, lengths in self.segments:
            prompt_key, prompt_value = next(keys), next(values)
            if self.prompt_cache is not None:
                cached.append((prompt_key[0], prompt_value[0]))
            outputs.append(attention(next(queries), prompt_key, prompt_value, scaling))
            outputs += [self.behind(prompt_key, prompt_value, next(queries), next(keys), next(values), scaling)
                        for _ in lengths]
        if self.prompt_cache is not None and layer == len(self.prompt_cache):  # a recomputation does not fill it again
            self.prompt_cache.append(cached)
        return torch.cat(outputs, dim=2).transpose(1, 2)

    def joined(self, layer: int, sizes: list[int], query: Tensor, key: Tensor, value: Tensor,
            scaling: float) -> Tensor:
        """As `attend`, in two calls."""
        if self.cuts is None:
            start, groups, prompts = 0, [], []
            for prompt, lengths in self.segments:
                prompts.append(range(start, start + prompt))
                groups.append((prompt, range(start + prompt, start := start + prompt + sum(lengths))))
            self.cuts = Cuts.of(sizes, groups, query.device)
            self.prompts = prompts
            behind = [prompt for prompt, (_, some) in zip(prompts, groups) if some]
            self.shared = torch.tensor(list(chain(*behind)), dtype=torch.long, device=query.device)
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        if self.prompt_cache is not None and layer == len(self.prompt_cache):
            self.prompt_cache.append([tuple(x[p.start : p.stop].transpose(0, 1) for x in (key, value))
                                      for p in self.prompts])
        return Joined.apply(query, key, value, key[self.shared], value[self.shared], self.cuts, scaling)[None]

    def behind(self, prompt_key: Tensor, prompt_value: Tensor, query: Tensor, key: Tensor, value: Tensor,
            scaling: float) -> Tensor:
        """One continuation's C queries on its prompt's and its own keys: (1, H, C, d)."""
        key, value = torch.cat([prompt_key, key], dim=2), torch.cat([prompt_value, value], dim=2)
        return attention(query, key, value, scaling,
            self._lower_right(query.shape[2], key.shape[2], query)) if query.shape[2] else query


def attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """torch's own, causal or by `mask`; (1, H, T, d) with keys and values (1, H_kv, S, d) → (1, H, T, d)."""
    grouped = not query.is_cuda
    if query.is_cuda:  # there only the kernels that take no mask know grouped heads
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=scaling,
        enable_gqa=grouped)
