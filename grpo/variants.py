"""Variants of GRPO as named sets of settings: each is a few lines over the same parts, and says whose it is.

`Preset()` is what all start from; a preset lists only where its paper differs.  What a paper leaves open is
marked [chosen].  Sizes are a matter of cost more than of method: G is 8 unless a user says otherwise, and
where a paper cuts its rollout into mini-batches we update on all of it, `updates` times.

`Preset` is the one home of these settings: the command line, its help and settings.json are made from its fields.
No torch here, so that a help text costs none."""

import difflib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from data.task import import_module

SCALES = ("group", "batch", "centred-batch", "leave-one-out", "none")
COMBINATIONS = ("sum", "normalised")
SURROGATES = ("ppo", "cispo", "sapo", "vespo")
LEVELS = ("token", "sequence")
KL_KINDS = ("k1", "k2", "k3")
AGGREGATES = ("sequence", "token", "constant")
TRUNCATED = ("kept", "masked")
ZERO_VARIANCE_GROUPS = ("kept", "dropped", "resampled")


def setting(default, help: str, **more):
    """A dataclass field that is a setting of a program, with its help text; `more` as grpo/runtime/settings.py says."""
    value = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**value, metadata={"help": help, **more})


def settings_of(preset) -> list:
    """The fields that are settings: those with a help text."""
    return [option for option in fields(preset) if "help" in option.metadata]


def check_choice(name: str, value, choices: tuple) -> None:
    """ValueError unless `value` is one of `choices`: which argument, what it got, what it takes."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r:.60}; it takes one of {', '.join(map(repr, choices))}")


@dataclass(frozen=True)
class Preset:
    """The settings in which GRPO's variants differ; an unknown option is a ValueError at once.

    A fork's `PRESET` may be of a subclass with further settings.  loss=True: the loss takes it as a keyword."""

    name: str = field(default="", compare=False)  # as --objective has it
    source: str = ""  # paper and equation

    # rewards to advantages: `combine_rewards`, `group_advantages`
    combine: str = setting("sum", "reward parts are summed, or each normalised before", choices=COMBINATIONS)
    scale: str = setting("group", "what advantages are divided by: a std, (G − 1)/G, or nothing", choices=SCALES)
    ddof: int = setting(1, "the std divides by n − ddof", choices=(0, 1))
    eps: float = setting(1e-4, "added to the std", least=0)
    kl_in_reward: bool = setting(False, "the KL lowers the reward (`kl_penalised_rewards`) and is not in the loss")
    overlong_share: float = setting(0.0, "last share of the completion limit in which length costs", least=0, most=1)

    # advantages to the loss: `grpo_loss`
    surrogate: str = setting("ppo", "what a ratio earns: clipped gain (ppo), clipped weight (cispo), a soft gate "
                                    "(sapo, vespo)", choices=SURROGATES, loss=True)
    clip_low: float | None = setting(0.2, "ε below 1; none: that side is not clipped", least=0, loss=True)
    clip_high: float | None = setting(0.2, "ε above 1; none: that side is not clipped", least=0, loss=True)
    level: str = setting("token", "one ratio a token, or one a completion", choices=LEVELS, loss=True)
    aggregate: str = setting("sequence", "a mean of sequence means, of all tokens, or a sum over a constant",
                             choices=AGGREGATES, loss=True)
    length: int | None = setting(None, "tokens of aggregate=constant; none: the completion limit", least=0)
    beta: float = setting(0.0, "β, weight of the KL to the reference; 0: no reference", least=0, loss=True, top=True)
    kl: str = setting("k3", "estimator of the KL", choices=KL_KINDS, loss=True)
    kl_weighted: bool = setting(False, "weight the KL by the ratio, as TRL does unless told otherwise", loss=True)
    log_ratio_bound: float | None = setting(20.0, "KL and ratio are straight lines beyond this log-ratio, in nats; "
                                            "none: one token far off may own or end a run", above=0, loss=True)

    # the loop
    group_size: int = setting(8, "G, completions a prompt", least=2, top=True)
    updates: int = setting(1, "μ, updates a rollout", least=1)
    temperature: float = setting(1.0, "of the rollouts and of the scored distribution", above=0)
    truncated: str = setting("kept", "tokens of completions cut by the limit are trained, or masked", choices=TRUNCATED)
    zero_variance_groups: str = setting("kept", "groups of equal rewards: kept, their KL still trains; dropped; or "
                                                "drawn again", choices=ZERO_VARIANCE_GROUPS)

    def __post_init__(self):
        for option in settings_of(self):
            if choices := option.metadata.get("choices"):
                check_choice(option.name, getattr(self, option.name), choices)


@dataclass(frozen=True)
class Sapo(Preset):
    """`sapo_surrogate` has settings of its own."""

    tau_positive: float = setting(1.0, "τ of the gate where A > 0", above=0)
    tau_negative: float = setting(1.05, "τ of the gate elsewhere", above=0)


@dataclass(frozen=True)
class Vespo(Preset):
    """`vespo_surrogate` has settings of its own."""

    k_positive: float = setting(2.0, "power of w where A ≥ 0", least=0)
    lambda_positive: float = setting(3.0, "decay with w where A ≥ 0", least=0)
    k_negative: float = setting(3.0, "power of w where A < 0", least=0)
    lambda_negative: float = setting(2.0, "decay with w where A < 0", least=0)


# Where each differs: presets.json beside this file, a paper's settings under its name.
TABLE = json.loads(Path(__file__).with_name("presets.json").read_text("utf-8"))
PRESETS = {name: {"sapo": Sapo, "vespo": Vespo}.get(name, Preset)(**settings) for name, settings in TABLE.items()}


def resolve(name: str, **overrides) -> Preset:
    """The settings called `name`, with some replaced: resolve("more-r1", beta=0.0).

    A module of a fork may bring its own `PRESET`, a `Preset`; without one it starts from GRPO's.
    Raises ValueError: an unknown name or setting, with the nearest right one."""
    preset = PRESETS.get(name) or getattr(load_module(name), "PRESET", PRESETS["grpo"])
    if not isinstance(preset, Preset):
        raise ValueError(f"PRESET of module {name!r} is a {type(preset).__name__}; a grpo.variants.Preset expected")
    known = [option.name for option in settings_of(preset)]
    for given in overrides:
        if given not in known:
            raise ValueError(f"{given!r} is not a setting of an objective{nearest(given, known)}")
    return replace(preset, name=name, **overrides)


def load_objective(name: str) -> Callable:
    """The loss of a preset, which is `grpo_loss`, or a fork's: the function `loss` of the module `name`.

    A fork's `loss` is called exactly as `grpo_loss` is, and returns a loss and statistics as it does.  Settings
    that its `PRESET` has besides ours are keywords of it; statistics besides ours are sums over tokens.
    Raises ValueError: neither a preset nor a module (with the nearest preset), or a module without `loss`."""
    if name in PRESETS:
        return load_module("grpo.objective").grpo_loss
    loss = getattr(load_module(name), "loss", None)
    if not callable(loss):
        raise ValueError(f"module {name!r} has no function `loss`; it takes one of the form of grpo_loss")
    return loss


def loss_options(preset: Preset, completion_limit: int) -> dict:
    """The keywords of the loss that a preset sets; Dr. GRPO's constant is `completion_limit` tokens."""
    ours = {option.name for option in fields(Preset)}
    options = {option.name: getattr(preset, option.name) for option in settings_of(preset)
               if option.metadata.get("loss", option.name not in ours)}
    if preset.kl_in_reward:
        options["beta"] = 0.0
    if preset.aggregate == "constant":
        options["length"] = preset.length or completion_limit
    return options


def load_module(name: str):
    """The module of that name, or a ValueError where there is none; an error inside it is not hidden."""
    complaint = f"objective {name!r} is neither a preset nor a module that can be imported"
    return import_module(name, name, complaint + nearest(name, PRESETS))


def nearest(name: str, names: Iterable[str]) -> str:
    """'; did you mean …?', or all names where none is near."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(names)}"
