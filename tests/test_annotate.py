"""Cold-start data from the draw to the three files, on a folder of twelve samples."""
import json
import re
import sys

import pytest

from data import more
from data.read import fill_in
from data.task import resolve_task
from more_folder import line, write_more
from sft import annotate, filters

TASK = resolve_task("more")
PEER = "/per/per/peer"
STEPS = " ".join(f"Step {k}: because." for k in range(1, 7))


def response(label, steps=STEPS):
    return f"<think> {steps} </think> <answer>{label}</answer>"


@pytest.fixture
def folder(tmp_path):
    """train/0 to train/7 are none, train/8 to train/11 peers."""
    return write_more(tmp_path, [line()] * 8 + [line(relation=PEER)] * 4)


def write_expert(folder, responses):
    path = folder / "expert.jsonl"
    rows = [json.dumps({"id": name, "response": text}) + "\n" for name, text in responses.items()]
    path.write_text("".join(rows))


def run(folder, *more_words, fraction=0.5):
    out = folder / "out"
    annotate.main(["--data", str(folder), "--expert", f"file:{folder / 'expert.jsonl'}",
                   "--fraction", str(fraction), "--output", str(out / "cold.jsonl"), *more_words])
    lines = [json.loads(row) for row in (out / "cold.jsonl").read_text().splitlines()]
    return lines, *(json.loads((out / f"cold.{name}.json").read_text()) for name in ("drawn", "report"))


def good_responses(folder):
    return {sample.id: response(sample.label) for sample in more.load(folder, "train")}


def test_what_is_drawn_and_right_is_written(folder, capsys):
    responses = good_responses(folder)
    write_expert(folder, responses)
    lines, drawn, report = run(folder)
    assert lines == [{"id": name, "response": responses[name], "sample": digest} for name, digest in drawn.items()]
    assert len(drawn) == 6 and sum(int(name.split("/")[1]) >= 8 for name in drawn) == 2
    assert (report["samples"], report["drawn"], report["kept"], report["fallen"]) == (12, 6, 6, {})
    assert report["strata"] == {"none": {"samples": 8, "drawn": 4, "kept": 4},
                                PEER: {"samples": 4, "drawn": 2, "kept": 2}}
    assert PEER in capsys.readouterr().out


def test_the_draw_is_decided_by_the_seed(folder):
    write_expert(folder, good_responses(folder))
    draws = [run(folder, "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert draws[0] == draws[1] != draws[2]


def test_the_draw_is_on_disk_before_the_expert_is_asked(folder, monkeypatch):
    write_expert(folder, good_responses(folder))
    drawn = run(folder)[1]
    (folder / "out" / "cold.drawn.json").unlink()

    def no_answer(requests):
        raise ValueError("nobody answers")

    monkeypatch.setattr(annotate, "find_expert", lambda settings: no_answer)
    with pytest.raises(ValueError, match="nobody answers"):
        run(folder)
    assert json.loads((folder / "out" / "cold.drawn.json").read_text()) == drawn


def test_drawn_ids_hold_the_filtered_ones_too(folder):
    responses = good_responses(folder)
    responses["train/9"] = response("none")
    write_expert(folder, responses)
    lines, drawn, report = run(folder, fraction=1)
    assert len(drawn) == 12 and "train/9" in drawn
    assert "train/9" not in [entry["id"] for entry in lines] and len(lines) == 11
    assert report["strata"][PEER] == {"samples": 4, "drawn": 4, "kept": 3}


def test_every_reason_is_counted_and_shown(folder):
    responses = good_responses(folder)
    del responses["train/0"]
    responses["train/1"] = response(PEER)
    responses["train/2"] = response("none", STEPS.replace("Step 4:", "Then"))
    responses["train/3"] = response("none") + " There."
    responses["train/4"] = response("none/of/these")
    write_expert(folder, responses)
    lines, _, report = run(folder, fraction=1)
    assert report["fallen"] == {
        "no response": 1, "answer is not the gold one": 1,
        "not Step 1: to Step 6:, each once and in order": 1, "text outside the tags": 1,
        "answer is not one of the labels": 1}
    assert [example["id"] for example in report["examples"]] == [f"train/{i}" for i in range(5)]
    assert report["examples"][1] == {"id": "train/1", "reason": "answer is not the gold one",
                                     "gold": "<answer>none</answer>", "response": response(PEER)}
    assert [entry["id"] for entry in lines] == [f"train/{i}" for i in range(5, 12)]


def test_ten_examples_show_a_rare_reason_too(folder):
    responses = dict.fromkeys(good_responses(folder), "no idea")
    responses["train/10"] = response("none")
    responses["train/11"] = response(PEER)
    write_expert(folder, responses)
    report = run(folder, fraction=1)[2]
    assert report["fallen"] == {"<think> missing": 10, "answer is not the gold one": 1}
    assert len(report["examples"]) == 10 and report["examples"][1]["id"] == "train/10"


def test_a_label_without_its_slash_is_right_and_gets_it_back(folder):
    responses = good_responses(folder)
    responses["train/8"] = response(PEER[1:])
    write_expert(folder, responses)
    lines, _, report = run(folder, fraction=1)
    assert report["kept"] == 12
    assert {entry["id"]: entry["response"] for entry in lines}["train/8"] == response(PEER)


def test_nothing_of_use_is_an_error_and_leaves_no_data(folder):
    write_expert(folder, {"train/0": "no", "valid/3": response("none")})
    with pytest.raises(ValueError, match="no response of use for any of 12 drawn samples; .*report.json"):
        run(folder, fraction=1)
    assert not (folder / "out" / "cold.jsonl").exists()
    assert json.loads((folder / "out" / "cold.report.json").read_text())["fallen"]["no response"] == 11


def test_no_half_file_is_left_behind(folder):
    write_expert(folder, good_responses(folder))
    run(folder)
    names = sorted(path.name for path in (folder / "out").iterdir())
    assert names == ["cold.drawn.json", "cold.jsonl", "cold.report.json"]


@pytest.mark.parametrize("row", ["{", "3", "", '{"id": "train/0"}', '{"id": 0, "response": "a"}',
                                 '{"id": "a", "response": null}'])
def test_a_broken_line_of_the_expert_s_file_is_named(folder, row):
    (folder / "expert.jsonl").write_text('{"id": "train/1", "response": "a"}\n' + row + "\n")
    with pytest.raises(ValueError,
                       match="expert.jsonl:2: found .*; expected a JSON object with the texts id and response"):
        run(folder)


def test_a_second_response_for_a_sample_is_named(folder):
    (folder / "expert.jsonl").write_text('{"id": "train/1", "response": "a\u2028b"}\n' * 2, encoding="utf-8")
    with pytest.raises(ValueError, match="expert.jsonl:2: a second response for train/1"):
        run(folder)


def test_a_task_without_words_of_its_own_is_filtered_by_its_format_reward(folder):
    class Rewards:
        @staticmethod
        def reward(completion, sample):
            return {"format": float(completion.startswith("!"))}

        @staticmethod
        def correct(completion, sample):
            return completion.endswith(sample.label)

    sample = more.load(folder, "train")[0]
    task = TASK._replace(rewards=Rewards)
    assert filters.reason_to_drop(task, sample, "none") == "broken structure"
    assert filters.reason_to_drop(task, sample, "! some") == "answer is not the gold one"
    assert filters.reason_to_drop(task, sample, "! none") is None


@pytest.mark.parametrize("name, message", [
    ("gone.txt", "--template gone.txt: .*No such file.*; a text file in UTF-8 expected"),
    (".", "--template .: .*directory.*; a text file in UTF-8 expected"),
    ("latin.txt", "--template latin.txt: .*decode.*; a text file in UTF-8 expected"),
    ("empty.txt", "--template empty.txt: no {text} or {question} in it"),
])
def test_a_bad_template_is_refused_before_anything_is_read(tmp_path, monkeypatch, name, message):
    (tmp_path / "empty.txt").write_text("Say something about {entity}.")
    (tmp_path / "latin.txt").write_text("{text} für {entity}", encoding="latin-1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        annotate.main(["--data", "no_data", "--expert", "file:no_expert", "--output", "out/cold.jsonl",
                       "--template", name])
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("words, message", [
    (["--expert", "gpt-4o"], "error: --expert gpt-4o: file:PATH, openai:MODEL or local:MODEL expected"),
    (["--expert", "file:gone.jsonl"], "error: --expert file:gone.jsonl: no such file"),
    (["--expert", "file:expert.jsonl", "--task", "mroe"], "error: unknown task 'mroe'"),
    (["--expert", "file:expert.jsonl", "--fraction", "2"], "error: fraction 2.0"),
    (["--expert", "file:expert.jsonl", "--sede", "2"], "error: .*sede.*seed"),
])
def test_what_the_user_can_mend_is_one_line_and_status_2(folder, words, message, monkeypatch, capsys):
    write_expert(folder, good_responses(folder))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["annotate", "--data", ".", "--output", "out/cold.jsonl", *words])
    with pytest.raises(SystemExit) as ended:
        annotate.run_program(annotate.main)
    assert ended.value.code == 2 and re.fullmatch(message + ".*\n", capsys.readouterr().err)
    assert not (folder / "out").exists()


def test_a_sample_may_have_a_field_of_any_name():
    assert fill_in("{template} and {name}, {other}", template="a", name="b") == "a and b, {other}"
