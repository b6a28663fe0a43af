"""What the memory of real weights is spent on: one rank's, a machine's while it loads, an export's, a large group's.

    python -m benchmarks.memory [--cases load group offload] [--record]

Each line is measured on a CPU with a random model of more than 400 MB, in processes of their own, as bytes beyond what
the process held when it had done the same with a small model. Beside it stand what it is held against, the bound that
is promised, and what grpo.plan says. Pages of mapped files are not counted: the system takes them back when it needs
room. Every block of 128 kB and more is given back when it is freed, so that what is counted are tensors.

load      a rank that trains everything (float32 masters and the reference), or an adapter on frozen weights: what it
          holds, the peak of all ranks together while they load, the peak of a step, the peak of an export, which
          holds the tensors of one file (here all there are, in float32)
group     activations of one update on G completions of 1,024 tokens each, with --tokens_per_pass for four of them
offload   an optimizer's step whose moments wait in host memory. A CPU has no memory but the host's: files that are
          mapped stand for it here, and what is counted is the device's

At the end, what grpo.plan says of the published models: prompts of 1,500 tokens, completions of 1,024, 16 × 8, rank 64,
--gradient_checkpointing True.
"""

import argparse
import gc
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.plan_check import GIVE_BACK, OBJECTIVE, Case, prepare, step
from benchmarks.record import PeakMemory, append, on_ranks
from benchmarks.shapes import MODELS, PUBLISHED, write_model

RANK = 64
FULL, WARM = Case(240, 112, 32), dict(prompt=60, side=112, completion=8)
GROUP = Case(240, 112, 1024, lora_rank=16, tokens_per_pass=240 + 4 * 1024)
LOADS = {"everything": FULL, "adapter, float32": replace(FULL, lora_rank=RANK),
         "adapter, bfloat16": replace(FULL, lora_rank=RANK, dtype="bfloat16")}
ADAPTER = "adapter, bfloat16"
# published model, GPUs, rank of an adapter: GiB that are promised, and that were planned before these parts
REAL = {("3B", 1, RANK): (16.0, 23.0), ("7B", 1, RANK): (29.0, 58.0), ("7B", 8, 0): (29.8, 31.8)}


# ── measured, in a process of its own ────────────────────────────────────────────────────────────────────────────


def trimmed(memory: PeakMemory) -> int:
    """Anonymous bytes that are held now."""
    gc.collect()
    memory.start()
    return memory.read("RssAnon")


def load(models: Path, output: Path, name: str) -> dict:
    """Bytes of one rank: held once it is loaded, peak until then, of a step, of an export over what it began with."""
    from grpo.runtime.dist import world_size

    case, memory, once = LOADS[name], PeakMemory(), {"objective": {"updates": 1}}
    trainer, samples = prepare(models / "small", replace(case, **WARM), output / "small", **once)
    step(trainer, samples)
    trainer.run.save()
    del trainer, samples
    before = trimmed(memory)
    with memory.sampled():
        trainer, samples = prepare(models / "planned", case, output / "planned", **once)
    found = {"peak": memory.most - before, "held": trimmed(memory) - before}
    if case.lora_rank and world_size() == 1:
        step(trainer, samples)
        found["step"] = memory.read("VmHWM") - memory.before + found["held"]
    start = trimmed(memory)
    with memory.sampled():
        trainer.run.save()
    return {**found, "export": memory.most - start}


def group(models: Path, output: Path, size: int) -> dict:
    """Peak of one update on a group, over what is held before."""
    import torch

    from grpo.group import Group
    from grpo.runtime.fsdp import encode_images_unsharded
    from grpo.runtime.optim import equal_passes

    def update(folder: Path, case: Case, count: int) -> int:
        trainer, samples = prepare(folder, case, output / folder.name,
                                   objective={"group_size": count, "beta": 0.0})
        prompts = trainer.run.prompts.short_enough(samples[:1], case.prompt)
        encode_images_unsharded(trainer.policy, prompts)
        ids, rewards = range(40), torch.arange(count, dtype=torch.float64)
        made = [torch.tensor([ids[(i + j) % len(ids)] for j in range(case.completion)]) for i in range(count)]
        one = Group(prompts[0], made, [torch.zeros(case.completion)] * count, [True] * count, rewards[:, None], rewards)
        memory, packs = PeakMemory(), equal_passes(trainer.pack([one]), trainer.run.device)
        trimmed(memory)
        trainer.fill_advantages(packs)
        trainer.update(packs, [1e-6])
        return memory.beyond()

    update(models / "small", replace(GROUP, **WARM), 8)
    return {"activations": update(models / "table", GROUP, size)}


def offload(models: Path, output: Path, on: bool) -> dict:
    """Peak of a step's anonymous memory, over what a process holds that has loaded nothing."""
    import torch

    from grpo.runtime import memory as product

    moves = iter(range(10**6))  # in turns: to the device, and back

    def move(state: dict, parameter, device) -> None:
        """In move_state's place: between this process's own memory and mapped files."""
        number = next(moves)
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                path = str(output / f"{number} {name}")
                state[name] = torch.from_file(path, shared=True, size=value.numel()).view(value.shape).copy_(
                    value) if number % 2 else value.clone()

    product.move_state = move
    memory, rates = PeakMemory(), {"objective": {"beta": 0.0}, "offload_optimizer": on}
    step(*prepare(models / "small", replace(FULL, **WARM), output / "small", **rates))
    before = trimmed(memory)
    trainer, _ = prepare(models / "planned", FULL, output / "planned", **rates)
    most = 0
    for _ in range(2):  # the first makes the moments
        for parameter in trainer.policy.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3) if parameter.requires_grad else None
        with memory.sampled():
            trainer.optimizer.step()
        most = memory.most
    return {"step": most - before}


# ── planned ──────────────────────────────────────────────────────────────────────────────────────────────────────


def plan_of(folder: Path, case: Case, ranks: int = 1, **more):
    from grpo.plan.__main__ import Settings, plan
    from grpo.plan.costs import read_shape

    shape = read_shape(str(folder))
    shape = replace(shape, vocabulary=more.pop("vocabulary", shape.vocabulary))
    told = {**OBJECTIVE, **case.settings(), "prompt_tokens": case.prompt, "image_tokens": 2 * (case.side // 28) ** 2,
            "device": "cpu", "gpus": [ranks], **more}
    return plan(shape, Settings(model=str(folder), **told), ranks)


def phase(one, name: str) -> float:
    return sum(one.phases[name].values())


def published(folder: Path) -> list[dict]:
    """The plans of the published models beside what is promised and what they were."""
    rows = []
    for (name, gpus, rank), (promised, was) in REAL.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(PUBLISHED[name]))
        case = Case(1500, 28, 1024, gradient_checkpointing=True, lora_rank=rank, tokens_per_pass=16384, dtype="auto")
        one = plan_of(path, case, gpus, device="gpu", image_tokens=1000, prompts_per_rollout=16, group_size=8)
        rows.append(row(f"{name} {f'with an adapter of rank {rank}' if rank else 'in full'}, {gpus} GPUs", gpus,
                        None, was * 2**30, promised / was, one.peak, "planned before"))
    return rows


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────


def row(what: str, ranks: int, measured, against: float, promised, planned=None, name: str = "") -> dict:
    """One line: bytes, what they are held against and the share of it that is promised."""
    found = planned if measured is None else measured
    return {"what": what, "ranks": ranks, "measured_bytes": measured, "against": name, "against_bytes": against,
            "share": found / against, "promised": promised, "planned_bytes": planned}


def in_one_line(one: dict) -> str:
    number = lambda name: "" if one[name] is None else f"{one[name] / 1e6:,.0f}"
    promised = "" if one["promised"] is None else f"{one['promised']:.2f}"
    return (f"{one['what']:44}{one['ranks']:3}{number('measured_bytes'):>10}{number('against_bytes'):>9} "
            f"{one['against']:28}{one['share']:6.2f}{promised:>6}{number('planned_bytes'):>9}")


def load_rows(measure, models: Path) -> list[dict]:
    rows, folder = [], models / "planned"
    weights = (folder / "model.safetensors").stat().st_size
    alone = {name: measure("load", name, 1) for name in LOADS}
    for name, ranks, found in [*((name, 1, alone[name]) for name in LOADS),
                               *((name, 2, measure("load", name, 2)) for name in ("everything", ADAPTER))]:
        plan, held = plan_of(folder, LOADS[name], ranks), sum(one["held"] for one in found)
        if name == ADAPTER and ranks == 1:
            before = alone["adapter, float32"][0]
            rows.append(row(f"{name}: held", 1, held, before["held"], 0.55, phase(plan, "loading"), "in float32"))
            rows.append(row(f"{name}: a step", 1, found[0]["step"], before["step"], None, plan.peak, "in float32"))
        rows.append(row(f"{name}: while it loads", ranks, sum(one["peak"] for one in found), held, 1.3,
                        ranks * phase(plan, "loading"), "what all ranks keep"))
        rows.append(row(f"{name}: export, over before", ranks, sum(one["export"] for one in found), weights, 1.1, None,
                        "one file, 5 GB at most"))
    return rows


def group_rows(measure, models: Path) -> list[dict]:
    from grpo.engine.encode import load_tokenizer, vocabulary_size

    few, many = (measure("group", size, 1)[0]["activations"] for size in (8, 64))
    rows = vocabulary_size(load_tokenizer(str(models / "table")))  # the head is not multiplied with others
    activations = lambda size, **more: sum(plan_of(
        models / "table", GROUP, group_size=size, prompts_per_rollout=1, vocabulary=rows, **more).phases["passes"][part]
        for part in ("activations", "caches", "head", "gradients"))
    return [row(f"G = {size}: activations", 1, found, activations(size, tokens_per_pass=10**6), None,
                activations(size), "planned in one pass") for size, found in ((8, few), (64, many))
            ] + [row("G = 64: activations", 1, many, few, 1.1, activations(64), "G = 8")]


def offload_rows(measure, models: Path) -> list[dict]:
    here, there = (measure("offload", on, 1)[0]["step"] for on in (0, 1))
    planned = [phase(plan_of(models / "planned", FULL, device="gpu", beta=0.0, offload_optimizer=on), "step")
               for on in (False, True)]
    return [row("optimizer's step, moments here", 1, here, here, None, planned[0], "itself"),
            row("optimizer's step, moments wait", 1, there, here, 0.65, planned[1], "moments here")]


ROWS = {"load": load_rows, "group": group_rows, "offload": offload_rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--measure", nargs=2, help="only this: a case and its detail, in this process, as JSON")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder for the random checkpoints")
    parser.add_argument("--output", type=Path, help="folder for what --measure writes")
    parser.add_argument("--record", action="store_true", help="append the figures to results.jsonl")
    settings = parser.parse_args()
    models = settings.models.absolute()
    if settings.measure:
        from grpo.runtime.dist import finish

        case, detail = settings.measure
        detail = detail if case == "load" else int(detail)
        print(json.dumps(globals()[case](models, settings.output, detail)))
        return finish()
    for shape in ("planned", "table", "small"):
        write_model(models / shape, shape)

    def measure(case: str, detail, ranks: int) -> list[dict]:
        with tempfile.TemporaryDirectory() as output:
            words = ["--measure", case, detail, "--models", models, "--output", output]
            return on_ranks("benchmarks.memory", words, ranks, GIVE_BACK)

    print(f"{'':44}{'ranks':>3}{'MB':>8}{'against':>9} {'':28}{'share':>6}{'most':>6}{'planned':>9}")
    rows = []
    for name in settings.cases:
        for one in ROWS[name](measure, models):
            print(in_one_line(one), flush=True)
            rows.append(one)
    with tempfile.TemporaryDirectory() as folder:
        for one in published(Path(folder)):
            print(in_one_line(one))
            rows.append(one)
    broken = [one["what"] for one in rows if one["promised"] is not None and one["share"] > one["promised"]]
    summary = f"more than promised: {', '.join(broken)}" if broken else "nothing takes more than promised"
    print(summary)
    if settings.record:
        append("memory", {"cases": " ".join(settings.cases)}, rows, summary)


if __name__ == "__main__":
    main()
