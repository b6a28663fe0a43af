"""Does a run survive for long? 500 rollouts of GRPO on a tiny model, once undisturbed and once with random kills.

    python -m benchmarks.soak

Two processes under torchrun; in the disturbed run a random one is killed (−9) every 20 to 60 seconds, whatever it is
doing, and torchrun starts both again. Nothing is lost if both runs end with the same weights, to the bit, and the same
lines in metrics.jsonl. Memory is flat if no process ever takes 5% more than the most it took in the first 200 rollouts
of the undisturbed run: four passes over the data and two validations.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors import safe_open

from benchmarks.record import append

WORLD = "--train 200 --valid 8 --test 4"
RUN = (
    "--learning_rate 1e-4 --prompts_per_rollout 4 --group_size 4 --max_completion_tokens 32 "
    "--reward_options min_length=60 "
    "--validate_every 100 --epochs 40 --rollout_log_every 20"
)
TIMES = {"step_time", *(f"seconds/{phase}" for phase in ("rollout", "reference", "advantage", "update", "rollout_log"))}
WARM = 200  # rollouts until memory should be what it will be


def torchrun(words: list, log: Path, restarts: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", str(restarts),
               "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "grpo.train", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(command, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def resident(pid: int) -> int:
    """Bytes; 0 where the process is no more."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def rollouts_done(output: Path) -> int:
    path = output / "metrics.jsonl"
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def go(words: list, output: Path, rng: random.Random | None) -> dict:
    """Run to the end, with kills where a generator is given: seconds, kills, [(rollout, largest resident set)]."""
    words = [*words, "--output", output]
    start, kills, memory = time.monotonic(), 0, []
    process = torchrun(words, output.with_suffix(".log"), restarts=1000)
    next_kill = time.monotonic() + (rng.uniform(20, 60) if rng else float("inf"))
    while process.poll() is None:
        time.sleep(0.25)
        step, workers = rollouts_done(output), children(process.pid)
        memory.append((step, max(map(resident, workers), default=0)))
        if time.monotonic() > next_kill and workers:
            victim = rng.choice(workers)
            os.kill(victim, signal.SIGKILL)
            kills += 1
            next_kill = time.monotonic() + rng.uniform(20, 60)
    if process.returncode:
        raise RuntimeError(f"ended with {process.returncode}; {output.with_suffix('.log')} says why")
    return {"seconds": round(time.monotonic() - start), "kills": kills, "memory": memory}


def peaks(memory: list, every: int = 100) -> str:
    """MB, the most in each hundred rollouts."""
    return " ".join(f"{max(size for _, size in part) / 1e6:.0f}" for n in range(0, memory[-1][0] + 1, every)
                    if (part := [point for point in memory if n <= point[0] < n + every and point[1]]))


def most(memory: list) -> int:
    return max(size for _, size in memory)


def lines(output: Path) -> list[dict]:
    every = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in every]


def same_weights(one: Path, other: Path) -> bool:
    files = [safe_open(output / "model" / "model.safetensors", "pt") for output in (one, other)]
    return all(files[0].get_tensor(name).equal(files[1].get_tensor(name)) for name in files[0].keys())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--record", action="store_true", help="append the figures to results.jsonl")
    settings = parser.parse_args()
    home = Path(tempfile.mkdtemp())
    world = home / "world"
    subprocess.run([sys.executable, "-m", "data.toy", "--output", world, *WORLD.split()], check=True)
    words = ["--model", world / "model", "--data", world / "MORE", "--max_rollouts", settings.rollouts, *RUN.split()]
    calm = go(words + ["--checkpoint_every", 0], home / "calm", None)
    wild = go(words + ["--checkpoint_every", 5], home / "wild", random.Random(settings.seed))
    steps = [line["step"] for line in lines(home / "wild")]
    lost = {
        "missing": len(set(range(settings.rollouts + 1)) - set(steps)),
        "double": len(steps) - len(set(steps)),
        "same metrics": lines(home / "calm") == lines(home / "wild"),
        "same weights": same_weights(home / "calm", home / "wild"),
    }
    warm = max(size for step, size in calm["memory"] if step <= WARM)
    rows = [
        {
            "run": name,
            "seconds": run["seconds"],
            "kills": run["kills"],
            "growth": most(run["memory"]) / warm - 1,
            "peak in each 100 rollouts, MB": peaks(run["memory"]),
        }
        for name, run in (("undisturbed", calm), ("random kills", wild))
    ]
    summary = ", ".join(f"{name} {value}" for name, value in lost.items())
    for row in rows:
        print(row)
    if settings.record:
        append("soak", {"rollouts": settings.rollouts, "processes": 2}, rows, summary)
    print(summary)
    flat = max(row["growth"] for row in rows) <= 0.05
    if lost["missing"] or lost["double"] or not lost["same metrics"] or not lost["same weights"] or not flat:
        sys.exit("not what was promised")


if __name__ == "__main__":
    main()
