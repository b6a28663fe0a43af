"""Exact speculation: guess the next tokens of a row, check them all in one pass, keep those that are drawn anyway.

A token is the inverse of the cumulative distribution at a number that belongs to its place in its completion
(grpo/engine/draw.py), so any guess can be checked without a rejection rule: draw from every distribution of the pass
with its own number, keep the tokens up to the first that differs from the guess. The completion is the one that would
have been drawn without guesses, at any temperature; only the number of passes changes. (Fast speculative decoding,
arXiv 2211.17192, needs a rejection rule because its noise is drawn afresh.)

Guesses cost nothing: what this sample was answered before (last epoch, the split, the last validation), then the
group's other rows, then the prompt. A row follows one of these texts as long as the text predicts its tokens, and
otherwise looks for its last tokens, nearest to where it stands."""

import json
import math
from collections import OrderedDict, defaultdict
from operator import eq

import torch
from torch import Tensor

from grpo.engine.sizes import WIDTHS
from grpo.group import Prompt

ORDERS = (3, 1)  # so many last tokens are looked for, the longer first
MEMORY = 1 << 24  # tokens of a history: 64 MB
CANDIDATES = 64  # places of the same last tokens that are kept
LONGEST = 32  # tokens of a guess
FIRST_CHANCE, PACE = 0.6, 0.1  # that a prediction is right: before any was checked; a new one's weight
# A decode step's fixed cost in tokens: to read the weights, and a layer's launches times the model's parameters.
# CPU: of an EPYC (benchmarks/decode_cost.py: a Xeon's differ, and gain no time); CUDA: an H100's (benchmarks/gpu.py).
FIXED = {"cpu": (12.0, 35e6), "cuda": (400.0, 0.0)}
# What guesses cost beside their tokens: regrouping, as a share of the fixed cost, and a place that pads a shorter one.
REGROUPED, PADDED = 0.3, 0.035


def expected(chance: float, guessed: int) -> float:
    """Tokens that a row is to keep of a step."""
    return (1 - chance ** (guessed + 1)) / (1 - chance)


class Texts:
    """What the rows of one prompt may follow: earlier completions, the rows themselves as they grow, the prompt."""

    def __init__(self, earlier: list[list[int]], prompt: list[int]):
        self.texts: list[list[int]] = []
        self.places: dict[tuple, list[tuple[int, int]]] = defaultdict(list)  # last tokens → (text, place behind them)
        self.earlier = len(earlier)
        for tokens in earlier:
            self.add(tokens)
        self.add(prompt, ORDERS[:1])

    def add(self, tokens: list[int], orders: tuple[int, ...] = ORDERS) -> int:
        """A text, which may grow; its index."""
        self.texts.append(tokens)
        for order in orders:
            for end, last in enumerate(zip(*(tokens[first:] for first in range(order))), order):
                self.note(last, len(self.texts) - 1, end)
        return len(self.texts) - 1

    def grown(self, text: int, end: int) -> None:
        """A text has now `end` tokens."""
        for order in (order for order in ORDERS if order <= end):
            self.note(tuple(self.texts[text][end - order : end]), text, end)

    def note(self, last: tuple, text: int, end: int) -> None:
        if len(places := self.places[last]) < CANDIDATES:
            places.append((text, end))

    def find(self, tokens: list[int], end: int) -> tuple[int, int] | None:
        """Where to go on after tokens[:end]: earlier completions first, the prompt last; then whatever is nearest."""
        for order in ORDERS:
            places = self.places.get(tuple(tokens[end - order : end]), ()) if order <= end else ()
            if known := [(text, place) for text, place in places if place < len(self.texts[text])]:
                return min(known, key=lambda at: (at[0] == self.earlier, at[0] > self.earlier, abs(at[1] - end), at[0]))
        return None


class Draft:
    """One row's guess of its future. `tokens` is the row's own list."""

    def __init__(self, texts: Texts, tokens: list[int], index: int):
        self.texts, self.tokens, self.chance = texts, tokens, FIRST_CHANCE
        self.own = texts.add(tokens)
        self.at = (index % texts.earlier, 0) if texts.earlier else None

    def observe(self, kept: int) -> None:
        """The row has got `kept` more tokens: each says whether its prediction was right, guessed or not."""
        for place in range(len(self.tokens) - kept, len(self.tokens)):
            predicted = self.ahead(1)
            right = predicted == self.tokens[place : place + 1]
            if predicted:
                self.chance += PACE * (right - self.chance)
            self.at = (self.at[0], self.at[1] + 1) if right else self.texts.find(self.tokens, place + 1)
            self.texts.grown(self.own, place + 1)

    def ahead(self, count: int) -> list[int]:
        if self.at is None:
            return []
        text, place = self.at
        return self.texts.texts[text][place : place + count]

    def guess(self, share: float, limit: int) -> list[int]:
        """The next tokens, while the chance that all are right exceeds `share`; at most `limit`."""
        if self.at is None or self.chance <= share:
            return []
        return self.ahead(min(int(math.log(share) / math.log(min(self.chance, 0.999))), limit, LONGEST))


class Speculation:
    """Guesses for the rollouts of one kind (training, validation), and the history that they come from.

    The history holds each sample's last group, by prompt id, MEMORY tokens in all; the oldest is forgotten first."""

    def __init__(self, memory: int = MEMORY):
        self.memory, self.held = memory, 0
        self.history: OrderedDict[str, list[Tensor]] = OrderedDict()
        self.counts = dict.fromkeys(("steps", "tokens", "guessed", "accepted"), 0)

    def remember(self, prompt_id: str, completions: list) -> None:
        """The completions of a sample, in the place of those before."""
        self.forget(prompt_id)
        self.history[prompt_id] = [torch.as_tensor(tokens, dtype=torch.int32) for tokens in completions]
        self.held += sum(map(len, completions))
        while self.held > self.memory:
            self.forget(next(iter(self.history)))

    def forget(self, prompt_id: str) -> None:
        self.held -= sum(map(len, self.history.pop(prompt_id, [])))

    def state(self) -> dict[str, Tensor]:
        """The history as two tensors, for a checkpoint."""
        index = json.dumps([(key, [len(tokens) for tokens in group]) for key, group in self.history.items()])
        tokens = [tokens for group in self.history.values() for tokens in group]
        return {"tokens": torch.cat(tokens) if tokens else torch.zeros(0, dtype=torch.int32),
                "index": torch.tensor(list(index.encode()), dtype=torch.uint8)}

    def restore(self, state: dict[str, Tensor]) -> None:
        index = json.loads(bytes(state["index"].tolist()))
        tokens = iter(state["tokens"].split([length for _, group in index for length in group]))
        for key, group in index:
            self.remember(key, [next(tokens) for _ in group])

    def begin(self, prompts: list[Prompt], policy) -> None:
        self.prompts, self.texts = prompts, {}
        read, launch = FIXED.get(policy.device.type, FIXED["cuda"])
        layers = policy.trunk_layers
        size = sum(p.numel() for p in layers.parameters()) + policy.model.lm_head.weight[: policy.vocabulary].numel()
        self.fixed = read + launch * len(layers) / size

    def draft(self, prompt: int, index: int, tokens: list[int]) -> Draft:
        """For a row that enters: its prompt, which of the G it is, and the list that its tokens will be put in."""
        if prompt not in self.texts:
            earlier = self.history.get(self.prompts[prompt].id, [])
            self.texts[prompt] = Texts([row.tolist() for row in earlier], self.prompts[prompt].tokens.tolist())
        return Draft(self.texts[prompt], tokens, index)

    def guess(self, rows: list, max_tokens: int) -> None:
        """Set every row's guess. With N live rows a step costs `fixed` + N + guessed tokens: a guessed token pays while
        the chance that it is kept exceeds the share of a step's cost that a token is worth, N / (fixed + N), and all
        of them if they pay for the padding as well. Nothing here is timed: the same run guesses the same."""
        share = len(rows) / (self.fixed + len(rows))
        for row in rows:
            row.guess = row.draft.guess(share, max_tokens - len(row.tokens) - 1)
        guessed = [len(row.guess) for row in rows]
        gain = sum(expected(min(row.draft.chance, 0.999), count) - 1 for row, count in zip(rows, guessed))
        padded = len(rows) * max(guessed) - sum(guessed)
        pays = gain >= share * (sum(guessed) + PADDED * padded + REGROUPED * self.fixed)
        for row in rows if not pays else ():
            row.guess = []
        self.counts["guessed"] += pays * sum(guessed)

    def width(self, rows: list, places: int) -> int:
        """Guessed tokens where every place of a step has as many, live or not: those that give most for its cost."""
        chances = [min(row.draft.chance, 0.999) if row.draft.at else 0.0 for row in rows]
        tokens = lambda guessed: sum(expected(chance, guessed) for chance in chances)
        return max(WIDTHS, key=lambda guessed: tokens(guessed) / (self.fixed + places * (guessed + 1)))

    def observe(self, row, kept: int, steps: int = 1, guessed: int = 0) -> None:
        """A row has kept so many tokens, of a step or of several with `guessed` tokens each."""
        row.draft.observe(kept)
        self.counts["steps"] += steps
        self.counts["tokens"] += kept
        self.counts["guessed"] += steps * guessed
        self.counts["accepted"] += kept - steps if guessed else sum(map(eq, row.tokens[-kept:], row.guess))
