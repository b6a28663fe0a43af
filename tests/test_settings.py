import json
from dataclasses import dataclass

import pytest

from grpo.runtime.optim import learning_rate
from grpo.runtime.settings import parse, parse_options, required, run_program, setting
from grpo.train import Settings as GRPOSettings
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
    (["--model", "m", "--epochs", "many"], "argument --epochs: found 'many'; a whole number expected"),
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
    with pytest.raises(ValueError, match="no setting epoch; did you mean epochs"):
        parse(Small, words)


def test_every_setting_of_a_program_has_a_help_text():
    import dataclasses

    from grpo.evaluate import Settings as EvaluateSettings

    for kind in (GRPOSettings, SFTSettings, EvaluateSettings):
        assert all(f.metadata.get("help") for f in dataclasses.fields(kind))


@pytest.mark.parametrize("changes,expected", [
    ({"group_size": 1}, "--group_size is 1; it must be at least 2"),
    ({"prompts_per_rollout": 0}, "--prompts_per_rollout is 0"),
    ({"updates": 0}, "--updates is 0"),
    ({"learning_rate": 0.0}, "--learning_rate is 0"),
    ({"max_completion_tokens": 0}, "--max_completion_tokens is 0"),
    ({"epochs": 0}, "--epochs is 0"),
    ({"tokens_per_pass": 0}, "--tokens_per_pass is 0"),
    ({"max_grad_norm": 0.0}, "--max_grad_norm is 0"),
    ({"rollout_rows": 0}, "--rollout_rows is 0"),
    ({"warmup": 1.1}, "--warmup is 1.1; it must be at most 1"),
    ({"warmup": -0.1}, "--warmup is -0.1; it must be at least 0"),
    ({"max_rollouts": -1}, "--max_rollouts is -1; it must be at least 0"), ({"max_prompt_tokens": 0}, "--max_prompt_tokens is 0"),
    ({"learning_rate": float("nan")}, "--learning_rate is nan"),
    ({"objective": "more-r2"}, "did you mean 'more-r1'"),
])
def test_settings_that_cannot_train_are_refused(changes, expected):
    given = {"model": "m", "data": "d", "output": "o", **changes}
    with pytest.raises(ValueError, match=expected):
        parse(GRPOSettings, [word for name, value in given.items() for word in (f"--{name}", str(value))]).check()


def test_prompts_that_do_not_divide_by_the_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="expected a multiple of the 3 ranks"):
        GRPOSettings(model="m", data="d", output="o", prompts_per_rollout=16).check()


def test_the_defaults_are_more_r1s():
    s = GRPOSettings()
    preset = s.objective
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


def test_words_before_the_recipe_count_like_words_after_it(tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({"epochs": 7, "flag": True}))
    assert parse(Small, ["--model", "m", "--epochs", "2", "--config", str(tmp_path / "recipe.json")]) == Small("m", 2, True)


@pytest.mark.parametrize("content,expected", [
    (None, "recipe.json: .*expected a JSON object of settings"),
    ("{epochs: 7", "recipe.json: .*expected a JSON object of settings"),
    ("[7]", "recipe.json: found \\[7\\]; expected a JSON object of settings"),
])
def test_a_recipe_that_cannot_be_read_is_refused_by_its_name(tmp_path, content, expected):
    if content is not None:
        (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(ValueError, match=expected):
        parse(Small, ["--model", "m", "--config", str(tmp_path / "recipe.json")])


def test_a_recipe_without_its_name_is_refused():
    with pytest.raises(ValueError, match="--config: expected one argument"):
        parse(Small, ["--model", "m", "--config"])


def test_an_option_that_is_no_number_is_refused_and_a_last_comma_forgiven():
    assert parse_options("x=1, ", "reward_options") == {"x": 1} and parse_options("", "reward_options") == {}
    for text in ("x=true", "x=NaN", "x=[1]", 'x="long"', "x=long", "x=", "x=1,x=long"):
        with pytest.raises(ValueError, match="--reward_options: found"):
            parse_options(text, "reward_options")


@pytest.mark.parametrize("fault", [ValueError, FileNotFoundError])
def test_a_fault_that_the_user_can_mend_ends_in_one_line_and_status_2(monkeypatch, capsys, fault):
    def main():
        raise fault("no such split")

    for name in ("GRPO_TRACEBACK", "RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit) as ended:
        run_program(main)
    assert ended.value.code == 2 and capsys.readouterr().err == "error: no such split\n"
    monkeypatch.setenv("GRPO_TRACEBACK", "1")
    with pytest.raises(fault):
        run_program(main)


def test_without_a_warm_up_the_cosine_starts_at_once_and_the_shortest_one_is_a_step():
    assert learning_rate(0, 20, 1.0, 0.0, "cosine") == 1.0 and learning_rate(10, 20, 1.0, 0.0, "cosine") == pytest.approx(0.5)
    assert [learning_rate(step, 3, 1.0, 0.05, "cosine") for step in (0, 1)] == [1.0, 1.0]
    assert learning_rate(4, 4, 1.0, 1.0, "cosine") == 1.0


def test_an_error_stands_on_torchruns_own_page_too(tmp_path, monkeypatch, capsys):
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    def main():
        raise ValueError("there is no such thing")

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit):
        run_program(main)
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
    assert failure.message["extraInfo"]["py_callstack"] == "error: there is no such thing"
    assert capsys.readouterr().err == "error: there is no such thing\n"


def test_a_ctrl_c_outside_of_training_is_one_word(monkeypatch, capsys):
    ends = []
    monkeypatch.setattr("grpo.runtime.settings.leave", ends.append)

    def main():
        raise KeyboardInterrupt

    run_program(main)
    assert ends == [130] and capsys.readouterr().err == "interrupted\n"


def test_no_warning_of_a_library_stands_between_our_lines(capsys, recwarn):
    import logging
    import warnings

    def main():
        warnings.warn("use another name", FutureWarning)
        logging.getLogger("transformers.modeling_utils").warning("use another name")
        logging.getLogger("data.curriculum").warning("three are dropped")
        print("ours")

    run_program(main)
    said = capsys.readouterr()
    assert said.out == "ours\n" and "another name" not in said.err and not recwarn.list
