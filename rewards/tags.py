"""The form `<think>…</think> <answer>…</answer>`, which every task here asks for. It is read from left to right a fixed
number of times, with no pattern that can backtrack: a hostile completion costs no more than its length."""
import re

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def tag_fault(completion: str, tags: tuple[str, ...] = TAGS) -> str | None:
    """The first thing that breaks the form, in words: each of the tags once, in order, and outside of the pairs white
    space alone; without tags for the answer it is what stands behind the others."""
    for tag in tags:
        if completion.count(tag) != 1:
            return f"{tag} missing" if tag not in completion else f"{tag} more than once"
    places = [completion.index(tag) for tag in tags]
    if places != sorted(places):
        return "tags out of order"
    outside = re.split("|".join(tags), completion)[: len(tags) + ("</answer>" in tags)][::2]
    return "text outside the tags" if any(text.strip() for text in outside) else None
