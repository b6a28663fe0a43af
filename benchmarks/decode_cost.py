"""What a decode step costs with guesses and without: the constants of grpo/engine/speculation.py for a CPU.

    python -m benchmarks.decode_cost [--models big-head trunk middle FOLDER …] [--record]

Rollouts of N rows in which every row is given g guesses a step that are wrong, so that a step keeps one token a row and
its cost alone differs (at most 128 tokens); the median step of the fastest of `--repeats` rollouts counts. Fitted to
each model's steps, by relative errors, with the cost of a further token as the unit:

    step = fixed · (1 + REGROUPED · [some row guesses]) + rows + guessed + PADDED · places that pad a shorter guess

and to the models: fixed = read + launch · layers / parameters, which is FIXED. A model is a folder or a shape of
benchmarks/shapes.py.

The constants in the code are those of an AMD EPYC and of an engine with slower steps, REGROUPED and PADDED set by whole
rollouts. An Intel Xeon's come out otherwise (guesses cheaper); rollouts of `benchmarks.speculation` with them took the
same time there, within what two runs differ by. The rule is flat around its best, and one set of constants stays.
"""

import argparse
import statistics
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks.record import append
from benchmarks.shapes import MODELS, SHAPES, whole_vocabulary, write_model
from grpo.engine.encode import Encoder
from grpo.engine.rollout import Sampling, sample
from grpo.engine.speculation import FIXED, PADDED, REGROUPED, Speculation
from grpo.engine.weights import load_policy

ROWS, GUESSES, STEPS, MOST = (1, 4, 16, 64), (0, 1, 3, 7), 10, 128


class Wrong(Speculation):
    """Guesses that are never drawn: so many for every row, or for the first alone."""

    def __init__(self, guesses: int, first_alone: bool):
        super().__init__()
        self.guesses, self.first_alone = guesses, first_alone

    def guess(self, rows: list, max_tokens: int) -> None:
        for place, row in enumerate(rows):
            count = 0 if self.first_alone and place else self.guesses
            row.guess = [self.unlikely] * min(count, max_tokens - len(row.tokens) - 1)


def timed(policy, prompts: list, rows: int, guesses: int, first_alone: bool, repeats: int) -> dict:
    """One point: rows, guessed tokens, padded places, and the seconds of a step."""
    best, size = float("inf"), min(rows, 8)
    for _ in range(repeats):
        speculation = Wrong(guesses, first_alone)
        speculation.unlikely = int(prompts[0].tokens[0])
        clock = []
        sample(policy, prompts[: rows // size], size, Sampling(STEPS + guesses, (), rows=rows),
               lambda *counts: clock.append(time.perf_counter()), speculation=speculation)
        # the first step has the prefill, the last ones have no room for whole guesses
        steps = [after - before for before, after in pairwise(clock)][1 : STEPS - 2]
        best = min(best, statistics.median(steps))
    guessed = guesses * (1 if first_alone else rows)
    return {"rows": rows, "guessed": guessed, "padded": guesses * rows - guessed, "seconds": best}


def solved(columns: list, target: list) -> np.ndarray:
    """Least squares of relative errors."""
    columns, target = np.array(columns, float), np.array(target, float)
    return np.linalg.lstsq(columns / target[:, None], np.ones(len(target)), rcond=None)[0]


def measure(model: str, settings) -> dict:
    folder = write_model(settings.folder / model, model) if model in SHAPES else Path(model)
    encoder, policy = Encoder(folder), load_policy(folder).requires_grad_(False)
    policy.vocabulary = encoder.vocabulary
    prompts = [encoder.encode([], " word" * 100, None, f"{number}") for number in range(8)]
    points = [timed(policy, prompts, rows, guesses, alone, settings.repeats) for rows in ROWS for guesses in GUESSES
              for alone in (False, True)[: 1 + bool(guesses and rows > 1)] if rows * (1 + guesses) <= MOST]
    fixed, token, regrouped, padded = solved(
        [(1, one["rows"] + one["guessed"], one["guessed"] > 0, one["padded"]) for one in points],
        [one["seconds"] for one in points])
    fitted = [fixed + token * (one["rows"] + one["guessed"]) + regrouped * (one["guessed"] > 0)
              + padded * one["padded"] for one in points]
    layers = policy.trunk_layers
    size = sum(p.numel() for p in layers.parameters()) + policy.model.lm_head.weight[: policy.vocabulary].numel()
    name = folder.parent.name if folder.name == "model" else folder.name
    return {"model": name, "layers": len(layers), "parameters": size, "step_ms": 1e3 * (fixed + token),
            "token_ms": 1e3 * token, "fixed": fixed / token, "regrouped": regrouped / fixed, "padded": padded / token,
            "mean_error": statistics.mean(abs(a / one["seconds"] - 1) for a, one in zip(fitted, points))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["middle", "trunk", "big-head"], help="shapes or folders")
    parser.add_argument("--folder", type=Path, default=MODELS, help="for the shapes' random checkpoints")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="append the figures to results.jsonl")
    settings = parser.parse_args()
    whole_vocabulary()
    print(f"{'model':16}{'layers':>7}{'parameters':>13}{'step, ms':>10}{'token, ms':>11}{'fixed':>8}{'regrouped':>11}"
          f"{'padded':>8}{'error':>7}")
    figures = []
    for model in settings.models:
        figures.append(measure(model, settings))
        print("{model:16}{layers:7}{parameters:13}{step_ms:10.2f}{token_ms:11.3f}{fixed:8.1f}{regrouped:11.2f}"
              "{padded:8.3f}{mean_error:7.0%}".format(**figures[-1]), flush=True)
    middle = lambda name: statistics.median(one[name] for one in figures)
    summary = (f"regrouped {middle('regrouped'):.2f} (REGROUPED {REGROUPED}), "
               f"padded {middle('padded'):.3f} (PADDED {PADDED})")
    if len(figures) > 1:
        read, launch = solved([(1, one["layers"] / one["parameters"]) for one in figures],
                              [one["fixed"] for one in figures])
        summary += f"; read {read:.1f}, launch {launch:.3g} (FIXED {FIXED['cpu']})"
    print(summary)
    if settings.record:
        kept = {"rows": str(ROWS), "guesses": str(GUESSES), "repeats": settings.repeats}
        append("decode_cost", kept, figures, summary)


if __name__ == "__main__":
    main()
