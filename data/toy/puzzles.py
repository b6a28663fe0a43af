"""Puzzles in words, made from a seed: a text task on which a small pretrained model is sometimes right.

`write_puzzles(DIR)` writes DIR/train.jsonl, valid.jsonl and test.jsonl for `--task jsonl`. No question stands twice, so
that none of the training split is in another."""

import json
import random
from pathlib import Path


def a_sum(draw: random.Random) -> tuple[str, int]:
    one, other = draw.randint(1, 50), draw.randint(1, 50)
    return f"What is {one} + {other}?", one + other


def largest(draw: random.Random) -> tuple[str, int]:
    numbers = draw.sample(range(10, 100), 3)
    return f"Which of these numbers is the largest: {', '.join(map(str, numbers))}?", max(numbers)


PUZZLES = {"sum": a_sum, "largest": largest}  # by category


def write_puzzles(folder: Path, seed: int, kinds: tuple[str, ...] = tuple(PUZZLES), **splits: int) -> None:
    """splits: how many questions each file gets; the kinds take turns."""
    draw, asked = random.Random(f"{seed}/puzzles"), set()
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in splits.items():
        lines, drawn = [], 0
        while len(lines) < count:
            if (drawn := drawn + 1) > 100 * count:
                raise ValueError(f"{split}: {count} puzzles asked for, {len(lines)} found that differ from all others")
            kind = kinds[len(lines) % len(kinds)]
            question, answer = PUZZLES[kind](draw)
            if question not in asked:
                asked.add(question)
                lines.append(
                    {"question": f"{question} Answer with the number alone.", "answer": answer, "category": kind})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
