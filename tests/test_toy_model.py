"""The tiny model is an ordinary Hugging Face folder that stock transformers loads."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from data import more
from data.toy import model as tiny_model, world as synthetic
from data.toy.__main__ import main

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json",
         "generation_config.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("example")
    main(["--output", str(folder), "--train", "300", "--valid", "2", "--test", "2"])
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder / "model")


def load_model(folder):
    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def test_stock_transformers_loads_every_tensor_of_about_a_million_parameters(folder):
    model = load_model(folder / "model")
    assert 0.8e6 < model.num_parameters() < 1.5e6
    written = load_file(folder / "model" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, written[tiny_model.hub_name(name)]), name


def test_the_folder_has_the_layout_of_the_hub(folder):
    names = load_file(folder / "model" / "model.safetensors")
    assert {name.split(".")[0] for name in names} == {"model", "visual", "lm_head"}
    assert "model.layers.0.self_attn.q_proj.weight" in names and "visual.merger.mlp.0.weight" in names
    config = json.loads((folder / "model" / "config.json").read_text())
    assert "text_config" not in config and config["hidden_size"] == 128
    for name in FILES:
        assert (folder / "model" / name).is_file()


def test_at_least_one_vision_block_sees_the_whole_image(folder):
    vision = load_model(folder / "model").config.vision_config
    assert vision.window_size == 112
    assert any(0 <= block < vision.depth for block in vision.fullatt_block_indexes)


def test_every_label_is_one_token_and_text_comes_back_as_it_was(folder, tokenizer):
    responses = [json.loads(line)["response"] for line in (folder / "expert.jsonl").read_text().splitlines()]
    for label in synthetic.LABELS:
        assert len(tokenizer.tokenize(f" <answer>{label}</answer>")) == 3
    for text in (*responses[:50], "Ünseen — words 12: <b>x</b>\n\n  /per/org"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_prompts_and_responses_are_short(folder, tokenizer):
    sample = more.load(folder / "MORE", "train")[0]
    text = more.build_prompt(sample)[1]
    assert len(tokenizer.tokenize(text)) < 60
    assert len(tokenizer) < 1100
    responses = [json.loads(line)["response"] for line in (folder / "expert.jsonl").read_text().splitlines()]
    assert all(len(tokenizer.tokenize(response)) < 80 for response in responses)


def test_the_template_is_qwens_without_a_system_turn(tokenizer):
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}
    assert tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Hi<|im_end|>\n<|im_start|>assistant\n")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


SMALL = dict(hidden=32, layers=1, heads=2, key_value_heads=1, intermediate=32, vision_hidden=32,
             vision_depth=1)


def test_the_seed_decides_the_weights_and_leaves_the_callers_randomness_alone(tmp_path):
    before = torch.get_rng_state()
    weights = {}
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        tiny_model.write_tiny_model(tmp_path / name, ["a few words"], seed, **SMALL)
        weights[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert weights["one"] == weights["same"] != weights["other"]
    assert torch.equal(before, torch.get_rng_state())


def test_a_tied_head_is_not_written(tmp_path):
    tiny_model.write_tiny_model(tmp_path, ["a few words"], tied=True, **SMALL)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load_model(tmp_path)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_the_folders_own_tokenizer_stays_and_decides_the_vocabulary(tmp_path, real_data):
    source = real_data / "qwen2.5-vl"
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    tiny_model.write_tiny_model(tmp_path, **SMALL)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (source / name).read_bytes()
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), load_model(tmp_path)
    assert len(tokenizer) == 151665 <= model.config.text_config.vocab_size
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match="model: no tokenizer.json in it, and no texts"):
        tiny_model.write_tiny_model(tmp_path / "model")
