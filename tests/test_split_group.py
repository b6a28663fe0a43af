"""A group larger than a pass: the numbers of one pass, the memory of its parts."""

import math

import pytest
import torch
from test_lora import lora_policy
from tiny_backbones import groups_of, policy_of

from grpo.engine.split_group import split
from grpo.group import make_packs
from grpo.runtime.dist import rank
from grpo.runtime.fsdp import shard
from grpo.runtime.optim import equal_passes, passes, set_gradient_checkpointing
from processes import gather_weights, run_processes
from tiny import pack_of, tiny_groups, tiny_policy, update

LENGTHS = ((5, 1, 9, 4, 1, 6), (3, 4, 2, 2, 1))


def weighed(scores):
    """Each token has a weight of its own, whichever pass it is in."""
    return (scores.logp * torch.cat([torch.arange(1.0, 1 + n) / n for n in scores.lengths]).to(scores.logp)).sum()


def gradients(policy, groups, budget):
    """(log-probabilities, every parameter's gradient), a pack a group, groups beyond the budget in parts."""
    parts = equal_passes(split([pack_of([group]) for group in groups], budget), "cpu")
    logps = []
    for _, score in passes(policy, parts, 0.7):
        scores = score()
        weighed(scores).backward()
        logps.append(scores.logp.detach())
    return torch.cat(logps), {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}, len(parts)


def frozen_vision():
    policy = tiny_policy()
    policy.freeze_vision()
    return policy


POLICIES = {"everything trains": tiny_policy, "the vision encoder is frozen": frozen_vision, "an adapter": lora_policy,
            "an adapter on values alone": lambda: lora_policy(targets="v_proj"), "llava": lambda: policy_of("llava"),
            "qwen3_vl": lambda: policy_of("qwen3_vl")}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", POLICIES)
def test_parts_have_the_values_and_gradients_of_one_pass(name, checkpointing):
    groups = groups_of(name, LENGTHS) if name in ("llava", "qwen3_vl") else tiny_groups(lengths=LENGTHS)
    found = {}
    for budget in (10**6, max(len(group.prompt) for group in groups) + 12, 1):
        policy = POLICIES[name]().double()
        set_gradient_checkpointing(policy, checkpointing)
        found[budget] = gradients(policy, groups, budget)
    (logp, expected, one), *split_ones = found.values()
    assert one == 2 and 2 < split_ones[0][2] < 11 == split_ones[1][2]
    for logps, grads, _ in split_ones:
        torch.testing.assert_close(logps, logp, rtol=1e-9, atol=1e-9)
        assert set(grads) == set(expected)
        for parameter, grad in grads.items():
            assert (grad - expected[parameter]).abs().max() <= 1e-9 * expected[parameter].abs().max() + 1e-12, parameter


def test_a_prompt_is_computed_once_whatever_the_number_of_parts():
    policy, read = frozen_vision(), []
    policy.trunk_layers[0].register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].shape[1]))
    group = tiny_groups(lengths=((5, 4, 9, 4, 6),))[0]
    gradients(policy, [group], 1)
    assert read == [len(group.prompt), 4, 3, 8, 3, 5]


def test_a_part_holds_its_share_of_what_is_known_and_as_much_as_fits_behind_the_prompt():
    group = tiny_groups(lengths=((5, 1, 9, 4, 1, 6),))[0]
    group.finished, group.rewards, group.parts = [True, False] * 3, torch.arange(6.0), torch.arange(12.0).reshape(6, 2)
    packs = split(make_packs([group], 10), len(group.prompt) + 10)
    assert [pack.lengths for pack in packs] == [[5, 1], [9], [4, 1],
                                                [6]] and len({id(pack.chain) for pack in packs}) == 1
    assert [pack.groups[0].rewards.tolist() for pack in packs] == [[0, 1], [2], [3, 4], [5]]
    assert packs[2].groups[0].finished == [False, True] and packs[2].groups[0].parts.tolist() == [[6, 7], [8, 9]]
    assert packs[1].mask.shape == (1, 9) and all(pack.groups[0].whole is group for pack in packs)
    assert split(packs[:1], 10**6) == packs[:1]


def most_kept(policy, group, budget):
    """Bytes besides weights that autograd keeps of a group, at the time when they are most."""
    held, most, weights = {}, 0, {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}

    class Held:
        def __init__(self, tensor):
            self.tensor, self.key = tensor, tensor.untyped_storage().data_ptr()
            size = tensor.untyped_storage().nbytes() * (self.key not in weights and tensor.is_floating_point())
            held.setdefault(self.key, [0, size])[0] += 1
            nonlocal most
            most = max(most, sum(size for _, size in held.values()))

        def __del__(self):
            held[self.key][0] -= 1
            if not held[self.key][0]:
                del held[self.key]

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda one: one.tensor):
        gradients(policy, [group], budget)
    return most


def test_eight_times_as_many_completions_keep_no_more():
    few, many = (tiny_groups(lengths=((30,) * completions,))[0] for completions in (8, 64))
    budget = len(few.prompt) + 4 * 30
    assert most_kept(frozen_vision(), many, budget) <= 1.1 * most_kept(frozen_vision(), few, budget)


# ── many ranks ───────────────────────────────────────────────────────────────────────────────────────────────────


def check_ranks(path, case):
    """Rank 0 has a group of six parts and one that fits; rank 1 as the case says."""
    make, dtype, mine = CASES[case]
    groups = tiny_groups(lengths=((5, 1, 9, 4, 1, 6), (3, 2), (4, 4), (2, 2)))
    mine = groups[:2] if rank() == 0 else [groups[i] for i in mine]
    policy = make()
    set_gradient_checkpointing(policy, case == "nothing")
    policy = shard(policy, dtype, torch.device("cpu"))
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.0)
    packs = [mine[:1], mine[1:]] if rank() == 0 else [mine] * bool(mine)
    norm = update(policy, optimizer, packs, weighed, 0.8, 1e9, 1.0, budget=80)
    weights = gather_weights(policy)
    if rank() == 0:
        torch.save((norm, weights), path)


CASES = {  # of the policy, of the compute type, of what rank 1 has
    "two groups in one pass": (tiny_policy, torch.float32, [2, 3]),
    "nothing": (lora_policy, torch.float32, []),
    "bfloat16": (frozen_vision, torch.bfloat16, [2, 3]),
}


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_go_through_the_same_passes_and_the_update_is_that_of_one(tmp_path, case):
    make, dtype, mine = CASES[case]
    groups = tiny_groups(lengths=((5, 1, 9, 4, 1, 6), (3, 2), (4, 4), (2, 2)))
    policy = make()
    start = {name: weight.clone() for name, weight in policy.model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.0)
    norm = update(policy, optimizer, [groups[:2] + [groups[i] for i in mine]], weighed, 0.8, 1e9, 1.0)
    run_processes(check_ranks, 2, tmp_path / "found.pt", case)
    found_norm, weights = torch.load(tmp_path / "found.pt")
    exact = dtype == torch.float32
    assert found_norm == pytest.approx(norm, rel=1e-4 if exact else 0.05)
    for name, weight in policy.model.state_dict().items():
        step, found = weight - start[name], weights[name].float() - start[name]
        if name in dict(policy.model.named_parameters()) and policy.model.get_parameter(name).requires_grad:
            assert (found - step).norm() <= (1e-4 if exact else 0.2) * step.norm() + 1e-6, name


# ── the step ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_step_in_parts_is_the_step_in_one_pass_and_the_log_has_whole_groups(folder, tmp_path):
    from test_loop import make

    lines, weights, records = [], [], []
    for budget in (10**6, 1):
        trainer, _, samples = make(folder, tmp_path / str(budget), "--rollout_log_every", 1)
        trainer.settings.tokens_per_pass = budget
        lines.append(trainer.step(samples[:8], 0, [1e-3, 1e-3]))
        weights.append([p.detach().clone() for p in trainer.policy.parameters()])
        records.append((tmp_path / str(budget) / "rollouts.jsonl").read_text())
    import json

    one, parts = (json.loads(text) for text in records)
    assert [len(group["completions"]) for group in parts["groups"]] == [4] * len(parts["groups"])
    assert [[c["text"] for c in group["completions"]] for group in parts["groups"]] == [
        [c["text"] for c in group["completions"]] for group in one["groups"]]
    for name, value in lines[0].items():
        if not name.startswith(("seconds", "step_time")) and isinstance(value, float) and math.isfinite(value):
            assert lines[1][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    assert lines[0]["kl"] > 0 and lines[0]["grad_norm"] > 0
    moved = max((a - b).abs().max() for a, b in zip(*weights))
    assert moved < 3e-3  # AdamW's first steps are of the rate's size, whatever the gradient's


def test_a_completion_that_exceeds_a_pass_by_itself_is_refused():
    from grpo.runtime.settings import parse
    from grpo.train import Settings

    words = ["--model", "m", "--data", "d", "--output", "o", "--max_completion_tokens", "2000", "--tokens_per_pass",
             "1500"]
    with pytest.raises(ValueError,
                       match="--tokens_per_pass is 1500; a completion may have --max_completion_tokens 2000"):
        parse(Settings, words).check()
