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

    Attention form, by counting and not yet by measuring: one call for the prompt, then one lower-right causal call
    per continuation on [prompt, own] keys, P² + Σ C_i (P + C_i) scores. One call with a dense mask over the whole
    group would compute (P + ΣC)²: 3.6 times as many at P = 200, G = 8, C = 100.
    """

    def __init__(self, segments: list[tuple[int, list[int]]], prompt_cache: list | None = None):
        self.segments = segments
        self.prompt_cache = prompt_cache
        self._masks: dict[tuple[int, int, torch.device], Tensor] = {}

    def _lower_right(self, rows: int, columns: int, device) -> Tensor:
        """(C, P + C) bool: row j of a continuation sees the whole prompt and its own first j + 1 tokens."""
        at = (rows, columns, device)
        if at not in self._masks:  # the same in every layer
            self._masks[at] = torch.ones(rows, columns, dtype=torch.bool, device=device).tril(columns - rows)
        return self._masks[at]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(1, H, T, d), keys and values (1, H_kv, T, d) → (1, T, H, d)."""
        grouped_key, grouped_value = key, value
        if query.is_cuda:  # there only the kernels that take no mask know grouped heads
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        outputs, cached, start = [], [], 0
        for prompt_length, lengths in self.segments:
            if len(lengths) == 1:  # a prompt and one continuation are one causal sequence
                prompt_length, lengths = prompt_length + lengths[0], []
            prompt = slice(start, start + prompt_length)
            prompt_key, prompt_value = key[:, :, prompt], value[:, :, prompt]
            if self.prompt_cache is not None:
                cached.append((grouped_key[0, :, prompt], grouped_value[0, :, prompt]))
            outputs.append(F.scaled_dot_product_attention(
                query[:, :, prompt], prompt_key, prompt_value, is_causal=True, scale=scaling, enable_gqa=True))
            start += prompt_length
            for length in filter(None, lengths):
                own = slice(start, start + length)
                outputs.append(F.scaled_dot_product_attention(
                    query[:, :, own],
                    torch.cat([prompt_key, key[:, :, own]], dim=2),
                    torch.cat([prompt_value, value[:, :, own]], dim=2),
                    attn_mask=self._lower_right(length, prompt_length + length, query.device),
                    scale=scaling, enable_gqa=True))
                start += length
        if self.prompt_cache is not None:
            self.prompt_cache.append(cached)
        return torch.cat(outputs, dim=2).transpose(1, 2)


@dataclass
class KeysValues:
    """One layer's cache while sampling, allocated once.

    prompt_key, prompt_value   (group slots, H_kv, P max, d): every prompt once, whatever G is
    own_key, own_value         (row slots, H_kv, C max, d): each row's continuation
    """

    prompt_key: Tensor
    prompt_value: Tensor
    own_key: Tensor
    own_value: Tensor


class Decode:
    """One token for each of B live rows: a product with the shared prompt, a product with the row's own keys.

    The G rows of a group are G more queries on the *same* prompt keys, so the prompt is read once a step for
    all of them. Softmax runs over both parts together.

    caches        KeysValues of every layer; live rows are its first B row slots, live groups its first group slots
    prompt_mask   (groups, P max) bool: True on a prompt's tokens (prompts of unequal length share one product)
    own_length    (B,) tokens of each row that are already cached: where this step's token goes
    group_of_row  (B,) group slot of each row
    """

    def __init__(self, caches: list[KeysValues], prompt_mask: Tensor, own_length: Tensor, group_of_row: Tensor):
        self.caches, self.prompt_mask = caches, prompt_mask
        self.set_rows(own_length, group_of_row)

    def set_rows(self, own_length: Tensor, group_of_row: Tensor) -> None:
        """Arrange the rows by group, (groups, R) with R the most rows of one group; spare places repeat row 0."""
        self.own_length, self.group_of_row = own_length, group_of_row
        members = F.one_hot(group_of_row, len(self.prompt_mask)).cumsum(0)  # (B, groups)
        self.place_of_row = members.gather(1, group_of_row[:, None])[:, 0] - 1
        self.row_at = group_of_row.new_zeros(len(self.prompt_mask), int(members[-1].max()))
        self.row_at[group_of_row, self.place_of_row] = torch.arange(len(group_of_row), device=group_of_row.device)
        self.advance(0)

    def advance(self, tokens: int = 1) -> None:
        """Every row has got `tokens` more."""
        self.own_length = self.own_length + tokens
        self.width = int(self.own_length.max()) + 1
        steps = torch.arange(self.width, device=self.own_length.device)
        self.own_mask = steps <= self.own_length[:, None]  # this step's own token included

    def _by_group(self, rows: Tensor) -> Tensor:
        """(B, H_kv, r, n) → (groups, H_kv, R·r, n): r query heads share a key head."""
        return rows[self.row_at].transpose(1, 2).flatten(2, 3)

    def _by_row(self, grouped: Tensor, heads_per_key: int) -> Tensor:
        """The way back: (groups, H_kv, R·r, n) → (B, H_kv, r, n)."""
        return grouped.unflatten(2, (-1, heads_per_key)).transpose(1, 2)[self.group_of_row, self.place_of_row]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(B, H, 1, d), keys and values (B, H_kv, 1, d) → (B, 1, H, d)."""
        cache, rows, groups = self.caches[layer], len(query), len(self.prompt_mask)
        every = torch.arange(rows, device=query.device)
        cache.own_key[every, :, self.own_length] = key[:, :, 0]
        cache.own_value[every, :, self.own_length] = value[:, :, 0]

        heads_per_key = query.shape[1] // key.shape[1]
        q = (query[:, :, 0] * scaling).unflatten(1, (-1, heads_per_key))  # (B, H_kv, r, d)
        to_prompt = self._by_group(q) @ cache.prompt_key[:groups].transpose(2, 3)
        to_prompt = to_prompt.masked_fill(~self.prompt_mask[:, None, None], float("-inf"))
        to_own = q @ cache.own_key[:rows, :, : self.width].transpose(2, 3)
        to_own = to_own.masked_fill(~self.own_mask[:, None, None], float("-inf"))

        scores = torch.cat([self._by_row(to_prompt, heads_per_key), to_own], dim=-1)
        weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
        prompt_weights, own_weights = weights.split([to_prompt.shape[-1], self.width], dim=-1)
        from_prompt = self._by_group(prompt_weights) @ cache.prompt_value[:groups]
        output = self._by_row(from_prompt, heads_per_key) + own_weights @ cache.own_value[:rows, :, : self.width]
        return output.flatten(1, 2)[:, None]
