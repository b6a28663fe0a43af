import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from data.toy.model import write_tiny_model
from grpo.engine.weights import export, load_policy, replace_folder
from tiny import plain_logp, tiny_groups, tiny_model, tiny_policy

WORDS = ["one two three Step 1: <think> the label is none"] * 3
SMALL = dict(hidden=32, layers=2, heads=4, key_value_heads=2, intermediate=48, vision_hidden=32, vocabulary=300)


@pytest.fixture
def folder(tmp_path):
    write_tiny_model(tmp_path / "source", WORDS, **SMALL)
    return tmp_path / "source"


def logits(model):
    ids = torch.arange(10)[None]
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=torch.zeros_like(ids)).logits


def stock(folder):
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def test_exported_weights_load_in_stock_transformers_and_give_the_same_logits(folder, tmp_path):
    policy = load_policy(str(folder))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    export(policy.model, policy.model.state_dict(), str(folder), tmp_path / "model")
    names = set(safe_open(tmp_path / "model" / "model.safetensors", "pt").keys())
    assert {"model.layers.0.mlp.up_proj.weight", "visual.patch_embed.proj.weight", "lm_head.weight"} <= names  # the Hub's
    exported = stock(tmp_path / "model")
    groups = tiny_groups(lengths=((4, 3),))
    groups[0].prompt.tokens = groups[0].prompt.tokens % 250
    groups[0].prompt.pixels = groups[0].prompt.grids = None
    positions = torch.arange(len(groups[0].prompt))
    groups[0].prompt.positions = positions.expand(3, -1)
    expected = torch.cat(plain_logp(exported, groups[0], ban=False))
    policy.banned, policy.vocabulary = (), len(policy.model.lm_head.weight)  # stock knows of no ban
    torch.testing.assert_close(policy.score(groups).logp, expected, rtol=1e-5, atol=1e-5)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"):
        assert (tmp_path / "model" / name).read_bytes() == (folder / name).read_bytes()


def test_a_checkpoint_in_several_files_with_an_index_loads(folder):
    weights = {name: tensor for file in [safe_open(folder / "model.safetensors", "pt")]
               for name, tensor in ((n, file.get_tensor(n)) for n in file.keys())}
    expected = logits(stock(folder))
    halves = [dict(list(weights.items())[0::2]), dict(list(weights.items())[1::2])]
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for half, name in zip(halves, files):
        save_file(half, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for half, name in zip(halves, files) for key in half}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    found = load_policy(str(folder)).model.state_dict()
    torch.testing.assert_close(logits(stock(folder)), expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in stock(folder).state_dict().items())


def test_a_tied_head_is_absent_from_the_file_and_loads(tmp_path):
    write_tiny_model(tmp_path / "tied", WORDS, tied=True, **SMALL)
    policy = load_policy(str(tmp_path / "tied"))
    assert policy.model.lm_head.weight is policy.model.get_input_embeddings().weight
    export(policy.model, policy.model.state_dict(), str(tmp_path / "tied"), tmp_path / "model")
    assert "lm_head.weight" not in set(safe_open(tmp_path / "model" / "model.safetensors", "pt").keys())
    torch.testing.assert_close(logits(stock(tmp_path / "model")), logits(stock(tmp_path / "tied")))


def test_weights_are_float32_whatever_the_file_holds(folder):
    weights = {n: safe_open(folder / "model.safetensors", "pt").get_tensor(n).bfloat16()
               for n in safe_open(folder / "model.safetensors", "pt").keys()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    assert {p.dtype for p in load_policy(str(folder)).parameters()} == {torch.float32}


def test_an_export_replaces_the_last_one_whole(folder, tmp_path):
    place, new = tmp_path / "model", tmp_path / "model.new"
    for content in ("first", "second"):
        new.mkdir()
        (new / "file").write_text(content)
        replace_folder(new, place)
        assert (place / "file").read_text() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "source"]


def test_another_architecture_is_refused_by_name(folder):
    (folder / "config.json").write_text('{"model_type": "gemma"}')
    with pytest.raises(ValueError, match="model_type 'gemma'; expected one of llama, llava, qwen2"):
        load_policy(str(folder))


def test_a_sliding_window_is_refused():
    from grpo.engine.policy import Policy

    model = tiny_model()
    model.config.text_config.layer_types[1] = "sliding_attention"
    with pytest.raises(ValueError, match="sliding_attention"):
        Policy(model)


def test_the_policy_is_the_stock_model_untouched():
    assert set(tiny_policy().model.state_dict()) == set(tiny_model().state_dict())


def test_a_checkpoint_whose_weights_are_missing_is_refused_by_its_name(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="source: the weights cannot be loaded"):
        load_policy(str(folder))


def test_a_checkpoint_that_lacks_a_tensor_is_refused_rather_than_filled_with_random_numbers(folder):
    file = safe_open(folder / "model.safetensors", "pt")
    weights = {name: file.get_tensor(name) for name in file.keys() if "layers.1.mlp" not in name}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="3 tensors are missing from the weights, model.*layers.1.mlp.down_proj.weight first"):
        load_policy(str(folder))


def test_weights_that_are_cut_off_are_refused_in_one_line(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="source: the weights cannot be loaded"):
        load_policy(str(folder))


def test_what_a_killed_export_left_behind_is_in_nobodys_way(folder, tmp_path):
    policy, place = load_policy(str(folder)), tmp_path / "run" / "model"
    for left in ("model", "model.new", "model.old"):
        (tmp_path / "run" / left).mkdir(parents=True)
        (tmp_path / "run" / left / "stale").write_text("")
    export(policy.model, policy.model.state_dict(), str(folder), place)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["model"] and not (place / "stale").exists()
    export(policy.model, policy.model.state_dict(), str(folder), tmp_path / "not" / "yet" / "there")
    assert (tmp_path / "not" / "yet" / "there" / "config.json").is_file()


def test_the_weights_that_are_exported_are_the_ones_that_are_given(folder, tmp_path):
    policy = load_policy(str(folder))
    export(policy.model, {n: torch.zeros_like(w) for n, w in policy.model.state_dict().items()}, str(folder), tmp_path / "model")
    assert not any(parameter.any() for parameter in stock(tmp_path / "model").parameters())


def test_the_last_export_is_whole_until_the_next_one_stands(tmp_path, monkeypatch):
    import os

    place, new, replace = tmp_path / "model", tmp_path / "model.new", os.replace
    for folder, content in ((place, "first"), (new, "second")):
        folder.mkdir()
        (folder / "file").write_text(content)

    def killed(source, target):
        if source == new:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        replace_folder(new, place)
    assert (tmp_path / "model.old" / "file").read_text() == "first"


def test_the_banned_tokens_are_no_weights():
    assert "banned" not in tiny_policy().state_dict()
