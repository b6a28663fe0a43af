"""Decode steps for an accelerator: static shapes, tokens and guesses and ends on the device, one reading in k steps.

A group slot has a place for each of its rows. A place whose row has ended is stepped on, and what it draws is thrown
away, until the host reads and a waiting row or group takes it. So nothing is gathered: prompts' scores and suffixes'
scores are slices of one tensor, and a layer's attention is two products for each and one softmax.

Shapes come in buckets: live groups and suffix width rounded up (`bucket_size`), tokens a row by `Speculation.width`.
On a GPU a bucket's step is captured once and replayed: launched one by one its kernels would wait for the host."""

import torch
from torch import Tensor

from grpo.engine.decode import Rope
from grpo.engine.draw import Sampling, draw_tokens
from grpo.engine.head import token_logits

WIDTH = 64  # the smallest bucket of suffix tokens
CAPTURE = True  # a GPU's steps as graphs; off for a benchmark
LONG = 256  # of shorter completions nothing is guessed there: each length of a guess is a graph more, worth 15 steps


def bucket_size(number: int, start: int, limit: int) -> int:
    """The next of start, 4 · start, 16 · start, …: what is masked costs less than a graph more."""
    while start < number:
        start *= 4
    return min(start, limit)


class Bucket(Rope):
    """The buffers of one bucket's steps; their addresses stay. B = groups × places rows with `tokens` fed to each.

    window   (B, 1 + k · tokens) the last token, then what is guessed and, up to `written`, what was drawn
    uniform  (B, k · tokens) numbers of the completions' noise, for the window's tokens but the first
    start    (B, 1) place in its completion of the window's first token; `first` the rope position of a completion's
    limit    (B,) tokens that may still be written; 0: no row lives here"""

    def __init__(self, policy, sampling: Sampling, caches: list, groups: int, width: int, tokens: int, steps: int):
        self.policy, self.sampling, self.caches, self.groups, self.tokens = policy, sampling, caches, groups, tokens
        _, _, self.heads, self.places, self.longest, _ = caches[0].suffix.shape
        self.prompts = [cache.prompt[:, :groups].flatten(1, 2) for cache in caches]
        self.read = [cache.suffix[:, :groups].flatten(1, 3)[..., :width, :] for cache in caches]
        device, rows = caches[0].prompt.device, groups * self.places
        new = lambda *shape, dtype=torch.long: torch.zeros(shape, dtype=dtype, device=device)
        self.window, self.uniform = new(rows, 1 + steps * tokens), new(rows, steps * tokens, dtype=torch.float64)
        self.logps, self.start, self.first = new(rows, steps * tokens, dtype=torch.float32), new(rows, 1), new(rows, 1)
        self.limit, self.written, self.steps = new(rows), new(rows), new(rows)
        self.lengths = new(groups, 1) + 1  # of the prompts
        self.prompt_columns = torch.arange(self.prompts[0].shape[2], device=device)
        self.ends = torch.tensor(sampling.end_tokens, dtype=torch.long, device=device)
        self.stepped, self.graph = False, None
        self.fed, self.columns = torch.arange(tokens, device=device), torch.arange(width, device=device)
        at = torch.arange(rows * tokens, device=device).div(tokens, rounding_mode="floor")
        self.slot, self.place = at.div(self.places, rounding_mode="floor"), at % self.places

    def step(self) -> None:
        """Feed each row its last token and its guess, draw behind each, keep up to the first that was not guessed."""
        column = self.written[:, None] + self.fed
        tokens, index = self.window.gather(1, column), self.start + column
        hidden = self.trunk(tokens, index)
        logits = token_logits(hidden, self.policy.model.lm_head.weight[: self.policy.vocabulary],
            self.sampling.temperature or 1.0, self.policy.banned)
        drawn, logps = (x.view_as(tokens) for x in
                        draw_tokens(logits, self.uniform.gather(1, column).flatten(), self.sampling))
        ends = (drawn[..., None] == self.ends).any(-1)
        on = (drawn[:, :-1] == tokens[:, 1:]) & ~ends[:, :-1]
        left = self.limit - self.written
        kept = torch.minimum(1 + on.cumprod(1).sum(1), left)
        known = self.window.gather(1, column + 1)
        self.window.scatter_(1, column + 1, torch.where(self.fed < kept[:, None], drawn, known))
        self.logps.scatter_(1, column, logps)
        self.written += kept
        self.steps += left > 0
        ended = (ends & (self.fed == kept[:, None] - 1)).any(1)
        self.limit.copy_(torch.where(ended, self.written, self.limit))

    def trunk(self, tokens: Tensor, index: Tensor) -> Tensor:
        """(B, tokens) ids and their places in the completions → (B · tokens, hidden)."""
        # beyond a completion's limit nothing is kept: the last place, which no kept token reads, takes it
        self.at = index.clamp(max=self.longest - 1).flatten()
        groups, places, t = self.groups, self.places, self.tokens
        visible = (self.columns <= self.at.view(groups, places, t, 1)).view(groups, 1, places, t, 1, -1)
        seen = self.prompt_columns < self.lengths
        seen = seen.view(groups, 1, 1, 1, 1, -1).expand(*visible.shape[:-1], -1)
        shared = self.policy.text_config.num_attention_heads // self.heads
        bias = self.prompts[0].new_zeros(()).masked_fill(~torch.cat([seen, visible], -1), float("-inf"))
        self.bias = bias.expand(-1, self.heads, -1, -1, shared, -1).reshape(
            groups * self.heads, places * t * shared, -1)
        embedded = self.policy.model.get_input_embeddings()(tokens.flatten())
        return self.policy.trunk(embedded[None], (self.first + index).flatten().expand(3, 1, -1), self)[0]

    def decode(self, layer: int, qkv: Tensor, angles: tuple[Tensor, Tensor], scaling: float) -> Tensor:
        """(N, H + 2 H_kv, d) queries, keys and values, before rope → (N, H · d)."""
        query = self.cache(layer, qkv, angles, self.slot, slice(None), self.place, self.at)
        (key, value), (own_key, own_value) = self.prompts[layer], self.read[layer]
        order = query.view(self.groups, self.places, self.tokens, self.heads, -1, query.shape[-1])
        q = order.permute(0, 3, 1, 2, 4, 5).reshape(len(key), -1, query.shape[-1])  # by group and head
        by_row = lambda x: x.view(len(own_key), -1, x.shape[-1])
        scores, prompt = self.bias.clone(), key.shape[1]
        scores[..., :prompt].baddbmm_(q, key.transpose(1, 2), alpha=scaling)
        by_row(scores)[..., prompt:].baddbmm_(by_row(q), own_key.transpose(1, 2), alpha=scaling)
        weights = scores.softmax(-1)
        out = by_row(weights[..., :prompt] @ value).baddbmm_(by_row(weights)[..., prompt:], own_value)
        by_group = out.view(self.groups, self.heads, self.places, self.tokens, -1, query.shape[-1])
        return by_group.permute(0, 2, 3, 1, 4, 5).reshape(len(qkv), -1)


class Static:
    """The decode steps of a rollout, `steps` at a time. In a circle with the rollout its caches would outlive it."""

    def __init__(self, rollout):
        self.steps, self.buckets = rollout.sampling.steps(rollout.policy.device), {}
        _, self.groups, _, self.places, self.longest, _ = rollout.caches[0].suffix.shape
        captured = CAPTURE and rollout.whole and rollout.policy.device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if captured else None

    def free(self, rollout) -> int:
        """Rows that may enter: whole groups, or those of the one group that is larger than its places."""
        if rollout.group_size > self.places and rollout.slots:
            waiting = sum(prompt == rollout.slots[0].prompt for prompt, _ in rollout.waiting)
            return min(self.places - len(rollout.rows), waiting)
        return (self.groups - len(rollout.slots)) * self.places

    def fill(self, rollout, rows: list, guessed: int) -> tuple[Bucket, list[int]]:
        """The bucket for these rows, with what they begin with, and where in its tensors each of them is."""
        span = self.steps * (1 + guessed)
        groups = bucket_size(len(rollout.slots), 1, self.groups)
        width = bucket_size(max(len(row.tokens) for row in rows) + span, WIDTH, self.longest)
        shape = groups, width, 1 + guessed
        if shape not in self.buckets:
            self.buckets[shape] = Bucket(rollout.policy, rollout.sampling, rollout.caches, *shape, self.steps)
        bucket, slot_of = self.buckets[shape], {slot.prompt: at for at, slot in enumerate(rollout.slots)}
        for row in rows:
            if row.place is None:
                row.place = min(set(range(self.places)) - {other.place for other in rows if other.prompt == row.prompt})
        where = [slot_of[row.prompt] * self.places + row.place for row in rows]
        pad = lambda values: values + [0] * (span - len(values))
        begin = dict(window=[row.tokens[-1:] + pad(row.draft.ahead(span) if guessed else []) for row in rows],
            uniform=[pad(row.noise[len(row.tokens) : len(row.tokens) + span]) for row in rows],
            start=[[len(row.tokens) - 1] for row in rows],
            first=[[int(rollout.prompts[row.prompt].positions.max()) + 1] for row in rows],
            limit=[rollout.sampling.max_tokens - len(row.tokens) for row in rows])
        for buffer in (bucket.limit, bucket.written, bucket.steps):
            buffer.zero_()
        put = lambda name, at, value: getattr(bucket, name).index_copy_(0, torch.tensor(at).to(bucket.limit.device),
            torch.tensor(value, dtype=getattr(bucket, name).dtype).to(bucket.limit.device))
        for name, value in begin.items():
            put(name, where, value)
        put("lengths", range(len(rollout.slots)), [[len(rollout.prompts[slot.prompt])] for slot in rollout.slots])
        return bucket, where

    def decode_steps(self, rollout) -> int:
        """`steps` decode steps, then what they have drawn. Returns the number of tokens kept."""
        rows, speculation = list(rollout.rows), rollout.speculation
        guesses = speculation and (self.pool is None or rollout.sampling.max_tokens >= LONG)
        guessed = speculation.width(rows, len(rollout.slots) * self.places) if guesses else 0
        bucket, where = self.fill(rollout, rows, guessed)
        for _ in range(self.steps):
            rollout.turn(True)
            run(bucket, self.pool)
        read = torch.cat([bucket.written[:, None], bucket.steps[:, None], bucket.window[:, 1:], bucket.logps.double()],
            1).tolist()  # one transfer; float64 holds every token id exactly
        read = [read[at] for at in where]
        for row, (written, steps, *drawn) in zip(rows, read):
            row.tokens += map(int, drawn[: int(written)])
            row.logps += drawn[len(drawn) // 2 :][: int(written)]
            if speculation:
                speculation.observe(row, int(written), int(steps), guessed)
        rollout.evict_ended()
        return int(sum(written for written, *_ in read))


def run(bucket: Bucket, pool) -> None:
    """One step. With a pool a bucket's first as it is, which loads what is loaded on first use, and then as a graph."""
    if pool is None or not bucket.stepped:
        bucket.stepped = True
        return bucket.step()
    bucket.graph = bucket.graph or capture(bucket, pool)
    bucket.graph.replay()


def capture(bucket: Bucket, pool) -> torch.cuda.CUDAGraph:
    """What it allocates lies in the pool that a rollout's graphs share. Other threads, NCCL's, may go on meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        bucket.step()
    return graph
