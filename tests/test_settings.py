import json
import re
from dataclasses import dataclass, fields, replace

import pytest

from grpo.plan.__main__ import Settings as PlanSettings
from grpo.runtime.optim import learning_rate
from grpo.runtime.settings import (
    as_dict,
    options,
    parse,
    parse_options,
    read_settings,
    required,
    resume_rules,
    run_program,
    setting,
)
from grpo.train import Settings as GRPOSettings
from grpo.variants import PRESETS, Preset, resolve
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
    from grpo.evaluate import Settings as EvaluateSettings

    for kind in (GRPOSettings, SFTSettings, EvaluateSettings, PlanSettings):
        assert all(option.about["help"] for option in options(kind()))


# ── the objective's settings ─────────────────────────────────────────────────────────────────────────────────────

GIVEN = ["--model", "m", "--data", "d", "--output", "o"]


@pytest.mark.parametrize("name", PRESETS)
def test_an_objectives_settings_are_its_presets(name):
    settings = parse(GRPOSettings, [*GIVEN, "--objective", name])
    assert settings.objective == PRESETS[name] == GRPOSettings(objective=resolve(name)).objective
    assert as_dict(settings)["objective"] == name and as_dict(settings)["clip_low"] == PRESETS[name].clip_low


def test_every_field_of_a_preset_is_a_setting_of_the_command_line():
    words = ["--objective", "rloo", "--kl_in_reward", "False", "--clip_low", "0.1", "--clip_high", "none", "--length",
             "7"]
    assert parse(GRPOSettings, GIVEN + words).objective == resolve("rloo", kl_in_reward=False, clip_low=0.1, length=7)
    known = as_dict(GRPOSettings(objective=resolve("sapo")))
    assert {f.name for f in fields(PRESETS["sapo"])} - {"name", "source"} <= set(known) and "tau_positive" in known
    with pytest.raises(ValueError, match="no setting --tau_positive"):
        parse(GRPOSettings, [*GIVEN, "--tau_positive", "2"])


def test_a_recipe_names_the_objective_too(tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({"objective": "sapo", "tau_negative": 3, "clip_low": None}))
    settings = parse(GRPOSettings, [*GIVEN, "--config", str(tmp_path / "recipe.json")])
    assert settings.objective == resolve("sapo", tau_negative=3.0, clip_low=None)
    with pytest.raises(ValueError, match="no setting tau_negative"):
        parse(GRPOSettings, [*GIVEN, "--config", str(tmp_path / "recipe.json"), "--objective", "grpo"])


def test_a_setting_of_a_fork_cannot_take_the_name_of_one_of_ours():
    @dataclass(frozen=True)
    class Fork(Preset):
        epochs: int = setting(1, "ours has these")

    @dataclass
    class Settings(GRPOSettings):
        objective: Preset = setting(Fork(name="fork"), "a fork's", family=resolve)

    with pytest.raises(ValueError, match="there are two settings epochs"):
        parse(Settings, GIVEN)


def test_what_may_differ_when_a_run_goes_on_is_said_by_the_setting():
    rules = resume_rules(GRPOSettings()) | resume_rules(SFTSettings())
    assert {name for name, rule in rules.items() if rule == "never"} == {
        "task", "split", "lora_rank", "lora_alpha", "lora_targets", "train_vision", "adapter"}
    free = {name for name, rule in rules.items() if rule == "free"}
    assert {"output", "tokens_per_pass", "shard_size", "predictions", "responses", "rollout_log_every"} <= free
    assert not free & {"learning_rate", "beta", "seed", "dtype", "prompts_per_rollout", "max_completion_tokens"}


# ── help ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def help_of(kind, capsys, *words):
    with pytest.raises(SystemExit) as end:
        parse(kind, [*words, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("kind", [GRPOSettings, SFTSettings, PlanSettings])
def test_help_lists_each_setting_once_and_what_is_set_first_on_top(kind, capsys):
    text = help_of(kind, capsys)
    flags = re.findall(r"^  (--\w+)", text, re.M)
    assert sorted(flags) == sorted({*(option.flag for option in options(kind())), "--config", "--help"})
    titles = re.findall(r"^(\w.*):$", text, re.M)
    assert titles[0] == "set first" and len(titles) == len(set(titles)) > 3
    first = re.findall(r"^  (--\w+)", text.split(f"\n{titles[1]}:\n")[0], re.M)
    assert {"--model", "--max_completion_tokens", "--gradient_checkpointing"} <= set(first) and len(first) <= 17
    assert "--no_" not in text and "(required) (default" not in text and "default: )" not in text


def test_help_names_the_presets_and_shows_the_chosen_ones_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = help_of(GRPOSettings, capsys, "--objective", "dapo")
    assert all(name in text for name in PRESETS) and "\nobjective dapo: DAPO, arXiv 2503.14476" in text
    for flag, default in (("--clip_high X", 0.28), ("--beta X", 0.0), ("--updates N", 2),
                          ("--aggregate {sequence,token,constant}", "token"), ("--length N", "none"),
                          ("--learning_rate X", "1e-06"), ("--kl_in_reward [True|False]", False)):
        assert re.search(rf"^  {re.escape(flag)}\s[^-]*?\(default {default}\)", text, re.M), flag


# ── names of others, and of yesterday ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("theirs,ours", [
    ("lr", "learning_rate"), ("batch", "prompts_per_rollout"), ("num_generations", "group_size"),
    ("num_iterations", "updates"), ("max_completion_length", "max_completion_tokens"),
    ("per_device_train_batch_size", "prompts_per_rollout"), ("output_dir", "output"), ("epsilon", "clip_low"),
    ("no_train_vision", "train_vision"), ("learning-rate", "learning_rate"),
])
def test_another_trainers_name_is_answered_with_ours(theirs, ours):
    with pytest.raises(ValueError, match=f"no setting --{theirs}; did you mean {ours}\\?$"):
        parse(GRPOSettings, [*GIVEN, f"--{theirs}", "1"])


def test_the_same_name_means_what_the_program_has():
    with pytest.raises(ValueError, match="did you mean batch_size"):
        parse(SFTSettings, [*GIVEN, "--per_device_train_batch_size", "1"])


@pytest.mark.parametrize("old,new", [
    ("journal_every", "rollout_log_every"), ("journal_groups", "rollout_log_groups"),
    ("journal_megabytes", "rollout_log_megabytes"), ("flat_groups", "zero_variance_groups"),
])
def test_a_renamed_setting_is_refused_with_its_new_name(tmp_path, old, new):
    with pytest.raises(ValueError, match=f"no setting --{old}=1; did you mean {new}\\?"):
        parse(GRPOSettings, [*GIVEN, f"--{old}=1"])
    (tmp_path / "recipe.json").write_text(json.dumps({old: 1}))
    with pytest.raises(ValueError, match=f"recipe.json: no setting {old}; did you mean {new}\\?"):
        parse(GRPOSettings, [*GIVEN, "--config", str(tmp_path / "recipe.json")])
    assert new in as_dict(GRPOSettings())


# ── values ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Kinds:
    """One of each."""

    flag: bool = setting(False, "yes or no")
    count: int = setting(1, "how many")
    share: float = setting(0.5, "of all", least=0, most=1)
    limit: float | None = setting(None, "or none")
    word: str = setting("a", "which", choices=("a", "b"))
    sizes: list[int] = setting([1, 2], "several")


@pytest.mark.parametrize("recipe,expected", [
    ({"flag": "yes"}, 'flag is "yes"; true or false expected'), ({"flag": 1}, "flag is 1; true or false expected"),
    ({"count": "eight"}, 'count is "eight"; a whole number expected'),
    ({"count": 1.5}, "count is 1.5; a whole number expected"),
    ({"count": True}, "count is true; a whole number expected"),
    ({"count": None}, "count is null; a whole number expected"),
    ({"share": "0.5"}, 'share is "0.5"; a number expected'),
    ({"limit": "x"}, 'limit is "x"; a number or null expected'), ({"word": 3}, "word is 3; a text expected"),
    ({"sizes": 3}, "sizes is 3; a list"),
    ({"sizes": [1, "2"]}, r"sizes is \[1, \"2\"\]; a list, each of it a whole number"),
])
def test_a_recipes_value_of_another_type_is_refused_with_file_and_setting(tmp_path, recipe, expected):
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match=f"--config .*recipe.json: {expected}"):
        parse(Kinds, ["--config", str(tmp_path / "recipe.json")])


def test_a_recipe_whose_objective_is_null_is_refused_with_file_and_setting(tmp_path):
    (tmp_path / "recipe.json").write_text('{"objective": null}')
    with pytest.raises(ValueError, match="--config .*recipe.json: objective is null; a text expected"):
        parse(GRPOSettings, ["--config", str(tmp_path / "recipe.json")])


def test_a_recipe_with_a_byte_order_mark_and_values_of_their_types_is_read(tmp_path):
    recipe = {"flag": True, "count": 3, "share": 1, "limit": None, "word": "b", "sizes": [4]}
    (tmp_path / "recipe.json").write_text("\ufeff" + json.dumps(recipe), encoding="utf-8")
    assert parse(Kinds,
                 [f"--config={tmp_path / 'recipe.json'}", "--limit", "0.25"]) == Kinds(True, 3, 1.0, 0.25, "b", [4])


@pytest.mark.parametrize("words,expected", [
    (["--flag", "maybe"], "argument --flag: found 'maybe'; true or false expected"),
    (["--share", "half"], "argument --share: found 'half'; a number expected"),
    (["--word", "c"], "argument --word: invalid choice: 'c'"),
    (["--share", "1.5"], "--share is 1.5; it must be at most 1"),
    (["--share", "nan"], "--share is nan; it must be at least 0"),
])
def test_a_value_that_does_not_fit_is_refused(words, expected):
    with pytest.raises(ValueError, match=expected):
        read_settings(Kinds, words)


def test_a_flag_alone_is_yes_and_none_is_none():
    assert parse(Kinds, ["--flag"]) == replace(Kinds(), flag=True)
    assert parse(Kinds, ["--limit", "none", "--sizes", "3", "4", "--flag", "no"]) == replace(Kinds(), sizes=[3, 4])


@pytest.mark.parametrize("words,expected", [
    (["--predictions", "gone.jsonl"], "--predictions gone.jsonl: no such file"),
    (["--data", "gone"], "--data gone: no such folder"),
    (["--model", "runs/gone/model"], "--model runs/gone/model: no such folder, nor a model of the hub"),
    (["--adapter", "gone"], "--adapter gone: no such folder"),
    (["--adapter", "a_file"], "--adapter a_file: no such folder"),
    (["--model", "here/gone"], "--model here/gone: no such folder"), (["--model", "./gone"], "no such folder"),
    (["--output", "a_file/out"], "--output a_file/out: a file; a folder expected"),
    (["--task", "mroe"], "did you mean 'more'"),
])
def test_what_is_not_there_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "a_file").touch()
    usual = ["--model", "here", "--data", "here", "--output", "out"]
    read_settings(GRPOSettings, usual)
    with pytest.raises(ValueError, match=re.escape(expected)):
        read_settings(GRPOSettings, [*usual, *words])


def test_a_hub_name_and_a_forks_data_are_not_taken_for_missing_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read_settings(GRPOSettings,
                  ["--model", "Qwen/Qwen2.5-VL-7B-Instruct", "--output", "o", "--task", "my.task", "--data",
                   "v2:train"])


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
    ({"max_rollouts": -1}, "--max_rollouts is -1; it must be at least 0"),
    ({"max_prompt_tokens": 0}, "--max_prompt_tokens is 0"), ({"learning_rate": float("nan")}, "--learning_rate is nan"),
    ({"hang_minutes": float("inf")}, "--hang_minutes is inf; a finite number expected"),
    ({"objective": "more-r2"}, "did you mean 'more-r1'"),
    ({"export_dtype": "int8"}, "--export_dtype: invalid choice: 'int8' .choose from '?auto'?, '?float32'?, '?bfloat16"),
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
    assert (preset.group_size, preset.updates, preset.temperature, preset.beta,
            preset.clip_low) == (8, 2, 0.8, 0.001, 0.2)
    sft = SFTSettings()
    assert (sft.epochs, sft.learning_rate, sft.batch_size, sft.max_tokens,
            sft.train_vision) == (20, 1e-4, 128, 2096, False)


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
    assert parse(Small,
                 ["--model", "m", "--epochs", "2", "--config", str(tmp_path / "recipe.json")]) == Small("m", 2, True)


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
    assert learning_rate(0, 20, 1.0, 0.0,
                         "cosine") == 1.0 and learning_rate(10, 20, 1.0, 0.0, "cosine") == pytest.approx(0.5)
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
    monkeypatch.setattr("grpo.runtime.program.leave", ends.append)

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
