"""One step: its rate, its clipping, what decays, and what a process does that has nothing to do."""

import math
from types import SimpleNamespace

import pytest
import torch

from grpo.runtime import memory
from grpo.runtime.optim import make_optimizer
from tiny import tiny_groups, tiny_policy, update


def step(policy, packs, scale=1.0, rate=0.5, limit=1e9, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(policy.parameters(), lr=7.0)
    return update(policy, optimizer, packs, lambda scores: -scale * scores.logp.mean(), 0.8, limit, rate)


def moved(policy):
    """The step of plain SGD at rate 1 is the gradient."""
    return torch.cat([(p - q).flatten() for p, q in zip(tiny_policy().parameters(), policy.parameters())]).detach()


def test_a_step_is_taken_at_the_rate_that_is_given_and_leaves_no_gradient():
    whole, half = tiny_policy(), tiny_policy()
    norm = step(whole, [tiny_groups()], rate=1.0)
    step(half, [tiny_groups()], rate=0.5)
    assert float(moved(whole).norm()) == pytest.approx(norm, rel=1e-3)
    torch.testing.assert_close(moved(half), moved(whole) / 2, rtol=1e-3, atol=1e-6)
    assert all(parameter.grad is None for parameter in whole.parameters())


def test_a_gradient_is_scaled_down_to_the_limit_and_its_norm_told_as_it_was():
    plain, clipped = tiny_policy(), tiny_policy()
    norm = step(plain, [tiny_groups()], rate=1.0)
    assert step(clipped, [tiny_groups()], rate=1.0, limit=norm / 4) == pytest.approx(norm)
    torch.testing.assert_close(moved(clipped), moved(plain) / 4, rtol=1e-3, atol=1e-6)


def test_a_gradient_that_is_not_finite_moves_nothing():
    by_loss, by_gradient = tiny_policy(), tiny_policy()
    by_gradient.trunk_layers[0].mlp.up_proj.weight.register_hook(lambda gradient: gradient * float("inf"))
    for policy, scale in ((by_loss, float("inf")), (by_gradient, 1.0)):
        assert math.isnan(step(policy, [tiny_groups()], scale=scale))
        assert not moved(policy).any() and all(parameter.grad is None for parameter in policy.parameters())


def test_a_rank_with_fewer_packs_joins_the_longest_ones_forwards_and_adds_nothing(monkeypatch):
    alone, among_others, forwards = tiny_policy(), tiny_policy(), []
    step(alone, [tiny_groups()])

    def longest(values):
        if not values.ndim:  # the number of passes: another rank has three
            assert int(values) == 1
            return torch.tensor(3)
        return torch.tensor([[1, 0]] * 3)  # each of one pass, none of a group in parts

    monkeypatch.setattr("grpo.runtime.optim.all_reduce_max", longest)
    among_others.register_forward_hook(lambda *_: forwards.append(1))
    step(among_others, [tiny_groups()])
    assert len(forwards) == 3
    torch.testing.assert_close(moved(among_others), moved(alone), rtol=1e-5, atol=1e-7)


def test_weights_decay_and_biases_and_norms_do_not():
    policy = tiny_policy()
    policy.freeze_vision()
    settings = SimpleNamespace(weight_decay=0.3, learning_rate=1e-3, adam_beta1=0.9, adam_beta2=0.95,
                               offload_optimizer=False)
    matrices, vectors = make_optimizer(policy, settings).param_groups
    assert matrices["weight_decay"] == 0.3 and {p.ndim for p in matrices["params"]} == {2}
    assert vectors["weight_decay"] == 0 and {p.ndim for p in vectors["params"]} == {1}
    assert len(matrices["params"]) + len(vectors["params"]) == sum(p.requires_grad for p in policy.parameters())
    assert (matrices["lr"], matrices["betas"]) == (1e-3, (0.9, 0.95))


def test_running_out_of_memory_says_which_setting_to_lower(monkeypatch):
    one, several = [tiny_groups(lengths=((5,),))], [tiny_groups(lengths=((5, 1),))]
    for too_much in (lambda *_: torch.empty(2**50), lambda *_: raise_(torch.OutOfMemoryError("CUDA out of memory")),
                     in_a_capture):
        policy = tiny_policy()
        monkeypatch.setattr(policy, "trunk", too_much)
        with pytest.raises(ValueError, match=r"^out of memory in a packed pass of \d+ tokens; lower --tokens_per_pass"):
            step(policy, several)
        with pytest.raises(ValueError, match="; one completion is all there is in it: lower --max_completion_tokens"):
            step(policy, one)


def test_another_fault_than_memory_is_left_as_it_is(monkeypatch):
    policy = tiny_policy()
    monkeypatch.setattr(policy, "trunk", lambda *_: raise_(RuntimeError("shapes do not fit")))
    with pytest.raises(RuntimeError, match="^shapes do not fit"):
        step(policy, [tiny_groups()])


def in_a_capture(*_):
    """The end of the capture is an error, too, and hides the first."""
    try:
        raise torch.OutOfMemoryError("CUDA out of memory")
    finally:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


def raise_(error):
    raise error


def test_moments_that_wait_in_host_memory_visit_the_device_one_parameter_at_a_time(monkeypatch):
    """Host and device are told apart by the order of the moves: there is no device here."""
    ends, moves, real = [], [], memory.move_state
    monkeypatch.setattr(memory, "move_state",
                        lambda state, parameter, device: moves.append((id(parameter), str(device), len(state)))
                        or real(state, parameter, device))
    for offload in (False, True):
        policy = tiny_policy()
        settings = SimpleNamespace(weight_decay=0.3, learning_rate=1e-3, adam_beta1=0.9, adam_beta2=0.95,
                                   offload_optimizer=offload)
        optimizer = make_optimizer(policy, settings)
        for _ in range(2):
            step(policy, [tiny_groups()], optimizer=optimizer)
        ends.append([p.detach().clone() for p in policy.parameters()])
        assert len(optimizer.param_groups) == 2 and len(optimizer.param_groups[0]["params"]) > 9
    assert all(torch.equal(a, b) for a, b in zip(*ends))  # the numbers are AdamW's own, decay and rate too
    second = moves[len(moves) // 2 :]
    assert len(second) == 2 * len(ends[0])
    for (one, there, held), (same, back, _) in zip(second[::2], second[1::2]):
        assert one == same and there == back == "cpu" and held == 3
