"""Stage 1's loop: when it validates and when it stops."""

from types import SimpleNamespace

import pytest

import sft.train
from grpo.settings import parse


def validations(monkeypatch, figures, **settings):
    """How often the loop validates where the n-th validation finds figures[n]."""
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    settings = parse(sft.train.Settings, ["--model", "m", "--data", "d", "--output", "o", *words])
    run = SimpleNamespace(settings=settings, policy=None, best=float("-inf"), device="cpu", done=[], step=0,
                          restore=lambda optimizer: {}, checkpoint=lambda *_, **__: None, journal=SimpleNamespace(write=lambda line: None))

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


@pytest.mark.parametrize("words", [["--patience", "-1"], ["--patience", "2", "--valid_split", ""]])
def test_patience_without_a_validation_makes_no_sense(words):
    settings = parse(sft.train.Settings, ["--model", "m", "--data", "d", "--output", "o", *words])
    with pytest.raises(ValueError, match="--patience is .*with a --valid_split"):
        settings.check()
