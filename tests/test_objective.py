"""The objective against a scalar reference, finite differences, exact enumeration and figures by hand."""

import itertools
import math
import random

import pytest
import scalar_reference
import torch

from grpo.advantage import group_advantages, kl_penalised_rewards
from grpo.objective import (
    AGGREGATES,
    KL_KINDS,
    LEVELS,
    SURROGATES,
    aggregate_loss,
    count_terms,
    grpo_loss,
    kl_estimate,
    mean_statistics,
    ppo_surrogate,
    truncation_mask,
    sapo_surrogate,
    vespo_surrogate,
)

NAN = float("nan")


def column(*numbers):
    return torch.tensor(numbers, dtype=torch.float64).unsqueeze(1)


# --- random cases ------------------------------------------------------------------------------------------


def random_case(seed, empty_rows=True):
    """Ragged completions of 1 to 6 tokens and, after them, garbage; advantages; every option drawn."""
    dice = random.Random(seed)
    N = dice.randint(1, 6)
    lengths = [dice.randint(1, 6) for _ in range(N)]
    if empty_rows and N > 1 and dice.random() < 0.3:
        lengths[0] = 0
    logp = [[dice.uniform(-3, -0.1) for _ in range(n)] for n in lengths]
    old = [[x + dice.gauss(0, 0.3) for x in row] for row in logp]
    reference = [[x + dice.gauss(0, 0.5) for x in row] for row in logp]
    advantages = [dice.gauss(0, 1) for _ in range(N)]
    options = dict(
        clip_low=dice.choice([None, 0.2, 0.1]), clip_high=dice.choice([None, 0.2, 0.28]),
        beta=dice.choice([0.0, 0.04, 1.0]), level=dice.choice(LEVELS), aggregate=dice.choice(AGGREGATES),
        surrogate=dice.choice(SURROGATES), kl_weighted=dice.random() < 0.5, length=dice.randint(1, 9),
    )
    return (logp, old, reference, advantages), dice.choice(KL_KINDS), options


def pad(rows, filling=0.0):
    width = max(map(len, rows)) + 1  # + 1: at least one column is padding for everybody
    return torch.tensor([row + [filling] * (width - len(row)) for row in rows], dtype=torch.float64)


def tensors(case, filling=0.0):
    """The arguments of `grpo_loss`, logp a leaf."""
    logp, old, reference, advantages = case
    mask = pad([[1.0] * len(row) for row in logp]).bool()
    advantages = torch.tensor(advantages, dtype=torch.float64)
    return pad(logp, filling).requires_grad_(), pad(old, filling), pad(reference, filling), advantages, mask


def loss_and_gradient(arguments, **options):
    loss, stats = grpo_loss(*arguments, **options)
    (gradient,) = torch.autograd.grad(loss, arguments[0])
    return loss.detach(), gradient, stats


@pytest.mark.parametrize("seeds", [range(start, start + 100) for start in range(0, 400, 100)], ids=str)
def test_value_and_gradient_equal_a_scalar_reference(seeds):
    """Gradients are the reference's central differences: this is the test by finite differences, too."""
    for seed in seeds:
        case, kind, options = random_case(seed)
        loss, gradient, _ = loss_and_gradient(tensors(case), kl=kind, **options)
        expected = scalar_reference.loss(*case, kl_kind=kind, **options)
        slopes = pad(scalar_reference.gradient(*case, kl_kind=kind, **options))
        assert math.isclose(loss.item(), expected, rel_tol=1e-12, abs_tol=1e-12), (seed, options)
        assert torch.allclose(gradient, slopes, rtol=1e-6, atol=1e-8), (seed, options)


def test_the_random_cases_reach_every_option():
    """A clip that never bites or an option never drawn would make the test above an empty promise."""
    drawn = [random_case(seed) for seed in range(400)]
    for name, values in dict(level=LEVELS, aggregate=AGGREGATES, surrogate=SURROGATES).items():
        assert {options[name] for _, _, options in drawn} == set(values)
    clipped = [grpo_loss(*tensors(case), kl=kind, **options)[1] for case, kind, options in drawn]
    assert sum(stats["clipped_low"] > 0 for stats in clipped) > 50
    assert sum(stats["clipped_high"] > 0 for stats in clipped) > 50


@pytest.mark.parametrize("filling", [NAN, float("-inf"), 1e30])
def test_padding_may_hold_anything(filling):
    for seed in range(60):
        case, kind, options = random_case(seed)
        clean, dirty = tensors(case), tensors(case, filling)
        loss, gradient, stats = loss_and_gradient(clean, kl=kind, **options)
        loss_dirty, gradient_dirty, stats_dirty = loss_and_gradient(dirty, kl=kind, **options)
        assert torch.equal(loss, loss_dirty) and torch.equal(gradient, gradient_dirty)
        assert stats == stats_dirty
        assert (gradient_dirty[~dirty[-1]] == 0).all()


def test_a_mask_of_zeros_and_ones_is_as_good_as_bools():
    case, kind, options = random_case(3)
    *arguments, mask = tensors(case)
    for dtype in (torch.float32, torch.int64):
        assert torch.equal(grpo_loss(*arguments, mask.to(dtype), kl=kind, **options)[0],
                           grpo_loss(*arguments, mask, kl=kind, **options)[0])


def test_parts_add_up_to_the_whole():
    """Losses, gradients and statistics, over cuts of unequal size: the reason for `denominator`."""
    for seed in range(120):
        case, kind, options = random_case(seed)
        arguments, dice = tensors(case), random.Random(seed)
        loss, gradient, stats = loss_and_gradient(arguments, kl=kind, **options)
        N = len(arguments[0])
        cuts = sorted({0, N, *(dice.randint(0, N) for _ in range(2))})
        masks = [arguments[-1][a:b] for a, b in itertools.pairwise(cuts)]
        denominator = sum(count_terms(mask, options["aggregate"]) for mask in masks)
        total, sums = 0.0, {}
        slopes = torch.zeros_like(gradient)
        for a, b in itertools.pairwise(cuts):
            part = [x[a:b].detach() for x in arguments]
            part[0].requires_grad_()
            loss_part, slopes[a:b], stats_part = loss_and_gradient(
                part, kl=kind, denominator=torch.tensor(denominator), **options
            )
            total += loss_part
            sums = {name: sums.get(name, 0) + x for name, x in stats_part.items()}
        assert torch.allclose(total, loss, rtol=1e-12) and torch.allclose(slopes, gradient, rtol=1e-12), seed
        whole, parts = mean_statistics(stats), mean_statistics(sums)
        assert parts == pytest.approx(whole, rel=1e-12, abs=1e-12)


# --- exact enumeration: a vocabulary of three tokens, all sequences up to length three ---------------------

END = 2
PREFIXES = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]
SEQUENCES = [(END,), (0, END), (1, END), *((a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1, END))]
MASK = torch.tensor([[t < len(s) for t in range(3)] for s in SEQUENCES])
REWARD = torch.tensor([math.sin(7 * i) + (i % 3) for i in range(len(SEQUENCES))], dtype=torch.float64)


def policy(seed):
    """A logit for each prefix and next token: every distribution over SEQUENCES is one such table."""
    return torch.randn(len(PREFIXES), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def score(logits):
    """log π of every token of every sequence, (15, 3), 0 after its end."""
    table = logits.log_softmax(dim=1)
    rows = [[table[PREFIXES.index(s[:t]), s[t]] if t < len(s) else table.new_zeros(()) for t in range(3)]
            for s in SEQUENCES]
    return torch.stack([torch.stack(row) for row in rows])


def probability(logits):
    return score(logits).sum(dim=1).exp()


def gradient_of(value, logits):
    return torch.autograd.grad(value, logits)[0]


def expected_gradient(logits, advantages_of, G=2, **options):
    """−E[∇ grpo_loss] over all 15^G groups, exactly: advantages are weighted by their group's probability."""
    groups = torch.tensor(list(itertools.product(range(len(SEQUENCES)), repeat=G)))  # (15^G, G)
    weight = probability(logits).detach()[groups].prod(dim=1, keepdim=True)
    A = (weight * advantages_of(groups)).flatten()
    rows = groups.flatten()
    loss, _ = grpo_loss(
        score(logits)[rows], None, None, A, MASK[rows], denominator=G, clip_low=None, clip_high=None,
        **options,
    )
    return -gradient_of(loss, logits)


def test_the_fifteen_sequences_are_all_there_is():
    assert len(SEQUENCES) == 15 and math.isclose(probability(policy(0)).sum().item(), 1, rel_tol=1e-14)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_the_expected_gradient_is_the_policy_gradient(surrogate):
    """Leave-one-out and plain sums (RLOO): exactly ∇ E[R], with nothing lost and nothing added."""
    logits = policy(1).requires_grad_()
    truth = gradient_of((probability(logits) * REWARD).sum(), logits)
    leave_one_out = lambda groups: group_advantages(REWARD[groups], "leave-one-out")  # noqa: E731
    for G in (2, 3):
        actual = expected_gradient(
            logits, leave_one_out, G, aggregate="constant", length=1, surrogate=surrogate
        )
        assert torch.allclose(actual, truth, rtol=1e-10, atol=1e-14)


def test_subtracting_ones_own_mean_only_shortens_the_policy_gradient():
    """Dr. GRPO's baseline holds the completion itself: (G − 1)/G of the policy gradient, over `length`."""
    logits = policy(2).requires_grad_()
    truth = gradient_of((probability(logits) * REWARD).sum(), logits)
    for G in (2, 3):
        actual = expected_gradient(
            logits, lambda groups: group_advantages(REWARD[groups], "none"), G, aggregate="constant", length=5
        )
        assert torch.allclose(actual, truth * (G - 1) / G / 5, rtol=1e-10, atol=1e-14)


def test_dividing_by_the_length_bends_the_policy_gradient():
    """The mean over a sequence trains E[R / |o|] where R is meant: the length bias, exactly."""
    logits = policy(3).requires_grad_()
    actual = expected_gradient(logits, lambda groups: group_advantages(REWARD[groups], "leave-one-out"))
    p, lengths = probability(logits), MASK.sum(dim=1)
    baseline = (p.detach() * REWARD).sum()
    bent = gradient_of((p.log() * p.detach() * (REWARD - baseline) / lengths).sum(), logits)
    truth = gradient_of((probability(logits) * REWARD).sum(), logits)
    assert torch.allclose(actual, bent, rtol=1e-10, atol=1e-14)
    assert (actual * truth < -1e-6).any()  # here it even learns a token that costs reward


def divergence_by_prefix(logits, reference, forward):
    """Σ over prefixes of π(prefix), held still, times the next token's KL: π‖ref, or ref‖π if `forward`."""
    p, q = logits.log_softmax(dim=1), reference.log_softmax(dim=1)
    kl = (q.exp() * (q - p)).sum(dim=1) if forward else (p.exp() * (p - q)).sum(dim=1)
    reach = [sum((p[PREFIXES.index(prefix[:t]), token] for t, token in enumerate(prefix)), p.new_zeros(()))
             for prefix in PREFIXES]
    return (torch.stack(reach).detach().exp() * kl).sum()


@pytest.mark.parametrize(
    "kind, weighted, expected",
    [
        ("k1", False, "nothing"), ("k2", False, "reverse"), ("k3", False, "forward"),
        ("k1", True, "reverse"), ("k3", True, "reverse"),
    ],
)
def test_what_each_kl_estimator_trains(kind, weighted, expected):
    """By enumeration, on-policy: the gradient of the KL term alone (all advantages are zero)."""
    logits, reference = policy(4).requires_grad_(), policy(5)
    p, logp = probability(logits).detach(), score(logits)
    # beta weights all rows alike, so each sequence enters alone, weighted by its probability.
    loss = sum(
        p[i] * grpo_loss(
            logp[i : i + 1], None, score(reference)[i : i + 1], torch.zeros(1), MASK[i : i + 1], beta=1.0,
            kl=kind, kl_weighted=weighted, aggregate="constant", length=1,
        )[0]
        for i in range(len(SEQUENCES))
    )
    actual = gradient_of(loss, logits)
    if expected == "nothing":
        assert actual.abs().max() < 1e-14
    else:
        truth = gradient_of(divergence_by_prefix(logits, reference, expected == "forward"), logits)
        assert torch.allclose(actual, truth, rtol=1e-10, atol=1e-14)


def test_the_estimators_estimate_the_kl():
    """E[k1] = E[k3] = KL summed over tokens, exactly; k2 is near it where the policies are near."""
    logits, reference = policy(6), policy(6) + 0.01 * policy(7)
    p = probability(logits)
    truth = (p * (p.log() - probability(reference).log())).sum()
    means = {kind: (p * (kl_estimate(score(logits), score(reference), kind) * MASK).sum(dim=1)).sum()
             for kind in KL_KINDS}
    assert torch.allclose(means["k1"], truth, rtol=1e-9) and torch.allclose(means["k3"], truth, rtol=1e-9)
    assert torch.allclose(means["k2"], truth, rtol=0.05) and not torch.allclose(means["k2"], truth, rtol=1e-5)


def test_the_kl_in_the_reward_trains_the_kl_of_whole_completions():
    logits, reference, beta = policy(8).requires_grad_(), policy(9), 0.3
    p = probability(logits)
    truth = gradient_of((p * (REWARD - beta * (p.log() - probability(reference).log()))).sum(), logits)

    def advantages(groups):
        rows = groups.flatten()
        rewards = kl_penalised_rewards(
            REWARD[groups], score(logits)[rows], score(reference)[rows], MASK[rows], beta
        )
        return group_advantages(rewards, "leave-one-out")

    actual = expected_gradient(logits, advantages, aggregate="constant", length=1)
    assert torch.allclose(actual, truth, rtol=1e-10, atol=1e-14)


# --- by hand -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "r, A, value, slope",  # ε = 0.2; the slope is d value / d log π, so r A where nothing is clipped
    [
        (1.0, 1.0, 1.0, 1.0), (1.0, -1.0, -1.0, -1.0), (1.1, 2.0, 2.2, 2.2),
        (1.5, 1.0, 1.2, 0.0),  # better already: no more
        (1.5, -1.0, -1.5, -1.5),  # the pessimistic branch: a loss is never clipped away
        (0.5, 1.0, 0.5, 0.5),
        (0.5, -1.0, -0.8, 0.0),
    ],
)
def test_the_clip_is_pessimistic(r, A, value, slope):
    logp = column(math.log(r)).requires_grad_()
    loss, _ = grpo_loss(logp, column(0.0), None, torch.tensor([A]).double(), torch.ones(1, 1))
    assert math.isclose(-loss.item(), value, rel_tol=1e-12)
    assert math.isclose(-gradient_of(loss, logp).item(), slope, abs_tol=1e-12)


@pytest.mark.parametrize("r, A, weight", [(1.5, 1, 1.2), (1.5, -1, 1.2), (0.5, 1, 0.8), (1.0, -2, 1.0)])
def test_cispo_bounds_a_tokens_weight_and_keeps_its_gradient(r, A, weight):
    logp = column(math.log(r)).requires_grad_()
    A_ = torch.tensor([A]).double()
    loss, _ = grpo_loss(logp, column(0.0), None, A_, torch.ones(1, 1), surrogate="cispo")
    assert math.isclose(-loss.item(), weight * A * math.log(r), rel_tol=1e-12, abs_tol=1e-12)
    assert math.isclose(-gradient_of(loss, logp).item(), weight * A, rel_tol=1e-12)


def test_sapo_starts_with_the_policy_gradient_and_fades_without_an_edge():
    r = column(0.0, 1.0, 1.5, 30.0).requires_grad_()
    for A, tau in ((2.0, 1.0), (-2.0, 1.05)):
        gain = sapo_surrogate(r, torch.full_like(r, A))
        slope, = torch.autograd.grad(gain.sum(), r)
        assert torch.allclose(gain[1], r.new_tensor(2 / tau * A)) and torch.allclose(slope[1], r.new_tensor(A))
        assert 0 < slope[2] / A < 1 and 0 < slope[3] / A < 1e-11 and 0 < slope[0] / A < 1


def test_vespo_weighs_a_completion_by_the_ratio_of_the_whole():
    logp = torch.tensor([[-1.0, -2.0, 0.0], [-1.0, -1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-1.1, -1.7, 0.0], [-1.0, -1.0, -1.0]], dtype=torch.float64)  # w = exp(−0.2), and 1
    A = column(1.0, -2.0)
    slope, = torch.autograd.grad(vespo_surrogate(logp, old, A).sum(), logp)
    w = math.exp(-0.2)
    assert torch.allclose(slope[0], slope.new_tensor(w**2 * math.exp(3 * (1 - w)))) and torch.allclose(slope[1], A[1])
    far, = torch.autograd.grad(vespo_surrogate(logp + 40.0, old, A).sum(), logp)
    assert (far == 0).all()  # and not NaN: exp of what exp has overflown


def test_without_a_clip_the_surrogate_is_the_bare_product():
    r, A = column(0.01, 1.0, 100.0), column(-1.0, 1.0, 2.0)
    assert torch.equal(ppo_surrogate(r, A, None, None), r * A)
    assert torch.equal(ppo_surrogate(r, A, 0.2, None), column(-0.8, 1.0, 200.0))
    assert torch.equal(ppo_surrogate(r, A, None, 0.2), torch.minimum(r * A, column(-0.01, 1.0, 2.4)))


def test_three_ways_to_take_a_mean():
    """Completions of 1 and 3 tokens with losses (6) and (1, 2, 3): by hand."""
    x = torch.tensor([[6.0, 99.0, 99.0], [1.0, 2.0, 3.0]])
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]]).bool()
    assert aggregate_loss(x, mask, "sequence").item() == (6 + 2) / 2
    assert aggregate_loss(x, mask, "token").item() == 12 / 4
    assert aggregate_loss(x, mask, "constant", length=3).item() == 12 / (2 * 3)
    assert aggregate_loss(x, mask, "sequence", denominator=8).item() == 1
    assert aggregate_loss(x, mask, "token", denominator=8).item() == 1.5
    assert aggregate_loss(x, mask, "constant", denominator=4, length=3).item() == 1
    assert [count_terms(mask, how) for how in ("sequence", "token", "constant")] == [2, 4, 2]


def test_the_sequence_ratio_is_the_geometric_mean():
    """Token ratios 2 and 8: GSPO's ratio is 4, and each token moves it by half."""
    logp = torch.tensor([[math.log(2), math.log(8), 5.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 0]])
    loss, stats = grpo_loss(
        logp, torch.zeros(1, 3), None, torch.ones(1), mask, level="sequence", clip_low=None, clip_high=None
    )
    assert math.isclose(loss.item(), -4) and math.isclose(mean_statistics(stats)["ratio_mean"], 4)
    assert torch.allclose(gradient_of(loss, logp), torch.tensor([[-2.0, -2.0, 0.0]], dtype=torch.float64))


def test_kl_estimates_by_hand():
    """π = 1/2, π_ref = 1/4: d = −ln 2."""
    logp, ref = torch.tensor(0.5).double().log(), torch.tensor(0.25).double().log()
    assert math.isclose(kl_estimate(logp, ref, "k1").item(), math.log(2))
    assert math.isclose(kl_estimate(logp, ref, "k2").item(), math.log(2) ** 2 / 2)
    assert math.isclose(kl_estimate(logp, ref, "k3").item(), 0.5 + math.log(2) - 1)


def test_k3_keeps_its_digits_where_the_policies_agree():
    """d = 1e-3 in float32: exp(d) − 1 − d is d²/2 to 3 digits, and computed literally only to one or two."""
    d = torch.tensor(1e-3)
    assert math.isclose(kl_estimate(torch.zeros(()), d, "k3").item(), 5.0017e-7, rel_tol=1e-3)
    assert not math.isclose((d.exp() - d - 1).item(), 5.0017e-7, rel_tol=1e-3)


# --- one token that is far from the reference ------------------------------------------------------------------

EDGE = math.exp(20)


def k3_and_slope(d, dtype=torch.float64, **options):
    logp = torch.zeros((), dtype=dtype, requires_grad=True)
    value = kl_estimate(logp, torch.tensor(float(d), dtype=dtype), "k3", **options)
    return value.item(), -gradient_of(value, logp).item()  # by d


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [25, 50, 120])
def test_beyond_the_bound_k3_is_a_straight_line_and_its_pull_remains(d, dtype):
    value, slope = k3_and_slope(d, dtype)
    assert math.isclose(value, EDGE - 21 + (d - 20), rel_tol=1e-6) and slope == 1
    value, slope = k3_and_slope(-d, dtype)
    assert math.isclose(value, d - 1, rel_tol=1e-6) and slope == -1  # as without a bound: there k3 is a line by itself
    assert math.isclose(k3_and_slope(-d, dtype, log_ratio_bound=None)[0], value, rel_tol=1e-6)


@pytest.mark.parametrize("d", [25, -25, 50, -50, 120, -120])
def test_beyond_the_bound_k2_is_a_straight_line_and_k1_has_always_been_one(d):
    logp = torch.zeros((), dtype=torch.float64, requires_grad=True)
    value = kl_estimate(logp, torch.tensor(float(d)), "k2")
    assert value.item() == 200 + (abs(d) - 20) and gradient_of(value, logp).item() == -math.copysign(1, d)
    assert kl_estimate(logp, torch.tensor(float(d)), "k1").item() == -d


@pytest.mark.parametrize("A", [1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [25, -25, 50, -50, 120, -120])
def test_beyond_the_bound_the_ratio_is_a_straight_line_too(log_ratio, A):
    logp = torch.tensor([[float(log_ratio)]], requires_grad=True)  # float32: exp(120) is infinite
    loss, _ = grpo_loss(logp, torch.zeros(1, 1), None, torch.tensor([A]), torch.ones(1, 1), clip_low=None,
                        clip_high=None)
    expected = EDGE + log_ratio - 20 if log_ratio > 0 else math.exp(log_ratio)
    slope = 1.0 if log_ratio > 0 else math.exp(log_ratio)
    assert math.isclose(loss.item(), -A * expected, rel_tol=1e-6, abs_tol=1e-40)
    assert math.isclose(gradient_of(loss, logp).item(), -A * slope, rel_tol=1e-6, abs_tol=1e-40)


@pytest.mark.parametrize("kind", KL_KINDS)
def test_up_to_the_bound_nothing_changes(kind):
    results = []
    for bound in (20.0, None):
        logp = torch.linspace(-20, 20, 41).unsqueeze(0).requires_grad_()
        loss, _ = grpo_loss(logp, torch.zeros(1, 41), torch.zeros(1, 41), torch.ones(1), torch.ones(1, 41), beta=0.04,
                            kl=kind, clip_low=None, clip_high=None, log_ratio_bound=bound)
        results.append((loss.detach(), gradient_of(loss, logp)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("d", [25.0, 50.0, 120.0])
def test_one_token_far_from_the_reference_neither_owns_nor_ends_an_update_and_is_counted(d):
    shares, generator = {}, torch.Generator().manual_seed(0)
    start = torch.randn(4, 8, generator=generator)
    for bound in (20.0, None):
        logp = start.clone().requires_grad_()
        reference = start.clone()
        reference[2, 3] += d
        loss, sums = grpo_loss(logp, start, reference, torch.tensor([1.0, -1.0, 0.5, -0.5]), torch.ones(4, 8),
                               beta=0.04, log_ratio_bound=bound)
        gradient = gradient_of(loss, logp)
        shares[bound] = gradient[2, 3].abs() / gradient.norm(), mean_statistics(sums)["kl/bounded_tokens"]
    assert shares[20.0][0] < 0.2 and shares[20.0][1] == 1
    assert not shares[None][0] < 0.999 and shares[None][1] == 0  # all of it, or not a number


def test_before_the_first_update_the_ratio_is_one_and_the_kl_zero():
    """The loss starts at 0 where completions are equally long, and says nothing; its gradient does."""
    logp = torch.rand(8, 5, generator=torch.Generator().manual_seed(0)).neg().requires_grad_()
    A = group_advantages(torch.tensor([[1.0, 0, 0, 1, 0, 0, 0, 0]])).flatten()
    for old in (None, logp.detach().clone()):
        loss, stats = grpo_loss(logp, old, logp.detach().clone(), A, torch.ones(8, 5), beta=0.1)
        means = mean_statistics(stats)
        assert means == {"ratio_mean": 1.0, "clip_ratio/low_mean": 0.0, "clip_ratio/high_mean": 0.0,
                         "clip_ratio/region_mean": 0.0, "kl": 0.0, "kl/bounded_tokens": 0.0}
        assert abs(loss.item()) < 1e-7
        assert torch.allclose(gradient_of(loss, logp), -(A / 40).unsqueeze(1).expand(8, 5))


def test_statistics_by_hand():
    """Ratios 0.5, 1, 1.5 and 0.5, 1.5: the clip costs only the first one's last and the second's first."""
    ratios = torch.tensor([[0.5, 1.0, 1.5], [0.5, 1.5, NAN]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    A = torch.tensor([1.0, -1.0], dtype=torch.float64)
    reference = ratios.log() - math.log(2)
    loss, stats = grpo_loss(
        ratios.log(), torch.zeros(2, 3).double(), reference, A, mask, kl="k1", entropy=torch.full((2, 3), 0.7)
    )
    assert stats["tokens"] == 5 and stats["sequences"] == 2
    assert mean_statistics(stats) == pytest.approx({
        "ratio_mean": 1.0, "clip_ratio/low_mean": 0.2, "clip_ratio/high_mean": 0.2,
        "clip_ratio/region_mean": 0.4, "kl": math.log(2), "kl/bounded_tokens": 0, "entropy": 0.7,
    })
    cispo = grpo_loss(ratios.log(), torch.zeros(2, 3), None, A, mask, surrogate="cispo")[1]
    assert cispo["clipped_low"] == 2 and cispo["clipped_high"] == 2


def test_statistics_of_nothing_are_not_a_number():
    loss, stats = grpo_loss(torch.zeros(2, 3), None, None, torch.ones(2), torch.zeros(2, 3), denominator=4)
    assert math.isnan(mean_statistics(stats)["ratio_mean"])


def test_a_masked_truncated_completion_trains_nothing_and_changes_nobody_elses_weight():
    logp = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)).neg().requires_grad_()
    mask, truncated = torch.ones(3, 4).bool(), torch.tensor([False, True, False])
    assert truncation_mask(mask, truncated, "kept") is mask
    kept = gradient_of(grpo_loss(logp, None, None, torch.ones(3), mask)[0], logp)
    mask = truncation_mask(mask, truncated, "masked")
    masked = gradient_of(grpo_loss(logp, None, None, torch.ones(3), mask)[0], logp)
    assert (masked[1] == 0).all() and torch.equal(masked[[0, 2]], kept[[0, 2]]) and (kept[1] != 0).all()


def test_only_the_policy_is_trained():
    """Neither the old policy nor the reference, even if the caller forgot to detach them."""
    logp, old, reference, entropy = (torch.full((2, 3), -x, requires_grad=True) for x in (1.0, 1.1, 1.2, 1.3))
    loss, stats = grpo_loss(
        logp, old, reference, torch.ones(2), torch.ones(2, 3), beta=0.1, entropy=entropy, level="sequence"
    )
    loss.backward()
    assert logp.grad is not None and old.grad is None and reference.grad is None and entropy.grad is None
    assert not any(x.requires_grad for x in stats.values())


# --- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(logp=torch.zeros(4)), r"logp has shape \(4,\); it takes \(completions, tokens\)"),
        (dict(old_logp=torch.zeros(2, 4)), r"old_logp has shape \(2, 4\); it takes \(2, 3\)"),
        (dict(ref_logp=torch.zeros(1, 3)), r"ref_logp has shape \(1, 3\); it takes \(2, 3\)"),
        (dict(advantages=torch.zeros(2, 1)), r"advantages has shape \(2, 1\); it takes \(2,\)"),
        (dict(mask=torch.ones(3)), r"mask has shape \(3,\); it takes \(2, 3\)"),
        (dict(entropy=torch.ones(2)), r"entropy has shape \(2,\); it takes \(2, 3\)"),
        (dict(mask=torch.zeros(2, 3)), "mask is empty; it takes at least one token"),
        (dict(mask=torch.full((2, 3), 0.5)), "mask holds other values than 0 and 1"),
        (dict(ref_logp=None, beta=0.1), "ref_logp is None; beta = 0.1 takes"),
        (dict(kl="k4"), "kl is 'k4'; it takes one of 'k1', 'k2', 'k3'"),
        (dict(level="word"), "level is 'word'; it takes one of 'token', 'sequence'"),
        (dict(aggregate="mean"), "aggregate is 'mean'; it takes one of 'sequence', 'token', 'constant'"),
        (dict(surrogate="trpo"), "surrogate is 'trpo'; it takes one of 'ppo', 'cispo', 'sapo', 'vespo'"),
        (dict(aggregate="constant"), "length is None; aggregate=\"constant\" takes a positive number"),
        (dict(denominator=0), "denominator is 0; it takes a positive count"),
        (dict(denominator=NAN), "denominator is nan; it takes a positive count"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_what_does_not_fit_is_named(change, message):
    arguments = dict(
        logp=torch.zeros(2, 3), old_logp=torch.zeros(2, 3), ref_logp=torch.zeros(2, 3),
        advantages=torch.ones(2), mask=torch.ones(2, 3),
    )
    with pytest.raises(ValueError, match=message):
        grpo_loss(**arguments | change)


def test_an_unknown_way_to_treat_truncated_completions_is_named():
    with pytest.raises(ValueError, match="truncated is 'dropped'; it takes one of 'kept', 'masked'"):
        truncation_mask(torch.ones(1, 1), torch.ones(1), "dropped")


def test_an_empty_part_of_a_batch_has_loss_zero_and_a_gradient():
    """A micro-batch of masked completions must still run its backward: other processes wait for it."""
    logp = torch.full((2, 3), NAN, requires_grad=True)
    loss, _ = grpo_loss(logp, None, None, torch.ones(2), torch.zeros(2, 3), denominator=8)
    assert loss.item() == 0 and (gradient_of(loss, logp) == 0).all()
