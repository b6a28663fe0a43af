"""Majority voting: of several completions of one sample, the one whose answer was given most often.

Two completions give the same vote where the task's `vote_key` is the same (`parse` of a task without one): a
quintuple more, another vote; another order or another reasoning, the same. What cannot be read does not vote."""

from collections import Counter


def majority(rewards, completions: list[str], sample) -> tuple[str, int]:
    """(the first completion with the most frequent answer, its votes); ties: the answer that came first.

    Where no completion can be read, the first one with 0 votes."""
    key = getattr(rewards, "vote_key", rewards.parse)
    answers = [key(completion, sample) for completion in completions]
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return completions[0], 0
    (winner, count), = votes.most_common(1)  # of equals the first, for a Counter keeps the order of coming
    return completions[answers.index(winner)], count
