import json

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from data.toy.model import write_tiny_model
from grpo.engine.weights import Checkpoint, empty_policy, fill, load_policy
from grpo.runtime import export as exporting
from grpo.runtime.dist import rank
from grpo.runtime.export import export
from grpo.runtime.files import replace_folder
from grpo.runtime.fsdp import shard
from processes import gather_weights, run_processes
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
    export(policy, str(folder), tmp_path / "model")
    names = set(safe_open(tmp_path / "model" / "model.safetensors", "pt").keys())
    assert {"model.layers.0.mlp.up_proj.weight", "visual.patch_embed.proj.weight",
            "lm_head.weight"} <= names  # the Hub's
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
    export(policy, str(tmp_path / "tied"), tmp_path / "model")
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


def rewrite(folder, change):
    """The folder's tensors, changed."""
    file = safe_open(folder / "model.safetensors", "pt")
    weights = {name: file.get_tensor(name) for name in file.keys()}
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


def test_a_checkpoint_without_weights_is_refused_by_name(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="source/model.safetensors: missing"):
        load_policy(str(folder))


@pytest.mark.parametrize("change,expected", [
    (lambda w: {n: t for n, t in w.items() if "layers.1.mlp" not in n},
     "source: 3 tensors are missing from the weights, model.language_model.layers.1.mlp.gate_proj.weight first"),
    (lambda w: w | {"model.layers.7.mlp.up_proj.weight": torch.zeros(2, 2)},
     "source: 1 tensors in the weights have no place in the model, model.layers.7.mlp.up_proj.weight first"),
    (lambda w: w | {"model.language_model.norm.weight": torch.zeros(32)},
     "1 tensors in the weights have no place .* first"),
    (lambda w: w | {"visual.merger.ln_q.weight": torch.zeros(31)},
     r"source: visual.merger.ln_q.weight has the shape \[31\] in the weights; the model's is \[32\]"),
], ids=["missing", "too many", "twice", "another shape"])
def test_weights_that_do_not_fit_the_config_are_refused_by_name(folder, change, expected):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=expected):
        load_policy(str(folder))


def test_weights_that_are_cut_off_are_refused_by_name(folder):
    content = (folder / "model.safetensors").read_bytes()
    for length in (4, 1000, len(content) - 1):
        (folder / "model.safetensors").write_bytes(content[:length])
        with pytest.raises(ValueError, match="source/model.safetensors: not a whole safetensors file"):
            load_policy(str(folder))


def test_an_index_that_names_a_file_that_is_not_there_is_refused_by_name(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"lm_head.weight": "model-1-of-1.safetensors"}}'
    )
    with pytest.raises(ValueError, match="source/model-1-of-1.safetensors: missing"):
        load_policy(str(folder))
    (folder / "model.safetensors.index.json").write_text('{}')
    with pytest.raises(ValueError, match="index.json: no weight_map"):
        load_policy(str(folder))


def test_a_pickle_is_refused_with_how_to_convert_it(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin: a pickle, .* convert it: python -c .*save_pretrained"):
        load_policy(str(folder))


def test_what_is_loaded_is_what_stock_transformers_loads_buffers_too(folder):
    ours, theirs = load_policy(str(folder)).model, stock(folder)
    for kind in ("named_parameters", "named_buffers"):
        found, expected = dict(getattr(ours, kind)()), dict(getattr(theirs, kind)())
        assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


def test_names_of_today_load_as_those_of_the_hub(folder, tmp_path):
    expected = load_policy(str(folder)).model.state_dict()
    new = {"lm_head": "lm_head", "visual": "model.visual", "model": "model.language_model"}
    rewrite(folder, lambda w: {new[name.partition(".")[0]] + "." + name.partition(".")[2]: t for name, t in w.items()})
    found = load_policy(str(folder)).model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_weights_that_wait_on_the_host_have_their_buffers_on_the_device(folder):
    policy = fill(empty_policy(str(folder)), Checkpoint(str(folder)), torch.device("meta"), host=True)
    buffers = [buffer for module in policy.modules() for buffer in module.buffers(recurse=False)]
    assert buffers and all(buffer.is_meta for buffer in buffers)  # a device that is not the host's
    expected = load_policy(str(folder)).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in policy.named_parameters())


# ── many ranks ───────────────────────────────────────────────────────────────────────────────────────────────────


def load_and_export(folder, place, dtype, shard_size):
    """Loaded, sharded, changed as a whole by 1, exported; the frozen encoder is left alone."""
    device = torch.device("cpu")
    policy = empty_policy(str(folder))
    policy.freeze_vision()
    fill(shard(policy, dtype, device, shard_size=shard_size), Checkpoint(str(folder)), device)
    whole, expected = gather_weights(policy), load_policy(str(folder)).model.state_dict()
    for name, tensor in expected.items():
        assert torch.equal(whole[name], tensor.to(whole[name].dtype)), name
        assert whole[name].dtype == (dtype if "visual" in name else torch.float32)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 1.0
    export(policy, str(folder), place)


@pytest.mark.parametrize("world,shard_size,tied", [(3, 0, True), (2, 1, False)],
                         ids=["three, uneven rows, tied", "two copies"])
def test_any_number_of_ranks_loads_its_rows_and_exports_the_whole(tmp_path, world, shard_size, tied):
    write_tiny_model(tmp_path / "source", WORDS, tied=tied, **SMALL)
    run_processes(load_and_export, world, tmp_path / "source", tmp_path / "model", torch.bfloat16, shard_size)
    before, after = ({n: f.get_tensor(n) for n in f.keys()} for f in
                     (safe_open(tmp_path / place / "model.safetensors", "pt") for place in ("source", "model")))
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor if name.startswith("visual.") else tensor + 1.0), name


def test_what_a_killed_export_left_behind_is_in_nobodys_way(folder, tmp_path):
    policy, place = load_policy(str(folder)), tmp_path / "run" / "model"
    for left in ("model", "model.new", "model.old"):
        (tmp_path / "run" / left).mkdir(parents=True)
        (tmp_path / "run" / left / "stale").write_text("")
    export(policy, str(folder), place)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["model"] and not (place / "stale").exists()
    export(policy, str(folder), tmp_path / "not" / "yet" / "there")
    assert (tmp_path / "not" / "yet" / "there" / "config.json").is_file()


# ── what an export looks like ────────────────────────────────────────────────────────────────────────────────────


def in_bfloat16(folder):
    rewrite(folder, lambda w: {name: tensor.bfloat16() for name, tensor in w.items()})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))


def test_an_export_has_the_sources_type_names_and_config_byte_for_byte(folder, tmp_path):
    in_bfloat16(folder)
    (folder / "generation_config.json").write_text('{"temperature":  0.1}')
    policy = load_policy(str(folder))
    export(policy, str(folder), tmp_path / "model")
    for path in folder.iterdir():  # weights too: nothing has trained
        if path.name != "model.safetensors":
            assert (tmp_path / "model" / path.name).read_bytes() == path.read_bytes(), path.name
    before, after = (safe_open(place / "model.safetensors", "pt") for place in (folder, tmp_path / "model"))
    assert all(torch.equal(before.get_tensor(name), after.get_tensor(name)) for name in before.keys())
    assert after.get_tensor("lm_head.weight").dtype == torch.bfloat16


def test_an_export_of_another_type_says_so_in_its_config(folder, tmp_path):
    in_bfloat16(folder)
    policy = load_policy(str(folder))
    policy.model.lm_head.weight.data += 1e-6
    export(policy, str(folder), tmp_path / "model", "float32")
    found = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "model", dtype="auto")
    assert torch.equal(found.lm_head.weight, policy.model.lm_head.weight)
    before, after = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "model"))
    assert after == before | {"torch_dtype": "float32"}


def test_an_export_has_the_sources_files_and_index_and_cuts_what_is_too_large(folder, tmp_path, monkeypatch):
    test_a_checkpoint_in_several_files_with_an_index_loads(folder)
    policy, index = load_policy(str(folder)), "model.safetensors.index.json"
    names = lambda place: {path.name for path in place.glob("*.safetensors")}
    export(policy, str(folder), tmp_path / "model")
    assert (
        names(tmp_path / "model") == names(folder)
        and (tmp_path / "model" / index).read_bytes() == (folder / index).read_bytes()
    )
    monkeypatch.setattr(exporting, "FILE_LIMIT", 160_000)
    export(policy, str(folder), tmp_path / "cut")
    assert len(names(tmp_path / "cut")) > 2 and max(p.stat().st_size
                                                    for p in (tmp_path / "cut").glob("*.safetensors")) < 165_000
    torch.testing.assert_close(logits(stock(tmp_path / "cut")), logits(stock(folder)))


def test_an_odd_number_of_narrow_numbers_does_not_misalign_wider_ones(folder, tmp_path):
    rewrite(folder, lambda w: {"rotary.inv_freq": torch.ones(3).bfloat16(), **w})
    export(load_policy(str(folder)), str(folder), tmp_path / "model")
    assert torch.equal(logits(stock(folder)), logits(stock(tmp_path / "model")))


def test_the_weights_that_are_exported_are_the_policys_and_of_the_frozen_ones_the_sources(folder, tmp_path):
    policy = load_policy(str(folder))
    policy.freeze_vision()
    for parameter in policy.parameters():
        parameter.data.zero_()
    export(policy, str(folder), tmp_path / "model")
    for name, parameter in stock(tmp_path / "model").named_parameters():
        assert parameter.ndim < 2 or bool(parameter.any()) == name.startswith("model.visual"), name


def full_disk(tensors, path, metadata):
    path.write_bytes(b"half")
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def export_twice(folder, place):
    device = torch.device("cpu")
    policy = fill(shard(empty_policy(str(folder)), torch.float32, device), Checkpoint(str(folder)), device)
    export(policy, str(folder), place)
    exporting.save_file = full_disk if rank() == 0 else save_file
    with pytest.raises(OSError,
                       match="model: the weights cannot be written .*No space left.*; what was there before still is"):
        export(policy, str(folder), place)  # on every rank


def test_a_disk_that_fills_during_an_export_is_said_on_every_rank_and_what_was_there_stays(folder, tmp_path):
    run_processes(export_twice, 2, folder, tmp_path / "run" / "model")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["model"]
    torch.testing.assert_close(logits(stock(tmp_path / "run" / "model")), logits(stock(folder)))


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


def test_a_folder_with_an_adapter_is_no_model_and_that_is_said(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter; its base is the model, it goes to --adapter"):
        load_policy(str(tmp_path))
