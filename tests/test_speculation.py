"""Guesses change how many tokens a step gives, never which."""

from types import SimpleNamespace

import pytest
import torch

from grpo.engine import speculation
from grpo.engine.rollout import Sampling, sample
from grpo.engine.speculation import Draft, Speculation, Texts
from grpo.group import Group
from test_rollout import prompts, sampling, tokens
from tiny import END, IMAGE, tiny_policy

FAR = 40  # tokens: long enough for guesses of several


def longer(**changes) -> Sampling:
    return sampling(**{"max_tokens": FAR, "end_tokens": (END, 0, 1), **changes})


def remembering(groups: list[Group], **limits) -> Speculation:
    made = Speculation(**limits)
    for group in groups:
        made.remember(group.prompt.id, group.completions)
    return made


def earlier(policy, **changes) -> list[Group]:
    """What the samples were answered before: with other noise, by a policy that was almost the same."""
    return sample(policy, prompts(), 3, longer(seed="before", **changes))


@pytest.fixture
def eager(monkeypatch):
    """Guesses are cheap: rows guess at every chance."""
    monkeypatch.setitem(speculation.FIXED, "cpu", (1e4, 0.0))


@pytest.mark.parametrize("source,changes", [
    ("other noise", dict(temperature=0.0)), ("other noise", dict(temperature=0.8)),
    ("other noise", dict(temperature=1.5)), ("other noise", dict(top_p=0.8)), ("other noise", dict(rows=4)),
    ("the same noise", dict()), ("nothing", dict(rows=6)), ("another dataset", dict())], ids=str)
def test_speculation_draws_the_tokens_that_are_drawn_without_it(eager, source, changes):
    policy, drawn = tiny_policy(), longer(**changes)
    plain = sample(policy, prompts(), 3, drawn)
    before = {"the same noise": plain, "other noise": earlier(policy), "nothing": []}.get(source)
    if before is None:
        random = torch.Generator().manual_seed(1)
        before = [Group(prompt, [torch.randint(0, IMAGE, (FAR,), generator=random)] * 2) for prompt in prompts()]
    made = remembering(before)
    guessed = sample(policy, prompts(), 3, drawn, speculation=made)
    assert tokens(guessed) == tokens(plain) and made.counts["guessed"] > 0
    assert [group.finished for group in guessed] == [group.finished for group in plain]
    torch.testing.assert_close(policy.score(guessed, drawn.temperature or 1.0).logp,
                               torch.cat([row for group in guessed for row in group.logps]), rtol=1e-5, atol=3e-5)


def test_speculation_saves_passes_where_the_past_repeats(eager):
    policy, passes = tiny_policy(), []
    policy.trunk_layers[0].register_forward_hook(lambda *_: passes.append(1))
    plain = sample(policy, prompts(), 3, longer())
    one_by_one, made = len(passes), remembering(plain)
    passes.clear()
    sample(policy, prompts(), 3, longer(), speculation=made)
    counts = made.counts
    assert len(passes) < one_by_one / 3 and counts["tokens"] / counts["steps"] > 3
    assert counts["tokens"] == sum(n for group in plain for n in group.lengths)
    assert counts["accepted"] <= counts["guessed"] and counts["tokens"] - counts["accepted"] <= counts["steps"]


def test_speculation_on_guesses_that_fit_nothing_soon_stops(monkeypatch):
    monkeypatch.setitem(speculation.FIXED, "cpu", (300.0, 0.0))
    made = remembering([Group(prompt, [torch.full((FAR,), 7)]) for prompt in prompts()])
    sample(tiny_policy(), prompts(), 3, longer(end_tokens=()), speculation=made)
    assert (
        made.counts["accepted"] < 0.1 * made.counts["tokens"]
        and 0 < made.counts["guessed"] < 0.3 * made.counts["tokens"]
    )


def test_speculation_does_not_happen_where_arithmetic_is_the_limit(monkeypatch):
    monkeypatch.setitem(speculation.FIXED, "cpu", (1e-3, 0.0))
    policy = tiny_policy()
    plain = sample(policy, prompts(), 3, longer())
    made = remembering(earlier(policy))
    assert tokens(sample(policy, prompts(), 3, longer(), speculation=made)) == tokens(plain)
    assert made.counts["guessed"] == 0 and made.counts["tokens"] == made.counts["steps"]


def test_speculation_guesses_longer_the_fewer_rows_live_and_the_better_a_row_was_guessed():
    draft = Draft(Texts([list(range(100))], []), [], 0)
    lengths = []
    for chance in (0.5, 0.8, 0.95):
        draft.chance = chance
        lengths.append([len(draft.guess(rows / (20 + rows), 99)) for rows in (64, 8, 1)])
    assert lengths == [[0, 1, 4], [1, 5, 13], [5, 24, 32]]  # 32: the longest
    assert len(draft.guess(0.01, 3)) == 3  # the limit of the completion


@pytest.mark.parametrize("known,guessed", [(8, 8 * [9]), (1, 8 * [0])])
def test_speculation_on_one_row_alone_must_pay_for_the_padding_of_all(known, guessed):
    made = Speculation()
    made.fixed = 8.0
    rows = [SimpleNamespace(tokens=[0], guess=[], draft=Draft(Texts([list(range(9))] if i < known else [], []), [], 0))
            for i in range(8)]
    for row in rows:
        row.draft.chance = 0.94
    made.guess(rows, 99)
    assert [len(row.guess) for row in rows] == guessed and made.counts["guessed"] == sum(guessed)


def test_speculation_follows_earlier_answers_before_siblings_and_siblings_before_the_prompt():
    prompt, sibling = [5, 6, 7, 8, 30], [5, 6, 7, 20]
    texts = Texts([[9, 5, 6, 7, 10]], prompt)
    texts.add(sibling)
    assert texts.find([5, 6, 7], 3) == (0, 4)
    texts = Texts([], prompt)
    assert texts.find([5, 6, 7], 3) == (0, 3)
    texts.add(sibling)
    assert texts.find([5, 6, 7], 3) == (1, 3)


def test_speculation_finds_the_nearest_of_several_places():
    texts = Texts([[1, 2, 0, 0, 1, 3, 0, 0, 1, 4]], [])
    assert [texts.find([0] * (end - 1) + [1], end) for end in (1, 5, 9)] == [(0, 1), (0, 5), (0, 9)]


def test_speculation_needs_a_next_token_and_falls_back_to_fewer_last_ones():
    texts = Texts([[1, 2, 3], [8, 3, 4]], [])
    assert texts.find([1, 2, 3], 3) == (1, 2)  # the three stand at an end; the one goes on elsewhere
    assert texts.find([7], 1) is None


def test_a_speculation_history_keeps_the_latest_answers_within_its_bound():
    made = Speculation(memory=10)
    for name, length in (("a", 4), ("b", 4), ("a", 3), ("c", 5)):
        made.remember(name, [torch.arange(length)])
    assert list(made.history) == ["a", "c"] and made.held == 8  # b was answered longest ago
    made.remember("d", [torch.arange(11)])
    assert not made.history and made.held == 0


def test_a_speculation_history_comes_back_from_its_tensors():
    made, back = Speculation(), Speculation()
    made.remember("ä/1", [[1, 2], [151_000]])
    made.remember("b", [[3]])
    back.restore(made.state())
    assert list(back.history) == ["ä/1", "b"] and back.held == 4
    assert [row.tolist() for row in back.history["ä/1"]] == [[1, 2], [151_000]]
    empty = Speculation()
    empty.restore(Speculation().state())
    assert not empty.history
