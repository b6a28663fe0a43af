"""The table beside the paper's figures, and the recipes whose results it holds."""

import json
import sys
from pathlib import Path

import pytest
from test_jmere_recipe import GIVEN, launch

import grpo.train
import sft.train
from grpo import evaluate
from grpo.report import paper_table
from grpo.runtime.settings import parse
from sft import annotate

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "docs" / "recipes" / "jmere-r1"
PAPER = {"source": "A, Table 1", "metrics": {"f1": "F1", "mner_f1": "MNER F1"},
         "rows": [{"folder": "sft", "title": "SFT", "f1": 51.95, "mner_f1": 78.67},
                  {"folder": "grpo", "title": "full"}]}


def run(folder, monkeypatch, paper=PAPER):
    (folder / "paper.json").write_text(json.dumps(paper))
    monkeypatch.setattr(sys, "argv", ["paper_table", str(folder / "paper.json"), "--runs", str(folder / "test"),
                                      "--output", str(folder / "table")])
    paper_table.main()
    return (folder / "table.md").read_text().splitlines(), json.loads((folder / "table.json").read_text())


def write_metrics(folder, **metrics):
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))


def test_ours_the_papers_and_greedy_stand_side_by_side_and_what_was_not_run_is_a_dash(tmp_path, monkeypatch):
    write_metrics(tmp_path / "test" / "grpo", f1=0.5684, mner_f1=0.792)
    write_metrics(tmp_path / "test" / "sft_greedy", f1=0.5, mner_f1=0.25)
    lines, rows = run(tmp_path, monkeypatch)
    assert lines[0] == "| % | F1, ours | F1, paper | F1, greedy | MNER F1, ours | MNER F1, paper | MNER F1, greedy |"
    assert lines[2:4] == ["| SFT | – | 51.95 | 50.00 | – | 78.67 | 25.00 |", "| full | 56.84 | – | – | 79.20 | – | – |"]
    assert rows[1]["f1"] == {"ours": pytest.approx(56.84), "paper": None, "greedy": None}


@pytest.mark.parametrize("content, message",
                         [("[]", r"metrics.json: found \[\]; expected"), ("{", "metrics.json: not JSON"),
                                              ('{"recall": 1}', "metrics.json: no f1; found recall")])
def test_an_evaluation_that_cannot_be_read_is_named(tmp_path, monkeypatch, content, message):
    (tmp_path / "test" / "sft").mkdir(parents=True)
    (tmp_path / "test" / "sft" / "metrics.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, monkeypatch)


def test_a_recipe_without_rows_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="paper.json: no rows; source, metrics and rows expected"):
        run(tmp_path, monkeypatch, {"source": "", "metrics": {}})


PROGRAMS = {"data": annotate, "cot_sft": sft.train, "sft": sft.train, "grpo": grpo.train, "test": evaluate}


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_recipe_of_jmere_r1_is_understood_by_its_program(name):
    words = ["--config", str(RECIPE / f"{name}.json"), "--data", "d", "--output", "o"]
    words += ["--expert", "file:x"] if name == "data" else ["--model", "m"]
    settings = parse(PROGRAMS[name].Settings, words)
    assert settings.task == "jmere"


def test_the_recipes_hold_the_papers_settings():
    read = lambda name: json.loads((RECIPE / f"{name}.json").read_text())
    data, warm_up, baseline, stage_2, test = map(read, ("data", "cot_sft", "sft", "grpo", "test"))
    assert (data["candidates"], data["repredict"], data["score"], data["score_threshold"]) == (5, True, True, 0.7)
    assert (warm_up["epochs"], baseline["epochs"], stage_2["epochs"]) == (5, 20, 30)
    assert {**warm_up, "epochs": 20} == baseline
    for recipe in (warm_up, stage_2):
        assert (recipe["warmup"], recipe["lora_rank"], recipe["lora_alpha"]) == (0.06, 128, 64)
        assert recipe["valid_split"] == "val"
    assert (warm_up["learning_rate"], warm_up["batch_size"], stage_2["learning_rate"]) == (2e-5, 8, 2e-6)
    preset = parse(grpo.train.Settings, ["--config", str(RECIPE / "grpo.json"), "--model", "m",
                                         "--data", "d", "--output", "o"]).objective
    assert (preset.updates, preset.clip_low, preset.clip_high) == (1, None, None)
    assert (preset.beta, preset.aggregate) == (0.01, "sequence")
    assert (test["temperature"], test["max_completion_tokens"], test["split"]) == (0.8, 2048, "test")


def test_every_row_of_the_paper_has_a_stage_that_fills_it_and_every_stage_a_row(tmp_path):
    _, _, calls = launch(tmp_path, *GIVEN, "--stage", "everything")
    rows = {row["folder"] for row in json.loads((RECIPE / "paper.json").read_text())["rows"]}
    tested = {words[words.index("--output") + 1] for program, words in calls if program == "grpo.evaluate"}
    names = {output.removeprefix("out/test/") for output in tested}
    assert rows == {name for name in names if not name.endswith("_greedy")}
    assert names == rows | {f"{name}_greedy" for name in rows - {"grpo_vote"}}


def test_a_column_of_greedy_figures_is_there_only_where_some_were_measured(tmp_path, monkeypatch):
    write_metrics(tmp_path / "test" / "grpo", f1=0.5, mner_f1=0.25)
    paper = {**PAPER, "rows": [*PAPER["rows"], {"title": "only theirs", "f1": 1.5}]}
    lines, rows = run(tmp_path, monkeypatch, paper)
    assert lines[0] == "| % | F1, ours | F1, paper | MNER F1, ours | MNER F1, paper |"
    assert lines[4] == "| only theirs | – | 1.50 | – | – |" and rows[2]["f1"]["ours"] is None
