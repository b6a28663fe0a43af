"""Many processes do what one does: gradients, completions, counts of collectives."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import DTensor

from grpo.engine.rollout import Sampling, sample
from grpo.engine.split_group import split
from grpo.group import Pack, row_mask
from grpo.runtime import fsdp
from grpo.runtime.dist import all_gather, merge_from_ranks, split_across_ranks
from grpo.runtime.fsdp import compute_dtype, encode_images_unsharded, sample_unsharded, shard
from grpo.runtime.optim import passes
from processes import gather_weights, run_processes
from tiny import END, packs, tiny_groups, tiny_policy, tiny_prompt, update

LENGTHS = ((5, 1, 9), (3, 4, 2), (6, 2, 2), (4, 4, 4))
TOKENS = sum(map(sum, LENGTHS))


def one_update(groups, budget: int, sharded: bool, shard_size: int = 0):
    """A plain SGD step on −Σ log p / TOKENS, so that the step itself shows the gradient."""
    policy = tiny_policy()
    if sharded:
        shard(policy, torch.float32, torch.device("cpu"), shard_size=shard_size)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.0)
    norm = update(policy, optimizer, packs(groups, budget), lambda scores: -scores.logp.sum() / TOKENS, 0.8, 1e9,
                  rate=1.0)
    return norm, policy


def check_gradients(path, uneven: bool, shard_size: int):
    everyone = tiny_groups(lengths=LENGTHS)
    mine = (everyone if torch.distributed.get_rank() == 0 else []) if uneven else split_across_ranks(everyone)
    norm, policy = one_update(mine, 40, sharded=True,
                              shard_size=shard_size)  # a budget of 40 tokens: one pack a group, unequal counts
    head = policy.model.lm_head.weight
    if torch.distributed.get_rank() == 0:
        assert len(head.to_local()) == -(-len(head) // (shard_size or torch.distributed.get_world_size()))
    weights = gather_weights(policy)
    if torch.distributed.get_rank() == 0:
        torch.save({"norm": norm, "weights": weights}, path)


@pytest.mark.parametrize("world,uneven,shard_size",
                         [(2, False, 0), (3, False, 0), (2, True, 0), (4, False, 0), (4, True, 2), (2, False, 1)],
                         ids=["two", "three, unequal packs", "one has nothing at all", "four",
                              "two copies of two parts, three "
                              "have nothing at all", "two copies"])
def test_the_number_of_processes_does_not_change_the_update(tmp_path, world, uneven, shard_size):
    norm, policy = one_update(tiny_groups(lengths=LENGTHS), 10**6, sharded=False)
    run_processes(check_gradients, world, tmp_path / "found.pt", uneven, shard_size)
    found = torch.load(tmp_path / "found.pt")
    assert found["norm"] == pytest.approx(norm, rel=1e-4)
    for name, expected in policy.model.state_dict().items():
        torch.testing.assert_close(found["weights"][name], expected, rtol=1e-4, atol=1e-5)


SAMPLING = Sampling(max_tokens=10, end_tokens=(END, *range(20)), temperature=0.8, rows=4)


def check_rollout(path, rollout_weights):
    policy = shard(tiny_policy(), torch.float32, torch.device("cpu"), rollout_weights=rollout_weights)
    prompts = [tiny_prompt(i, ((1, 4, 4),), length=4 + 3 * i) for i in range(5)]  # shared out: unequal work
    policy.freeze_vision()
    encode_images_unsharded(policy, split_across_ranks(prompts))
    gathered = set()
    policy.trunk_layers[1].register_forward_pre_hook(
        lambda *_: gathered.add(sum(isinstance(p, DTensor) for p in policy.trunk_layers[0].parameters()) > 0))
    groups = sample_unsharded(policy, split_across_ranks(prompts), 3, SAMPLING)
    assert gathered == {rollout_weights == "layers"}  # whether a layer is sharded while the next one works
    assert all(isinstance(p, DTensor) for p in policy.parameters())  # sharded again
    policy.score(tiny_groups())  # a rollout before the first forward leaves the root able to start
    tokens = merge_from_ranks(all_gather([[c.tolist() for c in group.completions] for group in groups]))
    if torch.distributed.get_rank() == 0:
        torch.save(tokens, path)


@pytest.mark.parametrize("world,rollout_weights", [(2, "whole"), (2, "layers"), (3, "layers")])
def test_several_processes_sample_what_one_does(tmp_path, world, rollout_weights):
    prompts = [tiny_prompt(i, ((1, 4, 4),), length=4 + 3 * i) for i in range(5)]
    alone = [[c.tolist() for c in group.completions] for group in sample(tiny_policy(), prompts, 3, SAMPLING)]
    run_processes(check_rollout, world, tmp_path / "tokens.pt", rollout_weights)
    assert torch.load(tmp_path / "tokens.pt") == alone


def check_bfloat16(path):
    policy = shard(tiny_policy(), torch.bfloat16, torch.device("cpu"))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
    before = gather_weights(policy)
    seen = []
    policy.trunk_layers[0].mlp.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    update(policy, optimizer, packs(split_across_ranks(tiny_groups(lengths=LENGTHS)), 10**6),
           lambda scores: -scores.logp.sum() / TOKENS, 1.0, 1.0, rate=1e-6)
    after = gather_weights(policy)
    assert set(seen) == {torch.bfloat16}
    prompts = split_across_ranks([tiny_prompt(i, ((1, 4, 4),)) for i in range(4)])
    group = sample_unsharded(policy, prompts, 3, SAMPLING)[0]
    scored = policy.score([group], 0.8).logp  # the same number of forwards on every process
    torch.testing.assert_close(torch.cat(group.logps), scored.detach(), rtol=0.1, atol=0.2)
    if torch.distributed.get_rank() == 0:
        moved = [not torch.equal(before[name], after[name]) for name in before]
        assert all(w.dtype == torch.float32 for w in after.values()) and all(moved)


def check_features_in_bfloat16(path):
    policy = tiny_policy()
    policy.freeze_vision()
    policy, looked = shard(policy, torch.bfloat16, torch.device("cpu")), []
    policy.visual.register_forward_pre_hook(lambda module, inputs: looked.append(1))
    prompts = [tiny_prompt(i, ((1, 4, 4),)) for i in range(2)]
    encode_images_unsharded(policy, prompts)
    groups = sample_unsharded(policy, prompts, 3, SAMPLING)
    policy.score(groups, 0.8).logp.sum().backward()
    for part, score in passes(policy, split([Pack([groups[0]], row_mask(groups[0].lengths))], 30), 0.8):
        score().logp.sum().backward()
    assert len(looked) == 1 and all(group.prompt is prompt for group, prompt in zip(groups, prompts))
    assert all(prompt.features.dtype == torch.bfloat16 and prompt.pixels.dtype == torch.float32 for prompt in prompts)


def check_backbone_in_bfloat16(name):
    from tiny_backbones import groups_of, policy_of

    logps = []
    for dtype in (torch.float32, torch.bfloat16):
        policy = shard(policy_of(name), dtype, torch.device("cpu"))
        logps.append(policy.score(groups_of(name), 0.8).logp)
        logps[-1].sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in policy.parameters() if p.grad is not None)
    torch.testing.assert_close(logps[1], logps[0], rtol=0.1, atol=0.3)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_every_backbone_is_sharded_in_bfloat16_with_a_vision_encoder_that_trains(name):
    run_processes(check_backbone_in_bfloat16, 1, name)


@pytest.mark.parametrize("world", [1, 2])
def test_sharding_in_bfloat16_copies_no_prompt_so_that_an_image_is_looked_at_once(world):
    run_processes(check_features_in_bfloat16, world, None)


def test_compute_is_bfloat16_and_masters_float32_so_that_a_step_of_1e_6_is_not_lost(tmp_path):
    run_processes(check_bfloat16, 2, None)


def check_offload(folder):
    """Two steps with moments that stay and with such that wait; then a checkpoint of the latter, read back."""
    from grpo.runtime import memory
    from grpo.runtime.checkpoints import Checkpoints
    from grpo.runtime.optim import make_optimizer

    moves, real, ends = [], memory.move_state, []
    memory.move_state = lambda state, parameter, device: moves.append((parameter, str(device), dict(state))) or real(
        state, parameter, device)
    for offload in (False, True):
        policy = shard(tiny_policy(), torch.float32, torch.device("cpu"))
        optimizer = make_optimizer(policy, SimpleNamespace(weight_decay=0.3, learning_rate=1e-3, adam_beta1=0.9,
                                                           adam_beta2=0.95, offload_optimizer=offload))
        for _ in range(2):
            update(policy, optimizer, packs(split_across_ranks(tiny_groups(lengths=LENGTHS)), 10**6),
                   lambda scores: -scores.logp.sum() / TOKENS, 1.0, 1.0, rate=1e-3)
        ends.append([parameter.to_local().clone() for parameter in policy.parameters()])
        assert bool(moves) == offload
    assert all(torch.equal(*pair) for pair in zip(*ends))
    there, back = moves[-2:]
    assert there[0] is back[0] and (there[1], back[1]) == ("cpu", "cpu") and len(moves) == 4 * len(ends[0])
    moments = [value for value in back[2].values() if value.ndim]
    assert len(moments) == 2 and all(isinstance(value, DTensor) for value in moments)
    away = {name: value for name, value in back[2].items()}
    real(away, back[0], "meta")  # a device that is another one: sharded moments really go there, as what they are
    assert [value.to_local().is_meta and isinstance(value, DTensor) for value in away.values()
            if value.ndim] == [True] * 2
    checkpoints = Checkpoints(folder, 1)
    checkpoints.save(policy, optimizer, 2, {})
    kept = {parameter: {name: value.clone() for name, value in state.items()} for parameter, state in
            optimizer.state.items()}
    optimizer.state.clear()
    assert checkpoints.newest()["step"] == 2
    checkpoints.load(policy, optimizer, on_host=True)
    for parameter, state in kept.items():
        assert set(state) == set(optimizer.state[parameter])
        for name, value in state.items():
            found = optimizer.state[parameter][name]
            assert type(found) is type(value) and bool((found == value).all())


def test_moments_that_wait_in_host_memory_change_no_bit_on_two_ranks_and_come_back_from_a_checkpoint(tmp_path):
    run_processes(check_offload, 2, tmp_path)


def in_float32(policy, device):
    """As it was before frozen weights were kept in the compute type: everything float32, cast for every layer."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    precision = dict(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    for module in (*policy.trunk_layers, policy):
        fully_shard(module, **precision)
    return policy


def check_frozen(path):
    from grpo.engine.lora import adapter_off
    from test_lora import lora_policy

    def vision_frozen():
        policy = tiny_policy()
        policy.freeze_vision()
        return policy

    groups, device = split_across_ranks(tiny_groups(lengths=LENGTHS)), torch.device("cpu")
    for make in (lora_policy, vision_frozen):
        new, old = shard(make(), torch.bfloat16, device), in_float32(make(), device)
        assert {p.dtype for p in new.parameters() if not p.requires_grad} == {torch.bfloat16}
        scores = [policy.score(groups, 0.8).logp for policy in (new, old)]
        assert torch.equal(*scores)
        for logp in scores:
            logp.sum().backward()
        expected = dict(old.named_parameters())
        for name, parameter in new.named_parameters():
            if parameter.requires_grad:
                assert parameter.dtype == torch.float32 and torch.equal(parameter.grad.to_local(),
                                                                        expected[name].grad.to_local()), name
        with torch.no_grad():
            assert torch.equal(*(policy.score(groups, 0.8).logp for policy in (new, old)))
        with torch.no_grad(), adapter_off(new), adapter_off(old):
            assert torch.equal(*(policy.score(groups, 0.8).logp for policy in (new, old)))
    frozen = shard(tiny_policy().requires_grad_(False), torch.bfloat16, device)
    assert torch.equal(frozen.score(groups).logp,
                       in_float32(tiny_policy().requires_grad_(False), device).score(groups).logp)


@pytest.mark.parametrize("world", [1, 2])
def test_frozen_weights_in_the_compute_type_change_no_bit_of_values_and_gradients(world):
    run_processes(check_frozen, world, None)


@pytest.mark.parametrize("free,more,fits", [(130, 0, True), (130, 30, False), (90, 0, False)])
def test_whole_weights_are_gathered_on_a_card_only_where_they_and_the_caches_fit(monkeypatch, free, more, fits):
    policy = SimpleNamespace(rollout_weights="auto", device=SimpleNamespace(type="cuda"), compute_dtype=torch.bfloat16,
                             parameters=lambda: [torch.zeros(50)])  # 100 bytes in bfloat16
    monkeypatch.setattr(fsdp, "DTensor", torch.Tensor)
    monkeypatch.setattr(fsdp, "any_rank", lambda flag, device: flag)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free - 20, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30)  # of which 10 are in use
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10)
    assert fsdp.unsharded_fits(policy, more) == fits


def test_auto_is_bfloat16_only_where_the_card_computes_in_it(monkeypatch):
    asked, cuda = [], SimpleNamespace(type="cuda")
    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                            lambda including_emulation=True: including_emulation or native)
        asked.append(compute_dtype("auto", cuda))
    assert asked == [torch.bfloat16, torch.float32] and compute_dtype("auto", torch.device("cpu")) == torch.float32
    with pytest.raises(ValueError, match="--dtype float16: .*does not scale losses; bfloat16"):
        compute_dtype("float16", cuda)


def test_shares_come_back_in_order():
    items = list(range(11))
    import grpo.runtime.dist as sharding

    for world in (1, 2, 3, 4):
        parts = [items[r::world] for r in range(world)]
        sharding_world, sharding.world_size = sharding.world_size, lambda: world
        try:
            assert merge_from_ranks([item for part in parts for item in part]) == items
        finally:
            sharding.world_size = sharding_world


def check_answers():
    """9 samples, one row: the first process has five turns to take, the second four."""
    from types import SimpleNamespace

    import grpo.runtime.answer

    policy = shard(tiny_policy(), torch.float32, torch.device("cpu"))
    encoder = SimpleNamespace(decode=lambda completion: completion.tolist())
    prompts_of = lambda i: tiny_prompt(i, ((1, 4, 4),))
    prompts_of.encoder, prompts_of.release_features = encoder, lambda prompts: None
    policy.freeze_vision()
    sampling = Sampling(max_tokens=3, end_tokens=(END,), temperature=0.0, rows=1)
    answers = grpo.runtime.answer.answer(policy, prompts_of, list(range(9)), sampling, group_size=2)
    expected = [[c.tolist() for c in group.completions]
                for group in sample(tiny_policy(), [prompts_of(i) for i in range(9)], 2, sampling)]
    assert answers == expected


def test_samples_that_do_not_divide_are_answered_without_a_deadlock_and_in_order():
    run_processes(check_answers, 2)
