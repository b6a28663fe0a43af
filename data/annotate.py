"""Cold-start data: draw a share of every stratum, take the expert's responses, keep those that hold up.

    python -m data.annotate --task more --data MORE --split train --fraction 0.25 --seed 0 \\
        --expert file:expert.jsonl --output cold_start.jsonl

writes beside each other
    cold_start.jsonl         {"id", "response"} a line: what Stage 1 learns from
    cold_start.drawn.json    the ids drawn, filtered out or not: the split and Stage 2 leave all of them out
    cold_start.report.json   how many were drawn and kept, how many fell for which reason, and ten of those
"""
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.curriculum import stratified_draw
from data.task import Task, resolve_task
from grpo.journal import say, table, write_json
from grpo.settings import parse, required, run_program, setting

EXAMPLES = 10
Expert = Callable[[list], dict[str, str]]  # samples -> response by sample id, where there is one


@dataclass
class Settings:
    """Cold-start data for Stage 1. The defaults are MORE-R1's."""

    data: str = required("folder of the task's dataset")
    expert: str = required("whose responses: file:PATH, a JSONL of {id, response} for the samples drawn")
    output: str = required("JSONL to write; the drawn ids and the report go beside it")
    task: str = setting("more", "a task here (more, jmere), a module of yours, or data_module,rewards_module")
    split: str = setting("train", "split to draw from")
    fraction: float = setting(0.25, "share of every stratum (MORE: of every relation) to draw")
    seed: int = setting(0, "of the draw")
    missing_images: str = setting("stop", "pictures that are not there: stop, drop the samples, or blank",
                                  choices=("stop", "drop", "blank"))


@dataclass(frozen=True)
class Fallen:
    """A drawn sample that does not become training data."""
    sample: object
    reason: str
    response: str | None


def file_expert(path: str) -> Expert:
    """Responses that were written earlier: JSONL of {id, response}; more than were drawn do not disturb."""
    responses = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                entry = json.loads(line)
                name, response = entry["id"], entry["response"]
            except (ValueError, TypeError, KeyError):
                name = response = None
            if not isinstance(name, str) or not isinstance(response, str):
                raise ValueError(f"{path}:{number}: found {line[:60]!r}; a JSON object with the texts "
                                 "id and response expected")
            if name in responses:
                raise ValueError(f"{path}:{number}: a second response for {name}; one a sample expected")
            responses[name] = response
    return lambda samples: {sample.id: responses[sample.id] for sample in samples if sample.id in responses}


def find_expert(name: str) -> Expert:
    """The expert that a setting such as file:expert.jsonl names. To add one is to write one more function."""
    kind, _, rest = name.partition(":")
    if kind == "file" and rest:
        return file_expert(rest)
    raise ValueError(f"--expert {name}: file:PATH expected")


def filter_responses(task: Task, samples: list, responses: dict[str, str]) -> tuple[list[dict], list[Fallen]]:
    """(lines for Stage 1, what fell): structure intact, answer the gold one (MORE-R1, section 3.2)."""
    kept, fallen = [], []
    for sample in samples:
        response = responses.get(sample.id)
        if response is not None:
            normalise = getattr(task.data, "normalise_response", lambda text, _: text.strip())
            response = normalise(response, sample)
        reason = reason_to_drop(task, sample, response)
        if reason:
            fallen.append(Fallen(sample, reason, response))
        else:
            kept.append({"id": sample.id, "response": response})
    return kept, fallen


def reason_to_drop(task: Task, sample, response: str | None) -> str | None:
    """Why a response is no training data, or None. A task's `fault` says more than a format reward of 0."""
    if response is None:
        return "no response"
    if hasattr(task.rewards, "fault"):
        fault = task.rewards.fault(response, sample)
    else:
        fault = "broken structure" if task.rewards.reward(response, sample).get("format", 1) < 1 else None
    if fault is None and not task.rewards.correct(response, sample):
        return "answer is not the gold one"
    return fault


def examples(fallen: list[Fallen], task: Task) -> list[dict]:
    """Up to ten of what fell, in turn from each reason, so that a frequent one does not hide a rare one."""
    seen, turns = Counter(), []
    for case in fallen:
        seen[case.reason] += 1
        turns.append(seen[case.reason])
    in_turn = [case for _, case in sorted(zip(turns, fallen), key=lambda pair: pair[0])]
    return [{"id": case.sample.id, "reason": case.reason, "gold": task.data.target(case.sample),
             "response": case.response} for case in in_turn[:EXAMPLES]]


def make_report(settings: Settings, task: Task, samples: list, drawn: list, kept: list[dict],
                fallen: list[Fallen]) -> dict:
    """The report's content: the settings, the counts in all and by stratum, the reasons, the examples."""
    kept_ids, strata = {line["id"] for line in kept}, {}
    for column, members in (("samples", samples), ("drawn", drawn),
                            ("kept", [sample for sample in drawn if sample.id in kept_ids])):
        for sample in members:
            counts = strata.setdefault(str(task.data.stratum(sample)), {"samples": 0, "drawn": 0, "kept": 0})
            counts[column] += 1
    return {
        "task": settings.task, "split": settings.split, "expert": settings.expert,
        "fraction": settings.fraction, "seed": settings.seed,
        "samples": len(samples), "drawn": len(drawn), "kept": len(kept), "strata": strata,
        "fallen": dict(Counter(case.reason for case in fallen).most_common()),
        "examples": examples(fallen, task),
    }


def print_report(report: dict) -> None:
    strata = [[name, *counts.values()] for name, counts in report["strata"].items()]
    total = ["all", report["samples"], report["drawn"], report["kept"]]
    say(table([["stratum", "samples", "drawn", "kept"], *strata, total]))
    if report["fallen"]:
        say("\n" + table([["fell because", "responses"], *report["fallen"].items()]))


def main(words: list[str] | None = None) -> None:
    settings = parse(Settings, words)
    task, expert = resolve_task(settings.task), find_expert(settings.expert)
    samples = task.data.load(settings.data, settings.split, missing_images=settings.missing_images)
    drawn, _ = stratified_draw(samples, settings.fraction, task.data.stratum, settings.seed)
    kept, fallen = filter_responses(task, drawn, expert(drawn))
    report, output = make_report(settings, task, samples, drawn, kept, fallen), Path(settings.output)
    write_json(output.with_suffix(".drawn.json"), [sample.id for sample in drawn])
    write_json(output.with_suffix(".report.json"), report)
    print_report(report)
    if not kept:
        raise ValueError(f"{settings.expert}: no response of use for any of {len(drawn)} drawn samples; "
                         f"{output.with_suffix('.report.json')} says why")
    # Last, and whole or not at all: where this file is, the other two are.
    new = output.with_name(output.name + ".new")
    new.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    new.replace(output)
    say(f"{output}: {len(kept)} responses")


if __name__ == "__main__":
    run_program(main)
