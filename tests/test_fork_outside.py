"""A fork from the outside: in another folder, beside names like ours, a module with a setting and a statistic of its
own."""

import json
import sys

import pytest

from data import more
from data.toy.model import write_tiny_model
from more_folder import line, write_more
from programs import lines, run, succeed

BOUNDED = '''
from dataclasses import dataclass

from grpo.objective import grpo_loss
from grpo.variants import Preset, setting


@dataclass(frozen=True)
class Bounded(Preset):
    bound: float = setting(1.5, "advantages beyond it are cut", above=0)


PRESET = Bounded(group_size=4)


def loss(logp, old_logp, ref_logp, advantages, mask, *, bound, **options):
    value, sums = grpo_loss(logp, old_logp, ref_logp, advantages.clamp(-bound, bound), mask, **options)
    return value, {**sums, "cut_advantages": ((advantages.abs() > bound)[:, None] & mask).sum()}
'''


@pytest.fixture
def elsewhere(tmp_path):
    (tmp_path / "my_bounded.py").write_text(BOUNDED)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("raise SystemExit('the data package of somebody else')")
    (tmp_path / "rewards.py").write_text("raise SystemExit('the rewards of somebody else')")
    return tmp_path


def test_its_setting_is_in_help_wherever_it_is_asked(elsewhere):
    text = succeed("grpo.train", "--objective", "my_bounded", "--help", interpreter=sys.executable, cwd=elsewhere)
    assert "--bound X" in text and "advantages beyond it are cut (default 1.5)" in " ".join(text.split())
    status, text = run("grpo.train", "--objective", "my_bounded", "--bound", 0, "--model", ".", "--data", ".",
                       "--output", "o", cwd=elsewhere)
    assert status == 2 and text == "error: --bound is 0.0; it must be above 0\n"


def test_its_setting_is_in_settings_json_and_its_statistic_in_metrics_jsonl(elsewhere):
    (elsewhere / "MORE").mkdir()
    write_more(elsewhere / "MORE", [line(), line(relation="/per/per/peer")])
    samples = more.load(elsewhere / "MORE", "train")
    write_tiny_model(elsewhere / "model", [more.build_prompt(sample)[1] for sample in samples], vocabulary=300,
                     hidden=32, layers=1, heads=2, key_value_heads=1, intermediate=32, vision_hidden=32)
    succeed("grpo.train", "--objective", "my_bounded", "--bound", 0.25, "--model", "model", "--data", "MORE",
            "--output", "run", "--valid_split", "", "--max_rollouts", 1, "--prompts_per_rollout", 2,
            "--max_completion_tokens", 6, "--reward_options", "min_length=12", "--learning_rate", 1e-3, cwd=elsewhere)
    settings = json.loads((elsewhere / "run" / "settings.json").read_text())["settings"]
    assert settings["bound"] == 0.25 and settings["objective"] == "my_bounded" and settings["group_size"] == 4
    *_, step = lines(elsewhere / "run" / "metrics.jsonl")
    assert 0 < step["cut_advantages"] <= 1 and step["frac_reward_zero_std"] < 1
