"""Advantages: what a group teaches, and what it must not pretend to teach."""

import math
import random

import pytest
import scalar_reference
import torch

from grpo.advantage import (
    SCALES,
    combine_rewards,
    group_advantages,
    kl_penalised_rewards,
    overlong_penalty,
    zero_variance_groups,
)


def random_rewards(seed, dtype=torch.float64):
    """(groups, G) of both small integers, as rules give them, and real numbers, as judges do."""
    dice = random.Random(seed)
    groups, G = dice.randint(1, 5), dice.randint(2, 9)
    draw = (lambda: float(dice.randint(0, 3))) if dice.random() < 0.5 else (lambda: dice.gauss(0, 2))
    return torch.tensor([[draw() for _ in range(G)] for _ in range(groups)], dtype=dtype)


def test_a_group_of_four_by_hand():
    """Rewards 3, 1, 1, 3: mean 2, differences 1, −1, −1, 1; std √(4/3) with n − 1, 1 with n."""
    rewards = torch.tensor([[3.0, 1.0, 1.0, 3.0]], dtype=torch.float64)
    signs = torch.tensor([[1.0, -1.0, -1.0, 1.0]], dtype=torch.float64)
    assert torch.allclose(group_advantages(rewards, eps=0.0), signs * math.sqrt(3 / 4))
    assert torch.allclose(group_advantages(rewards, ddof=0, eps=0.0), signs)
    assert torch.allclose(group_advantages(rewards, ddof=0, eps=1.0), signs / 2)
    assert torch.allclose(group_advantages(rewards, scale="none"), signs)
    # Leave-one-out: the others of a 3 have 1, 1, 3, mean 5/3; 3 − 5/3 = 4/3.
    assert torch.allclose(group_advantages(rewards, scale="leave-one-out"), signs * 4 / 3)


def test_two_groups_by_hand():
    """Rewards (0, 2) and (10, 14): centred (−1, 1), (−2, 2); n = 4."""
    rewards = torch.tensor([[0.0, 2.0], [10.0, 14.0]], dtype=torch.float64)
    centred = torch.tensor([[-1.0, 1.0], [-2.0, 2.0]], dtype=torch.float64)
    # All rewards: mean 6.5, squares 42.25 + 20.25 + 12.25 + 56.25 = 131.
    assert torch.allclose(group_advantages(rewards, "batch", ddof=0, eps=0.0), centred / math.sqrt(131 / 4))
    # The centred: squares 1 + 1 + 4 + 4 = 10.
    assert torch.allclose(group_advantages(rewards, "centred-batch", eps=0.0), centred / math.sqrt(10 / 3))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("ddof", [0, 1])
def test_advantages_equal_a_scalar_reference(scale, ddof):
    for seed in range(40):
        rewards, eps = random_rewards(seed), random.Random(seed).choice([1e-4, 1e-6, 1e-8])
        if zero_variance_groups(rewards).any():
            continue  # the reference's std of a flat group is float noise; the tests below are about that
        expected = scalar_reference.advantages(rewards.tolist(), scale, ddof, eps)
        actual = group_advantages(rewards, scale, ddof, eps)
        assert torch.allclose(actual, torch.tensor(expected, dtype=torch.float64), atol=1e-12), (seed, scale)


@pytest.mark.parametrize("scale", SCALES)
def test_advantages_sum_to_zero_in_every_group(scale):
    for seed in range(40):
        advantages = group_advantages(random_rewards(seed), scale)
        assert advantages.sum(dim=1).abs().max() < 1e-9 * max(1.0, advantages.abs().max())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_zero_variance_group_teaches_nothing(scale, dtype):
    """Exact zeros, whatever the value, the size and eps, in the company of a group that is not flat."""
    for value in (0.1, 0.2, 0.3, 1 / 3, 1e-3, -2.7, 1e6 + 0.1):
        for G in (2, 3, 5, 7, 8, 100):
            rewards = torch.full((2, G), value, dtype=dtype)
            rewards[1, 0] += 1
            for eps in (1e-4, 0.0):
                advantages = group_advantages(rewards, scale, eps=eps)
                assert (advantages[0] == 0).all() and (advantages[1] != 0).any()


def test_float_noise_defeats_the_test_by_standard_deviation():
    """Why `zero_variance_groups` compares max and min: torch's std of equal float32 numbers is not zero."""
    rewards = torch.full((1, 7), 0.1)
    assert rewards.std(dim=1).item() != 0
    assert zero_variance_groups(rewards).tolist() == [True]
    assert zero_variance_groups(torch.tensor([[0.0, 0.0, 1e-30], [1.0, 1.0, 1.0]])).tolist() == [False, True]


@pytest.mark.parametrize("scale", SCALES)
def test_parts_added_in_another_order_teach_nothing(scale):
    rewards = torch.tensor([[0.1 + 0.2 + 0.3, 0.3 + 0.2 + 0.1, 0.3 + 0.2 + 0.1, 0.3 + 0.2 + 0.1]], dtype=torch.float64)
    assert rewards.amax() != rewards.amin() and zero_variance_groups(rewards).all()
    assert (group_advantages(rewards, scale, eps=0.0) == 0).all()
    assert not zero_variance_groups(torch.tensor([[0.6, 0.6 + 1e-9]], dtype=torch.float64)).any()


def test_parts_that_cancel_but_for_the_order_of_adding_are_zero():
    parts = torch.tensor([[[0.1, 0.2, -0.3], [0.0, 0.0, 0.0], [-0.3, 0.2, 0.1]]], dtype=torch.float64)
    assert 0.1 + 0.2 - 0.3 != 0 and combine_rewards(parts, torch.ones(3)).tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("ddof", [0, 1])
def test_a_completion_that_does_not_count_is_as_if_it_had_not_been_drawn(scale, ddof):
    rewards = torch.rand(3, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    counted = torch.ones(3, 5, dtype=torch.bool)
    counted[:, 1] = False
    without = group_advantages(rewards[:, [0, 2, 3, 4]], scale, ddof)
    rewards[:, 1] = 1e9
    advantages = group_advantages(rewards, scale, ddof, counted=counted)
    assert torch.allclose(advantages[:, [0, 2, 3, 4]], without, rtol=1e-12) and (advantages[:, 1] == 0).all()
    none, one = torch.zeros(3, 5, dtype=torch.bool), torch.arange(5).expand(3, 5) == 2
    for known in (none, one):
        assert zero_variance_groups(rewards,
                                    known).all() and (group_advantages(rewards, scale, ddof, counted=known) == 0).all()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.filterwarnings("error")  # torch's about a std of one number
def test_a_group_of_one_gives_zeros(scale, ddof):
    assert group_advantages(torch.tensor([[3.0], [0.7]]), scale, ddof).tolist() == [[0.0], [0.0]]
    assert group_advantages(torch.tensor([[3.0]]), scale, ddof).tolist() == [[0.0]]


def test_shifting_and_stretching_rewards_changes_nothing_where_they_are_scaled():
    for seed in range(20):
        rewards = random_rewards(seed)
        assert torch.allclose(group_advantages(rewards, eps=0.0), group_advantages(7 * rewards - 3, eps=0.0))


def test_whole_numbers_are_taken_as_floats():
    assert torch.equal(group_advantages(torch.tensor([[1, 0]])), group_advantages(torch.tensor([[1.0, 0.0]])))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_reward_that_is_no_number_is_an_error_that_says_where(bad):
    rewards = torch.zeros(3, 4)
    rewards[1, 2] = bad
    with pytest.raises(ValueError, match=rf"rewards\[1, 2\] is {bad} \(group 1, completion 2"):
        group_advantages(rewards)
    with pytest.raises(ValueError, match=r"parts\[1, 2, 0\]"):
        combine_rewards(rewards.unsqueeze(2), torch.ones(1))


def test_arguments_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"rewards has shape \(4,\); it takes \(groups, G\)"):
        group_advantages(torch.zeros(4))
    with pytest.raises(ValueError, match=r"rewards has shape \(0, 4\)"):
        group_advantages(torch.zeros(0, 4))
    with pytest.raises(ValueError, match="scale is 'groups'; it takes one of 'group', 'batch'"):
        group_advantages(torch.zeros(2, 4), scale="groups")
    with pytest.raises(ValueError, match="ddof is 2; it takes one of 0, 1"):
        group_advantages(torch.zeros(2, 4), ddof=2)
    with pytest.raises(ValueError, match="how is 'mean'; it takes one of 'sum', 'normalised'"):
        combine_rewards(torch.zeros(1, 2, 3), torch.ones(3), how="mean")
    with pytest.raises(ValueError, match=r"weights has shape \(2,\); it takes \(3,\)"):
        combine_rewards(torch.zeros(1, 2, 3), torch.ones(2))
    with pytest.raises(ValueError, match="cache is 0; it takes a number of tokens from 1"):
        overlong_penalty(torch.tensor([3]), 10, 0)
    with pytest.raises(ValueError, match=r"ref_logp has shape \(4, 2\); it takes \(4, tokens\)"):
        kl_penalised_rewards(torch.zeros(2, 2), torch.zeros(4, 3), torch.zeros(4, 2), torch.ones(4, 3), 0.1)


def test_reward_parts_are_weighted_and_summed():
    parts = torch.tensor([[[1.0, 0.5, 1.0], [0.0, 1.0, 1.0]]])
    assert torch.allclose(combine_rewards(parts, torch.tensor([1.0, 0.2, 0.1])), torch.tensor([[1.2, 0.3]]))


def test_normalised_parts_weigh_the_same_however_small_their_deviation():
    """Part 1 of one stands out by 1, part 2 of the other by 0.001: a tie, if both are z-scored first."""
    parts = torch.tensor([[[1.0, 0.0], [0.0, 0.001]]], dtype=torch.float64)
    weights = torch.ones(2, dtype=torch.float64)
    assert torch.allclose(combine_rewards(parts, weights, "normalised", eps=0.0), torch.zeros(1, 2).double())
    assert group_advantages(combine_rewards(parts, weights))[0, 0] > 0.7
    first = combine_rewards(parts, torch.tensor([2.0, 0.0]), "normalised", eps=0.0)
    assert torch.allclose(first, torch.tensor([[2.0, -2.0]], dtype=torch.float64) / math.sqrt(2))


def test_equal_parts_stay_a_zero_variance_group():
    """Sums of thirds and tenths, in a group long enough for vectorised kernels and their tails."""
    parts = torch.tensor([1 / 3, 0.1, 0.7]).expand(3, 37, 3)
    for how in ("sum", "normalised"):
        rewards = combine_rewards(parts, torch.tensor([1.0, 0.2, 0.1]), how)
        assert zero_variance_groups(rewards).all() and (group_advantages(rewards) == 0).all()


def test_a_long_completion_is_punished_softly():
    """Limit 100, cache 20: free up to 80, half at 90, −1 from 100 on (DAPO eq. 13)."""
    lengths = torch.tensor([0, 80, 85, 90, 100, 130])
    expected = torch.tensor([0.0, 0.0, -0.25, -0.5, -1.0, -1.0])
    assert torch.allclose(overlong_penalty(lengths, limit=100, cache=20), expected)


def test_the_kl_in_the_reward_is_the_whole_completions():
    logp = torch.tensor([[-1.0, -2.0], [-1.0, float("nan")]], requires_grad=True)
    reference = torch.tensor([[-1.5, -1.0], [-3.0, float("nan")]])
    mask = torch.tensor([[1, 1], [1, 0]])
    # Log ratios 0.5 − 1 = −0.5 and 2.
    penalised = kl_penalised_rewards(torch.tensor([[1.0, 0.0]]), logp, reference, mask, beta=0.1)
    assert torch.allclose(penalised, torch.tensor([[1.05, -0.2]])) and not penalised.requires_grad
