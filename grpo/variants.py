"""Variants of GRPO as named sets of settings: each is a few lines over the same parts, and says whose it is.

`Preset()` is what all start from; a preset lists only where its paper differs.  What a paper leaves open is
marked [chosen].  Sizes are a matter of cost more than of method: G is 8 unless a user says otherwise, and
where a paper cuts its rollout into mini-batches we update on all of it, `updates` times.
"""

import difflib
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace

from grpo.advantage import COMBINATIONS, SCALES, check_choice
from grpo.objective import AGGREGATES, KL_KINDS, LEVELS, SURROGATES, TRUNCATED, grpo_loss

ZERO_VARIANCE_GROUPS = ("kept", "dropped", "resampled")


@dataclass(frozen=True)
class Preset:
    """The settings in which GRPO's variants differ; an unknown option is a ValueError at once."""

    source: str = ""  # paper and equation

    # rewards to advantages: `combine_rewards`, `group_advantages`
    combine: str = "sum"
    scale: str = "group"
    ddof: int = 1
    eps: float = 1e-4
    kl_in_reward: bool = False  # beta acts in `kl_penalised_rewards`, not in the loss
    overlong_share: float = 0.0  # `overlong_penalty` over the last share of the completion limit; 0: none

    # advantages to the loss: `grpo_loss`
    surrogate: str = "ppo"
    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    level: str = "token"
    aggregate: str = "sequence"
    length: int | None = None  # of aggregate="constant"; None: the completion limit
    beta: float = 0.0
    kl: str = "k3"
    kl_weighted: bool = False

    # the loop
    group_size: int = 8  # G, completions a prompt
    updates: int = 1  # μ, updates a rollout
    temperature: float = 1.0
    truncated: str = "kept"  # `truncation_mask`
    zero_variance_groups: str = "kept"  # groups with equal rewards: their KL still trains; or dropped; or drawn again

    def __post_init__(self):
        check_choice("combine", self.combine, COMBINATIONS)
        check_choice("scale", self.scale, SCALES)
        check_choice("ddof", self.ddof, (0, 1))
        check_choice("surrogate", self.surrogate, SURROGATES)
        check_choice("level", self.level, LEVELS)
        check_choice("aggregate", self.aggregate, AGGREGATES)
        check_choice("kl", self.kl, KL_KINDS)
        check_choice("truncated", self.truncated, TRUNCATED)
        check_choice("zero_variance_groups", self.zero_variance_groups, ZERO_VARIANCE_GROUPS)


PRESETS = {
    "grpo": Preset(
        source="DeepSeekMath, arXiv 2402.03300 eq. 3; its clip range is not given: 0.2, PPO's [chosen]",
        beta=0.04,
    ),
    "more-r1": Preset(
        source="MORE-R1 eq. 2-4 and Algorithm 1; G and the ratio per token are [chosen]",
        beta=0.001, updates=2, temperature=0.8,
    ),
    "jmere-r1": Preset(
        source="JMERE-R1 eq. 6 and 7: no clip, one update; the temperature, its evaluation's, is [chosen]",
        clip_low=None, clip_high=None, beta=0.01, updates=1, temperature=0.8,
    ),
    "dr-grpo": Preset(
        source="Dr. GRPO, arXiv 2503.20783 §3.2: no std, no division by the completion's own length",
        scale="none", aggregate="constant",
    ),
    "dapo": Preset(
        source="DAPO, arXiv 2503.14476 eq. 8, 10-13: cache 4096 of 20480 tokens; number of updates [chosen]",
        clip_high=0.28, aggregate="token", zero_variance_groups="resampled", overlong_share=0.2, updates=2,
    ),
    "gspo": Preset(
        source="GSPO, arXiv 2507.18071 eq. 5-7 and §5.1; number of updates [chosen]",
        level="sequence", clip_low=3e-4, clip_high=4e-4, updates=2,
    ),
    "cispo": Preset(
        source="CISPO, arXiv 2506.13585 eq. 4 and 5; the weight's bound, 5, and number of updates [chosen]",
        surrogate="cispo", clip_low=None, clip_high=4.0, aggregate="token", updates=2,
    ),
    "rloo": Preset(
        source="RLOO, arXiv 2402.14740: the completion is one action, its tokens are summed; beta [chosen]",
        scale="leave-one-out", clip_low=None, clip_high=None, aggregate="constant", length=1,
        beta=0.05, kl_in_reward=True,
    ),
    "reinforce++": Preset(
        source="REINFORCE++ with baseline, arXiv 2501.03262; beta and the mean over sequences [chosen]",
        scale="centred-batch", kl="k2", beta=0.001,
    ),
}


def resolve(name: str, **overrides) -> Preset:
    """The settings called `name`, with some replaced: resolve("more-r1", beta=0.0).

    A module of a fork may bring its own `PRESET`, a `Preset`; without one it starts from GRPO's.
    Raises ValueError: an unknown name or setting, with the nearest right one.
    """
    preset = PRESETS.get(name) or getattr(load_module(name), "PRESET", PRESETS["grpo"])
    known = [field.name for field in fields(Preset)]
    for setting in overrides:
        if setting not in known:
            raise ValueError(f"{setting!r} is not a setting of an objective{nearest(setting, known)}")
    return replace(preset, **overrides)


def load_objective(name: str) -> Callable:
    """The loss of a preset, which is `grpo_loss`, or a fork's: the function `loss` of the module `name`.

    A fork's `loss` is called exactly as `grpo_loss` is, and returns a loss and statistics as it does.
    Raises ValueError: neither a preset nor a module (with the nearest preset), or a module without `loss`.
    """
    if name in PRESETS:
        return grpo_loss
    loss = getattr(load_module(name), "loss", None)
    if not callable(loss):
        raise ValueError(f"module {name!r} has no function `loss`; it takes one of the form of grpo_loss")
    return loss


def loss_options(preset: Preset, completion_limit: int) -> dict:
    """The keywords of `grpo_loss` that a preset sets; Dr. GRPO's constant is `completion_limit` tokens."""
    names = ("surrogate", "clip_low", "clip_high", "level", "aggregate", "beta", "kl", "kl_weighted")
    options = {name: getattr(preset, name) for name in names}
    if preset.kl_in_reward:
        options["beta"] = 0.0
    if preset.aggregate == "constant":
        options["length"] = preset.length or completion_limit
    return options


def load_module(name: str):
    """The module of that name, or a ValueError where there is none; an error inside it is not hidden."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name + ".").startswith(error.name + "."):
            message = f"objective {name!r} is neither a preset nor a module that can be imported"
            raise ValueError(message + nearest(name, PRESETS)) from None
        raise


def nearest(name: str, names: Iterable[str]) -> str:
    """'; did you mean …?', or all names where none is near."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(names)}"
