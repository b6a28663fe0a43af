"""Every preset is what its paper says, from rewards to gradient; a fork's objective takes its place."""

import dataclasses
import inspect
import random

import pytest
import scalar_reference
import torch

from grpo.advantage import group_advantages
from grpo.objective import grpo_loss, sapo_surrogate, vespo_surrogate
from grpo.variants import PRESETS, Preset, load_objective, loss_options, resolve

LIMIT = 7  # tokens a completion may have
PLAIN = dict(
    clip_low=0.2, clip_high=0.2, beta=0.0, kl_kind="k3", level="token", aggregate="sequence", surrogate="ppo",
    kl_weighted=False, length=None,
)
UNCLIPPED = dict(clip_low=None, clip_high=None)
# name: scale of the advantages, and the loss in the reference's words where it differs from PLAIN.
PAPERS = {
    "grpo": ("group", dict(beta=0.04)),
    "more-r1": ("group", dict(beta=0.001)),
    "jmere-r1": ("group", dict(beta=0.01, **UNCLIPPED)),
    "dr-grpo": ("none", dict(aggregate="constant", length=LIMIT)),
    "dapo": ("group", dict(clip_high=0.28, aggregate="token")),
    "gspo": ("group", dict(level="sequence", clip_low=3e-4, clip_high=4e-4)),
    "cispo": ("group", dict(surrogate="cispo", clip_low=None, clip_high=4.0, aggregate="token")),
    "bnpo": ("group", dict(aggregate="token")),
    "luspo": ("group", dict(level="sequence", aggregate="constant", length=1, clip_low=2e-3, clip_high=2.5e-3)),
    "sapo": ("group", dict(surrogate="sapo", **UNCLIPPED)),
    "vespo": ("group", dict(surrogate="vespo", aggregate="token", **UNCLIPPED)),
    "rloo": ("leave-one-out", dict(aggregate="constant", length=1, **UNCLIPPED)),
    "reinforce++": ("centred-batch", dict(kl_kind="k2", beta=0.001)),
}
# And what the loop does otherwise than G = 8, one update, T = 1, everything kept, no shaping, KL in the loss.
LOOPS = {
    "more-r1": dict(updates=2, temperature=0.8),
    "jmere-r1": dict(temperature=0.8),
    "dapo": dict(updates=2, zero_variance_groups="resampled", overlong_share=0.2),
    "gspo": dict(updates=2),
    "cispo": dict(updates=2),
    **{name: dict(updates=2) for name in ("bnpo", "luspo", "sapo", "vespo")},
    "rloo": dict(kl_in_reward=True, beta=0.05),
}


def random_group(seed, groups=2, G=3):
    dice = random.Random(seed)
    logp = [[dice.uniform(-3, -0.1) for _ in range(dice.randint(1, 5))] for _ in range(groups * G)]
    old = [[x + dice.gauss(0, 0.4) for x in row] for row in logp]
    reference = [[x + dice.gauss(0, 0.4) for x in row] for row in logp]
    return logp, old, reference, [[dice.random() for _ in range(G)] for _ in range(groups)]


def pad(rows):
    return torch.tensor([row + [0.0] * (5 - len(row)) for row in rows], dtype=torch.float64)


def test_there_is_a_preset_for_each_paper():
    assert PRESETS.keys() == PAPERS.keys() and all(preset.source for preset in PRESETS.values())


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_its_paper_says_from_rewards_to_gradient(name):
    scale, differences = PAPERS[name]
    preset, options = resolve(name), PLAIN | differences
    for seed in range(10):
        logp, old, reference, rewards = random_group(seed)
        A = sum(scalar_reference.advantages(rewards, scale, ddof=1, eps=1e-4), [])
        expected = scalar_reference.loss(logp, old, reference, A, **options)
        slopes = scalar_reference.gradient(logp, old, reference, A, **options)

        leaf, mask = pad(logp).requires_grad_(), pad([[1.0] * len(row) for row in logp])
        advantages = group_advantages(
            torch.tensor(rewards, dtype=torch.float64), preset.scale, preset.ddof, preset.eps
        ).flatten()
        loss, _ = load_objective(name)(
            leaf, pad(old), pad(reference), advantages, mask, **loss_options(preset, completion_limit=LIMIT)
        )
        loss.backward()
        assert loss.item() == pytest.approx(expected, rel=1e-10)
        assert torch.allclose(leaf.grad, pad(slopes), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_preset_asks_of_the_loop(name):
    usual = dict(
        group_size=8, updates=1, temperature=1.0, truncated="kept", zero_variance_groups="kept", overlong_share=0.0,
        kl_in_reward=False, combine="sum",
    )
    settings = dataclasses.asdict(resolve(name))
    expected = usual | LOOPS.get(name, {})
    assert {key: settings[key] for key in expected} == expected


def test_what_a_preset_tells_the_loss_are_its_keywords_with_the_same_defaults():
    """The two places of an objective's setting: a field of its preset, a keyword of the loss."""
    functions = grpo_loss, sapo_surrogate, vespo_surrogate  # the last two take what is theirs from the first
    known = {name: one.default for function in functions
             for name, one in inspect.signature(function).parameters.items()}
    for preset in PRESETS.values():
        options = loss_options(type(preset)(), LIMIT)
        assert {name: known[name] for name in options} == options


def test_settings_can_be_replaced_one_by_one():
    preset = resolve("more-r1", beta=0.0, clip_high=None)
    assert preset == dataclasses.replace(PRESETS["more-r1"], beta=0.0, clip_high=None)
    assert PRESETS["more-r1"].beta == 0.001


@pytest.mark.parametrize("ask", [resolve, load_objective])
def test_an_unknown_name_is_answered_with_the_nearest(ask):
    with pytest.raises(ValueError, match="'more_r1' is neither a preset nor .* did you mean 'more-r1'?"):
        ask("more_r1")
    for name in ("nowhere.at_all", "", ".x"):
        with pytest.raises(ValueError, match=f"{name!r} is neither .*; there are grpo, more-r1"):
            ask(name)


def test_an_unknown_setting_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="'clip_hi' is not a setting .* did you mean 'clip_high'?"):
        resolve("dapo", clip_hi=0.3)


@pytest.mark.parametrize(
    "setting",
    ["combine", "scale", "ddof", "surrogate", "level", "aggregate", "kl", "truncated", "zero_variance_groups"],
)
def test_an_unknown_option_is_refused_before_anything_runs(setting):
    with pytest.raises(ValueError, match=f"{setting} is 'other'; it takes one of"):
        resolve("grpo", **{setting: "other"})


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """Writes modules of a package `a_fork`, which can then be imported."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a_fork").mkdir()

    def write(name, text):
        (tmp_path / "a_fork" / f"{name}.py").write_text(text)
        return f"a_fork.{name}"

    return write


def test_a_fork_brings_its_own_loss(fork):
    """Of the same form, so it may build on ours; without settings of its own it has GRPO's."""
    name = fork("doubled", "from grpo.objective import grpo_loss\n"
                           "def loss(*arguments, **options):\n"
                           "    value, stats = grpo_loss(*arguments, **options)\n"
                           "    return 2 * value, stats\n")
    arguments = torch.zeros(2, 3), None, torch.ones(2, 3).neg(), torch.tensor([1.0, -0.5]), torch.ones(2, 3)
    options = loss_options(resolve(name), LIMIT)
    assert resolve(name) == PRESETS["grpo"]
    assert load_objective(name)(*arguments, **options)[0] == 2 * grpo_loss(*arguments, **options)[0]


def test_a_fork_brings_its_own_settings(fork):
    name = fork("settings", "from grpo.objective import grpo_loss as loss\n"
                            "from grpo.variants import Preset\n"
                            "PRESET = Preset(source='ours', beta=0.5)\n")
    assert resolve(name) == Preset(source="ours", beta=0.5) and resolve(name, beta=0.1).beta == 0.1


def test_a_fork_without_a_loss_is_told_so(fork):
    with pytest.raises(ValueError, match="module 'a_fork.empty' has no function `loss`"):
        load_objective(fork("empty", ""))


def test_an_error_inside_a_fork_is_not_taken_for_a_missing_module(fork):
    with pytest.raises(ModuleNotFoundError, match="a_library_it_needs"):
        load_objective(fork("broken", "import a_library_it_needs\n"))
