"""The main job on real input: real text, the real tokenizer and template, real layouts; pointed at by
MORE_JMERE_DATA."""

import json
import shutil

import pytest
import torch
from PIL import Image

from data.task import resolve_task
from data.toy.model import write_tiny_model
from grpo.engine.encode import Encoder
from grpo.runtime.answer import Prompts
from programs import lines, run, succeed

WORDS = ["--task", "jmere", "--missing_images", "blank", "--max_pixels", 3136, "--max_completion_tokens", 16,
         "--valid_split", "val", "--valid_samples", 4, "--rollout_rows", 16]


@pytest.fixture(scope="session")
def model(real_data, tmp_path_factory):
    """A tiny random model behind the real tokenizer, template and preprocessor settings: the real vocabulary."""
    folder = tmp_path_factory.mktemp("real") / "model"
    shutil.copytree(real_data / "qwen2.5-vl", folder)
    write_tiny_model(folder, hidden=32, layers=2, heads=4, intermediate=64, vision_hidden=32)
    return folder


def test_sft_and_grpo_run_on_the_real_jmere_text_over_two_processes(real_data, model, tmp_path):
    train = json.loads((real_data / "jmere" / "train.json").read_text())
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps([f"train/{i}" for i in range(0, len(train), 250)]))
    words = ["--data", real_data / "jmere", *WORDS]
    succeed("sft.train", *words, "--model", model, "--samples", ids, "--output", tmp_path / "sft", "--epochs", 2,
            "--batch_size", 8, "--learning_rate", 1e-3, processes=2)
    losses = [line["loss"] for line in lines(tmp_path / "sft" / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < losses[0]
    succeed("grpo.train", *words, "--model", tmp_path / "sft" / "model", "--output", tmp_path / "grpo", "--objective",
            "jmere-r1", "--max_rollouts", 2, "--prompts_per_rollout", 4, "--group_size", 4, "--learning_rate", 1e-4,
            processes=2)
    updates = [line for line in lines(tmp_path / "grpo" / "metrics.jsonl") if "reward" in line]
    assert len(updates) == 2 and {"rewards/quintuple/mean", "rewards/partial/mean",
                                  "rewards/format/mean"} <= set(updates[0])
    assert updates[0]["kl"] == pytest.approx(0, abs=1e-6) and updates[0]["prompts"] == 4


def test_missing_images_stop_the_run_unless_told_otherwise(real_data, model, tmp_path):
    words = [word if word != "blank" else "stop" for word in WORDS]
    status, text = run("sft.train", *words, "--data", real_data / "jmere", "--model", model, "--output", tmp_path)
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(errors) == 1 and "496 of 496 posts have no image" in errors[0], text


def test_real_prompts_hold_the_whole_text_and_the_image_in_qwens_template(real_data, model):
    task, encoder = resolve_task("jmere"), Encoder(str(model), 3136)
    samples = task.data.load(real_data / "jmere", "val", missing_images="blank")
    prompts = Prompts(encoder, task)
    for sample in samples[::50]:
        prompt = prompts(sample)
        text = encoder.tokenizer.decode(prompt.tokens)
        assert text.startswith(
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        )
        assert text.endswith("<|im_end|>\n<|im_start|>assistant\n") and sample.text in text
        assert (prompt.tokens == encoder.image_token).sum() == 4


def test_the_real_more_sample_becomes_a_prompt_of_two_images_and_its_crop_shows_the_box(real_data, model):
    task, encoder = resolve_task("more"), Encoder(str(model), 28 * 28 * 256)
    sample, = task.data.load(real_data / "more-one", "train")
    (image, crop), text = task.data.build_prompt(sample)
    assert (
        sample.label == "/per/misc/awarded" and sample.entity in text and all(label in text for label in sample.labels)
    )
    cx, cy, w, h = sample.box
    left, top = round((cx - w / 2) * image.width), round((cy - h / 2) * image.height)
    assert abs(crop.width - w * image.width) <= 1 and abs(crop.height - h * image.height) <= 1
    assert crop.getpixel((3, 5)) == image.getpixel((left + 3, top + 5))
    assert isinstance(crop, Image.Image)
    prompt = encoder.encode([image, crop], text, sample, sample.id)
    runs = (prompt.grids.prod(-1) // 4).tolist()
    assert len(runs) == 2 and (prompt.tokens == encoder.image_token).sum() == sum(runs) and runs[0] <= 256
    assert torch.equal(prompt.positions[:, 0], torch.zeros(3, dtype=torch.long))
