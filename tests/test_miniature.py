"""benchmarks.miniature: what it runs can be run, what is done is not run again, and the figures are those of the
files."""

import json

import pytest

import grpo.train
import sft.train
from benchmarks import miniature
from grpo import evaluate
from grpo.runtime.settings import parse
from sft import annotate

PROGRAMS = {"sft.annotate": annotate, "sft.train": sft.train, "grpo.evaluate": evaluate, "grpo.train": grpo.train}


def test_every_stage_is_understood_by_its_program_and_comes_after_what_it_needs(tmp_path):
    seen = set()
    for stage in miniature.stages(tmp_path, 3):
        assert seen.issuperset(stage.needs)
        if stage.module != "data.toy":  # which has argparse's own words and no settings class
            assert parse(PROGRAMS[stage.module].Settings, stage.words.replace("{rollouts}", "9").split()).seed == 3
        seen.add(stage.folder)
    assert {tmp_path / row for row in miniature.ROWS} <= seen


def finished(home, f1):
    """A seed of which everything is done; every row's F1 is `f1` and a little more than the row's before."""
    for number, stage in enumerate(miniature.stages(home, 0)):
        stage.folder.mkdir(parents=True)
        stage.done.write_text('{"seconds": 60, "core_seconds": 30}')
        figures = dict.fromkeys(miniature.METRICS, f1 + 0.01 * number)
        (stage.folder / "metrics.json").write_text(json.dumps(figures))
        (stage.folder / "best.json").write_text('{"step": 15}')
    (home / "stage_1" / "metrics.jsonl").write_text('{"loss": 1}\n{"valid/f1": 0.25}\n{"valid/f1": 0.5}\n')
    (home / "split" / "predictions.jsonl").write_text('{"correct": true}\n{"correct": false}\n{"correct": true}\n')
    (home / "full" / "curriculum.jsonl").write_text('{"batches": 7}\n{"batches": 5}\n')


def test_what_is_done_is_not_run_again_and_the_table_is_that_of_the_files(tmp_path, monkeypatch, capsys):
    for seed, f1 in ((0, 0.1), (1, 0.3)):
        finished(tmp_path / "runs" / str(seed), f1)
    document = tmp_path / "miniature.md"
    document.write_text(f"before\n{miniature.BEGIN}\nold\n{miniature.END}\nafter\n")
    words = ["miniature", "--seeds", "0", "1", "--output", str(tmp_path / "runs"), "--document", str(document)]
    monkeypatch.setattr("sys.argv", words)
    miniature.main()
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    # the third stage of a seed is stage 1, the fourth its test: 0.1 and 0.3, and 0.03
    assert "| Stage 1 | 23.0 ± 14.1 | 23.0 ± 14.1 | 23.0 ± 14.1 | 23.0 ± 14.1 | 62.69 |" in text
    assert "| Stage 1 + GRPO, γ = 0.5 (full) − Stage 1 | 3.0 ± 0.0 | 2 of 2 | +3.0 | +3.0 |" in text
    assert "| 0 | 25.0 50.0 | 1 / 2 | 12 | 15 / 15 / 15 / 15 |" in text
    assert capsys.readouterr().out.count("done already") == 2 * len(miniature.stages(tmp_path, 0))


def test_a_document_without_a_place_for_the_figures_is_named(tmp_path):
    (tmp_path / "a.md").write_text("nothing")
    with pytest.raises(ValueError, match="a.md: <!-- figures -->"):
        miniature.put_into(tmp_path / "a.md", "text")
