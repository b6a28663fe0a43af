"""What a run of Stage 2 needs, before a GPU is rented: memory of each phase, seconds of each step, from config.json.

    python -m grpo.plan --model Qwen/Qwen2.5-VL-7B-Instruct --gpus 1 2 4 8

What does not fit is followed by the settings that make it fit, each tried in the same arithmetic. No weights are
downloaded and no GPU is asked: costs.py counts the bytes, step_time.py the seconds."""

import itertools
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data.read import read_object, shown
from grpo.plan.costs import COMPONENTS, PHASES, Costs, Shape, read_shape, total
from grpo.plan.step_time import seconds
from grpo.runtime.files import write_json
from grpo.runtime.log import say, table
from grpo.runtime.settings import check_values, options, read_settings, required, run_program, setting
from grpo.settings import Settings as TrainSettings, check_pass

GIB = 2**30
MOST_SUGGESTIONS = 4
MOST_CHANGES = 4  # settings of one suggestion
machine, rate = partial(setting, group="machine"), partial(setting, group="rates", above=0)
TRAINED = {option.name: option for option in options(TrainSettings())}


def as_trained(name: str, **more):
    """A setting of grpo.train: its default, bounds and help text; `more` replaces any of these."""
    return setting(TRAINED[name].value, **{**TRAINED[name].about, **more})


@dataclass
class Settings:
    """Plan Stage 2. Settings that grpo.train has too mean the same here; the defaults are its own."""

    model: str = required("checkpoint folder, its config.json, or hub name; no weights are read", path="model")
    gpus: list[int] = setting([1, 2, 4, 8, 16, 32, 64], "numbers of GPUs to plan for", top=True)
    device: str = machine("gpu", "what a rank computes on; cpu: --gpus counts ranks", choices=("gpu", "cpu"))
    gpu_memory: float = machine(80.0, "GiB of one GPU", top=True, above=0)
    spare: float = machine(4.0, "GiB of them for CUDA context, communication and the allocator's gaps", least=0)
    gpus_per_machine: int = machine(8, "GPUs that --link joins", least=1)
    tflops: float = rate(989.0, "peak of one GPU's matrix products, 10¹² operations/s (H100 SXM, dense bfloat16)")
    efficiency: float = rate(0.4, "assumed share of that peak which training and prefill reach")
    bandwidth: float = rate(3350.0, "of one GPU's memory, GB/s (H100 SXM)")
    memory_efficiency: float = rate(0.4, "assumed share of that bandwidth which decoding reaches (RESULTS.md, gpu)")
    link: float = rate(450.0, "between GPUs of one machine, GB/s received by each (NVLink of an H100)")
    network: float = rate(50.0, "between GPUs of different machines, GB/s received by each (400 Gb/s)")
    host_link: float = rate(50.0, "between a GPU and its host's memory, GB/s (PCIe 5)")
    rates: str = setting("", "file that ./launch.sh check --rates writes: its measured rates take the places of the "
                             "assumed ones that are not given", path="file", group="rates")
    prompt_tokens: int = setting(1500, "of a prompt, its images included: the longest counts", top=True, least=1)
    image_tokens: int = setting(1000, "of them from images", top=True, least=0)
    max_completion_tokens: int = as_trained("max_completion_tokens", help="of every completion: all at the limit")
    group_size: int = as_trained("group_size", least=1, help="completions a prompt; 1, with --beta 0: SFT, evaluation")
    prompts_per_rollout: int = as_trained("prompts_per_rollout", help="over all ranks; made a multiple of the GPUs")
    updates: int = as_trained("updates", group="settings of grpo.train")
    beta: float = as_trained("beta")
    rollout_rows: int = as_trained("rollout_rows")
    tokens_per_pass: int = as_trained("tokens_per_pass")
    dtype: str = as_trained("dtype", help="what is computed in. auto: bfloat16 on a GPU, float32 on a CPU",
                            choices=("auto", "float32", "bfloat16"))
    gradient_checkpointing: bool = as_trained("gradient_checkpointing")
    lora_rank: int = as_trained("lora_rank", help="train an adapter of this rank instead of the weights; 0 for none")
    lora_targets: str = as_trained("lora_targets")
    offload_reference: bool = as_trained("offload_reference")
    offload_optimizer: bool = as_trained("offload_optimizer")
    shard_size: int = as_trained("shard_size")
    rollout_weights: str = as_trained("rollout_weights")
    json: str = setting("", "file for all the numbers; empty for none", group="output")

    def check(self) -> None:
        check_pass(self)
        if min(self.gpus, default=0) < 1:
            raise ValueError(f"--gpus is {' '.join(map(str, self.gpus)) or 'empty'}; expected numbers from 1")
        for less, more in (("image_tokens", "prompt_tokens"), ("spare", "gpu_memory")):
            if getattr(self, less) >= (most := getattr(self, more)):
                raise ValueError(f"--{less} is {getattr(self, less)}; it must be below --{more} {most}")
        for gpus in self.gpus:
            if self.shard_size and max(gpus, self.shard_size) % min(gpus, self.shard_size):
                raise ValueError(f"--shard_size is {self.shard_size}; {gpus} GPUs are no multiple of it")


def with_rates(s: Settings) -> Settings:
    """The settings with what was measured in the place of every rate that stands at its default."""
    known = [one.name for one in options(s) if one.title == "rates" and one.type is float]
    expected = f"what ./launch.sh check --rates writes, numbers for {', '.join(known)}"
    found = read_object(s.rates, expected).get("rates")
    if not isinstance(found, dict) or set(found) - set(known) or {type(x) for x in found.values()} - {int, float}:
        raise ValueError(f"{s.rates}: found {shown(found)} for its rates; expected {expected}")
    s = replace(s, **{name: float(x) for name, x in found.items() if getattr(s, name) == getattr(Settings, name)})
    check_values(s)
    return s


@dataclass
class Plan:
    """One number of GPUs: bytes by phase and component, the highest of them and the limit, seconds by phase."""

    gpus: int
    prompts: int
    phases: dict[str, dict[str, float]]
    host: dict[str, float]
    seconds: dict[str, float]
    bound: str
    peak_phase: str
    peak: float
    limit: float
    fits: bool


def plan(shape: Shape, s: Settings, gpus: int) -> Plan:
    if s.rollout_weights == "auto":
        whole, layers = (plan(shape, replace(s, rollout_weights=how), gpus) for how in ("whole", "layers"))
        return whole if whole.fits else layers
    costs, limit = Costs(shape, s, gpus), (s.gpu_memory - s.spare) * GIB
    phases = costs.memory()
    highest = max(phases, key=lambda name: total(phases[name]))
    peak = total(phases[highest])
    return Plan(gpus, costs.prompts * gpus, phases, costs.host(), *seconds(costs), highest, peak, limit, peak <= limit)


def moves(s: Settings, gpus: int) -> list[tuple[str, object]]:
    """Single changes worth trying: settings that cost time, then more GPUs, then an adapter, which learns otherwise."""
    halves = lambda value, least: [value >> times for times in range(1, 12) if value >> times >= least]
    least = s.prompt_tokens + s.max_completion_tokens  # a pass holds at least one completion
    tried = [("gradient_checkpointing", True), ("offload_optimizer", True), ("rollout_weights", "layers"),
             ("offload_reference", bool(s.beta and not s.lora_rank))]
    tried = [(name, value) for name, value in tried if value and getattr(s, name) != value]
    tried += [("tokens_per_pass", value) for value in halves(s.tokens_per_pass, least)[:3]]
    tried += [("rollout_rows", value) for value in halves(s.rollout_rows, 4)[:4]]
    tried += [("gpus", count) for count in (2, 4, 8, 16, 32, 64) if count > gpus]
    return tried + ([] if s.lora_rank else [("lora_rank", 64)])


class Suggestion(NamedTuple):
    """Changes that together make a plan fit, none of them in vain."""

    changes: tuple[tuple[str, object], ...]
    plan: Plan

    def cost(self) -> tuple:
        """Few changes first; of as many, an adapter last; then by GPU-seconds."""
        return len(self.changes), "lora_rank" in dict(self.changes), self.plan.gpus * sum(self.plan.seconds.values())


def changed(shape: Shape, s: Settings, gpus: int, changes) -> Plan:
    other = {"gpus": gpus, **dict(changes)}
    return plan(shape, replace(s, **{name: value for name, value in other.items() if name != "gpus"}), other["gpus"])


def suggestions(shape: Shape, s: Settings, gpus: int) -> list[Suggestion]:
    """The least costly changes that make it fit, each found by planning anew. Of a setting with several values only
    the first that does is kept; what contains a set that fits already is left out."""
    found: list[Suggestion] = []
    for size in range(1, MOST_CHANGES + 1):
        for changes in itertools.combinations(moves(s, gpus), size):
            if len(dict(changes)) < size or any(dict(old.changes).keys() <= dict(changes).keys() for old in found):
                continue
            if (new := changed(shape, s, gpus, changes)).fits:
                found.append(Suggestion(changes, new))
    return sorted(found, key=Suggestion.cost)[:MOST_SUGGESTIONS]


def by_phase(one: Plan) -> str:
    parts = [part for part in COMPONENTS if any(phase[part] for phase in one.phases.values())]
    rows = [["phase", *parts, "all", "fits"]]
    for name, phase in one.phases.items():
        rows.append([name, *(f"{phase[part] / GIB:.1f}" if phase[part] else "" for part in parts),
                     f"{total(phase) / GIB:.1f}", "yes" if total(phase) <= one.limit else "no"])
    return table(rows)


def by_gpus(plans: list[Plan]) -> str:
    rows = ["GPUs|prompts|peak, GiB|in phase|fits|rollout, s|reference, s|update, s|step, s|waits for".split("|")]
    for one in plans:
        rows.append([one.gpus, one.prompts, f"{one.peak / GIB:.1f}", one.peak_phase, "yes" if one.fits else "no",
                     *(f"{value:.3g}" for value in (*one.seconds.values(), sum(one.seconds.values()))), one.bound])
    return table(rows)


def advice(shape: Shape, s: Settings, one: Plan) -> list[str]:
    too_large = [name for name in PHASES if total(one.phases[name]) > one.limit]
    found = suggestions(shape, s, one.gpus)
    lines = [f"{one.gpus} {devices(s, one.gpus)}: {', '.join(too_large)} need{'s' * (len(too_large) == 1)} more than "
             f"{one.limit / GIB:.0f} GiB. "
             + ("It would fit with" if found else f"No {MOST_CHANGES} of the settings tried make it fit.")]
    for new in found:
        words = " ".join(f"--{name} {value}" for name, value in new.changes)
        lines.append(f"  {words}: {new.plan.peak / GIB:.1f} GiB, {sum(new.plan.seconds.values()):.3g} s a step")
    return lines


def devices(s: Settings, count: int) -> str:
    return {"gpu": "GPU", "cpu": "CPU process"}[s.device] + ("" if count == 1 else "s" if s.device == "gpu" else "es")


def report(shape: Shape, s: Settings, plans: list[Plan]) -> str:
    """One number of GPUs in full, the smallest that fits or else the largest; then all; then what would help."""
    shown = next((one for one in plans if one.fits), plans[-1])
    machine = min(shown.gpus, s.gpus_per_machine)
    parts = [f"{s.model}: {shape.total / 1e9:.3f} billion parameters, "
        f"{Costs(shape, s, 1).trained / 1e9:.3f} billion of them train",
        f"{shown.gpus} {devices(s, shown.gpus)}, GiB on each, {shown.limit / GIB:.0f} to be had\n" + by_phase(shown),
        f"host memory of a machine: {shown.host['loading'] * machine / GIB:.0f} GiB while it loads, "
        f"{shown.host['waiting'] * machine / GIB:.0f} for what waits there, "
        f"{shown.host['checkpoint'] * machine / GIB:.0f} more while a checkpoint is written",
        f"a step is one rollout and {s.updates} updates"
        f"{f', at the rates measured in {s.rates}' * bool(s.rates)}\n{by_gpus(plans)}"]
    return "\n\n".join(parts + ["\n".join(advice(shape, s, one)) for one in plans if not one.fits])


def main() -> None:
    s = read_settings(Settings)
    s = with_rates(s) if s.rates else s
    shape = read_shape(s.model)
    if not shape.vision:
        s.image_tokens = 0  # of a model that reads text alone
    plans = [plan(shape, s, gpus) for gpus in sorted(set(s.gpus))]
    say(report(shape, s, plans))
    if s.json:
        write_json(Path(s.json), {"settings": asdict(s), "shape": asdict(shape), "plans": list(map(asdict, plans))})


if __name__ == "__main__":
    run_program(main)
