"""./launch.sh more-r1: which programs run in which order, what is skipped, and recipes with the paper's settings."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import grpo.train
import sft.train
from grpo import evaluate
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
    shift
done
case $output in
    *.jsonl) touch "$output" "${output%.jsonl}.drawn.json" ;;
    ?*) mkdir -p "$output/model"; touch "$output/predictions.jsonl" ;;
esac
"""


@pytest.fixture
def launch(tmp_path):
    """A function of the command's words: (exit status, what it said, the programs' command lines)."""
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o755)

    def run(*words, fails="nothing", command="more-r1"):
        calls = tmp_path / "calls"
        calls.write_text("")
        environment = {**os.environ, "PYTHON": str(tmp_path / "python"), "CALLS": str(calls), "FAILS": fails,
                       "PROCESSES": "2"}
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


@pytest.mark.parametrize("typed, meant", [("dmeo", "demo"), ("more", "more-r1"), ("jmer-r1", "jmere-r1"), ("tests", "test"),
                                          ("stup", "setup")])
def test_a_mistyped_command_is_answered_with_the_nearest_in_one_line(launch, typed, meant):
    assert launch(command=typed)[:2] == (2, f"error: no command {typed}; did you mean ./launch.sh {meant}?\n")


@pytest.mark.parametrize("command", ["setup", "demo", "more-r1", "jmere-r1", "test"])
def test_every_command_has_a_help_that_names_it_and_runs_nothing(launch, command):
    status, said, calls = launch("--help", command=command)
    assert status == 0 and f"./launch.sh {command}" in said and not calls
    others = {"setup", "demo", "more-r1", "jmere-r1", "test"} - {command}
    assert not any(f"./launch.sh {other}" in said for other in others)


def test_the_help_names_every_stage(launch):
    said = launch("--help")[1]
    script = (RECIPES / "more-r1.sh").read_text()
    for stage in re.findall(r"^        (\w+)\)", script, re.MULTILINE):
        assert re.search(rf"\b{stage}\b", said), stage


PROGRAMS = {"data": annotate, "stage_1": sft.train, "label_only": sft.train, "stage_2": grpo.train, "test": evaluate,
            "answer": evaluate}


@pytest.mark.parametrize("recipe", ["more-r1", "more-demo"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_recipe_is_understood_by_its_program(recipe, name):
    if recipe == "more-demo" and name == "label_only":
        return
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
