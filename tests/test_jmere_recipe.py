"""`./launch.sh jmere-r1` as a user types it, with a stand-in for Python that writes down what it is asked to run."""

import os
import subprocess
from pathlib import Path

import pytest

import grpo.train
import sft.train
from grpo import evaluate
from grpo.runtime.settings import parse
from sft import annotate

ROOT = Path(__file__).parent.parent
PROGRAMS = {"sft.annotate": annotate, "sft.train": sft.train, "grpo.train": grpo.train, "grpo.evaluate": evaluate}
GIVEN = ["--model", "a/model", "--data", "a folder/JMERE", "--output", "out"]


def launch(folder, *words, command="jmere-r1"):
    """Exit status, output, and [(program, its words)] of one ./launch.sh."""
    log, stand_in = folder / "log", folder / "python"
    stand_in.write_text(f'#!/bin/sh\nprintf "%s\\037" "$@" >>"{log}"\necho >>"{log}"\n')
    stand_in.chmod(0o755)
    log.write_text("")
    done = subprocess.run([ROOT / "launch.sh", command, *words], capture_output=True, text=True, timeout=60, cwd=folder,
                          env={**os.environ, "PYTHON": str(stand_in), "PROCESSES": "1"})
    calls = [line.split("\037")[:-1] for line in log.read_text().splitlines()]
    after = [call[len(call) - call[::-1].index("-m"):] for call in calls]  # behind the last -m: torchrun's is the first
    return done.returncode, done.stdout + done.stderr, [(program, rest) for program, *rest in after]


def settings_of(calls):
    """The parsed settings of every call of a program that has some, with the program's name."""
    return [(name, parse(PROGRAMS[name].Settings, words)) for name, words in calls if name in PROGRAMS]


def test_the_main_line_goes_from_the_data_to_the_table(tmp_path):
    words = ["--seed", "5", "--missing_images", "blank", "--", "--max_pixels", "3136"]
    status, text, calls = launch(tmp_path, *GIVEN, *words)
    assert status == 0, text
    assert [name for name, _ in calls] == ["sft.annotate", "sft.train", "grpo.evaluate", "grpo.evaluate", "grpo.train",
                                           "grpo.evaluate", "grpo.evaluate", "grpo.evaluate", "grpo.report.paper_table"]
    (_, data), (_, sft_), (_, sampled), (_, greedy), (_, stage_2), _, _, (_, vote) = settings_of(calls)
    assert data.responses == "out/mp_cot.responses.jsonl" and sft_.responses == data.output == "out/mp_cot.jsonl"
    assert (sft_.model, stage_2.model, vote.model) == ("a/model", "out/cot_sft/model", "out/grpo/model")
    assert (sampled.temperature, greedy.temperature, vote.temperature, vote.samples) == (0.8, 0, 0.8, 100)
    for name, settings in settings_of(calls):
        assert (settings.data, settings.seed, settings.missing_images) == ("a folder/JMERE", 5, "blank")
        assert name == "sft.annotate" or settings.max_pixels == 3136


def test_every_stage_gives_its_programs_settings_that_they_know(tmp_path):
    status, text, calls = launch(tmp_path, *GIVEN, "--stage", "everything")
    assert status == 0, text
    by_output = {settings.output: settings for _, settings in settings_of(calls)}
    assert by_output["out/sft"].responses == "" and by_output["out/cot_sft_20"].epochs == 20
    assert not by_output["out/test/sft"].reasoning and not by_output["out/test/zero_shot_greedy"].reasoning
    assert by_output["out/only_rl"].model == "a/model"
    assert by_output["out/without_partial"].reward_weights == "partial=0,format=0"
    assert [by_output[f"out/groups_{size}"].objective.group_size for size in (2, 4, 16)] == [2, 4, 16]
    for name, filters in (("score", (True, False)), ("repredict", (False, True)), ("both", (False, False))):
        data = by_output[f"out/mp_cot_without_{name}.jsonl"]
        assert (data.repredict, data.score, data.responses) == (*filters, "out/mp_cot.responses.jsonl")
        assert by_output[f"out/warm_up_without_{name}"].responses == data.output
        assert by_output[f"out/without_{name}"].model == f"out/warm_up_without_{name}/model"
        baseline = by_output[f"out/cot_sft_without_{name}"]
        assert (baseline.epochs, baseline.responses) == (20, data.output)
    read = {settings.model for name, settings in settings_of(calls) if name != "sft.annotate"}
    assert read <= {"a/model", *(f"{output}/model" for output in by_output)}


def test_the_demo_is_the_same_pipeline_in_small(tmp_path):
    status, text, calls = launch(tmp_path, "--task", "jmere", "--seed", "3", command="demo")
    assert status == 0, text
    assert [name for name, _ in calls] == ["data.toy", "sft.annotate", "grpo.evaluate", "sft.train", "grpo.evaluate",
                                           "grpo.train", "grpo.evaluate", "grpo.compare", "grpo.report"]
    (_, data), (_, untrained), (_, sft_), (_, first), (_, stage_2), (_, second) = settings_of(calls)
    assert data.repredict and data.score and sft_.responses == data.output and sft_.train_vision
    assert untrained.reasoning is False and first.reasoning is None and first.temperature == second.temperature == 0
    assert stage_2.objective.name == "jmere-r1" and second.model == "runs/demo-jmere/grpo/model"
    assert {settings.data for _, settings in settings_of(calls)} == {"runs/demo-jmere/world/JMERE"}


def test_what_is_done_is_not_done_again(tmp_path):
    status, text, first = launch(tmp_path, *GIVEN)
    assert status == 0, text
    (tmp_path / "out" / "grpo.done").unlink()
    status, text, calls = launch(tmp_path, *GIVEN)
    assert status == 0 and text.count("done before, skipped") == len(first) - 2, text
    assert [name for name, _ in calls] == ["grpo.train", "grpo.report.paper_table"]


@pytest.mark.parametrize("words, message", [
    (["--stage", "grop", "--model", "m", "--data", "d"], "error: jmere-r1: no stage grop; did you mean grpo?"),
    (["--model", "m"], "error: jmere-r1: --data DIR expected"), (["--data", "d"], "error: jmere-r1: --model expected"),
    (["--modle", "m"], "error: jmere-r1: no option --modle; did you mean --model?"),
    (["--model"], "error: jmere-r1: --model: no value behind it")])
def test_what_the_user_mistypes_is_one_line_and_status_2(tmp_path, words, message):
    status, text, calls = launch(tmp_path, *words)
    assert status == 2 and message in text and not calls


def test_the_help_names_the_stages(tmp_path):
    status, text, calls = launch(tmp_path, "--help")
    assert status == 0 and not calls
    assert all(stage in text for stage in ("cot_sft_20", "without_repredict", "groups", "everything"))


def test_the_text_demo_is_grpo_alone_on_a_model_that_is_given(tmp_path):
    status, text, calls = launch(tmp_path, "--task", "text", "--model", "a/model", "--seed", "3", command="demo")
    assert status == 0, text
    assert [name for name, _ in calls] == ["data.toy", "grpo.evaluate", "grpo.evaluate", "grpo.train", "grpo.evaluate",
                                           "grpo.evaluate", "grpo.compare", "grpo.report"]
    (_, drawn), (_, greedy), (_, stage), *after = settings_of(calls)
    assert (drawn.temperature, greedy.temperature, stage.objective.temperature,
            stage.objective.name) == (1, 0, 1, "dr-grpo")
    assert {settings.task
            for _, settings in settings_of(calls)} == {"jsonl"} and stage.data == "runs/demo-text/world/TEXT"
    assert [settings.model for _, settings in after] == ["runs/demo-text/grpo/model"] * 2
    assert {settings.seed for _, settings in settings_of(calls)} == {3}
    status, text, _ = launch(tmp_path, "--task", "text", command="demo")
    assert status == 2 and "error: --model expected: a pretrained text model" in text
    status, text, _ = launch(tmp_path, "--task", "texts", command="demo")
    assert status == 2 and "error: --task texts: expected more, jmere or text" in text


def test_an_adapter_goes_from_stage_to_stage_as_it_is(tmp_path):
    for name in ("cot_sft", "grpo", "warm_up_without_score"):
        (tmp_path / "out" / name / "adapter").mkdir(parents=True)
    stages = "data,grpo,vote,groups,without_score,cot_sft_without_score"
    status, text, calls = launch(tmp_path, *GIVEN, "--stage", stages)
    assert status == 0, text
    begun = {settings.output: (settings.model, settings.adapter) for _, settings in settings_of(calls)
             if hasattr(settings, "adapter")}
    adapter = lambda name: ("a/model", f"out/{name}/adapter")
    assert begun["out/grpo"] == begun["out/groups_4"] == adapter("cot_sft")
    assert begun["out/cot_sft_without_score"] == ("a/model", "")
    assert begun["out/test/grpo"] == begun["out/test/grpo_greedy"] == begun["out/test/grpo_vote"] == adapter("grpo")
    assert begun["out/without_score"] == adapter("warm_up_without_score")
    assert begun["out/test/groups_4"] == ("out/groups_4/model", "")  # nothing but a checkpoint there
