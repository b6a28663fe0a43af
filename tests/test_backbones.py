"""A backbone is one small file: LLaVA-1.5 and Qwen3-VL through the same three verbs as Qwen2.5-VL."""

import json
import re

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny_backbones import (
    TEMPLATE,
    groups_of,
    plain_logp,
    policy_of,
    prompt_of,
    tiny_network,
    write_llava,
    write_qwen3_vl,
)
from transformers import LlavaForConditionalGeneration, Qwen3VLForConditionalGeneration

from grpo.engine.backbones import MODEL_TYPES, backbone
from grpo.engine.encode import Encoder
from grpo.engine.lora import adapted, adapter_off, add_adapter
from grpo.engine.rollout import Sampling, sample
from grpo.engine.weights import load_policy
from grpo.group import Group
from grpo.runtime.dist import split_across_ranks
from grpo.runtime.export import export
from grpo.runtime.fsdp import shard
from grpo.runtime.optim import set_gradient_checkpointing
from grpo.runtime.settings import LORA_TARGETS
from processes import gather_weights, run_processes
from programs import COMMON, ROOT, lines, succeed, tensors
from tiny import update

OTHERS = ["llava", "qwen3_vl"]
TEXTS = ["What is in the image? a red logo, a blue cup. USER: ASSISTANT: Step 1: <think> none"] * 3


# ── the network's verbs ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", OTHERS)
def test_a_packed_pass_equals_plain_forwards_one_by_one_in_values_and_gradients(name):
    policy, network, groups = policy_of(name), tiny_network(name), groups_of(name)
    packed = policy.score(groups, 0.7).logp
    plain = torch.cat([row for group in groups for row in plain_logp(name, network, group, 0.7)])
    torch.testing.assert_close(packed, plain, rtol=1e-5, atol=2e-5)
    assert plain.std() > 0.5  # far from uniform
    upstream = torch.randn(len(plain))
    (packed * upstream).sum().backward()
    (plain * upstream).sum().backward()
    for (label, expected), found in zip(network.named_parameters(), policy.model.parameters()):
        expected = torch.zeros_like(expected) if expected.grad is None else expected.grad  # CLIP's last layer: unused
        assert (found.grad - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-5, label


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("kept", [False, True], ids=["seen again", "features kept"])
def test_the_samplers_log_probabilities_are_the_scorers(name, kept):
    policy = policy_of(name)
    policy.freeze_vision()
    prompts = [prompt_of(name, i, images=i % 3, length=3 + 2 * i) for i in range(4)]
    if kept:
        policy.keep_image_features(prompts)
    groups = sample(policy, prompts, 3, Sampling(10, (7, 8, 9, *range(20, 40)), 0.8, rows=5))
    sampled = torch.cat([logp for group in groups for logp in group.logps])
    torch.testing.assert_close(sampled, policy.score(groups, 0.8).logp.detach(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_images_count_and_image_tokens_are_never_sampled(name):
    policy, groups = policy_of(name), groups_of(name, lengths=((5, 1),))
    before = policy.score(groups).logp
    groups[0].prompt.pixels = groups[0].prompt.pixels.flip(0)
    assert (policy.score(groups).logp - before).abs().max() > 1e-3
    lost = Group(groups[0].prompt, [torch.tensor(policy.banned)])
    assert torch.isinf(policy.score([lost]).logp).all()


@pytest.mark.parametrize("name", OTHERS)
def test_the_vision_encoder_runs_once_and_a_few_images_at_a_time(name, monkeypatch):
    policy, seen = policy_of(name), []
    policy.freeze_vision()
    assert policy.vision_is_frozen
    features = policy.backbone.features
    monkeypatch.setattr(policy.backbone, "features", lambda *a: seen.append(len(a[2])) or features(*a))
    monkeypatch.setattr("grpo.engine.policy.PATCHES_AT_ONCE", 32)
    prompts = [prompt_of(name, i, images=1) for i in range(5)]
    policy.keep_image_features(prompts)
    for _ in range(3):
        policy.score([Group(prompt, [torch.tensor([1, 2, 3])]) for prompt in prompts])
    assert seen == [2, 2, 1]


@pytest.mark.parametrize("name", OTHERS)
def test_an_adapter_fits_every_backbone_and_its_reference_is_exact(name):
    policy, groups = policy_of(name), groups_of(name)
    before = policy.score(groups).logp.detach()
    add_adapter(policy, 4, 8.0, LORA_TARGETS)
    assert len(adapted(policy)) == 3 * 7  # three layers
    set_gradient_checkpointing(policy, True)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.0)
    update(policy, optimizer, [groups], lambda scores: -scores.logp.sum(), 1.0, 1e9, rate=1e-3)
    assert not torch.equal(policy.score(groups).logp, before)
    with torch.no_grad(), adapter_off(policy):
        assert torch.equal(policy.score(groups).logp, before)


def one_update(name, groups):
    policy = policy_of(name)
    if torch.distributed.is_initialized():
        shard(policy, torch.float32, torch.device("cpu"))
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    norm = update(policy, optimizer, [groups], lambda scores: -scores.logp.sum() / 32, 1.0, 1e9, rate=1e-2)
    return norm, gather_weights(policy)


def check_processes(name, path):
    """The first process gets the groups with images, the second the one without."""
    groups = groups_of(name)
    found = one_update(name, groups[:2] if torch.distributed.get_rank() == 0 else groups[2:])
    if torch.distributed.get_rank() == 0:
        torch.save(found, path)


@pytest.mark.parametrize("name", OTHERS)
def test_two_processes_train_vision_and_language_as_one_does_even_if_one_has_no_image(name, tmp_path):
    norm, weights = one_update(name, groups_of(name))
    run_processes(check_processes, 2, name, tmp_path / "found.pt")
    found_norm, found = torch.load(tmp_path / "found.pt")
    assert found_norm == pytest.approx(norm, rel=1e-4)
    for label in weights:
        torch.testing.assert_close(found[label], weights[label], rtol=1e-4, atol=1e-5)


# ── LLaVA's checkpoint, encoder, programs ────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("llava") / "model", TEXTS)


def image(width=100, height=80):
    return Image.linear_gradient("L").resize((width, height)).convert("RGB")


def test_a_llava_prompt_begins_once_and_holds_every_images_features(llava):
    encoder = Encoder(str(llava), max_pixels=10**6)
    prompt = encoder.encode([image(), image(40, 120)], "a red logo")
    text = encoder.tokenizer.decode(prompt.tokens)
    assert text.replace("<image>" * 16, "<image>") == "<s>USER: <image>\n<image>\na red logo ASSISTANT:"
    assert prompt.pixels.shape == (2, 3, 56, 56) and (prompt.tokens == encoder.image_token).sum() == 2 * 16
    features = load_policy(str(llava)).encode_images([prompt])[0]
    assert features.shape == (2 * 16, 32)
    assert prompt.positions.tolist() == [list(range(len(prompt)))] * 3
    completion = encoder.completion("a blue cup")
    assert (
        encoder.tokenizer.convert_ids_to_tokens(completion.tolist())[-1] == "</s>" and completion[0] != prompt.tokens[0]
    )
    assert encoder.decode(completion).strip() == "a blue cup" and len(encoder.end_tokens) == 1


def test_a_template_that_writes_the_first_token_itself_gets_no_second_one(llava, tmp_path):
    for file in llava.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ bos_token }}" + TEMPLATE}))
    ours, theirs = Encoder(str(llava)).encode([], "a cup"), Encoder(str(tmp_path)).encode([], "a cup")
    assert torch.equal(ours.tokens, theirs.tokens)


def test_llava_pads_a_image_to_a_square_and_cuts_nothing_off(llava):
    encoder = Encoder(str(llava))
    wide = Image.new("RGB", (112, 56), "white")
    wide.paste("red", (0, 0, 14, 56))  # at the edge, where a square from the middle would not reach
    pixels = encoder.preprocess([wide])[0][0]
    red = (pixels[0] > 1.5) & (pixels[1] < -1)
    assert red[:, :7].any() and not red[:, 8:].any()
    assert pixels[:, 0].abs().max() < 0.02  # the border has the mean colour
    square = image(90, 90)
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    clip = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    expected = clip([square], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(encoder.preprocess([square])[0], expected)


def test_with_the_full_strategy_a_image_costs_the_class_token_too(llava, tmp_path):
    for file in llava.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((llava / "config.json").read_text()) | {"vision_feature_select_strategy": "full"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    prompt = Encoder(str(tmp_path)).encode([image()], "a cup")
    features = load_policy(str(tmp_path)).encode_images([prompt])[0]
    assert features.shape == (17, 32) and (prompt.tokens == Encoder(str(llava)).image_token).sum() == 17


def test_a_llava_tokenizer_without_the_image_token_is_refused_though_unknown_tokens_have_an_id(llava, tmp_path):
    for file in llava.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes().replace(b"<image>", b"<imbge>"))
    with pytest.raises(ValueError, match="no <image> token"):
        Encoder(str(tmp_path))


def test_llava_loads_from_the_hubs_names_and_its_export_in_stock_transformers_gives_the_same(llava, tmp_path):
    policy, encoder = load_policy(str(llava)), Encoder(str(llava))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    export(policy, str(llava), tmp_path / "model")
    names = lambda folder: set(safe_open(folder / "model.safetensors", "pt").keys())
    assert names(tmp_path / "model") == names(llava) and "language_model.model.layers.0.mlp.up_proj.weight" in names(
        llava
    )
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    group = Group(encoder.encode([image()], "a red logo"),
                  [encoder.completion("a blue cup"), encoder.completion("none")])
    ids = [torch.cat([group.prompt.tokens, completion])[None] for completion in group.completions]
    logits = [stock(input_ids=row, pixel_values=group.prompt.pixels).logits[0, len(group.prompt) - 1 : -1]
              for row in ids]
    plain = [row.index_fill(-1, torch.tensor([encoder.image_token]), float("-inf")).log_softmax(-1)
             .gather(-1, completion[:, None])[:, 0] for row, completion in zip(logits, group.completions)]
    torch.testing.assert_close(policy.score([group]).logp, torch.cat(plain), rtol=1e-5, atol=1e-5)
    again = Encoder(str(tmp_path / "model"))  # Stage 2 begins with what Stage 1 wrote
    assert torch.equal(again.encode([image()], "a red logo").tokens, group.prompt.tokens)


def test_the_programs_train_and_evaluate_llava_on_two_processes(folder, tmp_path):
    data = folder / "world" / "MORE"
    write_llava(tmp_path / "llava", [line["response"] for line in lines(folder / "cold_start.jsonl")])
    succeed("sft.train", "--model", tmp_path / "llava", "--data", data, "--responses", folder / "cold_start.jsonl",
            "--output", tmp_path / "sft", "--epochs", 1, "--batch_size", 8, "--learning_rate", 1e-3, "--valid_split",
            "", "--train_vision", True, *COMMON, processes=2)
    succeed("grpo.train", "--model", tmp_path / "sft" / "model", "--data", data, "--output", tmp_path / "grpo",
            "--max_rollouts", 1, "--prompts_per_rollout", 2, "--group_size", 4, "--valid_split", "", "--lora_rank", 2,
            "--learning_rate", 1e-2, "--reward_options", "min_length=20", *COMMON, processes=2)
    succeed("grpo.evaluate", "--model", tmp_path / "grpo" / "model", "--data", data, "--output", tmp_path / "test",
            *COMMON)
    assert len(lines(tmp_path / "test" / "predictions.jsonl")) == 12
    before, after = tensors(tmp_path / "sft" / "model"), tensors(tmp_path / "grpo" / "model")
    assert set(before) == set(after) == set(tensors(tmp_path / "llava"))


# ── Qwen3-VL's checkpoint, encoder, programs ─────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def qwen3_vl(tmp_path_factory):
    return write_qwen3_vl(tmp_path_factory.mktemp("qwen3_vl") / "model", TEXTS)


def test_a_qwen3_vl_prompts_images_and_positions_are_stock_transformers(qwen3_vl):
    encoder, policy = Encoder(str(qwen3_vl), max_pixels=96 * 96), load_policy(str(qwen3_vl))
    prompt = encoder.encode([image(), image(40, 120), image(8, 20)], "a red logo")
    text = encoder.tokenizer.decode(prompt.tokens)
    assert re.sub(r"(<.image_pad.>)+", "<|image_pad|>", text).count("<|vision_start|><|image_pad|><|vision_end|>") == 3
    assert (prompt.grids.prod(-1) * 16**2 <= 96 * 96).all() and prompt.pixels.shape[1] == 3 * 2 * 16 * 16
    is_image = prompt.tokens == encoder.image_token
    assert (
        is_image.sum() == prompt.grids.prod(-1).sum() // 4 and len(policy.encode_images([prompt])[0]) == is_image.sum()
    )
    expected, _ = policy.model.model.get_rope_index(prompt.tokens[None], is_image[None].int(),
                                                    image_grid_thw=prompt.grids)
    assert torch.equal(prompt.positions, expected[:, 0])
    with pytest.raises(ValueError, match="one token of an image is already 32 × 32"):
        Encoder(str(qwen3_vl), max_pixels=1000)


def test_qwen3_vl_loads_from_the_hubs_names_and_its_export_in_stock_transformers_gives_the_same(qwen3_vl, tmp_path):
    policy, encoder = load_policy(str(qwen3_vl)), Encoder(str(qwen3_vl))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    export(policy, str(qwen3_vl), tmp_path / "model")
    names = lambda folder: set(safe_open(folder / "model.safetensors", "pt").keys())
    assert names(tmp_path / "model") == names(qwen3_vl) and "model.visual.pos_embed.weight" in names(qwen3_vl)
    stock = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    group = Group(encoder.encode([image()], "a red logo"),
                  [encoder.completion("a blue cup"), encoder.completion("none")])
    plain = []
    for completion in group.completions:
        ids = torch.cat([group.prompt.tokens, completion])[None]
        logits = stock(input_ids=ids, attention_mask=torch.ones_like(ids),
                       mm_token_type_ids=(ids == encoder.image_token).int(), pixel_values=group.prompt.pixels,
                       image_grid_thw=group.prompt.grids).logits[0, len(group.prompt) - 1 : -1]
        logits[:, [*policy.banned, *range(policy.vocabulary, logits.shape[1])]] = float("-inf")
        plain.append(logits.log_softmax(-1).gather(-1, completion[:, None])[:, 0])
    torch.testing.assert_close(policy.score([group]).logp, torch.cat(plain), rtol=1e-5, atol=1e-5)
    again = load_policy(str(tmp_path / "model"))  # Stage 2 begins with what Stage 1 wrote
    assert torch.equal(again.score([group]).logp, policy.score([group]).logp)
    assert torch.equal(Encoder(str(tmp_path / "model")).encode([image()], "a red logo").pixels, group.prompt.pixels)


@pytest.mark.parametrize("size", [(100, 80), (40, 120), (8, 20), (400, 300), (56, 56), (28, 560), (3, 100)])
def test_the_size_at_which_a_model_sees_an_image_is_that_of_its_patches(qwen3_vl, llava, size):
    encoder = Encoder(str(qwen3_vl), max_pixels=96 * 96)
    grid = encoder.encode([image(*size)], "a cup").grids[0]
    assert encoder.seen_size(*size) == (int(grid[2]) * 16, int(grid[1]) * 16)
    seen = Encoder(str(llava)).seen_size(*size)  # fills a square of 56 pixels one way, and keeps its shape
    assert max(seen) == 56 and min(seen) == max(1, round(56 * min(size) / max(size)))


def test_an_image_of_no_shape_that_a_model_sees_is_refused(qwen3_vl):
    with pytest.raises(ValueError, match="absolute aspect ratio must be smaller than 200"):
        Encoder(str(qwen3_vl)).seen_size(10_000, 20)


# ── the choice of one ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_backbone_is_found_by_its_model_type_and_an_unknown_one_is_refused_with_the_known():
    assert MODEL_TYPES == ["llama", "llava", "qwen2", "qwen2_5_vl", "qwen3", "qwen3_vl"]
    for unknown in ("gemma", "__init__", None):
        expected = (
            f"here: config.json has model_type {unknown!r}; expected one of llama, llava, .*another one is a file"
        )
        with pytest.raises(ValueError, match=expected):
            backbone(unknown, "here")
