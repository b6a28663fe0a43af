"""Two minutes on your own device before a long run: does every fast path give what its plain form gives?

    ./launch.sh check [--json FILE] [--rates FILE]        or (torchrun … -m) python -m benchmarks.check

On a tiny random model every fast path is held against its plain form, in values and gradients (check_paths.py); then
two rollouts and updates are run, a checkpoint is read back and the run goes on from one; the planner's peak is held
against the measured one; and the device's rates are measured, which `python -m grpo.plan --rates FILE` takes
(rates.py). One table: what differs, by how much, how much is allowed and why. Exit status 1 where more differs than is
allowed; below the table then stands what turns that path off. What it prints is what an issue should begin with.
"""

import gc
import io
import json
import math
import platform
import shutil
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from grpo.runtime.settings import read_settings, refuse_early, run_program, setting

PARTS = ("paths", "run", "memory", "rates")


@dataclass
class Settings:
    """Every fast path against its plain form, on this machine's own device; a run, a resume; memory; rates."""

    json: str = setting("", "file for all of it; empty for none", group="output")
    rates: str = setting("", "file for the measured rates, for grpo.plan --rates; empty for none", group="output")
    only: list[str] = setting(list(PARTS), f"parts, of {', '.join(PARTS)}; a path by its name in the table", top=True)
    dtype: str = setting(
        "auto",
        "what the run, its memory and the rates compute in. auto: as a run does",
        top=True,
        choices=("auto", "float32", "bfloat16"),
    )


refuse_early(Settings, __name__)

import torch
import transformers

from benchmarks import plan_check, rates
from benchmarks.check_paths import NONE, PATHS, ROUNDING, SHARDED, SIDE, FastPath, Found, Subject, write_checked
from benchmarks.record import machine
from benchmarks.shapes import WORD, write_model
from grpo.engine.weights import local
from grpo.runtime.checkpoints import state_tensors
from grpo.runtime.dist import all_gather, all_reduce_max, broadcast_from_rank_0, finish, rank, start, world_size
from grpo.runtime.files import write_json
from grpo.runtime.fsdp import compute_dtype
from grpo.runtime.log import say
from grpo.runtime.provenance import commit
from grpo.runtime.run import Run
from grpo.runtime.schedule import Curriculum
from grpo.train import Settings as TrainSettings
from grpo.train import Trainer, train
from grpo.variants import resolve


@dataclass
class Checked:
    """One line or several of the table: a path, and what was found, or why it could not be tried."""

    name: str
    against: str
    off: str
    found: list[Found] = field(default_factory=list)
    fault: str = ""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.fault and all(one.fits for one in self.found)


@contextmanager
def quietly():
    """What a run says is shown where it fails alone."""
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            yield
    except BaseException:
        print(said.getvalue()[-2000:], file=sys.stderr)
        raise


def in_one_line(error: Exception) -> str:
    """For the table; all of it for who reads on."""
    traceback.print_exc()
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def attempt(path: FastPath, subject) -> Checked:
    """The worst that any rank finds. What raises is red, and the next path is tried all the same."""
    checked = Checked(path.name, path.against, path.off)
    began = time.perf_counter()
    try:
        with quietly():
            checked.found = path.tried(subject)
    except Exception as error:
        checked.fault = in_one_line(error)
    checked.seconds = round(time.perf_counter() - began, 1)
    every = all_gather([checked])
    checked.fault = next((one.fault for one in every if one.fault), "")
    for index, one in enumerate(checked.found):
        worst = [other.found[index] for other in every if len(other.found) > index]
        checked.found[index] = max(worst, key=lambda found: (not found.fits, found.differs))
    return checked


# ── a run, and its resume ────────────────────────────────────────────────────────────────────────────────────────


def begin(subject: Subject, output: Path, dtype: str) -> tuple[Trainer, Curriculum]:
    """Two rollouts of two prompts a rank, two updates each, a checkpoint after each rollout."""
    settings = TrainSettings(
        model=str(subject.folder),
        data=f"{SIDE}/{f' {WORD}' * 8}",
        output=str(output),
        task="benchmarks.two_images",
        valid_split="",
        dtype=dtype,
        learning_rate=1e-4,
        max_rollouts=2,
        prompts_per_rollout=2 * world_size(),
        max_completion_tokens=16,
        checkpoint_every=1,
        rollout_log_groups=0,
        tensorboard="off",
        objective=resolve("more-r1", group_size=4, updates=2, beta=0.01),
    )
    run = Run(settings)
    return Trainer(run, settings), Curriculum(settings, run.load("train"), run.task.data.is_none)


def copied(place: Path, output: Path, steps: int) -> Path:
    """The run's folder as it was after so many rollouts."""

    def copy():
        shutil.copytree(place, output, ignore=shutil.ignore_patterns(".lock"))
        for path in (output / "checkpoints").iterdir():
            if int(path.name.removeprefix("step-")) > steps:
                shutil.rmtree(path)

    broadcast_from_rank_0(copy)
    return output


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What this rank holds of weights and moments."""
    tensors = state_tensors(trainer.policy, trainer.optimizer)
    return {name: local(tensor).detach().float().cpu().clone() for name, (_, tensor) in tensors.items()}


def furthest(one: dict, other: dict) -> float:
    """The largest difference of two states on any rank; ∞ where one has what the other lacks."""
    far = max(
        (float((one[name] - other[name]).abs().max()) for name in one if name in other and one[name].numel()),
        default=0.0,
    )
    return float(all_reduce_max(torch.tensor(far if one.keys() == other.keys() else float("inf"))))


def train_and_resume(subject: Subject, dtype: str) -> list[Found]:
    """Two rollouts with their updates; the last checkpoint read back; from the first one on, once more."""
    place, low = subject.place / "run", compute_dtype(dtype, subject.device) == torch.bfloat16
    trainer, curriculum = begin(subject, place, dtype)
    began = state(trainer)
    train(trainer, curriculum)
    ended = state(trainer)
    moved = furthest(began, {name: ended[name] for name in began})
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    apart = [line["sampling/sampling_logp_difference/mean"] for line in lines if "loss" in line]
    back, _ = begin(subject, copied(place, subject.place / "read", 2), dtype)
    again, rest = begin(subject, copied(place, subject.place / "resumed", 1), dtype)
    train(again, rest)
    exact = subject.device.type == "cpu"
    why = "the same operations in the same order" if exact else "a GPU's sums may take another order each time"
    return [
        Found(
            "sampler and scorer",
            max(apart),
            0.05 if low else 1e-4,
            "nats, mean",
            "bfloat16" if low else ROUNDING,
            off="--dtype float32" if low else NONE,
        ),
        Found("read back", furthest(state(back), ended), 0.0, "largest", "a file holds every bit"),
        Found(
            "resumed",
            furthest(state(again), ended) / moved if moved else math.nan,
            0.0 if exact else 0.05,
            "of the way",
            why,
        ),
    ]


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────


def planned_and_measured(subject: Subject, dtype: str) -> list[Found]:
    """The planner's peak of a real step of 107 million parameters. On a CPU it is measured in a process of its own."""
    gpu = subject.device.type != "cpu"
    name = "bfloat16" if compute_dtype(dtype, subject.device) == torch.bfloat16 else "plain"
    models, case = subject.place / "models", plan_check.CASES[name]
    broadcast_from_rank_0(lambda: [write_model(models / shape, shape) for shape in ("planned", "small")] and None)
    planned = plan_check.planned(models, case, world_size(), "gpu" if gpu else "cpu").peak
    measured = measured_here(models, case, subject) if gpu else plan_check.measure_apart(models, name)
    return [
        Found(
            "planned and measured peak",
            abs(planned / measured - 1),
            0.15 if gpu else plan_check.TOLERANCE,
            "of it",
            "small tensors are not counted",
            f"{planned / 1e6:.0f} MB planned, {measured / 1e6:.0f} measured",
            off="grpo.plan is wrong here: leave it more --spare",
        )
    ]


def measured_here(models: Path, case: plan_check.Case, subject: Subject) -> float:
    """Peak bytes beyond what a GPU held before, of the rank where it is largest. The allocator's holes are not in it,
    nor what libraries take at their first use."""
    warm = replace(case, prompt=60, side=112, completion=8)
    plan_check.step(*plan_check.prepare(models / "small", warm, subject.place / "warm"))
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    plan_check.step(*plan_check.prepare(models / "planned", case, subject.place / "step"))
    peak = torch.tensor(float(torch.cuda.max_memory_allocated() - before), device=subject.device)
    return float(all_reduce_max(peak))


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────


def header(device: torch.device, dtype: str) -> dict[str, str]:
    """What an issue must name."""
    name = machine()
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        name += f", {about.total_memory / 2**30:.1f} GiB, sm_{about.major}{about.minor}, CUDA {torch.version.cuda}"
    return {
        "device": name,
        "ranks": str(world_size()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": commit() or "no checkout",
        "--dtype": dtype + (f": {str(compute_dtype(dtype, device)).removeprefix('torch.')}" if dtype == "auto" else ""),
        "float32 products": torch.get_float32_matmul_precision(),
    }


def rows_of(checked: Checked) -> list[list[str]]:
    if checked.fault or not checked.found:
        return [[checked.name, checked.against, "", "", "", "FAILED" if checked.fault else "skipped", ""]]
    figures = [
        [one.what, f"{one.differs:.1e}", f"{one.allowed:.1e} {one.unit}", "ok" if one.fits else "DIFFERS", one.why]
        for one in checked.found
    ]
    return [[checked.name, checked.against, *figures[0]], *(["", "", *row] for row in figures[1:])]


def remedy(off: str) -> str:
    """What to do about a path that is red."""
    if not off:
        return "No setting turns it off: do not train on this device, and report it."
    return f"{off} turns it off." if off.startswith("--") else f"{off}."


def complaints(checked: Checked) -> list[str]:
    if checked.fault:
        return [f"{checked.name}: {checked.fault}. {remedy(checked.off)}"]
    return [
        f"{checked.name}, {one.what}: {one.differs:.2g} {one.unit}, {one.allowed:.2g} allowed"
        f"{f' ({one.where})' * bool(one.where)}. {remedy(one.off or checked.off)}"
        for one in checked.found
        if not one.fits
    ]


def outcome(every: list[Checked]) -> str:
    """The table; below it what to do about what is red."""
    rows = [["fast path", "against", "of it", "differs by", "allowed", "", "because"]]
    rows += [row for checked in every for row in rows_of(checked)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines = [lines[0], "  ".join("─" * width for width in widths), *lines[1:], ""]
    lines += [line for checked in every for line in complaints(checked)]
    tried = [checked for checked in every if checked.found or checked.fault]
    red, seconds = sum(not checked.ok for checked in tried), sum(checked.seconds for checked in tried)
    verdict = f"{red} of {len(tried)} are not as they should be" if red else f"all {len(tried)} are as they should be"
    return "\n".join([*lines, f"{verdict}, {seconds:.0f} s"])


def chosen(only: list[str], device: torch.device, dtype: str) -> list[FastPath]:
    """The paths of the parts asked for, or those of these names."""
    paths = [*PATHS, SHARDED] if world_size() > 1 else list(PATHS)
    run = FastPath("run, checkpoint, resume", "itself, uninterrupted", NONE, lambda s: train_and_resume(s, dtype))
    memory = FastPath("memory", "the planner", NONE, lambda s: planned_and_measured(s, dtype))
    if world_size() > 1 and device.type == "cpu":
        memory = FastPath("memory", "the planner", NONE, lambda s: [])
    known = {"paths": paths, "run": [run], "memory": [memory], "rates": []} | {path.name: [path] for path in paths}
    if unknown := [name for name in only if name not in known]:
        raise ValueError(f"--only {unknown[0]}: expected some of {', '.join(known)}")
    return list({path.name: path for name in only for path in known[name]}.values())


def measured_rates(settings: Settings, about: dict, device: torch.device) -> dict:
    """The content of --rates, said in one line; {} where they are not asked for."""
    if "rates" not in settings.only:
        return {}
    with quietly():
        found = {"device": about["device"], **rates.measure(device, settings.dtype)}
    figures = "  ".join(f"{name} {value:.3g}" for name, value in found["rates"].items())
    say(f"measured: {figures}  a launch {found['microseconds_of_a_launch']} µs")
    if settings.rates and rank() == 0:
        write_json(Path(settings.rates), found)
        say(f"wrote {settings.rates}: python -m grpo.plan --rates {settings.rates} takes them")
    return found


def check(settings: Settings, folder: Path) -> bool:
    """All that is asked for, said and written: whether it is as it should be."""
    device = start()
    torch.manual_seed(0)
    broadcast_from_rank_0(lambda: write_checked(folder / "model") and None)
    subject, about = Subject(folder, device), header(device, settings.dtype)
    paths = chosen(settings.only, device, settings.dtype)
    say("\n".join(f"{name:18}{value}" for name, value in about.items()) + "\n")
    every, fault, found = [attempt(path, subject) for path in paths], "", {}
    if every:
        say(outcome(every))
    try:
        found = measured_rates(settings, about, device)
    except Exception as error:
        say(f"rates: {(fault := in_one_line(error))}")
    ok = not fault and all(checked.ok for checked in every)
    if settings.json and rank() == 0:
        checks = [{**asdict(checked), "ok": checked.ok} for checked in every]
        write_json(Path(settings.json), {"header": about, "ok": ok, "rates": found or fault, "checks": checks})
    return ok


def main() -> None:
    settings = read_settings(Settings)
    start()
    folder = broadcast_from_rank_0(tempfile.mkdtemp)  # all ranks are of one machine
    try:
        ok = check(settings, Path(folder))
    finally:
        if rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
    finish()
    if not ok:
        sys.exit(1)


if __name__ == "__main__":
    run_program(main)
