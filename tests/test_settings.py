import json
from dataclasses import dataclass

import pytest

from grpo.settings import parse, parse_options, required, setting
from grpo.train import Settings as GRPOSettings
from grpo.update import learning_rate
from sft.train import Settings as SFTSettings


@dataclass
class Small:
    """A program's settings."""

    model: str = required("a folder")
    epochs: int = setting(3, "passes")
    flag: bool = setting(False, "yes or no")


def test_the_command_line_sets_fields_of_their_types():
    settings = parse(Small, ["--model", "m", "--epochs", "5", "--flag", "True"])
    assert settings == Small("m", 5, True)


@pytest.mark.parametrize("words,expected", [
    (["--model", "m", "--epoch", "5"], "no setting --epoch; did you mean epochs"),
    (["--model", "m", "--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
    (["--epochs", "5"], "the following arguments are required: --model"),
    (["--model", "m", "surplus"], "no setting surplus"),
])
def test_what_does_not_fit_is_refused_in_one_line(words, expected):
    with pytest.raises(ValueError) as error:
        parse(Small, words)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_recipe_is_read_first_and_the_command_line_wins(tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({"epochs": 7, "flag": True}))
    words = ["--config", str(tmp_path / "recipe.json"), "--model", "m", "--flag", "False"]
    assert parse(Small, words) == Small("m", 7, False)
    (tmp_path / "recipe.json").write_text(json.dumps({"epoch": 7}))
    with pytest.raises(ValueError, match="no setting 'epoch'; did you mean epochs"):
        parse(Small, words)


def test_every_setting_of_a_program_has_a_help_text():
    import dataclasses

    from grpo.evaluate import Settings as EvaluateSettings

    for kind in (GRPOSettings, SFTSettings, EvaluateSettings):
        assert all(f.metadata.get("help") for f in dataclasses.fields(kind))


@pytest.mark.parametrize("changes,expected", [
    ({"group_size": 1}, "--group_size is 1.*at least 2"),
    ({"prompts_per_rollout": 0}, "--prompts_per_rollout is 0"),
    ({"updates": 0}, "--updates is 0"),
    ({"learning_rate": 0.0}, "--learning_rate is 0"),
    ({"max_completion_tokens": 0}, "--max_completion_tokens is 0"),
    ({"objective": "more-r2"}, "did you mean 'more-r1'"),
])
def test_settings_that_cannot_train_are_refused(changes, expected):
    with pytest.raises(ValueError, match=expected):
        GRPOSettings(model="m", data="d", output="o", **changes).check()


def test_prompts_that_do_not_divide_by_the_processes_are_refused(monkeypatch):
    monkeypatch.setattr("grpo.train.world_size", lambda: 3)
    with pytest.raises(ValueError, match="expected a multiple of the 3 processes"):
        GRPOSettings(model="m", data="d", output="o", prompts_per_rollout=16).check()


def test_the_defaults_are_more_r1s():
    s = GRPOSettings()
    preset = s.preset()
    assert (s.epochs, s.learning_rate, s.warmup, s.decay, s.max_completion_tokens) == (4, 1e-6, 0.05, 0.5, 1024)
    assert (preset.group_size, preset.updates, preset.temperature, preset.beta, preset.clip_low) == (8, 2, 0.8, 0.001, 0.2)
    sft = SFTSettings()
    assert (sft.epochs, sft.learning_rate, sft.batch_size, sft.max_tokens, sft.train_vision) == (20, 1e-4, 128, 2096, False)


def test_options_are_names_and_numbers():
    assert parse_options("min_length=200, x=0.5", "reward_options") == {"min_length": 200, "x": 0.5}
    with pytest.raises(ValueError, match="--reward_options: found 'min_length'"):
        parse_options("min_length", "reward_options")


def test_the_learning_rate_rises_linearly_then_falls_as_a_cosine_to_zero():
    rates = [learning_rate(step, 20, 1.0, 0.2, "cosine") for step in range(21)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[12] == pytest.approx(0.5) and rates[20] == pytest.approx(0.0)
    assert all(a >= b for a, b in zip(rates[4:], rates[5:]))
    assert [learning_rate(step, 20, 1.0, 0.0, "constant") for step in (0, 19)] == [1.0, 1.0]
