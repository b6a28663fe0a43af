"""What attends to what: one prompt, G continuations, no mask over the whole, no padding of the tokens.

transformers lets a model's attention be a registered function and hands extra keyword arguments of the
forward down to it. Ours is called "layout": it passes queries, keys and values (rope already applied) to the
layout of the pass at hand, which is one of
    Packed   score and prefill: whole groups end to end in one row, (1, heads, T, head size)
    Decode   sample: one new token for every row, (B, heads, 1, head size)
Only the language model is switched to it; the vision encoder keeps its own attention.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface


def layout_attention(module, query, key, value, attention_mask, scaling, layout, **_):
    """The registered function: `layout.attend` with the index of the layer, whose cache it may keep."""
    return layout.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register("layout", layout_attention)


class Packed:
    """Groups end to end: [prompt, c₁ … c_G, prompt, c₁ …], prompts causal, each c_i behind its prompt and itself.

    segments: one (P, [C₁ … C_G]) per group. `prompt_cache`, if given, is a list that receives, layer by layer,
    the keys and values of every prompt: [(heads, P, head size), …] twice; that is what makes a pass a prefill.

    Attention form, chosen by measurement (benchmarks.attention_forms): one call for the prompt, then one lower-right
    causal call per continuation on [prompt, own] keys, P² + Σ C_i (P + C_i) scores. One call with a dense mask over the
    whole group computes (P + ΣC)² and takes several times as long; a batch of G rows padded to the longest is as fast
    where all are equally long and twice as slow where they are ragged. FlexAttention has no backward on a CPU.
    """

    def __init__(self, segments: list[tuple[int, list[int]]], prompt_cache: list | None = None):
        # a prompt and one continuation are one causal sequence
        self.segments = [(p + lengths[0], []) if len(lengths) == 1 else (p, lengths) for p, lengths in segments]
        self.prompt_cache = prompt_cache
        self._masks: dict[tuple, Tensor] = {}

    def _lower_right(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """(C, P + C): row j of a continuation sees the whole prompt and its own first j + 1 tokens; 0 there, −∞ elsewhere.

        Added and not bool: torch would make this of a bool mask in every layer, and keep each for the backward.
        """
        at = (rows, columns, like.dtype, like.device)
        if at not in self._masks:  # the same in every layer
            self._masks[at] = like.new_full((rows, columns), float("-inf")).triu_(columns - rows + 1)
        return self._masks[at]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(1, H, T, d), keys and values (1, H_kv, T, d) → (1, T, H, d)."""
        sizes = [size for prompt, continuations in self.segments for size in (prompt, *continuations)]
        # split, not slices: the gradient of a slice is a tensor of zeros as large as the whole, one for every slice
        queries, keys, values = (iter(x.split(sizes, dim=2)) for x in (query, key, value))
        outputs, cached = [], []
        for prompt_length, lengths in self.segments:
            prompt_key, prompt_value = next(keys), next(values)
            if self.prompt_cache is not None:
                cached.append((prompt_key[0], prompt_value[0]))
            outputs.append(attention(next(queries), prompt_key, prompt_value, scaling))
            for length in lengths:
                suffix_query, suffix_key, suffix_value = next(queries), next(keys), next(values)
                if length:
                    outputs.append(attention(
                        suffix_query, torch.cat([prompt_key, suffix_key], dim=2), torch.cat([prompt_value, suffix_value], dim=2),
                        scaling, self._lower_right(length, prompt_length + length, query)))
        if self.prompt_cache is not None:
            self.prompt_cache.append(cached)
        return torch.cat(outputs, dim=2).transpose(1, 2)


def attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """torch's own, causal or by `mask`; (1, H, T, d) with keys and values (1, H_kv, S, d) → (1, H, T, d)."""
    grouped = not query.is_cuda
    if query.is_cuda:  # there only the kernels that take no mask know grouped heads
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped)


@dataclass
class KeysValues:
    """One layer's cache while sampling, allocated once.

    prompt_key, prompt_value   (group slots, H_kv, P max, d): every prompt once, whatever G is
    suffix_key, suffix_value         (row slots, H_kv, C max, d): each row's continuation
    """

    prompt_key: Tensor
    prompt_value: Tensor
    suffix_key: Tensor
    suffix_value: Tensor


def as_bias(mask: Tensor) -> Tensor:
    """(n, k) bool → (n, 1, 1, k) float32: 0 where True, −∞ elsewhere."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf"))[:, None, None]


class Decode:
    """One token for each of B live rows: attention to the shared prompt, attention to the row's own keys.

    The G rows of a group are G more queries on the *same* prompt keys, so the prompt is read once a step for
    all of them. The two parts are joined by their masses, so that nothing as wide as a prompt is ever regrouped.

    caches          KeysValues of every layer; live rows are its first B row slots, live groups its first group slots
    prompt_lengths  tokens of each live group's prompt (prompts of unequal length share one product)
    suffix_lengths     tokens of each row that are already cached: where this step's token goes
    group_of_row    group slot of each row
    """

    def __init__(self, caches: list[KeysValues], prompt_lengths: list[int], suffix_lengths: list[int], group_of_row: list[int]):
        device, longest = caches[0].prompt_key.device, caches[0].prompt_key.shape[2]
        self.caches, self.groups = caches, len(prompt_lengths)
        self.prompt_bias = as_bias(torch.arange(longest) < torch.tensor(prompt_lengths)[:, None]).to(device)
        # Rows by group, (groups, R) with R the most rows of one group; spare places repeat row 0.
        members = [[row for row, group in enumerate(group_of_row) if group == g] for g in range(self.groups)]
        most = max(map(len, members))
        self.row_at = torch.tensor([rows + [0] * (most - len(rows)) for rows in members], device=device)
        self.group_of_row = torch.tensor(group_of_row, device=device)
        self.place_of_row = torch.tensor([members[g].index(row) for row, g in enumerate(group_of_row)], device=device)
        self.every_row = torch.arange(len(group_of_row), device=device)
        self.suffix_length = torch.tensor(suffix_lengths, device=device)
        self.width = max(suffix_lengths) + 1  # kept beside the tensor: asking the device would wait for it
        self.update_suffix_bias()

    def advance(self) -> None:
        """Every row has got one more token."""
        self.suffix_length = self.suffix_length + 1
        self.width += 1
        self.update_suffix_bias()

    def update_suffix_bias(self) -> None:
        """This step's own token is seen, what a slot held before is not."""
        steps = torch.arange(self.width, device=self.suffix_length.device)
        self.suffix_bias = as_bias(steps <= self.suffix_length[:, None])

    def _by_group(self, rows: Tensor) -> Tensor:
        """(B, H_kv, r, n) → (groups, H_kv, R·r, n): r query heads share a key head."""
        return rows[self.row_at].transpose(1, 2).flatten(2, 3)

    def _by_row(self, grouped: Tensor, heads_per_key: int) -> Tensor:
        """The way back: (groups, H_kv, R·r, n) → (B, H_kv, r, n)."""
        return grouped.unflatten(2, (-1, heads_per_key)).transpose(1, 2)[self.group_of_row, self.place_of_row]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(B, H, 1, d), keys and values (B, H_kv, 1, d) → (B, 1, H, d)."""
        cache, rows, groups = self.caches[layer], len(query), self.groups
        cache.suffix_key[self.every_row, :, self.suffix_length] = key[:, :, 0]
        cache.suffix_value[self.every_row, :, self.suffix_length] = value[:, :, 0]

        heads_per_key = query.shape[1] // key.shape[1]
        q = (query[:, :, 0] * scaling).unflatten(1, (-1, heads_per_key))  # (B, H_kv, r, d)
        prompt = partial_attention(self._by_group(q), cache.prompt_key[:groups], cache.prompt_value[:groups], self.prompt_bias)
        own = partial_attention(q, cache.suffix_key[:rows, :, : self.width], cache.suffix_value[:rows, :, : self.width], self.suffix_bias)
        (prompt_sum, prompt_mass, prompt_top), (suffix_sum, suffix_mass, suffix_top) = (
            self._by_row(prompt, heads_per_key).split([q.shape[-1], 1, 1], -1), own.split([q.shape[-1], 1, 1], -1))
        top = torch.maximum(prompt_top, suffix_top)
        prompt_share, suffix_share = (prompt_top - top).exp(), (suffix_top - top).exp()
        output = (prompt_sum * prompt_share + suffix_sum * suffix_share) / (prompt_mass * prompt_share + suffix_mass * suffix_share)
        return output.to(value.dtype).flatten(1, 2)[:, None]


def partial_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Attention to a part of the keys, in float32, ready to be joined with another part.

    (…, q, d), (…, k, d), (…, k, d), bias (…, 1, k) of 0 and −∞ → (…, q, d + 2): Σ exp(score − top) · value,
    Σ exp(score − top), top.
    """
    scores = (query @ key.transpose(-1, -2)).float().add_(bias)
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    return torch.cat([(weights.to(value.dtype) @ value).float(), weights.sum(-1, keepdim=True), top], dim=-1)
