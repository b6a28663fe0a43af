"""Attention of a decode step: each row to its group's shared prompt and to its own suffix, merged by log-sum-exp."""

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.engine.draw import Sampling
from grpo.engine.policy import Policy
from grpo.group import Prompt

ALIGNED = 8  # a row of scores in bfloat16 is then a multiple of 16 bytes: without that a GPU's products are slow


@dataclass
class KeysValues:
    """One layer's cache while sampling, allocated once.

    prompt   (2, group slots, H_kv, P max, d): keys and values of every prompt once, whatever G is
    suffix   (2, row slots, H_kv, C max, d): of each row's continuation; see static.py for another order"""

    prompt: Tensor
    suffix: Tensor


def move(caches: list[KeysValues], source: int, target: int, *kinds: str) -> None:
    """A slot's keys and values, of prompt or suffix, into another slot."""
    for tensor in (getattr(cache, kind) for cache in caches for kind in kinds if source != target):
        tensor[:, target] = tensor[:, source]


class Rope:
    """What every decode step begins with: rope, queries and keys at once, and the new keys and values."""

    def cache(self, layer: int, qkv: Tensor, angles: tuple[Tensor, Tensor], *slots) -> Tensor:
        """(N, H + 2 H_kv, d) before rope → (N, H, d) queries; keys and values are in these slots of the cache.

        Cosines and sines are (…, N, d): a completion's axes are all alike. The first layer prepares them for all."""
        half, heads = qkv.shape[-1] // 2, self.caches[layer].suffix.shape[2]
        if layer == 0:
            self.cos, sin = (part[(0,) * (part.dim() - 2)][:, None] for part in angles)
            self.sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
        turned = qkv[:, :-heads].roll(half, -1)
        qkv[:, :-heads].mul_(self.cos).addcmul_(turned, self.sin)
        self.caches[layer].suffix[(slice(None), *slots)] = qkv[:, -2 * heads :].unflatten(1, (2, -1))
        return qkv[:, : -2 * heads]


def as_bias(mask: Tensor) -> Tensor:
    """bool → float32: 0 where True, −∞ elsewhere."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf"))


class Grid:
    """N tokens, end to end, by owner: (n owners, t the most tokens of one). Spare places repeat token 0.

    owner  (N,) of each token; `step` is its place among its owner's tokens"""

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


class Decode(Rope):
    """Some tokens, end to end, of each of B live rows: attention to the shared prompt, and to the row's own suffix.

    The G rows of a group are G more queries on the *same* prompt keys, so the prompt is read once a step for
    all of them. The two parts are merged by log-sum-exp, so that nothing as wide as a prompt is ever regrouped.

    caches   KeysValues of every layer; live rows are its first B row slots, live groups its first group slots
    groups   the prompt of each live group (prompts of unequal length share one product), `rows` that of each row"""

    def __init__(self, caches: list[KeysValues], prompts: list[Prompt], groups: list[int], rows: list[int]):
        self.heads, longest = caches[0].prompt.shape[2:4]
        self.caches, self.device, self.counts = caches, caches[0].prompt.device, []
        seen = torch.arange(longest) < torch.tensor([len(prompts[group]) for group in groups])[:, None]
        self.prompt_bias = as_bias(seen)[:, None, None, None].to(self.device)
        self.group_of_row = torch.tensor([groups.index(row) for row in rows])
        self.first_position = torch.tensor([int(prompts[row].positions.max()) + 1 for row in rows])

    def place(self, cached: list[int], counts: list[int]) -> Tensor:
        """The next step's tokens, `counts` of each row behind the `cached` ones. Returns (3, 1, N) rope positions."""
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

    def decode(self, layer: int, qkv: Tensor, angles: tuple[Tensor, Tensor], scaling: float) -> Tensor:
        """(N, H + 2 H_kv, d) queries, keys and values, before rope → (N, H · d)."""
        cache, rows, groups = self.caches[layer], len(self.counts), len(self.prompt_bias)
        query = self.cache(layer, qkv, angles, self.by_row.owner, slice(None), self.at)
        q = (query * scaling).unflatten(1, (self.heads, -1))  # (N, H_kv, r, d)
        prompt, prompt_lse = map(self.by_group.collect, partial_attention(
            self.by_group.spread(q), *cache.prompt[:, :groups], self.prompt_bias))
        suffix, suffix_lse = map(self.by_row.collect, partial_attention(
            self.by_row.spread(q), *cache.suffix[:, :rows, :, : self.width], self.suffix_bias))
        merged = torch.lerp(suffix, prompt, torch.sigmoid(prompt_lse - suffix_lse))
        return merged.to(qkv.dtype).flatten(1)


def partial_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to a part of the keys, in float32: (n, H_kv, t, r, d), keys and values (n, H_kv, k, d), bias of 0
    and −∞ that broadcasts over (n, H_kv, t, r, k) → (n, H_kv, t, r, d) and log-sum-exps (n, H_kv, t, r, 1), by
    which it is merged with another part: out = lerp(a, b, sigmoid(lse_b − lse_a))."""
    t_r = query.shape[2:4]
    scores = (query.flatten(2, 3) @ key.transpose(-1, -2)).unflatten(2, t_r).float().add_(bias)
    weights = scores.softmax(-1)
    out = (weights.to(value.dtype).flatten(2, 3) @ value).unflatten(2, t_r).float()
    return out, scores.amax(-1, keepdim=True).sub_(weights.amax(-1, keepdim=True).log_())


def slots(prompts: int, group_size: int, rows: int) -> tuple[int, int]:
    """(groups, rows) that caches have room for: a group without a live row has left one free, so never more groups."""
    rows = min(rows, prompts * group_size)
    return min(rows, prompts), rows


def head_size(text) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def cache_bytes(text, prompts: list, group_size: int, rows: int, max_tokens: int, item: int) -> int:
    """What the caches of a rollout take, `item` bytes a number: prompts padded to the longest, rows to the limit."""
    groups, rows = slots(len(prompts), group_size, rows)
    tokens = groups * max(map(len, prompts), default=0) + rows * max_tokens
    return 2 * tokens * text.num_hidden_layers * text.num_key_value_heads * head_size(text) * item


def allocate(policy: Policy, prompts: list, group_size: int, sampling: Sampling) -> tuple[list[KeysValues], int]:
    """A layer's caches each, and for how many rows. Where shapes are static each group slot has places for its rows."""
    groups, rows = slots(len(prompts), group_size, sampling.rows)
    suffixes, text, like = (rows,), policy.text_config, policy.model.lm_head.weight
    longest, width = max(map(len, prompts)), sampling.max_tokens
    if sampling.steps(policy.device):
        places = min(group_size, sampling.rows)
        suffixes = groups, _ = min(len(prompts), sampling.rows // places), places
        rows = groups * places
        longest, width = (-(-size // ALIGNED) * ALIGNED for size in (longest, width))
    # zeros, not empty: a weight of exactly 0 times uninitialised memory may still be NaN
    new = lambda slots, *shape: torch.zeros(2, slots, text.num_key_value_heads, *shape, head_size(text),
                                            dtype=like.dtype, device=like.device)
    return [KeysValues(new(groups, longest), new(*suffixes, width))
            for _ in range(text.num_hidden_layers)], rows
