"""Stage 1's loop: when it validates and when it stops."""

from types import SimpleNamespace

import pytest

import sft.train
from grpo.runtime.run import read_ids
from grpo.runtime.settings import parse


def validations(monkeypatch, figures, **settings):
    """How often the loop validates where the n-th validation finds figures[n]."""
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    settings = parse(sft.train.Settings, ["--model", "m", "--data", "d", "--output", "o", *words])
    run = SimpleNamespace(settings=settings, policy=None, best=float("-inf"), device="cpu", done=[], step=0,
                          restore=lambda optimizer: {}, checkpoint=lambda *_, **__: None,
                          metrics_log=SimpleNamespace(write=lambda line: None))

    def validate(step):
        run.done.append(step)
        run.best = max(run.best, figures[len(run.done) - 1])
        return {}

    run.validate = validate
    for name, value in {"make_optimizer": lambda *_: None, "encode_batch": lambda run, pairs: pairs,
                        "step": lambda *_: {}}.items():
        monkeypatch.setattr(sft.train, name, value)
    sft.train.train(run, [("a", "b")] * 4)
    return len(run.done)


FIGURES = [0.1, 0.3, 0.2, 0.3, 0.4, 0.35, 0.3, 0.2, 0.5, 0.6]


@pytest.mark.parametrize("patience, expected", [(0, 10), (1, 3), (2, 4), (3, 8), (4, 10)])
def test_it_stops_when_so_many_validations_in_a_row_brought_no_new_best(monkeypatch, patience, expected):
    assert validations(monkeypatch, FIGURES, epochs=10, patience=patience) == expected


def test_patience_counts_validations_not_epochs(monkeypatch):
    assert validations(monkeypatch, FIGURES, epochs=20, validate_every=2, patience=3) == 8


@pytest.mark.parametrize("content, expected", [
    ('["train/0", "test/9"]', "found 'test/9'; expected the id of a sample of the split"), ("[[1]]", r"found \[1\]"),
    ('[{"id": 1}]', "found {'id': 1}"), ("3", "found 3; expected a JSON list of sample ids"),
    ("[1", "ids.json: .*expected a JSON list"),
])
def test_a_file_of_ids_that_does_not_fit_is_named_with_what_was_found(tmp_path, content, expected):
    (tmp_path / "ids.json").write_text(content)
    with pytest.raises(ValueError, match=expected) as refused:
        read_ids(str(tmp_path / "ids.json"), [SimpleNamespace(id="train/0")])
    assert "ids.json" in str(refused.value) and "\n" not in str(refused.value)


def test_no_sample_to_train_on_is_refused(tmp_path):
    (tmp_path / "ids.json").write_text("[]")
    words = ["--model", "m", "--data", "d", "--output", "o", "--samples", str(tmp_path / "ids.json")]
    load = lambda split: [SimpleNamespace(id="train/0")]
    run = SimpleNamespace(settings=parse(sft.train.Settings, words), load=load, task=None)
    with pytest.raises(ValueError, match="ids.json: no sample of split train to train on"):
        sft.train.training_pairs(run)


@pytest.mark.parametrize("words, expected", [
    (["--samples", "a", "--responses", "b"], "--samples with --responses"), (["--minutes", "-1"], "--minutes is -1"),
    (["--minutes", "nan"], "--minutes is nan"), (["--learning_rate", "nan"], "--learning_rate is nan"),
])
def test_settings_that_make_no_sense_are_refused(words, expected):
    settings = parse(sft.train.Settings, ["--model", "m", "--data", "d", "--output", "o", *words])
    with pytest.raises(ValueError, match=expected):
        settings.check()


@pytest.mark.parametrize("words", [["--patience", "-1"], ["--patience", "2", "--valid_split", ""]])
def test_patience_without_a_validation_makes_no_sense(words):
    settings = parse(sft.train.Settings, ["--model", "m", "--data", "d", "--output", "o", *words])
    with pytest.raises(ValueError, match="--patience is (-1; it must be at least 0|.*with a --valid_split)"):
        settings.check()
