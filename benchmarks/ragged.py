"""Refilling: 256 completions of geometric length (mean 100, limit 400) through 32 row slots.

    python -m benchmarks.ragged [--record]

Lengths are made geometric by a head of zeros, under which every token is as likely as any other, and by letting one
token in a hundred end a completion. "Slots used" is tokens ÷ (slots × steps). Without refilling, the same completions
(the same noise, so the same lengths) are drawn 32 at a time, and each lot waits for its longest. The bound is what a
refill at once, at no cost, reaches for these lengths: nobody who does not know the lengths beforehand can fill the
slots of the last rows, when nothing waits any more.
"""

import argparse
import time

from benchmarks.record import append
from benchmarks.shapes import MODELS, images, whole_vocabulary, words_for, write_model
from grpo.engine.encode import Encoder
from grpo.engine.rollout import Sampling, sample
from grpo.engine.weights import load_policy

PROMPTS, G, SLOTS, MEAN, LIMIT = 32, 8, 32, 100, 400


def drawn(policy, lots: list[list], sampling: Sampling) -> tuple[list[int], list[int], float]:
    """(lengths, rows written in each step, seconds) of sampling lot after lot."""
    lengths, written, start = [], [], time.perf_counter()
    for lot in lots:
        groups = sample(policy, lot, G, sampling, lambda rows, *_: written.append(rows))
        lengths += [length for group in groups for length in group.lengths]
    return lengths, written, time.perf_counter() - start


def bound(lengths: list[int]) -> float:
    """Slots used by an ideal refill in the order of the completions."""
    waiting, rows, steps = list(lengths), [], 0
    while waiting or rows:
        while waiting and len(rows) < SLOTS:
            rows.append(waiting.pop(0))
        rows, steps = [left - 1 for left in rows if left > 1], steps + 1
    return sum(lengths) / (SLOTS * steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="middle")
    parser.add_argument("--record", action="store_true", help="append the figures to results.jsonl")
    settings = parser.parse_args()
    folder = write_model(MODELS / settings.shape, settings.shape)
    whole_vocabulary()
    policy, encoder = load_policy(str(folder)).requires_grad_(False), Encoder(str(folder))
    weight = policy.model.lm_head.weight
    weight.zero_()
    sampling = Sampling(LIMIT, tuple(range(len(weight) // MEAN)), rows=SLOTS)
    text = words_for(encoder, 200, 224)
    prompts = [encoder.encode(images(i, 224), text, None, f"prompt/{i}") for i in range(PROMPTS)]
    policy.keep_image_features(prompts)
    sample(policy, prompts[:2], G, sampling)  # what happens once

    lot = SLOTS // G
    ways = {"refilling": [prompts], "without": [prompts[i : i + lot] for i in range(0, PROMPTS, lot)]}
    print(f"{'':12}{'tokens':>9}{'steps':>8}{'slots used':>12}{'seconds':>9}{'tokens/s':>10}")
    rows, all_lengths = [], []
    for name, lots in ways.items():
        lengths, written, seconds = drawn(policy, lots, sampling)
        all_lengths.append(lengths)
        row = {
            "way": name,
            "tokens": sum(written),
            "steps": len(written),
            "used": sum(written) / (SLOTS * len(written)),
            "seconds": seconds,
        }
        rows.append(row)
        print(f"{name:12}{row['tokens']:9}{row['steps']:8}{row['used']:12.1%}{seconds:9.1f}"
              f"{row['tokens'] / seconds:10.0f}", flush=True)
    if all_lengths[0] != all_lengths[1]:
        raise RuntimeError("the two ways drew different lengths")
    print(
        f"bound for these lengths: {bound(all_lengths[0]):.1%} "
        f"(mean length {sum(all_lengths[0]) / len(all_lengths[0]):.0f})"
    )
    if settings.record:
        append("ragged", {"shape": settings.shape, "slots": SLOTS, "completions": PROMPTS * G}, rows,
               f"bound {bound(all_lengths[0]):.3f}")


if __name__ == "__main__":
    main()
