"""Cold-start data: draw a share of every stratum, take the expert's responses, keep those that hold up.

    python -m sft.annotate --task more --data MORE --split train --fraction 0.25 --seed 0 \\
        --expert file:expert.jsonl --output cold_start.jsonl

writes cold_start.jsonl, {"id", "response"} a line, which Stage 1 learns from, and beside it .drawn.json, the ids drawn
with their samples' hashes, filtered out or not: the split and Stage 2 leave them all out; .report.json, how many were
kept and why the others fell; .responses.jsonl, what --expert openai:MODEL or local:MODEL answered, as it came.

JMERE-R1's data has several candidates a sample and two filters more (sft/filters.py, docs/jmere-r1.md)."""
import json
from collections import Counter
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path

from data.curriculum import stratified_draw
from data.read import fill_in, read_json_lines
from data.task import Task, load_samples, resolve_task, sample_hash
from grpo.runtime.files import write_json, write_whole
from grpo.runtime.log import say, table
from grpo.runtime.settings import TaskSettings, read_settings, required, run_program, setting
from sft.experts import ask_all, endpoint_from_environment, local_expert
from sft.filters import (Ask, Candidate, Fallen, best_of_each, candidates_of, filter_responses, repredict_filter,
                         score_filter)

EXAMPLES = 10
filters, experts = (partial(setting, group=title) for title in ("filters", "expert"))


@dataclass
class Settings(TaskSettings):
    """Cold-start data for Stage 1. The defaults are MORE-R1's."""

    expert: str = required(
        "whose responses: file:PATH, a JSONL of {id, response} for the samples drawn, openai:MODEL, asked at "
        "OPENAI_BASE_URL with OPENAI_API_KEY, or local:MODEL, a checkpoint folder or hub name that runs here")
    output: str = required("JSONL to write; the drawn ids and the report go beside it")
    split: str = setting("train", "split to draw from", top=True)
    fraction: float = setting(0.25, "share of every stratum (MORE: of every relation) to draw", top=True)
    seed: int = setting(0, "random seed of the draw", top=True)
    candidates: int = setting(1, "responses a sample; one of those that pass the filters is kept", top=True, least=1)
    repredict: bool = filters(False, "keep a candidate only if the expert finds the gold answer in its reasoning again "
                                     "(one more request a candidate)")
    score: bool = filters(False, "have the expert score each candidate by the task's rules, and keep the best "
                                 "(one more request a candidate)")
    score_threshold: float = filters(0.7, "drop candidates with a score below it", least=0, most=1)
    template: str = experts("", "openai, local: file with the prompt in your own words; {question}, {answer}, "
                                "{text} and the sample's other fields are filled in", path="file")
    expert_options: str = experts('{"max_tokens": 2048}', "openai: JSON object that goes into every request; "
                                                          "local: its max_tokens, temperature, top_p, top_k, seed")
    responses: str = experts("", "openai, local: JSONL with all answers so far, none of which is asked for again; "
                                 "empty: beside the output")
    concurrency: int = experts(8, "openai: requests at a time", above=0)
    attempts: int = experts(6, "openai: how often a sample is tried, with longer and longer pauses", above=0)
    timeout: float = experts(120.0, "openai: seconds to wait for a reply", above=0)

    def check(self) -> None:
        task = resolve_task(self.task, self.rewards)
        for name in ("repredict", "score"):
            if getattr(self, name) and not hasattr(task.data, f"{name}_prompt"):
                raise ValueError(f"--{name}: task {self.task} has no {name}_prompt, which this filter asks with")
        prompt_maker(self, task)  # refuses a bad --template, or none where the task needs one


def file_expert(path: str) -> Ask:
    """Responses that were written earlier: JSONL of {id, response}; more than were drawn do not disturb."""
    responses, expected = {}, "a JSON object with the texts id and response"
    for where, entry in read_json_lines(path, expected, id=str, response=str):
        if (name := entry["id"]) in responses:
            raise ValueError(f"{where}: a second response for {name[:60]}; one a sample expected")
        responses[name] = entry["response"]
    return lambda requests: {one.id: responses[one.id] for one in requests if one.id in responses}


def find_expert(settings: Settings) -> Ask:
    """The expert that --expert names: a file, or one that is asked over HTTP ("openai") or runs here ("local"), but for
    what is in the .responses.jsonl beside the output."""
    kind, _, model = settings.expert.partition(":")
    if kind not in ("file", "openai", "local") or not model:
        raise ValueError(f"--expert {settings.expert}: file:PATH, openai:MODEL or local:MODEL expected")
    if kind == "file":
        if not Path(model).is_file():
            raise ValueError(f"--expert {settings.expert}: no such file")
        return file_expert(model)
    try:
        options = json.loads(settings.expert_options)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise ValueError(f"--expert_options {settings.expert_options}: a JSON object expected")
    expert = local_expert(model, options) if kind == "local" else endpoint_from_environment(
        model, options=options, concurrency=settings.concurrency, timeout=settings.timeout, attempts=settings.attempts)
    path = Path(settings.responses or Path(settings.output).with_suffix(".responses.jsonl"))
    template = read_template(settings.template)
    return lambda requests: ask_all(expert, requests, path, template)


def read_template(path: str) -> str:
    """"" without a path; ValueError where there is no template, or one that would not show the expert the text."""
    if not path:
        return ""
    try:
        template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"--template {path}: {problem}; a text file in UTF-8 expected") from None
    if "{text}" not in template and "{question}" not in template:
        raise ValueError(f"--template {path}: no {{text}} or {{question}} in it; the expert would not see the text")
    return template


def prompt_maker(settings: Settings, task: Task):
    """A function sample → (images, text): what the expert is asked for a candidate. In a template {question} is the
    task's, {answer} the gold one, {text} and so on the sample's."""
    template = read_template(settings.template)
    if not template and not hasattr(task.data, "expert_prompt") and not settings.expert.startswith("file:"):
        raise ValueError(f"task {settings.task} has no expert prompt of its own; --template FILE expected")

    def prompt_of(sample):
        images, question = task.data.build_prompt(sample)
        if not template:
            return images, task.data.expert_prompt(sample)
        values = {part.name: getattr(sample, part.name) for part in fields(sample)}
        values |= {name: ", ".join(map(str, value)) for name, value in values.items() if isinstance(value, tuple)}
        return images, fill_in(template, **{**values, "question": question, "answer": task.data.target(sample)})

    return prompt_of


def examples(fallen: list[Fallen], task: Task) -> list[dict]:
    """Up to ten of what fell, in turn from each reason, so that a frequent one does not hide a rare one."""
    by_reason = {}
    for one, reason in fallen:
        by_reason.setdefault(reason, []).append({"id": one.sample.id, "reason": reason,
                                                 "gold": task.data.target(one.sample), "response": one.response})
    in_turn = (case for turn in zip_longest(*by_reason.values()) for case in turn if case)
    return list(islice(in_turn, EXAMPLES))


def survivors(settings: Settings, task: Task, drawn: list, expert: Ask):
    """(candidates kept, one a sample; what fell; the stages with their counts, before and after each filter)."""
    left, fallen, stages = candidates_of(drawn, settings.candidates, prompt_maker(settings, task), expert), [], {}
    chosen = {"asked for": lambda left: (left, []), "structure and answer right": partial(filter_responses, task)}
    if settings.repredict:
        chosen["re-prediction right"] = lambda left: repredict_filter(task, left, expert)
    if settings.score:
        chosen["score high enough"] = lambda left: score_filter(task, left, expert, settings.score_threshold)
    for stage, keep in chosen.items():
        left, dropped = keep(left)
        fallen += dropped
        stages[stage] = {"candidates": len(left), "samples": len({one.sample.id for one in left})}
    return best_of_each(left, settings.seed), fallen, stages


def make_report(settings: Settings, task: Task, samples: list, drawn: list, kept: list[Candidate],
                fallen: list[Fallen], stages: dict) -> dict:
    """The report's content: the settings, the counts in all and by stratum, the reasons, the examples."""
    columns = {"samples": samples, "drawn": drawn, "kept": [one.sample for one in kept]}
    counts = {name: Counter(str(task.data.stratum(one)) for one in members) for name, members in columns.items()}
    strata = {stratum: {name: counts[name][stratum] for name in columns} for stratum in counts["samples"]}
    return {**{name: getattr(settings, name) for name in ("task", "split", "expert", "fraction", "seed")},
            **{name: len(members) for name, members in columns.items()}, "strata": strata, "stages": stages,
            "fallen": dict(Counter(why for _, why in fallen).most_common()), "examples": examples(fallen, task)}


def print_report(report: dict) -> None:
    rows = lambda part: [[name, *counts.values()] for name, counts in report[part].items()]
    columns = ["samples", "drawn", "kept"]
    say(table([["stratum", *columns], *rows("strata"), ["all", *map(report.get, columns)]]))
    say("\n" + table([["left after", "candidates", "samples"], *rows("stages")]))
    if report["fallen"]:
        say("\n" + table([["fell because", "responses"], *report["fallen"].items()]))


def main(words: list[str] | None = None) -> None:
    settings = read_settings(Settings, words)
    task = resolve_task(settings.task, settings.rewards)
    expert = find_expert(settings)
    samples = load_samples(task, settings, settings.split)
    drawn, _ = stratified_draw(samples, settings.fraction, task.data.stratum, settings.seed)
    output = Path(settings.output)
    write_json(output.with_suffix(".drawn.json"), {sample.id: sample_hash(task, sample) for sample in drawn})
    kept, fallen, stages = survivors(settings, task, drawn, expert)
    report = make_report(settings, task, samples, drawn, kept, fallen, stages)
    write_json(output.with_suffix(".report.json"), report)
    print_report(report)
    if not kept:
        raise ValueError(f"{settings.expert}: no response of use for any of {len(drawn)} drawn samples; "
                         f"{output.with_suffix('.report.json')} says why")
    lines = [{"id": one.sample.id, "response": one.response, "sample": sample_hash(task, one.sample)} for one in kept]
    write_whole(output, "".join(json.dumps(line) + "\n" for line in lines).encode())
    say(f"{output}: {len(kept)} responses")


if __name__ == "__main__":
    run_program(main)
