"""The adapter: what it computes, what trains, what is exported, how many processes share it."""

import json
import re
import shutil

import pytest
import torch
from test_fsdp import LENGTHS, TOKENS
from test_weights import SMALL, WORDS, in_bfloat16
from safetensors.torch import load_file, save_file
from torch import nn

from data.toy.model import write_tiny_model
from grpo.engine.lora import LoraLinear, adapted, adapter_off, add_adapter
from grpo.engine.rollout import Sampling, sample
from grpo.engine.weights import load_policy
from grpo.runtime.dist import all_gather, merge_from_ranks, split_across_ranks
from grpo.runtime.export import export, export_adapter
from grpo.runtime.fsdp import sample_unsharded, shard
from grpo.runtime.optim import make_optimizer, set_gradient_checkpointing
from grpo.runtime.provenance import fingerprint
from grpo.runtime.run import load_frozen, take_adapter
from grpo.runtime.settings import LORA_TARGETS, parse
from processes import gather_weights, run_processes
from programs import COMMON, lines, succeed, tensors
from tiny import END, pack_of, packs, plain_logp, tiny_groups, tiny_model, tiny_policy, tiny_prompt, update


def lora_policy(rank=4, alpha=6.0, targets=LORA_TARGETS, dropout=0.0, seed=0, moved=True):
    """A tiny policy with an adapter that is away from zero unless `moved` is False."""
    policy = add_adapter(tiny_policy(), rank, alpha, targets, dropout, seed)
    if moved:
        random = torch.Generator().manual_seed(5)
        for layer in adapted(policy).values():
            layer.lora_B.data = 0.1 * torch.randn(layer.lora_B.shape, generator=random)
    return policy


def merged(model, weights):
    """Whole weights with adapter → without, in one go."""
    plain = {name: tensor for name, tensor in weights.items() if not name.endswith((".lora_A", ".lora_B"))}
    for name, layer in adapted(model).items():
        plain[f"{name}.weight"] = plain[f"{name}.weight"] + layer.scale * (
            weights[f"{name}.lora_B"] @ weights[f"{name}.lora_A"]
        )
    return plain


def trained(policy):
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


# ── what it computes ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_layer_is_the_base_plus_alpha_over_rank_b_a():
    base = nn.Linear(6, 5)
    layer = LoraLinear(base, 2, 3.0, 0.0)
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 6)
    torch.testing.assert_close(layer(x), x @ (base.weight + 1.5 * layer.lora_B @ layer.lora_A).T + base.bias)


def test_a_fresh_adapter_changes_nothing_by_a_bit():
    groups = tiny_groups()
    assert torch.equal(lora_policy(moved=False).score(groups).logp, tiny_policy().score(groups).logp)


def test_with_the_adapter_off_the_policy_is_the_starting_one_by_a_bit_and_on_again_after_an_error():
    policy, groups = lora_policy(), tiny_groups()
    moved = policy.score(groups).logp
    with pytest.raises(RuntimeError), adapter_off(policy):
        assert torch.equal(policy.score(groups).logp, tiny_policy().score(groups).logp)
        raise RuntimeError
    assert torch.equal(policy.score(groups).logp, moved) and not torch.equal(moved, tiny_policy().score(groups).logp)


def test_merged_weights_in_a_stock_model_give_the_adapters_log_probabilities():
    policy, groups, stock = lora_policy(), tiny_groups(), tiny_model()
    weights = policy.model.state_dict()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    stock.load_state_dict(merged(policy.model, weights))  # strict: the names are the stock model's
    plain = torch.cat([row for group in groups for row in plain_logp(stock, group, 0.7)])
    torch.testing.assert_close(policy.score(groups, 0.7).logp, plain, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.model.state_dict().items())


def test_the_samplers_log_probabilities_are_the_scorers_with_an_adapter_too():
    policy = lora_policy()
    groups = sample(policy, [tiny_prompt(i, ((1, 4, 4),)) for i in range(2)], 3, Sampling(8, (END,), 0.8))
    sampled = torch.cat([logp for group in groups for logp in group.logps])
    torch.testing.assert_close(sampled, policy.score(groups, 0.8).logp.detach(), rtol=1e-5, atol=1e-5)


def test_every_matrix_of_the_language_model_is_adapted_and_none_of_the_vision_encoder():
    policy = lora_policy(rank=3)
    ends = [name.split(".")[-1] for name in adapted(policy.model)]
    assert sorted(ends) == sorted(2 * LORA_TARGETS.split(","))  # two layers
    assert all(name.startswith("model.language_model.layers.") for name in adapted(policy.model))
    few = lora_policy(targets=" q_proj, v_proj")
    assert {name.split(".")[-1] for name in adapted(few)} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("targets", ["q_proj,k_prj", "proj", ","])
def test_a_target_that_is_no_matrix_is_refused_by_name(targets):
    with pytest.raises(ValueError, match="no matrix '(k_prj|proj|,)' in the language model"):
        lora_policy(targets=targets)


def test_the_seed_alone_decides_where_an_adapter_begins():
    a, b, other = (adapted(lora_policy(seed=seed)) for seed in (1, 1, 2))
    name = next(iter(a))
    assert all(torch.equal(a[n].lora_A, b[n].lora_A) for n in a) and not torch.equal(a[name].lora_A, other[name].lora_A)
    largest, bound = a[name].lora_A.abs().max(), a[name].in_features ** -0.5
    assert largest <= bound < 1.1 * largest  # Kaiming, a = √5


# ── what trains ──────────────────────────────────────────────────────────────────────────────────────────────────


class Adam:
    weight_decay, learning_rate, adam_beta1, adam_beta2, offload_optimizer = 0.1, 1e-2, 0.9, 0.95, False


def test_gradients_and_the_optimizers_memory_are_the_adapters_alone():
    policy, groups = lora_policy(moved=False), tiny_groups()
    assert {name.split(".")[-1] for name in trained(policy)} == {"lora_A", "lora_B"}
    optimizer = make_optimizer(policy, Adam)
    frozen = {name: p.clone() for name, p in policy.named_parameters() if not p.requires_grad}
    for _ in range(2):
        policy.score(groups).logp.sum().backward()
        assert all((p.grad is not None) == p.requires_grad for p in policy.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert len(optimizer.state) == len(trained(policy)) == 2 * 14
    assert all(torch.equal(p, frozen[name]) for name, p in policy.named_parameters() if name in frozen)
    assert all(p.any() for p in trained(policy).values())


def test_the_adapters_gradients_are_those_of_the_merged_weights_by_the_chain_rule():
    policy, whole, groups = lora_policy(), tiny_policy(), tiny_groups()
    whole.model.load_state_dict(merged(policy.model, policy.model.state_dict()))
    for network in (policy, whole):
        network.score(groups, 0.7).logp.sum().backward()
    for name, layer in adapted(policy).items():
        full = whole.get_submodule(name).weight.grad
        torch.testing.assert_close(layer.lora_A.grad, layer.scale * layer.lora_B.T @ full, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.lora_B.grad, layer.scale * full @ layer.lora_A.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_no_gradient_of_an_adapter_under_frozen_embeddings(dropout):
    plain, checkpointed, groups = lora_policy(dropout=dropout), lora_policy(dropout=dropout), tiny_groups()
    set_gradient_checkpointing(checkpointed, True)
    for policy in (plain, checkpointed):
        torch.manual_seed(1)
        policy.score(groups).logp.sum().backward()
    for name, p in trained(plain).items():
        torch.testing.assert_close(p.grad, trained(checkpointed)[name].grad)


def test_dropout_falls_in_the_update_pass_and_nowhere_else():
    noisy, quiet, groups = lora_policy(dropout=0.5), lora_policy(), tiny_groups()
    set_gradient_checkpointing(noisy, True)  # training mode must not bring dropout into the rollout
    with torch.no_grad():
        assert torch.equal(noisy.score(groups).logp, quiet.score(groups).logp)
    assert not torch.allclose(noisy.score(groups).logp, quiet.score(groups).logp)
    prompts, sampling = [tiny_prompt(0, ((1, 4, 4),))], Sampling(6, (END,), 0.8)
    assert torch.equal(sample(noisy, prompts, 2, sampling)[0].logps[0], sample(quiet, prompts, 2, sampling)[0].logps[0])
    with adapter_off(noisy):
        assert torch.equal(noisy.score(groups).logp, tiny_policy().score(groups).logp)


# ── PEFT ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def in_peft(policy, tmp_path, **more):
    """Our adapter, written to a folder and loaded by peft on the stock model."""
    peft = pytest.importorskip("peft", reason="parity with peft: pip install -e '.[peft]'")
    export_adapter(policy, LORA_TARGETS, {"model": "some/checkpoint"}, tmp_path / "adapter")
    return peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter", **more)


def test_the_adapters_folder_is_whole_and_holds_every_matrix_under_pefts_names(tmp_path):
    policy = lora_policy()
    for _ in range(2):  # the second takes the first one's place
        export_adapter(policy, LORA_TARGETS, {"model": "some/checkpoint"}, tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 6.0, "some/checkpoint")
    from safetensors.torch import load_file

    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.language_model.layers.1.mlp.up_proj.lora_B.weight"
    assert len(found) == 2 * 14 and torch.equal(found[name], dict(policy.model.named_parameters())[name[17:-7]])


def test_peft_loads_our_adapter_and_gives_the_same_values_and_gradients(tmp_path):
    policy, groups = lora_policy(), tiny_groups()
    theirs = in_peft(policy, tmp_path, is_trainable=True)
    ours = policy.score(groups, 0.7).logp
    plain = torch.cat([row for group in groups for row in plain_logp(theirs, group, 0.7)])
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(len(plain))
    (ours * upstream).sum().backward()
    (plain * upstream).sum().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert len(gradients) == len(trained(policy)) == 28
    for name, p in trained(policy).items():
        expected = gradients[f"base_model.{name}.default.weight"]
        assert (p.grad - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-6, name


def test_pefts_merge_equals_ours(tmp_path):
    policy = lora_policy()
    theirs = in_peft(policy, tmp_path).merge_and_unload().state_dict()
    ours = merged(policy.model, policy.model.state_dict())
    assert set(theirs) == set(ours)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)


# ── adapters as inputs ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def base(tmp_path):
    """A checkpoint in bfloat16, its policy with an adapter that has moved by little, and that adapter's folder."""
    write_tiny_model(tmp_path / "base", WORDS, **SMALL)
    in_bfloat16(tmp_path / "base")
    policy = add_adapter(load_policy(str(tmp_path / "base")), 4, 6.0, LORA_TARGETS)
    for layer in adapted(policy).values():
        nn.init.normal_(layer.lora_B.data, std=1e-4)
    model_hash = fingerprint(tmp_path / "base")
    export_adapter(policy, LORA_TARGETS, {"model": str(tmp_path / "base"), "model_hash": model_hash},
                   tmp_path / "run" / "adapter")
    return tmp_path / "base", policy, tmp_path / "run" / "adapter"


def rename_adapter(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(change(tensors), folder / "adapter_model.safetensors")


def words_alone(lengths=((4, 2),)):
    """Groups without images, of a vocabulary of 300."""
    groups = tiny_groups(seed=2, lengths=lengths)
    for group in groups:
        group.prompt = tiny_prompt(2, ())
    return groups


def frozen(folder, adapter):
    return load_frozen(str(folder), str(adapter or ""), torch.float32, torch.device("cpu"))


def test_an_adapters_folder_gives_the_policy_that_wrote_it(base):
    folder, policy, adapter = base
    expected = policy.score(words_alone()).logp
    assert torch.equal(frozen(folder, adapter).score(words_alone()).logp, expected)
    assert not torch.equal(frozen(folder, None).score(words_alone()).logp, expected)
    # names as PEFT writes them under the transformers of 2025
    rename_adapter(adapter,
                   lambda w: {name.replace("model.language_model.", "model."): tensor for name, tensor in w.items()})
    assert torch.equal(frozen(folder, adapter).score(words_alone()).logp, expected)


@pytest.mark.parametrize("change,expected", [
    (lambda w: {n: t[:, :-1].contiguous() if "up_proj.lora_A" in n else t for n, t in w.items()},
     r".*up_proj.lora_A has the shape \[4, 31\] in the weights; the model's is \[4, 32\]"),
    (lambda w: {n: t for n, t in w.items() if "layers.1.mlp.up_proj.lora_B" not in n},
     "1 tensors are missing from the weights, .*layers.1.mlp.up_proj.lora_B first"),
    (lambda w: w | {"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.zeros(4, 32)},
     "1 tensors in the weights have no place in the model, model.layers.7.mlp.up_proj.lora_A first"),
])
def test_an_adapter_of_another_model_is_refused_by_what_does_not_fit(base, change, expected):
    folder, _, adapter = base
    rename_adapter(adapter, change)
    with pytest.raises(ValueError, match=f"adapter: an adapter of another model: {expected}"):
        frozen(folder, adapter)


def test_an_adapter_of_another_base_of_the_same_shape_is_refused(base, tmp_path):
    folder, policy, adapter = base
    write_tiny_model(tmp_path / "other", WORDS, seed=1, **SMALL)
    with pytest.raises(ValueError,
                       match=f"--adapter {adapter}: it was trained on {folder}, .* --model {tmp_path / 'other'}"):
        frozen(tmp_path / "other", adapter)
    shutil.copytree(folder, tmp_path / "moved")
    frozen(tmp_path / "moved", adapter)  # another place is the same base


@pytest.mark.parametrize("config,expected", [
    ({"use_dora": True}, "an adapter with use_dora True; expected a plain one"),
    ({"r": None}, "expected numbers r and lora_alpha"),
    ({"modules_to_save": ["lm_head"]}, "an adapter with modules_to_save"),
])
def test_an_adapter_that_is_more_than_one_is_refused(base, config, expected):
    folder, _, adapter = base
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(ValueError, match=expected):
        frozen(folder, adapter)


def test_a_merge_begins_with_the_sources_numbers_and_is_written_in_float32(base, tmp_path):
    folder, policy, _ = base
    expected = merged(policy.model, policy.model.state_dict())
    policy.requires_grad_(False)
    trained = [layer for layer in adapted(policy).values()]
    policy = shard(policy, torch.bfloat16,
                   torch.device("cpu"))  # frozen weights of any type: they are not what is merged
    assert trained[0].weight.dtype == torch.bfloat16
    export(policy, str(folder), tmp_path / "merged")
    found = load_policy(str(tmp_path / "merged")).model.state_dict()
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["torch_dtype"] == "float32"
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def test_a_merge_in_bfloat16_says_what_share_of_the_update_survives(base, tmp_path, capsys):
    folder, policy, _ = base
    export(policy, str(folder), tmp_path / "merged", "bfloat16")
    share = float(re.search(r"update (\d+\.\d)% of the entries survive the rounding to bfloat16",
                            capsys.readouterr().out)[1])
    before, after = (
        load_policy(str(folder)).model.state_dict(),
        load_policy(str(tmp_path / "merged")).model.state_dict(),
    )
    names = [f"{name}.weight" for name in adapted(policy.model)]
    differ = sum(int((before[name] != after[name]).sum())
                 for name in names) / sum(before[name].numel() for name in names)
    assert share == pytest.approx(100 * differ, abs=0.06) and 0 < share < 50


def test_stage_2_goes_on_with_stage_1s_adapter_and_its_reference_is_stage_1(folder, tmp_path):
    from test_loop import make

    first, _, samples = make(folder, tmp_path / "a", "--lora_rank", 4, "--lora_alpha", 8)
    first.step(samples[:8], 0, [1e-2, 1e-2])
    first.run.save()
    second, _, _ = make(folder, tmp_path / "b", "--adapter", tmp_path / "a" / "adapter", "--updates", 1)
    assert second.settings.lora_rank == 4 and second.reference is second.policy
    for name, parameter in trained(first.policy).items():
        assert torch.equal(parameter, trained(second.policy)[name])
    groups = second.sample(samples[:8], 0)
    expected = first.policy.score(groups, 0.8).logp
    for turn in range(2):
        with adapter_off(second.policy):
            assert torch.equal(second.policy.score(groups, 0.8).logp, expected)
        line = second.step(samples[:8], turn, [1e-2])
        assert line["ratio_mean"] == 1 and (line["kl"] == 0) == (turn == 0)
    assert not torch.equal(second.policy.score(groups, 0.8).logp, expected)


def test_a_rank_that_is_not_the_adapters_is_refused(base):
    from sft.train import Settings

    folder, _, adapter = base
    words = ["--model", folder, "--data", "d", "--output", "o", "--adapter", adapter]
    with pytest.raises(ValueError, match="--lora_rank is 8; --adapter .*adapter has rank 4"):
        take_adapter(parse(Settings, [str(word) for word in (*words, "--lora_rank", 8)]))
    take_adapter(settings := parse(Settings, [str(word) for word in words]))
    assert (settings.lora_rank, settings.lora_alpha,
            set(settings.lora_targets.split(","))) == (4, 6.0, set(LORA_TARGETS.split(",")))


# ── many processes ───────────────────────────────────────────────────────────────────────────────────────────────


def one_update(groups, sharded, dtype=torch.float32):
    """A plain SGD step of rate 1, so that the step itself shows the gradient; then a rollout and a reference pass."""
    policy = lora_policy()
    set_gradient_checkpointing(policy, True)
    if sharded:
        shard(policy, dtype, torch.device("cpu"))
    optimizer = torch.optim.SGD(trained(policy).values(), lr=0.0)
    parts = packs(groups, 40)
    norm = update(policy, optimizer, parts, lambda scores: -scores.logp.sum() / TOKENS, 0.8, 1e9, rate=1.0)
    assert all((p.grad is None) for p in policy.parameters() if not p.requires_grad)
    prompts = split_across_ranks([tiny_prompt(i, ((1, 4, 4),)) for i in range(3)])
    texts = merge_from_ranks(all_gather([[c.tolist() for c in group.completions] for group in
                            sample_unsharded(policy, prompts, 2, Sampling(6, (END,), 0.8, seed=3))]))
    with torch.no_grad(), adapter_off(policy):
        reference = policy.score(tiny_groups()).logp
    return {"norm": norm, "weights": gather_weights(policy), "texts": texts, "reference": reference}


def check_processes(path):
    found = one_update(split_across_ranks(tiny_groups(lengths=LENGTHS)), sharded=True)
    if torch.distributed.get_rank() == 0:
        torch.save(found, path)


@pytest.mark.parametrize("world", [2, 3])
def test_the_number_of_processes_changes_neither_the_adapters_update_nor_rollout_nor_reference(tmp_path, world):
    alone = one_update(tiny_groups(lengths=LENGTHS), sharded=False)
    run_processes(check_processes, world, tmp_path / "found.pt")
    found = torch.load(tmp_path / "found.pt")
    assert found["norm"] == pytest.approx(alone["norm"], rel=1e-4) and found["texts"] == alone["texts"]
    assert torch.equal(found["reference"], tiny_policy().score(tiny_groups()).logp)
    for name, expected in alone["weights"].items():
        torch.testing.assert_close(found["weights"][name], expected, rtol=1e-4, atol=1e-5)


def check_bfloat16():
    policy = shard(lora_policy(moved=False), torch.bfloat16, torch.device("cpu"))
    groups = tiny_groups()
    with torch.no_grad(), adapter_off(policy):
        reference = policy.score(groups).logp
    optimizer = torch.optim.AdamW(trained(policy).values(), lr=1e-6)
    before, seen = gather_weights(policy), []

    def loss_of_pack(scores):
        seen.append(scores.logp.detach())
        return -scores.logp.sum()

    update(policy, optimizer, [groups], loss_of_pack, 1.0, 1.0, rate=1e-6)
    after = gather_weights(policy)
    assert torch.equal(seen[0], reference)  # before the first update the KL is exactly 0
    if torch.distributed.get_rank() == 0:
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == {name for name in before if name.endswith("lora_B")}  # A's gradient waits until B is not zero


def test_in_bfloat16_the_reference_is_exact_and_a_step_of_1e_6_moves_the_adapter_alone():
    run_processes(check_bfloat16, 2)


# ── the programs ─────────────────────────────────────────────────────────────────────────────────────────────────


def make(folder, tmp_path, *words):
    from test_loop import make

    return make(folder, tmp_path, "--lora_rank", 4, "--lora_alpha", 8, *words)


def test_stage_2_needs_no_second_copy_and_begins_with_ratio_one_and_kl_zero(folder, tmp_path):
    trainer, _, samples = make(folder, tmp_path, "--updates", 1)
    assert trainer.reference is trainer.run.policy
    line = trainer.step(samples[:8], 0, [1e-2])
    assert line["ratio_mean"] == 1 and line["kl"] == 0
    again = trainer.step(samples[:8], 1, [1e-2])
    assert again["ratio_mean"] == 1 and again["kl"] > 0


def test_the_reference_stays_stage_1_while_the_adapter_learns(folder, tmp_path):
    trainer, _, samples = make(folder, tmp_path)
    groups = trainer.sample(samples[:2], 0)
    stage_1 = load_policy(str(folder / "sft" / "model"))
    for turn in range(2):
        trainer.score_reference([pack := pack_of(groups)])
        reference = pack.ref_logp[pack.mask]
        torch.testing.assert_close(reference, stage_1.score(groups, 0.8).logp, rtol=1e-6, atol=1e-6)
        trainer.step(samples[:2], turn, [1e-2, 1e-2])
    assert not torch.allclose(trainer.run.policy.score(groups, 0.8).logp, stage_1.score(groups, 0.8).logp)


def test_the_same_seed_gives_the_same_run_with_dropout_too(folder, tmp_path):
    ends = []
    for name in ("a", "b"):
        trainer, _, samples = make(folder, tmp_path / name, "--lora_dropout", 0.2)
        trainer.step(samples[:2], 0, [1e-3, 1e-3])
        ends.append([p.clone() for p in trained(trainer.run.policy).values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends))


@pytest.mark.parametrize("words,expected", [
    (["--train_vision", "True", "--lora_rank", "4"], "--train_vision with --lora_rank"),
    (["--lora_rank", "-1"], "--lora_rank is -1"), (["--lora_alpha", "0"], "--lora_alpha is 0.0"),
    (["--lora_dropout", "1"], "--lora_dropout is 1.0"),
])
def test_settings_that_make_no_adapter_are_refused(words, expected):
    from sft.train import Settings

    with pytest.raises(ValueError, match=expected):
        parse(Settings, ["--model", "m", "--data", "d", "--output", "o", *words]).check()


def test_both_stages_train_an_adapter_on_two_processes_and_export_it_merged_and_alone(folder, tmp_path):
    data, lora = folder / "world" / "MORE", ["--lora_rank", 4, "--lora_alpha", 8, "--gradient_checkpointing", True]
    text = succeed("sft.train", "--model", folder / "sft" / "model", "--data", data, "--output", tmp_path / "sft",
                   "--responses", folder / "cold_start.jsonl", "--epochs", 1, "--batch_size", 8,
                   "--learning_rate", 1e-2, *lora, *COMMON, processes=2)
    assert "an adapter of rank 4 on 28 matrices" in text
    succeed("grpo.train", "--model", tmp_path / "sft" / "model", "--data", data, "--output", tmp_path / "grpo",
            "--max_rollouts", 2, "--learning_rate", 1e-2, "--prompts_per_rollout", 4, "--group_size", 4, "--updates", 1,
            "--valid_split", "", "--reward_options", "min_length=60", *lora, *COMMON, processes=2)
    first, second = (line for line in lines(tmp_path / "grpo" / "metrics.jsonl") if "reward" in line)
    assert first["kl"] == 0 < second["kl"] and first["ratio_mean"] == 1
    for stage, start in (("sft", folder / "sft"), ("grpo", tmp_path / "sft")):
        before, after = tensors(start / "model"), tensors(tmp_path / stage / "model")
        config = json.loads((tmp_path / stage / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(start / "model") and set(before) == set(after)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved and all(name.startswith("model.layers.") and "proj" in name for name in moved)
