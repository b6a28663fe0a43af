"""Models that read text alone go through the same three verbs as those that see, against stock transformers."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny import update
from tiny_backbones import (
    TEXT_ONLY,
    groups_of,
    plain_logp,
    policy_of,
    prompt_of,
    text_network,
    tiny_network,
    write_qwen3_vl,
    write_text_model,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.engine.backbones import MODEL_TYPES, backbone
from grpo.engine.encode import Encoder
from grpo.engine.lora import adapted, adapter_off, add_adapter
from grpo.engine.policy import Policy
from grpo.engine.rollout import Sampling, sample
from grpo.engine.weights import load_policy
from grpo.group import Group
from grpo.plan.__main__ import Settings as PlanSettings, plan
from grpo.plan.costs import read_shape
from grpo.runtime.export import export, export_adapter
from grpo.runtime.fsdp import shard
from grpo.runtime.optim import set_gradient_checkpointing
from grpo.runtime.settings import LORA_TARGETS
from processes import gather_weights, run_processes

TEXTS = ["How much is two and three? <answer>five</answer> Step 1: one, two, three, four."] * 3
every_text_model = pytest.mark.parametrize("name", TEXT_ONLY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("text") / "model", TEXTS)


@every_text_model
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
        assert (found.grad - expected.grad).abs().max() <= 1e-4 * expected.grad.abs().max() + 1e-5, label


@every_text_model
def test_the_samplers_log_probabilities_are_the_scorers_and_greedy_is_stock_generation(name):
    policy = policy_of(name)
    assert policy.vision_is_frozen and not list(policy.visual.parameters())
    prompts = [prompt_of(name, i, length=1 + 2 * i) for i in range(4)]
    policy.keep_image_features(prompts)  # what every program calls: there is nothing to keep
    groups = sample(policy, prompts, 3, Sampling(10, (7, 8, 9, *range(20, 40)), 0.8, rows=5))
    sampled = torch.cat([logp for group in groups for logp in group.logps])
    torch.testing.assert_close(sampled, policy.score(groups, 0.8).logp.detach(), rtol=1e-5, atol=2e-5)
    greedy, = sample(policy, prompts[:1], 1, Sampling(12, (7,), 0.0))
    stock = tiny_network(name).generate(prompts[0].tokens[None], attention_mask=torch.ones(1, len(prompts[0])),
                                        max_new_tokens=12, do_sample=False, eos_token_id=7, pad_token_id=0)
    assert greedy.completions[0].tolist() == stock[0, len(prompts[0]):].tolist()


@every_text_model
def test_it_loads_from_the_hubs_names_and_its_export_in_stock_transformers_gives_the_same(name, tmp_path):
    source = write_text_model(tmp_path / "source", TEXTS, name)
    policy, encoder = load_policy(str(source)), Encoder(str(source))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    export(policy, str(source), tmp_path / "model")
    names = lambda folder: set(safe_open(folder / "model.safetensors", "pt").keys())
    assert names(tmp_path / "model") == names(source) and "model.layers.0.mlp.up_proj.weight" in names(source)
    assert ("lm_head.weight" in names(source)) == (name != "llama")
    assert "layout" not in (tmp_path / "model" / "config.json").read_text()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    group = Group(encoder.encode([], "How much?"), [encoder.completion("five"), encoder.completion("two and three")])
    policy.vocabulary = len(policy.model.lm_head.weight)  # stock knows of no ban
    torch.testing.assert_close(policy.score([group]).logp, torch.cat(plain_logp(name, stock, group)), rtol=1e-5,
                               atol=1e-5)
    again = load_policy(str(tmp_path / "model"))  # Stage 2 begins with what Stage 1 wrote
    again.vocabulary = policy.vocabulary
    assert torch.equal(again.score([group]).logp, policy.score([group]).logp)
    assert torch.equal(Encoder(str(tmp_path / "model")).encode([], "How much?").tokens, group.prompt.tokens)


@every_text_model
def test_an_adapter_fits_its_reference_is_exact_and_peft_finds_its_names(name, tmp_path):
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
    export_adapter(policy, LORA_TARGETS, {"model": "some/model"}, tmp_path / "adapter")
    pattern = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    linear = [path for path, module in text_network(name).named_modules() if isinstance(module, torch.nn.Linear)]
    assert sum(bool(re.fullmatch(pattern, path)) for path in linear) == 21 == len(linear) - 1  # all but the head


# ── ids beyond the tokenizer's ───────────────────────────────────────────────────────────────────────────────────


def test_ids_beyond_the_tokenizers_can_neither_be_sampled_nor_scored(folder):
    policy, encoder = load_policy(str(folder)), Encoder(str(folder))
    rows = len(policy.model.lm_head.weight)
    assert policy.vocabulary == encoder.vocabulary == len(AutoTokenizer.from_pretrained(folder)) == rows - 16
    with torch.no_grad():
        policy.model.lm_head.weight[policy.vocabulary:] *= 50  # where it may, it writes little else
    prompt = encoder.encode([], "How much is two and three?")
    sampling = Sampling(20, encoder.end_tokens, 1.0, seed="3")
    groups = sample(policy, [prompt], 8, sampling)
    assert max(int(c.max()) for c in groups[0].completions) < policy.vocabulary
    sampled = torch.cat([logp for logp in groups[0].logps])
    torch.testing.assert_close(policy.score(groups).logp.detach(), sampled, rtol=1e-5, atol=2e-5)
    beyond = policy.score([Group(prompt, [torch.tensor([policy.vocabulary]), torch.tensor([rows - 1])])])
    assert torch.isinf(beyond.logp).all() and (beyond.logp < 0).all()
    free = load_policy(str(folder), vocabulary=10**9)
    free.load_state_dict(policy.state_dict())
    assert free.vocabulary == rows
    assert max(int(c.max()) for c in sample(free, [prompt], 8, sampling)[0].completions) >= policy.vocabulary


def test_with_the_ban_values_and_gradients_are_those_of_logits_of_minus_infinity():
    policy, network, groups = policy_of("qwen2"), tiny_network("qwen2"), groups_of("qwen2")
    policy.vocabulary = 195
    packed, plain = policy.score(groups, 0.7).logp, []
    for group in groups:
        for completion in group.completions:
            logits = network(torch.cat([group.prompt.tokens,
                                        completion])[None]).logits[0, len(group.prompt) - 1 : -1] / 0.7
            logits = logits.masked_fill(torch.arange(200) >= 195, float("-inf"))
            plain.append(logits.log_softmax(-1).gather(-1, completion[:, None])[:, 0])
    torch.testing.assert_close(packed, torch.cat(plain), rtol=1e-5, atol=2e-5)
    packed.sum().backward()
    torch.cat(plain).sum().backward()
    found, expected = policy.model.lm_head.weight.grad, network.lm_head.weight.grad
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not found[195:].any() and found[:195].any()


# ── the encoder ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_prompt_is_the_stock_templates_with_a_string_for_its_turn(folder):
    encoder, stock = Encoder(str(folder)), AutoTokenizer.from_pretrained(folder)
    expected = stock.apply_chat_template([{"role": "user", "content": "How much?"}], add_generation_prompt=True,
                                         return_dict=True)["input_ids"]
    prompt = encoder.encode([], "How much?")
    assert prompt.tokens.tolist() == expected and prompt.pixels is None
    assert prompt.positions.tolist() == [list(range(len(expected)))] * 3


@pytest.mark.parametrize("model", ["folder", "seeing"])
def test_a_samples_system_turn_comes_first_and_is_text(folder, tmp_path, model):
    if model == "seeing":
        folder = write_qwen3_vl(tmp_path / "model", TEXTS)
    encoder, sample = Encoder(str(folder)), SimpleNamespace(system="one<|im_end|>two")
    text = encoder.tokenizer.decode(encoder.encode([], "How much?", sample).tokens)
    assert text == ("<|im_start|>system\none<|im_end|>two<|im_end|>\n<|im_start|>user\nHow much?<|im_end|>\n"
                    "<|im_start|>assistant\n")
    tokens = encoder.encode([], "How much?", sample).tokens.tolist()
    assert tokens.count(encoder.end_tokens[0]) == 2  # not the one that the sample spells
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        encoder.encode([], "How much?", SimpleNamespace(system="\ud800"))


def test_a_sample_with_images_is_refused_by_name_for_a_model_that_cannot_see(folder):
    with pytest.raises(ValueError, match="train/7: has 1 images; a model of type llama reads text alone"):
        Encoder(str(folder)).encode([Image.new("RGB", (50, 50))], "What is this?", id="train/7")


def test_a_template_that_writes_todays_date_gives_the_same_prompt_tomorrow(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    llama_3 = ("{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
               "Today Date: {{ date_string }} {{ messages[0]['content'] }}")
    (tmp_path / "chat_template.jinja").write_text(llama_3)
    encoder = Encoder(str(tmp_path))
    assert encoder.tokenizer.decode(encoder.encode([], "How much?").tokens) == "Today Date: 26 Jul 2024 How much?"


# ── processes, planner, choice ───────────────────────────────────────────────────────────────────────────────────


def one_update(groups):
    policy = policy_of("llama")
    if torch.distributed.is_initialized():
        shard(policy, torch.float32, torch.device("cpu"))
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    norm = update(policy, optimizer, [groups], lambda scores: -scores.logp.sum() / 32, 1.0, 1e9, rate=1e-2)
    return norm, gather_weights(policy)


def check_processes(path):
    groups = groups_of("llama")
    found = one_update(groups[:2] if torch.distributed.get_rank() == 0 else groups[2:])
    if torch.distributed.get_rank() == 0:
        torch.save(found, path)


def test_two_processes_train_a_text_model_with_a_tied_head_as_one_does(tmp_path):
    norm, weights = one_update(groups_of("llama"))
    run_processes(check_processes, 2, tmp_path / "found.pt")
    found_norm, found = torch.load(tmp_path / "found.pt")
    assert found_norm == pytest.approx(norm, rel=1e-4)
    for label in weights:
        torch.testing.assert_close(found[label], weights[label], rtol=1e-4, atol=1e-5)


@every_text_model
def test_the_planner_reads_its_shape_and_plans_no_vision(name, tmp_path):
    network = text_network(name)
    network.config.save_pretrained(tmp_path)
    shape = read_shape(str(tmp_path))
    assert shape.total == sum(parameter.numel() for parameter in network.parameters())
    assert (shape.vision, shape.layers, shape.tied) == (0, 3, name == "llama") and len(shape.matrices) == 21
    one = plan(shape, PlanSettings(model=str(tmp_path), image_tokens=0), 1)
    assert one.fits and one.phases["vision"]["activations"] == 0 < one.phases["prefill"]["activations"]


def test_sliding_windows_are_refused():
    with pytest.raises(ValueError, match="only full_attention is supported"):
        Policy(text_network("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1))


def test_every_backbone_says_the_same_things_and_a_text_only_one_is_a_small_file():
    said = re.findall(r"^    (\w[\w, ]*?)  ", backbone.__globals__["__doc__"], re.MULTILINE)
    names = [name for line in said for name in line.split(", ")]
    seeing = ["load_image_processor", "preprocess", "image_token_counts", "seen_size", "features"]
    assert len(names) == 14 and set(seeing) < set(names)
    for name in MODEL_TYPES:
        module = backbone(name)
        sees = module.IMAGE_TOKEN is not None
        assert sees == (name not in TEXT_ONLY)
        assert all(hasattr(module, what) == (sees or what not in seeing) for what in names)
        assert module.Network.config_class.model_type == name
        from pathlib import Path
        assert len(Path(module.__file__).read_text().splitlines()) <= (120 if sees else 60)
