"""How `sample` and `score` grow with G and with the prompt: the prompt's share is paid once, each completion's is flat.

    python -m benchmarks.growth [--record]

The middle shape, 32 new tokens a completion, float32. `score` is forward and backward. The table shows seconds and the
memory beyond what the process held before; below it, what the figures say: seconds for a prompt (G = 1 beyond the
completion's own) and for each further completion, between G = 1 and 8 and between 8 and 64. Draws
benchmarks/growth.svg.
"""

import argparse
import time
from pathlib import Path

from benchmarks.record import PeakMemory, append
from benchmarks.shapes import MODELS, images, whole_vocabulary, words_for, write_model
from grpo.engine.encode import Encoder
from grpo.engine.rollout import Sampling, sample
from grpo.engine.weights import load_policy

SIZES, PROMPTS, TOKENS = (1, 2, 4, 8, 16, 32, 64), (100, 300, 1000, 3000), 32
COLORS = ("#3b6fb6", "#2a9d8f", "#e09f3e", "#c8553d")


def measure(policy, prompt, size: int, repeats: int) -> dict:
    """Best seconds and extra bytes of both verbs for one prompt and `size` completions."""
    row = {"prompt": len(prompt), "G": size}
    for verb in ("sample", "score"):
        best, most = float("inf"), 0
        for _ in range(repeats):
            memory, start = PeakMemory(), time.perf_counter()
            memory.start()
            if verb == "sample":
                groups = sample(policy, [prompt], size, Sampling(TOKENS, (), rows=64))
            else:
                policy.score(groups).logp.sum().backward()
                policy.zero_grad(set_to_none=True)
            best, most = min(best, time.perf_counter() - start), max(most, memory.beyond())
        row |= {f"{verb}_seconds": best, f"{verb}_bytes": most}
    return row


def slopes(rows: list[dict], verb: str) -> dict[int, tuple[float, float, float]]:
    """Prompt length → seconds of the prompt alone, of a further completion up to G = 8, of one beyond."""
    found = {}
    for length in sorted({row["prompt"] for row in rows}):
        at = {row["G"]: row[f"{verb}_seconds"] for row in rows if row["prompt"] == length}
        early, late = (at[8] - at[1]) / 7, (at[64] - at[8]) / 56
        found[length] = (at[1] - early, early, late)
    return found


def plot(rows: list[dict], path: Path) -> None:
    """Two panels of lines, seconds over G, one line a prompt length; the dashed one is what G prompts would cost."""
    width, height, left, bottom = 420, 300, 52, 40
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * width}" height="{height + 24}" '
             f'font-family="system-ui, sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>']
    for panel, verb in enumerate(("sample", "score")):
        top = 1.05 * max(row[f"{verb}_seconds"] for row in rows)
        across = lambda size: panel * width + left + (width - left - 16) * size / 64
        down = lambda seconds: 28 + (height - bottom - 28) * (1 - seconds / top)
        parts.append(f'<text x="{across(0)}" y="16" font-weight="600">{verb}: seconds over G</text>')
        for size in (1, 16, 32, 48, 64):
            parts.append(f'<text x="{across(size)}" y="{height - 20}" text-anchor="middle" fill="#555">{size}</text>')
        for share in (0, 0.25, 0.5, 0.75, 1):
            y = down(share * top)
            parts.append(
                f'<line x1="{across(0)}" x2="{across(64)}" y1="{y}" y2="{y}" stroke="#ddd"/>'
                f'<text x="{across(0) - 6}" y="{y + 4}" text-anchor="end" fill="#555">{share * top:.2g}</text>'
            )
        for color, length in zip(COLORS, PROMPTS):
            line = [(row["G"], row[f"{verb}_seconds"]) for row in rows if row["prompt"] == length]
            points = " ".join(f"{across(size):.1f},{down(seconds):.1f}" for size, seconds in line)
            repeated = line[0][1]  # G times the cost of one prompt and one completion, until it leaves the panel
            end = min(64, top / repeated)
            parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>'
                         f'<line x1="{across(0)}" y1="{down(0)}" x2="{across(end)}" y2="{down(end * repeated)}" '
                         f'stroke="{color}" stroke-dasharray="2 4"/>')
    for place, (color, length) in enumerate(zip(COLORS, PROMPTS)):
        parts.append(f'<text x="{left + 130 * place}" y="{height + 8}" fill="{color}">— prompt {length}</text>')
    parts.append(f'<text x="{left + 130 * 4}" y="{height + 8}" fill="#555">··· G times a group of one</text></svg>')
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="middle")
    parser.add_argument("--repeats", type=int, default=2, help="of each point; the best counts")
    parser.add_argument("--record", action="store_true", help="append the figures to results.jsonl and draw growth.svg")
    settings = parser.parse_args()
    folder = str(write_model(MODELS / settings.shape, settings.shape))
    whole_vocabulary()
    encoder, policy = Encoder(folder), load_policy(folder)
    policy.freeze_vision()
    rows = []
    print(f"{'prompt':>8}{'G':>5}{'sample, s':>11}{'MB':>8}{'score, s':>11}{'MB':>8}")
    for length in PROMPTS:
        side = 112 if length == 100 else 224
        prompt = encoder.encode(images(0, side), words_for(encoder, length, side), None, "prompt")
        policy.keep_image_features([prompt])
        measure(policy, prompt, 1, 1)  # what happens once
        for size in SIZES:
            row = measure(policy, prompt, size, settings.repeats)
            rows.append(row)
            print(f"{length:8}{size:5}{row['sample_seconds']:11.2f}{row['sample_bytes'] / 1e6:8.0f}"
                  f"{row['score_seconds']:11.2f}{row['score_bytes'] / 1e6:8.0f}", flush=True)
    summary = []
    for verb in ("sample", "score"):
        for length, (prompt, early, late) in slopes(rows, verb).items():
            summary.append(f"{verb}, prompt {length}: the prompt {prompt * 1e3:.0f} ms once, a further completion "
                           f"{early * 1e3:.1f} ms up to G = 8, {late * 1e3:.1f} ms beyond")
    print("\n".join(summary))
    if settings.record:
        append("growth", {"shape": settings.shape, "tokens": TOKENS}, rows, "; ".join(summary))
        plot(rows, Path(__file__).with_suffix(".svg"))


if __name__ == "__main__":
    main()
