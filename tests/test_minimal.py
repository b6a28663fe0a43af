"""The short GRPO is the real one."""

import functools
import sys

import pytest
import torch
from safetensors import safe_open

import data.more
import grpo.minimal
import grpo.train
import rewards.more
from grpo.runtime.settings import parse
from programs import lines


def tensors(model):
    file = safe_open(model / "model.safetensors", "pt")
    return {name: file.get_tensor(name) for name in file.keys()}


@pytest.mark.parametrize("few", [None, 3], ids=["of the whole dataset", "of three samples, one of them twice"])
def test_after_three_rollouts_the_short_one_has_the_weights_of_the_long_one(folder, tmp_path, monkeypatch, few):
    """To the bit."""
    load = data.more.load
    first = functools.wraps(load)(lambda *given, **more: load(*given, **more)[:few])
    monkeypatch.setattr(data.more, "load", first)
    model = folder / "sft" / "model"
    same = ["--model", model, "--data", folder / "world" / "MORE", "--learning_rate", 1e-3, "--beta", 0.01,
            "--updates", 2, "--group_size", 4, "--prompts_per_rollout", 4, "--seed", 3,
            "--max_completion_tokens", 24, "--max_pixels", 3136]
    same = [str(word) for word in same]
    # a length that these short completions differ in; and small packs, so that the gradients of several add up
    monkeypatch.setitem(rewards.more.reward.__kwdefaults__, "min_length", 60)
    short = grpo.minimal.train(parse(grpo.minimal.Settings, [*same, "--rollouts", "3", "--tokens_per_pass", "400"]))
    words = [*same, "--max_rollouts", "3", "--output", str(tmp_path), "--valid_split", "", "--schedule", "constant",
             "--warmup", "0", "--tokens_per_pass", "400"]
    monkeypatch.setattr(sys, "argv", ["grpo.train", *words])
    grpo.train.main()

    grpo.minimal.export(short, str(model), tmp_path / "short")
    start, long, short = tensors(model), tensors(tmp_path / "model"), tensors(tmp_path / "short")
    assert all(torch.equal(long[name], short[name]) for name in long)
    assert max((long[name] - start[name]).abs().max() for name in long) > 1e-3
    steps = [line for line in lines(tmp_path / "metrics.jsonl") if "reward" in line]
    assert len(steps) == 3 and any(line["reward_std"] > 0 for line in steps) and steps[-1]["kl"] > 0
