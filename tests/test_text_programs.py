"""The programs on a text-only model and a file of questions: no code, and one answer to whether thoughts are asked
for."""

import json

import pytest
import torch
from tiny_backbones import write_qwen3_vl, write_text_model

import grpo.train
from programs import COMMON, lines, run, succeed, tensors
from test_checkpoints import run as run_here, same_run

QUESTIONS = [{"question": f"{a} and {b}?", "answer": a + b, "category": "even" if a % 2 == 0 else "odd"}
             for a in range(8) for b in range(5)]
TEXTS = [f"{q['question']} Write the answer in <answer>{q['answer']}</answer>. First think in <think></think>, then"
         for q in QUESTIONS]
JSONL = ["--task", "jsonl", "--max_completion_tokens", 8]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, a file, and an SFT on its bare answers."""
    place = tmp_path_factory.mktemp("text")
    write_text_model(place / "model", TEXTS)
    (place / "q.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    succeed("sft.train", *JSONL, "--model", place / "model", "--data", place / "q.jsonl", "--output", place / "sft",
            "--epochs", 6, "--batch_size", 8, "--learning_rate", 1e-2, "--validate_every", 6)
    return place


def settings_of(output):
    return json.loads((output / "settings.json").read_text())["settings"]


def test_bare_answers_are_learned_and_the_next_stage_asks_as_it_was_trained(world, tmp_path):
    losses = [line["loss"] for line in lines(world / "sft" / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    assert settings_of(world / "sft")["reasoning"] is False and settings_of(world / "sft")["valid_metric"] == "accuracy"
    assert json.loads((world / "sft" / "model" / "training.json").read_text()) == {"reasoning": False}
    succeed("grpo.train", *JSONL, "--model", world / "sft" / "model", "--data", world / "q.jsonl", "--output",
            tmp_path / "grpo", "--max_rollouts", 2, "--prompts_per_rollout", 4, "--group_size", 4, "--learning_rate",
            1e-3, "--rollout_log_every", 1, "--lora_rank", 4, processes=2)
    assert settings_of(tmp_path / "grpo")["reasoning"] is False
    assert json.loads((tmp_path / "grpo" / "model" / "training.json").read_text()) == {"reasoning": False}
    shown = lines(tmp_path / "grpo" / "rollouts.jsonl")[0]["groups"][0]
    assert "think" not in shown["prompt"] and shown["target"].startswith("<answer>")
    log = lines(tmp_path / "grpo" / "metrics.jsonl")
    assert {"valid/accuracy", "valid/unparsable"} <= set(log[0]) and "rewards/answer/mean" in log[1]
    assert set(tensors(tmp_path / "grpo" / "model")) - {"lm_head.weight"} == set(
        tensors(world / "model")
    )  # a tied head
    succeed("grpo.evaluate", *JSONL, "--model", tmp_path / "grpo" / "model", "--data", world / "q.jsonl", "--output",
            tmp_path / "test")
    assert set(json.loads((tmp_path / "test" / "metrics.json").read_text())) >= {"accuracy", "unparsable", "samples"}
    assert (
        len(lines(tmp_path / "test" / "predictions.jsonl")) == 4
        and settings_of(tmp_path / "test")["reasoning"] is False
    )
    text = succeed("grpo.predict", "--model", tmp_path / "grpo" / "model", "--text", "1 and 2?",
                   "--max_completion_tokens", 8)
    assert text.splitlines()[-1].startswith("answer: ")


def test_what_is_said_goes_before_what_the_model_was_trained_with(world, tmp_path):
    succeed("grpo.evaluate", *JSONL, "--model", world / "sft" / "model", "--data", world / "q.jsonl", "--output",
            tmp_path / "test", "--reasoning", True, "--limit", 1)
    assert settings_of(tmp_path / "test")["reasoning"] is True
    succeed("grpo.evaluate", *JSONL, "--model", world / "model", "--data", world / "q.jsonl", "--output",
            tmp_path / "raw", "--limit", 1)
    assert settings_of(tmp_path / "raw")["reasoning"] is True


def test_a_text_models_run_that_was_cut_off_goes_on_to_the_bit(world, tmp_path):
    words = [*JSONL, "--model", world / "sft" / "model", "--data", world / "q.jsonl", "--max_rollouts", 3,
             "--prompts_per_rollout", 2, "--group_size", 4, "--learning_rate", 1e-3, "--checkpoint_every", 1,
             "--valid_samples", 2, "--rollout_rows", 8]
    run_here(grpo.train, [*words, "--output", tmp_path / "whole"])
    with pytest.raises(BaseException, match="^$"):
        run_here(grpo.train, [*words, "--output", tmp_path / "cut"], killed_in_step=2)
    run_here(grpo.train, [*words, "--output", tmp_path / "cut"])
    same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_reward_of_ones_own_is_one_function_in_a_file(world, tmp_path):
    (tmp_path / "short.py").write_text(
        "def reward(completion, sample):\n    return -len(completion) + sample.fields['bonus']\n"
    )
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({**question, "bonus": 5}) + "\n" for question in QUESTIONS))
    succeed("grpo.train", *JSONL, "--model", world / "sft" / "model", "--data", tmp_path / "q.jsonl", "--output",
            tmp_path / "grpo", "--rewards", tmp_path / "short.py", "--max_rollouts", 1, "--prompts_per_rollout", 2,
            "--group_size", 4, "--valid_split", "")
    line = lines(tmp_path / "grpo" / "metrics.jsonl")[-1]
    assert line["rewards/reward/mean"] == line["reward"] < 5


REFUSED = {
    "a bad line": (["--data", "bad.jsonl"], "error: .*bad.jsonl:2: found 'nonsense"),
    "no file": (["--data", "no.jsonl"], "error: --data .*no.jsonl: no such folder or file"),
    "an unknown verifier": (["--verifier", "nomber"], "error: --verifier nomber: auto, exact, text, number"),
    "a verifier that the answers do not suit": (["--verifier", "choice"],
                                                r"error: .*q.jsonl:\d+: answer is \d+; one of the line's choices"),
    "a reward that is not there": (["--rewards", "no.py"], "error: --rewards no.py: no such file"),
    "vision of a model that has none": (["--train_vision", "True"], "error: --train_vision: .*model reads text alone"),
    "a split that is none": (["--valid_split", "dev"], "error: split is 'dev'; of a single file"),
}


@pytest.mark.parametrize("words, message", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_run_is_said_in_one_line_before_training(world, tmp_path, words, message):
    import re

    (world / "bad.jsonl").write_text(json.dumps(QUESTIONS[0]) + "\nnonsense\n")
    words = [str(world / word) if word.endswith(".jsonl") else word for word in words]
    given = {"--data": world / "q.jsonl", "--model": world / "model", "--output": tmp_path / "out", **dict([words])}
    status, text = run("grpo.train", *JSONL, *(word for pair in given.items() for word in pair))
    assert status == 2 and re.search(f"^{message}", text, re.MULTILINE) and "Traceback" not in text, text
    assert not (tmp_path / "out" / "model").exists()


def test_the_programs_train_and_evaluate_qwen3_vl_and_go_on_to_the_bit(folder, tmp_path):
    data = folder / "world" / "MORE"
    write_qwen3_vl(tmp_path / "model", [line["response"] for line in lines(folder / "cold_start.jsonl")])
    succeed("sft.train", "--model", tmp_path / "model", "--data", data, "--responses", folder / "cold_start.jsonl",
            "--output", tmp_path / "sft", "--epochs", 1, "--batch_size", 8, "--learning_rate", 1e-3, "--valid_split",
            "", "--train_vision", True, *COMMON, processes=2)
    words = ["--model", tmp_path / "sft" / "model", "--data", data, "--max_rollouts", 2, "--prompts_per_rollout", 2,
             "--group_size", 4, "--valid_samples", 2, "--lora_rank", 2, "--learning_rate", 1e-2, "--reward_options",
             "min_length=20", "--checkpoint_every", 1, *COMMON]
    run_here(grpo.train, [*words, "--output", tmp_path / "whole"])
    with pytest.raises(BaseException, match="^$"):
        run_here(grpo.train, [*words, "--output", tmp_path / "cut"], killed_in_step=2)
    run_here(grpo.train, [*words, "--output", tmp_path / "cut"])
    same_run(tmp_path / "whole", tmp_path / "cut")
    succeed("grpo.evaluate", "--model", tmp_path / "whole" / "model", "--data", data, "--output", tmp_path / "test",
            *COMMON)
    assert len(lines(tmp_path / "test" / "predictions.jsonl")) == 12
    before, after = tensors(tmp_path / "sft" / "model"), tensors(tmp_path / "whole" / "model")
    assert set(before) == set(after) == set(tensors(tmp_path / "model"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith("model.visual.") for name in moved)
