"""How far from this machine's limits is a GRPO step? Necessary operations and bytes against measured rates, by phase.

    python -m benchmarks.limit [--record]

Necessary is what the mathematics asks for, each prompt once: no recomputed logits, no copies. A phase's limit is the
larger of operations ÷ the measured rate of a large float32 matrix product and bytes ÷ the measured rate of reading
(weights once a pass or decoding step, keys and values once a step, Adam's seven streams). A rollout's parts, vision,
prefill and decode steps, come one after the other, and each has its own limit: their sum is the nearer bound ("in
parts"; other phases have one part). The shares that are reached are followed by where the phase's time went, from the
profiler. Speculation is off: each run would be guessed
whole from the one before. The fastest of three runs counts.
"""

import argparse
import time
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.record import append
from benchmarks.shapes import MODELS, write_model
from benchmarks.update_vs_trl import CASES, PROMPTS, UPDATES, G, our_trainer

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm",
                        "mkldnn::_linear_pointwise"),
    "attention": ("scaled_dot",),
}


@dataclass
class Work:
    operations: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.operations + other.operations, self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Work":
        return Work(self.operations * times, self.bytes * times)


class Counted:
    """The necessary work of each phase of one step, from the configuration alone; float32."""

    def __init__(self, config, vision, case: str):
        text = config.text_config
        _, self.prompt, side, self.completion = CASES[case]
        size = text.hidden_size // text.num_attention_heads
        queries, keys = text.num_attention_heads * size, text.num_key_value_heads * size
        self.layers = text.num_hidden_layers * text.hidden_size * (2 * queries + 2 * keys + 3 * text.intermediate_size)
        self.head = text.vocab_size * text.hidden_size
        self.pair = 4 * queries * text.num_hidden_layers  # operations of one query against one key, all layers
        self.token_cache = 2 * keys * text.num_hidden_layers * 4
        self.vision = sum(p.numel() for p in vision.parameters())
        self.patches = 2 * (side // 14) ** 2

    def rollout(self) -> list[Work]:
        """Vision encoder, prefill, decode steps."""
        P, C, rows = self.prompt, self.completion, PROMPTS * G
        look = Work(2 * self.vision * self.patches * PROMPTS, 4 * self.vision)
        prefill = Work(PROMPTS * (2 * self.layers * P + self.pair * P * P / 2), 4 * self.layers)
        pairs = sum(P + j for j in range(1, C))
        decode = Work(rows * (2 * self.layers * (C - 1) + 2 * self.head * C + self.pair * pairs),
                      C * 4 * (self.layers + self.head) + self.token_cache * (PROMPTS * P * C + rows * C * C / 2))
        return [look, prefill, decode]

    def score(self) -> Work:
        """One packed pass."""
        P, C = self.prompt, self.completion
        tokens = PROMPTS * (P + G * (C - 1))
        pairs = PROMPTS * (P * P / 2 + G * (C * P + C * C / 2))
        return Work(
            2 * self.layers * tokens + 2 * self.head * PROMPTS * G * C + self.pair * pairs,
            4 * (self.layers + self.head),
        )

    def update(self) -> Work:
        """Forward, twice as much backward, Adam's reading of weight, gradient, two moments and writing of three."""
        return (self.score() * 3 + Work(0, 7 * 4 * (self.layers + self.head))) * UPDATES


def rates() -> tuple[float, float]:
    """Operations a second of a matrix product, bytes a second of reading; the best of five."""
    a, big = torch.randn(2048, 2048), torch.ones(10**8)

    def best(function) -> float:
        times = []
        for _ in range(6):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return min(times[1:])

    return 2 * 2048**3 / best(lambda: a @ a), 4e8 / best(lambda: big.sum())


def where(profiler) -> dict[str, float]:
    """Shares of the time by kind of operator."""
    shares, whole = dict.fromkeys([*KINDS, "everything else"], 0.0), 0.0
    for event in profiler.key_averages():
        kind = next(
            (
                kind
                for kind, names in KINDS.items()
                if event.key in names or any(n in event.key for n in names if "::" not in n)
            ),
            "everything else",
        )
        shares[kind] += event.self_cpu_time_total
        whole += event.self_cpu_time_total
    return {kind: value / whole for kind, value in shares.items()}


def phases(case: str):
    """name → function, in the order in which a step runs them."""
    trainer, samples = our_trainer(write_model(MODELS / CASES[case][0], CASES[case][0]), case, speculate="off")
    state = {}

    def rollout():
        state["groups"] = trainer.draw(samples, 0)
        state["packs"] = trainer.pack(state["groups"])

    def reference():
        trainer.score_reference(state["packs"])

    def update():
        for pack in state["packs"]:
            pack.advantages = pack.old_logp = None
        trainer.fill_advantages(state["packs"])
        trainer.update(state["packs"], [1e-6] * UPDATES)

    return trainer, {"rollout": rollout, "reference": reference, "update": update}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["big-head-200", "trunk-800-64"], choices=list(CASES))
    parser.add_argument("--record", action="store_true", help="append the figures to results.jsonl")
    settings = parser.parse_args()
    products, reads = rates()
    print(f"this machine: {products / 1e9:.0f} GFLOP/s in a matrix product, {reads / 1e9:.0f} GB/s of reading\n")
    print(f"{'':25}{'GFLOP':>8}{'GB':>7}{'limit, s':>10}{'took, s':>9}{'share':>7}{'in parts':>10}  where time went")
    rows = []
    for case in settings.cases:
        trainer, functions = phases(case)
        counted = Counted(trainer.run.policy.config, trainer.run.policy.visual, case)
        works = {"rollout": counted.rollout(), "reference": [counted.score()], "update": [counted.update()]}
        for function in functions.values():  # once, for what happens once
            function()
        for name, function in functions.items():
            times, work = [], sum(works[name], Work())
            for _ in range(3):
                start = time.perf_counter()
                function()
                times.append(time.perf_counter() - start)
            took = min(times)
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                function()
            limit, in_parts = (sum(max(part.operations / products, part.bytes / reads) for part in parts)
                               for parts in ([work], works[name]))
            rows.append(
                {
                    "case": case,
                    "phase": name,
                    "operations": work.operations,
                    "bytes": work.bytes,
                    "limit": limit,
                    "took": took,
                    "share": limit / took,
                    "share_in_parts": in_parts / took,
                    **where(profiler),
                }
            )
            spent = ", ".join(f"{kind} {share:.0%}" for kind, share in where(profiler).items())
            print(
                f"{case:14}{name:11}{work.operations / 1e9:8.0f}{work.bytes / 1e9:7.1f}"
                f"{limit:10.2f}{took:9.2f}{limit / took:7.0%}{in_parts / took:10.0%}"
                f"  {spent}",
                flush=True,
            )
    worst = max(rows, key=lambda row: row["took"] - row["limit"])
    kind = max([*KINDS, "everything else"], key=lambda kind: worst[kind])
    summary = (
        f"largest gap: {worst['phase']} of {worst['case']}, {worst['took'] - worst['limit']:.1f} s beyond its limit, "
        f"most of the time in {kind}"
    )
    print("\n" + summary)
    if settings.record:
        append("limit", {"GFLOP/s": products / 1e9, "GB/s": reads / 1e9}, rows, summary)


if __name__ == "__main__":
    main()
