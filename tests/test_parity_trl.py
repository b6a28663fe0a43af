"""Our objective gives TRL's loss and gradient, where TRL is installed (the extra `benchmark`)."""

import pytest

pytest.importorskip("trl", reason="TRL is not installed: pip install 'trl==1.16.*'")

from benchmarks import parity_trl  # noqa: E402


def named(rows):
    return [pytest.param(*row[1:], id=row[0]) for row in rows]


@pytest.mark.parametrize("settings, ours", named(parity_trl.ADVANTAGES))
def test_advantages_are_trls(settings, ours):
    assert parity_trl.compare_advantages(settings, ours, [1]) < parity_trl.TOLERANCE


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("settings, options", named(parity_trl.OBJECTIVES))
def test_loss_and_gradient_are_trls(settings, options, weighted):
    differences = parity_trl.compare_objective(settings, options, parity_trl.BETA, weighted, [1])
    loss, gradient, statistics = differences
    assert loss < parity_trl.TOLERANCE and gradient < parity_trl.TOLERANCE
    assert not statistics > parity_trl.TOLERANCE  # NaN where the two mean different things by them


def test_the_comparison_can_fail():
    """Other settings on one side, and the difference is there: nothing is compared with itself."""
    _, gradient, _ = parity_trl.compare_objective(
        dict(loss_type="grpo"), dict(aggregate="token"), parity_trl.BETA, False, [1]
    )
    assert gradient > 1e-4
    by_group = parity_trl.ADVANTAGES[0][2]
    assert parity_trl.compare_advantages(dict(scale_rewards="batch"), by_group, [1]) > 1e-2
