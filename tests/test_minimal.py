"""The short GRPO is the real one."""

import sys

import torch
from safetensors import safe_open

import grpo.minimal
import grpo.train
import rewards.more
from grpo.runtime.settings import parse
from programs import lines


def tensors(model):
    file = safe_open(model / "model.safetensors", "pt")
    return {name: file.get_tensor(name) for name in file.keys()}


def test_after_three_rollouts_the_short_one_has_the_weights_of_the_long_one_to_the_bit(folder, tmp_path, monkeypatch):
    model, data = folder / "sft" / "model", folder / "world" / "MORE"
    same = ["--model", model, "--data", data, "--learning_rate", 1e-3, "--beta", 0.01, "--updates", 2, "--group_size",
            4, "--prompts_per_rollout", 4, "--seed", 3, "--max_completion_tokens", 24, "--max_pixels", 3136]
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
