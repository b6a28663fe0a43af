"""./launch.sh more-r1: which programs run in which order, what is skipped, and recipes with the paper's settings."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

import grpo.train
import sft.train
from grpo import evaluate
from grpo.plan.__main__ import GIB, plan
from grpo.plan.__main__ import Settings as PlanSettings
from grpo.plan.costs import Costs, read_shape
from grpo.runtime.settings import parse
from sft import annotate

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "docs" / "recipes"
# Stands in for the interpreter: notes how it was called, and leaves behind what the program would.
STUB = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
[[ $* != *"$FAILS"* ]] || exit 1
while [ $# -gt 1 ]; do
    [ "$1" = --output ] && output=$2
    [ "$1" = --config ] && config=$2
    shift
done
case $output in
    *.jsonl) touch "$output" "${output%.jsonl}.drawn.json" ;;
    ?*) mkdir -p "$output/model"; touch "$output/predictions.jsonl"
        ! grep -qs lora_rank "$config" || mkdir -p "$output/adapter" ;;
esac
"""


@pytest.fixture
def launch(tmp_path):
    """A function of the command's words: (exit status, what it said, the programs' command lines)."""
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o755)

    def run(*words, fails="nothing", command="more-r1", processes="2"):
        calls = tmp_path / "calls"
        calls.write_text("")
        environment = {**os.environ, "PYTHON": str(tmp_path / "python"), "CALLS": str(calls), "FAILS": fails,
                       "PROCESSES": processes}
        done = subprocess.run([ROOT / "launch.sh", command, *words], env=environment, cwd=tmp_path,
                              capture_output=True, text=True, timeout=60)
        return (done.returncode, done.stdout + done.stderr,
                [line.partition("-m ")[2] for line in calls.read_text().splitlines()])

    return run


def programs(calls):
    """Each call's program and the last part of what it writes."""
    found = []
    for call in calls:
        call = re.sub(r"^grpo.runtime.launch.* -m ", "", call)
        output = re.search(r"--output (\S+)", call)
        found.append((call.split()[0], output[1].removeprefix("runs/more-r1/") if output else ""))
    return found


MODEL = ("--model", "M", "--data", "D")


def test_the_whole_pipeline_is_one_line(launch):
    status, said, calls = launch(*MODEL)
    assert status == 0, said
    assert programs(calls) == [
        ("data.more", ""), ("sft.annotate", "cold_start.jsonl"), ("sft.train", "stage_1"),
        ("grpo.evaluate", "test/stage_1"), ("grpo.evaluate", "split"), ("grpo.train", "stage_2"),
        ("grpo.evaluate", "test/stage_2"), ("grpo.report.paper_table", "table")]
    assert "--expert openai:gpt-4o" in calls[1]
    assert "--model M" in calls[2] and "--responses runs/more-r1/cold_start.jsonl" in calls[2]
    assert "--split train" in calls[4] and "--exclude runs/more-r1/cold_start.drawn.json" in calls[4]
    assert "--model runs/more-r1/stage_1/model" in calls[5]
    assert "--predictions runs/more-r1/split/predictions.jsonl" in calls[5]


FIND = """rest=" $*"; program=${rest##* -m }
"$REAL" -c 'import importlib.util, sys; print(importlib.util.find_spec(sys.argv[1]).origin)' "${program%% *}" >>"$CALLS"
"""


def test_our_programs_run_where_a_users_folder_has_names_like_ours(launch, tmp_path, monkeypatch):
    for name in ("data/__init__.py", "sft/__init__.py", "rewards.py", "grpo.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('of somebody else')")
    (tmp_path / "python").write_text(STUB.replace('echo "$*" >>"$CALLS"\n', FIND))
    monkeypatch.setenv("REAL", sys.executable)
    status, said, _ = launch(*MODEL)
    assert status == 0, said
    found = (tmp_path / "calls").read_text().splitlines()
    assert {"sft/train.py", "grpo/train.py"} < {path.removeprefix(f"{ROOT}/") for path in found} and len(found) > 5
    assert all(path.startswith(f"{ROOT}/") for path in found), found


def test_what_is_done_is_skipped_and_said_and_what_was_cut_off_is_not(launch):
    status, _, calls = launch(*MODEL, fails="grpo.train")
    assert status == 1 and programs(calls)[-1] == ("grpo.train", "stage_2")
    status, said, calls = launch(*MODEL)
    assert programs(calls) == [("data.more", ""), ("grpo.train", "stage_2"), ("grpo.evaluate", "test/stage_2"),
                               ("grpo.report.paper_table", "table")]
    assert "done before, skipped: runs/more-r1/stage_1.done" in said


def test_another_run_in_the_same_folder_is_refused(launch):
    launch(*MODEL, "--stage", "data")
    status, said, calls = launch(*MODEL, "--stage", "data", "--seed", "1")
    assert status == 2 and not calls
    assert "error: runs/more-r1/cold_start.done: found one sft.annotate" in said and "--seed 1" in said


@pytest.mark.parametrize("other", [("--seed", "1"), ("--data", "E"), ("--missing_images", "drop"),
                                   ("--recipe", str(RECIPES / "more-demo")), ("--", "--learning_rate", "1e-5")])
@pytest.mark.parametrize("stage", ["stage_1", "split", "gamma_0"])
def test_a_stage_with_other_settings_is_refused_and_never_passed_off_as_done(launch, stage, other):
    launch(*MODEL, "--stage", f"data,stage_1,split,{stage}")
    status, said, calls = launch(*MODEL, "--stage", stage, *other)
    assert status == 2 and not calls and f"error: runs/more-r1/{stage}.done: found many" in said and other[-1] in said


def test_a_stage_1_that_was_cut_off_is_no_start_for_the_split(launch, tmp_path):
    launch(*MODEL, "--stage", "data,stage_1", fails="sft.train")
    (tmp_path / "runs" / "more-r1" / "stage_1" / "model").mkdir(parents=True)  # its best so far
    status, said, calls = launch(*MODEL, "--stage", "split")
    assert status == 2 and not calls and "stage_1.done is not there yet; --stage stage_1 makes it" in said


def test_a_users_template_reaches_the_expert(launch):
    calls = launch(*MODEL, "--stage", "data", "--template", "mine.txt")[2]
    assert calls[0].endswith("--template mine.txt")


def test_the_demo_is_the_same_pipeline_and_another_seed_begins_anew(launch):
    status, said, calls = launch(command="demo")
    wanted = [("data.toy", "world"), ("sft.annotate", "cold_start.jsonl"), ("grpo.evaluate", "test/zero_shot"),
              ("sft.train", "stage_1"), ("grpo.evaluate", "test/stage_1"), ("grpo.evaluate", "split"),
              ("grpo.train", "stage_2"), ("grpo.evaluate", "test/stage_2"), ("grpo.compare", "results.json"),
              ("grpo.report", "report.html")]
    short = lambda calls: [(program, path.removeprefix("runs/demo/")) for program, path in programs(calls)]
    assert status == 0 and short(calls) == wanted, said
    assert "docs/recipes/more-demo/stage_2.json" in calls[6] and "--data runs/demo/world/MORE" in calls[6]
    assert short(launch(command="demo")[2]) == wanted[-2:]
    assert short(launch("--seed", "1", command="demo")[2]) == wanted


def test_each_stage_alone_starts_from_what_is_there(launch):
    status, said, _ = launch(*MODEL, "--stage", "stage_2")
    assert status == 2 and "runs/more-r1/split.done is not there yet; --stage split makes it" in said
    launch(*MODEL)
    status, _, calls = launch(*MODEL, "--stage", "zero_shot,label_only_25,gamma_0", "--", "--dtype", "float32")
    assert status == 0 and programs(calls) == [
        ("grpo.evaluate", "test/zero_shot"), ("sft.train", "label_only_25"), ("grpo.evaluate", "test/label_only_25"),
        ("grpo.train", "gamma_0"), ("grpo.evaluate", "test/gamma_0")]
    assert "--samples runs/more-r1/cold_start.drawn.json" in calls[1] and "--decay 0 --dtype float32" in calls[3]


@pytest.mark.parametrize("words, message", [
    (("--stage", "zero_shot", "--modle", "M"), "no option --modle; did you mean --model?"),
    (("--stage", "zero_shot", "--data", "D"), "--model expected"), (("--model", "M"), "--data DIR expected"),
    (("--data", "D"), "--model expected"), ((*MODEL, "--stage", "check,data,stage-3"), "no stage stage-3"),
    ((*MODEL, "--stage", "stage-3"), "no stage stage-3; did you mean stage_"), (("--model",), "no value behind it"),
])
def test_a_line_that_does_not_fit_is_refused_before_anything_runs(launch, words, message):
    status, said, calls = launch(*words)
    assert status == 2 and message in said and not calls


@pytest.mark.parametrize("typed, meant",
                         [("dmeo", "demo"), ("more", "more-r1"), ("jmer-r1", "jmere-r1"), ("tests", "test"),
                                          ("stup", "setup")])
def test_a_mistyped_command_is_answered_with_the_nearest_in_one_line(launch, typed, meant):
    assert launch(command=typed)[:2] == (2, f"error: no command {typed}; did you mean ./launch.sh {meant}?\n")


@pytest.mark.parametrize("command", ["setup", "demo", "more-r1", "jmere-r1", "check", "test"])
def test_every_command_has_a_help_that_names_it_and_runs_nothing(launch, command):
    status, said, calls = launch("--help", command=command)
    assert status == 0 and f"./launch.sh {command}" in said and not calls
    others = {"setup", "demo", "more-r1", "jmere-r1", "check", "test"} - {command}
    assert not any(f"./launch.sh {other}" in said for other in others)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_check_tries_the_device_in_as_many_processes_as_are_asked_for(launch, processes):
    status, said, (call,) = launch("--rates", "r.json", command="check", processes=processes)
    assert status == 0 and call.endswith("benchmarks.check --rates r.json"), said
    assert ("--nproc-per-node 2" in call) == (processes == "2")


def test_the_help_names_every_stage(launch):
    said = launch("--help")[1]
    script = (RECIPES / "more-r1.sh").read_text()
    for stage in re.findall(r"^        (\w+)\)", script, re.MULTILINE):
        assert re.search(rf"\b{stage}\b", said), stage


PROGRAMS = {"data": annotate, "stage_1": sft.train, "label_only": sft.train, "stage_2": grpo.train, "test": evaluate,
            "answer": evaluate}


FOLDERS = ["more-r1", "more-demo", "more-r1-24gb", "more-r1-80gb", "more-r1-2x80gb"]


@pytest.mark.parametrize("recipe,name", [(folder, name) for folder in FOLDERS for name in PROGRAMS
                                         if (RECIPES / folder / f"{name}.json").exists()])
def test_every_recipe_is_understood_by_its_program(recipe, name):
    words = ["--config", str(RECIPES / recipe / f"{name}.json"), "--data", "d", "--output", "o"]
    words += ["--expert", "file:x"] if name == "data" else ["--model", "m"]
    settings = parse(PROGRAMS[name].Settings, words)
    assert settings.task == "more"


def test_the_recipes_hold_the_papers_settings():
    stage_1, label_only, stage_2 = (json.loads((RECIPES / "more-r1" / f"{name}.json").read_text())
                                    for name in ("stage_1", "label_only", "stage_2"))
    assert {**stage_1, "max_completion_tokens": 64} == label_only
    wanted = {"epochs": 20, "batch_size": 8 * 8 * 2, "learning_rate": 1e-4, "warmup": 0.05, "max_tokens": 2096,
              "train_vision": False}
    assert wanted.items() <= stage_1.items()
    wanted = {"epochs": 4, "learning_rate": 1e-6, "warmup": 0.05, "temperature": 0.8, "max_completion_tokens": 1024,
              "clip_low": 0.2, "clip_high": 0.2, "beta": 0.001, "kl": "k3", "updates": 2, "decay": 0.5,
              "mixing": "progressive"}
    assert wanted.items() <= stage_2.items()
    assert stage_2["prompts_per_rollout"] * stage_2["group_size"] == 128


def test_every_program_of_the_recipe_sees_images_of_one_size():
    names = ("stage_1", "label_only", "stage_2", "test", "answer")
    assert len({json.loads((RECIPES / "more-r1" / f"{name}.json").read_text())["max_pixels"] for name in names}) == 1


def test_every_row_of_the_paper_has_a_stage_that_fills_it_and_every_tested_stage_a_row():
    rows = json.loads((RECIPES / "more-r1" / "paper.json").read_text())["rows"]
    stages = (RECIPES / "more-r1.sh").read_text().partition("run_stage() {")[2].partition("\n}")[0]
    tested = set(re.findall(r" (?:train|evaluate|stage_2) (\w+) ", stages))
    assert {row["folder"] for row in rows if "folder" in row} == tested
    assert next(row for row in rows if row.get("folder") == "stage_2")["f1"] == 67.80


# ── recipes for one card ─────────────────────────────────────────────────────────────────────────────────────────

ADAPTER = {"lora_rank": 64}
CARDS = {  # recipe: config of its model, GPUs, GiB of each, what differs from the paper's settings in each file
    "more-r1-24gb": ("3b", 1, 24.0, {
        **dict.fromkeys(("stage_1", "label_only"), ADAPTER | {"rollout_rows": 32}),
        **dict.fromkeys(("test", "answer"), {"rollout_rows": 32}),
        "stage_2": ADAPTER | {"rollout_rows": 32, "learning_rate": 1e-5}}),
    "more-r1-80gb": ("7b", 1, 80.0, {
        **dict.fromkeys(("stage_1", "label_only"), ADAPTER), "stage_2": ADAPTER | {"learning_rate": 1e-5}}),
    "more-r1-2x80gb": ("7b", 2, 80.0, {
        **dict.fromkeys(("stage_1", "label_only"), {"rollout_rows": 32}),
        "stage_2": {"rollout_rows": 32, "offload_reference": True}})}


@pytest.mark.parametrize("recipe", CARDS)
def test_a_recipe_for_a_card_is_the_papers_but_for_what_memory_and_an_adapter_ask(recipe):
    differences = CARDS[recipe][3]
    assert {path.stem for path in (RECIPES / recipe).iterdir()} == set(differences)
    for name, differing in differences.items():
        paper, ours = (json.loads((RECIPES / folder / f"{name}.json").read_text()) for folder in ("more-r1", recipe))
        assert ours == paper | differing, name


def test_a_recipe_is_taken_by_its_name_and_its_adapter_is_what_the_next_stage_begins_with(launch):
    status, said, calls = launch(*MODEL, "--recipe", "more-r1-24gb", "--stage", "everything")
    assert status == 0, said
    config = lambda call: re.search(r"--config (\S+)|paper_table (\S+)", call)
    by_output = dict(zip((name for _, name in programs(calls)), calls))
    for output, file in (
            ("stage_1", "more-r1-24gb/stage_1"), ("cold_start.jsonl", "more-r1/data"), ("table", "more-r1/paper"),
            ("split", "more-r1-24gb/test"), ("test/zero_shot", "more-r1-24gb/answer")):
        found = config(by_output[output])
        assert (found[1] or found[2]).endswith(f"docs/recipes/{file}.json"), output
    beginning = {name: re.search(r"--model (\S+)(?: --adapter runs/more-r1/(\S+)/adapter)?", call).groups()
                 for name, call in by_output.items() if "--model" in call}
    trained = ("label_only", "label_only_25", "stage_1", "stage_2", "raw", "gamma_1", "gamma_0")
    assert beginning == {
        **dict.fromkeys(("test/zero_shot", "label_only", "label_only_25", "stage_1"), ("M", None)),
        **dict.fromkeys(("split", "stage_2", "raw", "gamma_1", "gamma_0"), ("M", "stage_1")),
        **{f"test/{name}": ("M", name) for name in trained}}


def test_settings_are_taken_from_a_folder_and_what_it_lacks_is_the_papers(launch, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "stage_1.json").write_text("{}")
    calls = launch(*MODEL, "--recipe", "mine", "--stage", "data,stage_1")[2]
    assert [re.search(r"--config (\S+)", call)[1].removeprefix(f"{ROOT}/") for call in calls] == [
        "docs/recipes/more-r1/data.json", "mine/stage_1.json", "docs/recipes/more-r1/test.json"]


@pytest.mark.parametrize("typed,message", [
    ("more-r1-24", "--recipe more-r1-24: neither a folder nor one of"),
    ("no/folder", "--recipe no/folder: no such folder")])
def test_a_recipe_that_is_not_there_is_named_before_anything_runs(launch, typed, message):
    status, said, calls = launch(*MODEL, "--recipe", typed)
    assert status == 2 and message in said and not calls
    assert "/" in typed or "more-r1-24gb" in said


def planned(shape, recipe: str, name: str) -> float:
    """GiB of one of its programs. SFT is Stage 2 without a reference and with one completion a prompt; evaluation is
    the rollout of that, all weights frozen, with twice as many prompts encoded at once as are answered at once."""
    _, gpus, gib, _ = CARDS[recipe]
    folder = next(folder for folder in (recipe, "more-r1") if (RECIPES / folder / f"{name}.json").exists())
    settings = json.loads((RECIPES / folder / f"{name}.json").read_text())
    if name != "stage_2":
        rows = settings.get("rollout_rows", PlanSettings.rollout_rows)
        prompts = max(2 * rows * gpus, settings.get("batch_size", 0))
        settings |= {"group_size": 1, "beta": 0.0, "updates": 1,
                     "prompts_per_rollout": prompts} | (ADAPTER if name in ("test", "answer") else {})
    ours = {f.name for f in fields(PlanSettings)}
    one = plan(shape, replace(PlanSettings(model="m", gpus=[gpus], gpu_memory=gib), **{
        key: value for key, value in settings.items() if key in ours}), gpus)
    phases = ("loading", "vision", "prefill", "decode") if name in ("test", "answer") else one.phases
    return max(sum(one.phases[phase].values()) for phase in phases) / GIB


@pytest.mark.parametrize("recipe", CARDS)
def test_every_stage_of_a_recipe_fits_its_card_and_the_page_says_how_tightly(real_data, recipe):
    size, gpus, gib, differences = CARDS[recipe]
    shape = read_shape(str(real_data / "qwen2.5-vl" / f"config-{size}.json"))
    peaks = {name: planned(shape, recipe, name) for name in ("stage_1", "label_only", "test", "answer", "stage_2")}
    # Stage 2 validates as Stage 1 does, and keeps what is not planned: the adapter that it began with, and the one of
    # now while the first stands in its place
    begun = 2 * 4 / GIB * Costs(shape, replace(PlanSettings(model="m"), **differences["stage_1"]), gpus).adapter
    assert max(peaks.values()) + begun < gib - PlanSettings.spare, peaks
    row = re.search(rf"^\| `{recipe}` \|.*", (ROOT / "docs" / "more-r1.md").read_text(), re.MULTILINE)[0]
    written = [float(figure) for figure in row.split("|")[-5:-1]]
    near = [pytest.approx(peaks[name], rel=0.05) for name in ("stage_1", "test", "stage_2")]
    assert written == [gib - PlanSettings.spare, *near]
