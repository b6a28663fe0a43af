"""`sample`: prompts → groups. One prefill a prompt, G continuations that share its keys and values.

Rows that end are evicted at once and waiting ones take their places, so that a rollout does not run at the pace
of its slowest row. Live rows and live groups are always the first ones of their caches: whoever leaves is
overwritten by the last one, and every product runs on a plain slice.

A decode step feeds each row its last token and guesses of the next ones (grpo/engine/speculation.py). Every token is
drawn with its own number of the completion's noise, so guesses decide how many tokens a step gives, never which."""

from collections import deque
from dataclasses import dataclass, field
from typing import Callable

import torch
from torch import Tensor

from grpo.engine.attention import Packed
from grpo.engine.decode import Decode, allocate, move
from grpo.engine.draw import Sampling, draw_tokens, noise
from grpo.engine.head import token_logits
from grpo.engine.packed import pack, packed
from grpo.engine.policy import Policy
from grpo.engine.sizes import LOGITS, PREFILL_TOKENS
from grpo.engine.speculation import Draft, Speculation
from grpo.engine.static import Static
from grpo.group import Group, Prompt, within

Turn = Callable[[bool], bool]  # this rank has work → any rank has; see `sample`


@dataclass
class Row:
    """One continuation being written.

    noise  one uniform number a token
    guess  what the last decode step was fed of the tokens to come; `draft` makes it"""

    prompt: int  # index of its prompt
    index: int  # which of the G
    noise: list[float]
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    guess: list[int] = field(default_factory=list)
    draft: Draft | None = None
    place: int | None = None  # among its group's, see static.py


@dataclass
class Slot:
    """One prompt whose keys and values are cached; `left` counts its rows that have not ended."""

    prompt: int
    left: int
    last_hidden: Tensor  # (hidden,): what predicts every row's first token


class Rollout:
    """The state of one call of `sample`: caches, live rows, live groups."""

    def __init__(self, policy: Policy, prompts: list[Prompt], group_size: int, sampling: Sampling, turn: Turn | None,
                 speculation: Speculation | None = None):
        self.policy, self.prompts, self.sampling = policy, prompts, sampling
        self.group_size, self.speculation = group_size, speculation
        self.whole, self.turn = turn is None, turn or (lambda working: working)  # whole: passes are no collectives
        self.waiting = deque((p, i) for p in range(len(prompts)) for i in range(group_size))
        self.rows: list[Row] = []
        self.slots: list[Slot] = []
        self.caches, self.max_rows = allocate(policy, prompts, group_size, sampling)
        self.head = pack(policy.model.lm_head.weight[: policy.vocabulary])
        self.static = Static(self) if sampling.steps(policy.device) else None
        self.drawing: list[Row] = []  # whose tokens are drawn next
        self.hidden: Tensor | None = None  # (these rows and their guesses, hidden): each predicts a token
        self.layout: Decode | None = None
        self.done: list[list[Row | None]] = [[None] * group_size for _ in prompts]
        self.spared = 0  # tokens of the limit that ended rows will not write

    def prefill(self, indices: list[int]) -> None:
        """One packed pass; the prompts' keys and values are written into new group slots."""
        prompts = [self.prompts[index] for index in indices]
        cache: list[list[tuple[Tensor, Tensor]]] = []
        embedded = self.policy.embed(prompts)[None]
        positions = torch.cat([prompt.positions for prompt in prompts], 1)[:, None].to(self.policy.device)
        layout = Packed([(len(prompt), []) for prompt in prompts], prompt_cache=cache)
        self.turn(True)
        hidden = self.policy.trunk(embedded, positions, layout)[0]
        for layer, keys_values in zip(self.caches, cache):
            for offset, (key, value) in enumerate(keys_values):
                layer.prompt[0, len(self.slots) + offset, :, : key.shape[1]] = key
                layer.prompt[1, len(self.slots) + offset, :, : value.shape[1]] = value
        ends = torch.tensor([len(prompt) for prompt in prompts]).cumsum(0) - 1
        self.slots += [Slot(index, self.group_size, hidden[end].clone()) for index, end in zip(indices, ends.tolist())]

    def admit(self) -> None:
        """Waiting rows into free places; those whose prompt is cached at once.

        New prompts wait until an eighth of the places is free: a prefill of several costs less than several."""
        free = self.static.free(self) if self.static else self.max_rows - len(self.rows)
        entering, cached = [], {slot.prompt for slot in self.slots}
        patient = self.rows and free < self.max_rows // 8
        while self.waiting and len(entering) < free and not (patient and self.waiting[0][0] not in cached):
            entering.append(self.waiting.popleft())
        if not entering:
            return
        new = [p for p in dict.fromkeys(p for p, _ in entering) if p not in cached]
        for some in within(PREFILL_TOKENS, new, lambda index: len(self.prompts[index])):
            self.prefill(some)
        hidden_of = {slot.prompt: slot.last_hidden for slot in self.slots}
        for p, i in entering:
            number = i + self.group_size * (self.sampling.earlier[p] if self.sampling.earlier else 0)
            row = Row(p, i, noise(self.sampling.seed, self.prompts[p].id, number, self.sampling.max_tokens))
            row.draft = self.speculation.draft(p, i, row.tokens) if self.speculation else None
            self.rows.append(row)
            self.drawing.append(row)
        entered = torch.stack([hidden_of[p] for p, _ in entering])
        self.hidden = entered if self.hidden is None else torch.cat([self.hidden, entered])
        self.layout = None

    def sample_tokens(self) -> int:
        """Draw what every hidden state predicts; keep each row's tokens up to the first that was not guessed. Rows
        that end are evicted. Returns the number of tokens kept."""
        sampling = self.sampling
        numbers = [n for row in self.drawing for n in row.noise[len(row.tokens) : len(row.tokens) + len(row.guess) + 1]]
        uniform = torch.tensor(numbers, dtype=torch.float64).to(self.hidden.device)
        some = max(1, LOGITS // len(self.head))
        tokens, logps = map(torch.cat, zip(*(
            draw_tokens(token_logits(hidden, self.head, sampling.temperature or 1.0, self.policy.banned), own, sampling)
            for hidden, own in zip(self.hidden.split(some), uniform.split(some)))))
        # one transfer from the device a step; float64 holds every token id exactly
        drawn = zip(*torch.stack([tokens.double(), logps.double()]).tolist())
        kept = sum(self.keep(row, [next(drawn) for _ in range(len(row.guess) + 1)]) for row in self.drawing)
        self.evict_ended()
        return kept

    def evict_ended(self) -> None:
        for place in reversed(range(len(self.rows))):
            if self.ended(self.rows[place]):
                self.evict(place)
        self.hidden, self.drawing = None, []

    def keep(self, row: Row, drawn: list[tuple[float, float]]) -> int:
        """The tokens and log-probabilities that a row takes over: how many."""
        before = len(row.tokens)
        for (token, logp), guessed in zip(drawn, [*row.guess, None]):
            row.tokens.append(int(token))
            row.logps.append(logp)
            if token != guessed or self.ended(row):  # what follows was drawn behind another token
                break
        kept = len(row.tokens) - before
        if self.speculation:
            self.speculation.observe(row, kept)
        return kept

    def ended(self, row: Row) -> bool:
        return row.tokens[-1] in self.sampling.end_tokens or len(row.tokens) == self.sampling.max_tokens

    def evict(self, place: int) -> None:
        """A row has ended: the last live row takes its place, and likewise for its group if it was the last."""
        row, last = self.rows[place], len(self.rows) - 1
        self.done[row.prompt][row.index] = row
        self.spared += self.sampling.max_tokens - len(row.tokens)
        if not self.static:
            move(self.caches, last, place, "suffix")
        self.rows[place] = self.rows[last]
        self.rows.pop()
        self.layout = None
        at = next(i for i, slot in enumerate(self.slots) if slot.prompt == row.prompt)
        self.slots[at].left -= 1
        if self.slots[at].left == 0:
            last = len(self.slots) - 1
            move(self.caches, last, at, "prompt", *["suffix"] * bool(self.static))
            self.slots[at] = self.slots[last]
            self.slots.pop()

    def decode_step(self) -> int:
        """Feed every live row's last token and its guess; the new hidden states predict the next tokens. Where shapes
        are static: several steps. Returns the tokens kept meanwhile."""
        if self.static:
            return self.static.decode_steps(self)
        self.layout = self.layout or Decode(self.caches, self.prompts, [slot.prompt for slot in self.slots],
            [row.prompt for row in self.rows])  # until a row comes or goes
        if self.speculation:
            self.speculation.guess(self.rows, self.sampling.max_tokens)
        tokens = torch.tensor([token for row in self.rows for token in (row.tokens[-1], *row.guess)])
        positions = self.layout.place([len(row.tokens) - 1 for row in self.rows],
            [1 + len(row.guess) for row in self.rows])
        embedded = self.policy.model.get_input_embeddings()(tokens.to(self.policy.device))
        self.turn(True)
        self.hidden, self.drawing = self.policy.trunk(embedded[None], positions, self.layout)[0], list(self.rows)
        return 0

    def groups(self) -> list[Group]:
        ended = self.sampling.end_tokens
        return [Group(prompt, [torch.tensor(row.tokens) for row in rows], [torch.tensor(row.logps) for row in rows],
                [row.tokens[-1] in ended for row in rows]) for prompt, rows in zip(self.prompts, self.done)]


@torch.no_grad()
def sample(policy: Policy, prompts: list[Prompt], group_size: int, sampling: Sampling,
        on_tokens: Callable[[int, int, int], None] | None = None, turn: Turn | None = None,
        speculation: Speculation | None = None) -> list[Group]:
    """Continue every prompt `group_size` times. Every step calls `on_tokens(tokens written, rows ended,
    tokens that these rows have not written of their limit)`.

    Weights are unsharded meanwhile, or every pass through the layers is a collective and `turn` keeps the ranks in
    step: it is called before every pass and tells whether any rank has work; a rank without any joins with a dummy
    forward as long as others have. `fsdp.sample_unsharded` sees to both. Without `speculation` nothing is guessed."""
    if speculation:
        speculation.begin(prompts, policy)
    rollout = Rollout(policy, prompts, group_size, sampling, turn, speculation) if prompts else None
    with packed(policy.language_model, rollout is not None and not rollout.static):
        while rollout and (rollout.waiting or rollout.rows):
            rollout.admit()
            live, spared = len(rollout.rows), rollout.spared
            written = rollout.sample_tokens() if rollout.drawing else 0
            written += rollout.decode_step() if rollout.rows else 0
            if on_tokens:
                on_tokens(written, live - len(rollout.rows), rollout.spared - spared)
    while turn and turn(False):
        token = policy.embed_tokens(torch.zeros(1, dtype=torch.long))
        policy.trunk(token[None], torch.zeros(3, 1, 1, dtype=torch.long, device=policy.device), Packed([(1, [])]))
    return rollout.groups() if rollout else []
