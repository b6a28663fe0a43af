"""Cold-start data: draw a share of every stratum, take the expert's responses, keep those that hold up.

    python -m data.annotate --task more --data MORE --split train --fraction 0.25 --seed 0 \\
        --expert file:expert.jsonl --output cold_start.jsonl

writes beside each other
    cold_start.jsonl            {"id", "response"} a line: what Stage 1 learns from
    cold_start.drawn.json       the ids drawn, filtered out or not: the split and Stage 2 leave them all out
    cold_start.report.json      how many were drawn and kept, how many fell for which reason, ten of those
    cold_start.responses.jsonl  what --expert openai:MODEL answered, as it came (data/expert.py)
"""
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.curriculum import stratified_draw
from data.expert import ask_all, endpoint_from_environment, fill_template, read_template
from data.task import Task, resolve_task
from grpo.journal import say, table, write_json
from grpo.settings import parse, required, run_program, setting

EXAMPLES = 10
Expert = Callable[[list], dict[str, str]]  # samples -> response by sample id, where there is one


@dataclass
class Settings:
    """Cold-start data for Stage 1. The defaults are MORE-R1's."""

    data: str = required("folder of the task's dataset")
    expert: str = required("whose responses: file:PATH, a JSONL of {id, response} for the samples drawn, "
                           "or openai:MODEL, asked at OPENAI_BASE_URL with OPENAI_API_KEY")
    output: str = required("JSONL to write; the drawn ids and the report go beside it")
    task: str = setting("more", "a task here (more, jmere), a module of yours, or data_module,rewards_module")
    split: str = setting("train", "split to draw from")
    fraction: float = setting(0.25, "share of every stratum (MORE: of every relation) to draw")
    seed: int = setting(0, "of the draw")
    missing_images: str = setting("stop", "pictures that are not there: stop, drop the samples, or blank",
                                  choices=("stop", "drop", "blank"))
    template: str = setting("", "openai: file with the prompt in your own words; {question}, {answer}, "
                                "{text} and the sample's other fields are filled in")
    expert_options: str = setting('{"max_tokens": 2048}', "openai: JSON object that goes into every request")
    concurrency: int = setting(8, "openai: requests at a time")
    attempts: int = setting(6, "openai: how often a sample is tried, with longer and longer pauses")
    timeout: float = setting(120.0, "openai: seconds to wait for a reply")


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


def endpoint_expert(model: str, settings: Settings, task: Task) -> Expert:
    """Responses asked for over HTTP, but for those that are in the .responses.jsonl beside the output."""
    try:
        options = json.loads(settings.expert_options)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise ValueError(f"--expert_options {settings.expert_options}: a JSON object expected")
    if settings.concurrency < 1 or settings.attempts < 1 or settings.timeout <= 0:
        raise ValueError("--concurrency, --attempts and --timeout must be above 0")
    template = read_template(settings.template) if settings.template else ""
    if not template and not hasattr(task.data, "expert_prompt"):
        raise ValueError(f"task {settings.task} has no expert prompt of its own; --template FILE expected")
    endpoint = endpoint_from_environment(model, options=options, timeout=settings.timeout,
                                         attempts=settings.attempts)

    def prompt_of(sample):
        pictures, question = task.data.build_prompt(sample)
        if template:
            return pictures, fill_template(template, sample, question, task.data.target(sample))
        return pictures, task.data.expert_prompt(sample)

    path = Path(settings.output).with_suffix(".responses.jsonl")
    return lambda samples: ask_all(endpoint, samples, prompt_of, path, template=template,
                                   concurrency=settings.concurrency)


def find_expert(settings: Settings, task: Task) -> Expert:
    """The expert that --expert names. To add a kind is to write one more function."""
    kind, _, rest = settings.expert.partition(":")
    if kind == "file" and rest:
        return file_expert(rest)
    if kind == "openai" and rest:
        return endpoint_expert(rest, settings, task)
    raise ValueError(f"--expert {settings.expert}: file:PATH or openai:MODEL expected")


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
    task = resolve_task(settings.task)
    expert = find_expert(settings, task)
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
