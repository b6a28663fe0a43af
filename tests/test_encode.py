import json

import pytest
import torch
from PIL import Image

from data.toy.model import write_tiny_model
from grpo.engine.backbones.qwen2_5_vl import at_least
from grpo.engine.encode import Encoder
from grpo.engine.rope import rope_positions
from grpo.group import Group
from tiny import packs

WORDS = ["What is in the image? a red logo, a blue cup. Step 1: <think> none"] * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encode") / "model"
    write_tiny_model(path, WORDS, hidden=32, layers=1, heads=4, intermediate=32, vision_hidden=32, vocabulary=320)
    return path


@pytest.fixture(scope="module")
def encoder(folder):
    return Encoder(str(folder), 56 * 56)


def image(width=100, height=80):
    return Image.linear_gradient("L").resize((width, height)).convert("RGB")


def test_every_image_gets_as_many_image_tokens_as_the_encoder_makes_features(encoder):
    prompt = encoder.encode([image(), image(40, 120)], "a red logo")
    runs = (prompt.grids.prod(-1) // 4).tolist()
    assert (prompt.tokens == encoder.image_token).sum() == sum(runs)
    assert len(prompt.pixels) == 4 * sum(runs) and len(set(runs)) >= 1
    text = encoder.tokenizer.decode(prompt.tokens)
    assert text.startswith("<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * runs[0]
                           + "<|vision_end|><|vision_start|>")
    assert text.endswith("a red logo<|im_end|>\n<|im_start|>assistant\n")


def test_images_are_scaled_to_the_limit_and_never_cut(encoder, folder):
    small, large = encoder.encode([image(900, 700)], ""), Encoder(str(folder), 200 * 200).encode([image(900, 700)], "")
    assert small.grids.prod() * 14 * 14 <= 56 * 56 < large.grids.prod() * 14 * 14 <= 200 * 200


def test_a_image_smaller_than_one_token_is_enlarged(encoder):
    assert at_least(image(5, 9), 28).size == (28, 50)
    assert encoder.encode([image(5, 9)], "").pixels is not None


def test_a_template_that_writes_other_than_one_image_token_an_image_is_refused_by_the_samples_name(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes().replace(b"<|vision_start|><|image_pad|>",
                                                                     b"<|image_pad|><|image_pad|>"))
    with pytest.raises(
        ValueError, match="train/3: the chat template writes 2 <|image_pad|> tokens for 1 images".replace("|", r"\|")
    ):
        Encoder(str(tmp_path)).encode([image()], "look", id="train/3")


def test_a_image_too_elongated_is_refused_by_the_samples_name(encoder):
    with pytest.raises(ValueError, match="train/4: .*200"):
        encoder.encode([image(30 * 250, 30)], "", id="train/4")


def test_a_response_ends_with_the_end_token_and_decodes_without_it(encoder):
    completion = encoder.completion("a blue cup")
    assert completion[-1] == encoder.end_tokens[0] == encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encoder.decode(completion) == "a blue cup"
    junk = torch.cat([completion[:-1], torch.tensor([encoder.tokenizer.convert_tokens_to_ids("<|im_start|>")]),
                      completion[-1:]])
    assert encoder.decode(junk) == "a blue cup<|im_start|>"  # the reward must see it


def test_the_checkpoints_generation_settings_do_not_leak_into_sampling(folder, encoder):
    from grpo.engine.rollout import Sampling

    assert json.loads((folder / "generation_config.json").read_text())["top_k"] == 1
    sampling = Sampling(5, encoder.end_tokens)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)


@pytest.mark.parametrize("missing", ["preprocessor_config.json", "tokenizer_config.json"])
def test_a_checkpoint_without_its_processor_files_is_refused_by_their_name(folder, tmp_path, missing):
    for file in folder.iterdir():
        if file.name != missing:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=f"{missing}: missing"):
        Encoder(str(tmp_path))


def test_a_tokenizer_without_the_image_token_is_refused(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes().replace(b"<|image_pad|>", b"<|image_bad|>"))
    with pytest.raises(ValueError, match="no <.image_pad.> token"):
        Encoder(str(tmp_path))


def test_packs_hold_whole_groups_within_the_budget(encoder):
    prompt = encoder.encode([image()], "a red logo")
    groups = [Group(prompt, [torch.arange(n)] * 2) for n in (5, 6, 7, 100)]
    cost = [group.packed_tokens for group in groups]
    parts = packs(groups, cost[0] + cost[1])
    assert [len(part) for part in parts] == [2, 1, 1] and sum(parts, []) == groups


def test_a_prompt_carries_its_positions_its_sample_and_its_name(encoder):
    sample = object()
    prompt = encoder.encode([image(), image(40, 120)], "a red logo", sample, "train/5")
    assert prompt.sample is sample and prompt.id == "train/5"
    assert torch.equal(prompt.positions, rope_positions(prompt.tokens, prompt.grids, encoder.image_token, 2))


def test_text_alone_needs_no_image(encoder):
    prompt = encoder.encode([], "a red logo")
    assert prompt.pixels is None and prompt.grids is None
    assert prompt.positions.tolist() == [list(range(len(prompt)))] * 3


def test_either_end_token_ends_a_completion_and_its_text_is_cut_before_it(encoder):
    ends = tuple(encoder.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    assert encoder.end_tokens == ends
    words = encoder.completion("a blue cup")[:-1]
    for end in ends:
        assert encoder.decode(torch.cat([words, torch.tensor([end])])) == "a blue cup"
    assert encoder.decode(words) == "a blue cup"  # the limit cut it: nothing is lost
    assert encoder.decode(words[:0]) == ""


def test_a_tokenizer_without_a_chat_template_is_refused(folder, tmp_path):
    for file in folder.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="no chat template"):
        Encoder(str(tmp_path))


def test_a_small_image_is_enlarged_before_the_processor_sees_it(encoder):
    small = image(5, 9)
    assert torch.equal(encoder.preprocess([small])[0], encoder.preprocess([at_least(small, 28)])[0])


def test_without_a_limit_of_ours_the_checkpoints_own_numbers_hold(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"min_pixels": 57 * 57, "max_pixels": 85 * 85, "image_mean": [0.1, 0.2, 0.3],
                 "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = Encoder(str(tmp_path)).image_processor
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == (57 * 57, 85 * 85)
    assert (list(processor.image_mean), list(processor.image_std)) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    settings |= {"size": {"shortest_edge": settings.pop("min_pixels"), "longest_edge": settings.pop("max_pixels")}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = Encoder(str(tmp_path)).image_processor
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == (57 * 57, 85 * 85)


def test_a_limit_of_one_token_is_kept_and_a_smaller_one_refused(folder):
    prompt = Encoder(str(folder), 28 * 28).encode([image(90, 90), image(28, 28)], "")
    assert prompt.grids.tolist() == [[1, 2, 2]] * 2  # the checkpoint's smallest image, 56 × 56, gives way
    with pytest.raises(ValueError, match="max_pixels is 783"):
        Encoder(str(folder), 28 * 28 - 1)
