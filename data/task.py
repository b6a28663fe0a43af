"""A task by its name: the module with its samples and prompts, and the module with its rewards and metrics.

`--task more` means data/more.py and rewards/more.py. `--task my.task` means one module of your own that
offers both halves, `--task my.samples,my.rewards` two. Nothing is registered: a name that can be imported is
enough.
"""
import difflib
import hashlib
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

# What the programs call. A task may also offer, for sft.annotate:
#   data half: expert_prompt(sample) -> str, normalise_response(response, sample) -> str
#   rewards half: fault(completion, sample) -> str | None, what breaks the structure
# and for grpo.predict, in the data half, sample_from(…) with any of these by name: image, text, box, entity, data;
# and for grpo.evaluate, in the rewards half, per_label(completions, samples) -> {label: {figure: value}}.
DATA_NAMES = ("load", "build_prompt", "target", "stratum", "is_none")
REWARD_NAMES = ("WEIGHTS", "reward", "correct", "metrics", "parse")


class Task(NamedTuple):
    """The two halves of a task, as modules."""
    data: ModuleType
    rewards: ModuleType


def resolve_task(name: str) -> Task:
    """Import the task's two halves. ValueError, one line, for an unknown name or a half that lacks a name."""
    data_name, comma, rewards_name = (part.strip() for part in name.partition(","))
    if not comma:
        plain = "." not in name
        data_name, rewards_name = (f"data.{name}", f"rewards.{name}") if plain else (name, name)
    task = Task(_import(data_name, name), _import(rewards_name, name))
    _require(task.data, DATA_NAMES)
    _require(task.rewards, REWARD_NAMES)
    return task


def sample_hash(task: Task, sample) -> str:
    """8 hexadecimal digits of a sample's id, text and target: it goes with a prediction or a response of the sample, so
    that a file made from other data is noticed although ids coincide. Where the data lies makes no difference."""
    words = [sample.id, task.data.target(sample), *(getattr(sample, name, None) for name in ("text", "entity", "question"))]
    return hashlib.sha256(json.dumps(words, default=str).encode()).hexdigest()[:8]


def _import(module: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as problem:
        # Only "this module is not there" is about the name; a task that itself misses a library must say so.
        if not isinstance(problem, ModuleNotFoundError) or not f"{module}.".startswith(f"{problem.name}."):
            package = (problem.name or "").partition(".")[0]
            if package not in ("data", "rewards", "sft", "grpo"):
                raise
            raise ValueError(f"{module}: {problem}: {sys.modules.get(package, package)} comes before a module of yours "
                             f"of that name, which needs another one") from None
    except (ValueError, TypeError):  # an empty name, or one that begins with a dot
        pass
    raise ValueError(f"unknown task {name!r}: no module {module}; {_nearest(name)}")


def _nearest(name: str) -> str:
    here = Path(__file__).parent
    rewards = here.parent / "rewards"
    known = sorted(path.stem for path in here.glob("[!_]*.py") if (rewards / path.name).exists() and path.stem != name)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}, or a module of yours"


def _require(module: ModuleType, names: tuple[str, ...]) -> None:
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        raise ValueError(f"task module {module.__name__} ({module.__file__}) lacks {', '.join(missing)}; see data/task.py")
