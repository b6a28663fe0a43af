"""Attention of a decode step: each row to its group's shared prompt and to its own suffix, merged by log-sum-exp."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class KeysValues:
    """One layer's cache while sampling, allocated once.

    prompt_key, prompt_value   (group slots, H_kv, P max, d): every prompt once, whatever G is
    suffix_key, suffix_value   (row slots, H_kv, C max, d): each row's continuation
    """

    prompt_key: Tensor
    prompt_value: Tensor
    suffix_key: Tensor
    suffix_value: Tensor


def as_bias(mask: Tensor) -> Tensor:
    """bool → float32: 0 where True, −∞ elsewhere."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf"))


class Grid:
    """N tokens, end to end, by owner: (n owners, t the most tokens of one). Spare places repeat token 0.

    owner  (N,) of each token; `step` is its place among its owner's tokens
    """

    def __init__(self, owner: Tensor, owners: int, heads: int, device: torch.device):
        order, counts = owner.argsort(stable=True), owner.bincount(minlength=owners)
        step = torch.empty_like(owner)
        step[order] = torch.arange(len(owner)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        token = owner.new_zeros(owners, int(counts.max())).index_put_((owner, step), torch.arange(len(owner)))
        self.plain = token.shape == (len(owner), 1) and torch.equal(owner, torch.arange(owners))
        self.owner, self.step, self.token = owner.to(device), step.to(device), token[:, None].to(device)
        self.heads = torch.arange(heads, device=device)[:, None]

    def spread(self, x: Tensor) -> Tensor:
        """(N, H_kv, r, d) → (n, H_kv, t, r, d)."""
        return x[:, :, None] if self.plain else x[self.token, self.heads]

    def collect(self, x: Tensor) -> Tensor:
        """The way back."""
        return x[:, :, 0] if self.plain else x[self.owner, :, self.step]


class Decode:
    """Some tokens, end to end, of each of B live rows: attention to the shared prompt, attention to the row's
    suffix keys.

    The G rows of a group are G more queries on the *same* prompt keys, so the prompt is read once a step for
    all of them. The two parts are merged by log-sum-exp, so that nothing as wide as a prompt is ever regrouped.

    caches          KeysValues of every layer; live rows are its first B row slots, live groups its first group slots
    prompt_lengths  tokens of each live group's prompt (prompts of unequal length share one product)
    group_of_row    group slot of each row
    first_position  rope position of each row's first token
    """

    def __init__(self, caches: list[KeysValues], prompt_lengths: list[int], group_of_row: list[int],
            first_position: list[int]):
        _, self.heads, longest, _ = caches[0].prompt_key.shape
        self.caches, self.device, self.counts = caches, caches[0].prompt_key.device, []
        seen = torch.arange(longest) < torch.tensor(prompt_lengths)[:, None]
        self.prompt_bias = as_bias(seen)[:, None, None, None].to(self.device)
        self.group_of_row, self.first_position = torch.tensor(group_of_row), torch.tensor(first_position)

    def place(self, cached: list[int], counts: list[int]) -> Tensor:
        """The tokens of the next step: `counts` of each row behind the `cached` ones. Returns (3, 1, N) rope
        positions."""
        if counts != self.counts:
            row = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
            self.by_row = Grid(row, len(counts), self.heads, self.device)
            self.by_group = Grid(self.group_of_row[row], len(self.prompt_bias), self.heads, self.device)
            self.counts, self.row = counts, row
            self.new = torch.arange(max(counts))
        start = torch.tensor(cached)
        step = start[:, None] + self.new
        at = step[self.row, self.by_row.step.cpu()]
        self.width = max(map(sum, zip(cached, counts)))
        # a row's earlier tokens are seen and the token itself, what a slot held before is not
        self.suffix_bias = as_bias(torch.arange(self.width) <= step[..., None])[:, None, :, None].to(self.device)
        self.at = at.to(self.device)
        return (self.first_position[self.row] + at).to(self.device).expand(3, 1, -1)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(1, H, N, d), keys and values (1, H_kv, N, d) → (1, N, H, d)."""
        cache, rows, groups = self.caches[layer], len(self.counts), len(self.prompt_bias)
        cache.suffix_key[self.by_row.owner, :, self.at] = key[0].transpose(0, 1)
        cache.suffix_value[self.by_row.owner, :, self.at] = value[0].transpose(0, 1)
        q = (query[0].transpose(0, 1) * scaling).unflatten(1, (self.heads, -1))  # (N, H_kv, r, d)
        prompt, prompt_lse = map(self.by_group.collect, partial_attention(
            self.by_group.spread(q), cache.prompt_key[:groups], cache.prompt_value[:groups], self.prompt_bias))
        suffix, suffix_lse = map(self.by_row.collect, partial_attention(
            self.by_row.spread(q), cache.suffix_key[:rows, :, : self.width], cache.suffix_value[:rows, :, : self.width],
            self.suffix_bias))
        merged = torch.lerp(suffix, prompt, torch.sigmoid(prompt_lse - suffix_lse))
        return merged.to(value.dtype).flatten(1, 2)[None]


def partial_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to a part of the keys, in float32: (n, H_kv, t, r, d), keys and values (n, H_kv, k, d), bias of 0
    and −∞ that broadcasts over (n, H_kv, t, r, k) → (n, H_kv, t, r, d) and log-sum-exps (n, H_kv, t, r, 1), by
    which it is merged with another part: out = lerp(a, b, sigmoid(lse_b − lse_a))."""
    t_r = query.shape[2:4]
    scores = (query.flatten(2, 3) @ key.transpose(-1, -2)).unflatten(2, t_r).float().add_(bias)
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    mass = weights.sum(-1, keepdim=True)
    out = (weights.to(value.dtype).flatten(2, 3) @ value).unflatten(2, t_r).float()
    return out.div_(mass), mass.log().add_(top)


def slots(prompts: int, group_size: int, rows: int) -> tuple[int, int]:
    """(groups, rows) that caches have room for. A group that has no live row while its others wait leaves a row free:
    never more groups than rows."""
    rows = min(rows, prompts * group_size)
    return min(rows, prompts), rows


def head_size(text) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def cache_bytes(text, prompts: list, group_size: int, rows: int, max_tokens: int, item: int) -> int:
    """What the caches of a rollout take, `item` bytes a number: prompts padded to the longest, rows to the limit."""
    groups, rows = slots(len(prompts), group_size, rows)
    tokens = groups * max(map(len, prompts), default=0) + rows * max_tokens
    return 2 * tokens * text.num_hidden_layers * text.num_key_value_heads * head_size(text) * item


def allocate(text, groups: int, longest: int, rows: int, max_tokens: int, like: Tensor) -> list[KeysValues]:
    """A layer's caches each, of the type and on the device of `like`."""
    # zeros, not empty: a weight of exactly 0 times uninitialised memory may still be NaN
    new = lambda slots, length: torch.zeros(slots, text.num_key_value_heads, length, head_size(text),
                                            dtype=like.dtype, device=like.device)
    return [KeysValues(new(groups, longest), new(groups, longest), new(rows, max_tokens), new(rows, max_tokens))
            for _ in range(text.num_hidden_layers)]
