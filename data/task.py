"""A task by its name: the module with its samples and prompts, and the module with its rewards and metrics.

`--task more` means data/more.py and rewards/more.py. `--task mine` means one module of your own that offers both
halves, `--task my.samples,my.rewards` two. Nothing is registered: a name that can be imported is enough. `--rewards
mine` puts a reward of yours in the place of the task's."""
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

# What the programs call; docs/your-own-task.md says with what, and what else a task may offer.
DATA_NAMES = ("load", "build_prompt", "target", "stratum", "is_none")
REWARD_NAMES = ("WEIGHTS", "reward", "correct", "metrics", "parse")


class Task(NamedTuple):
    data: ModuleType
    rewards: ModuleType


def resolve_task(name: str, rewards: str = "") -> Task:
    """Import the task's two halves. ValueError, one line, for an unknown name or a half that lacks a name."""
    data_name, comma, rewards_name = (part.strip() for part in name.partition(","))
    if not comma:
        yours = name.isidentifier() and importlib.util.find_spec(name) is not None
        here = "." not in name and (Path(__file__).with_name(f"{name}.py").is_file() or not yours)
        data_name, rewards_name = (f"data.{name}", f"rewards.{name}") if here else (name, name)
    task = Task(import_module(data_name, name), import_module(rewards_name, name))
    for module, names in ((task.data, DATA_NAMES), (task.rewards, REWARD_NAMES)):
        if missing := [name for name in names if not hasattr(module, name)]:
            raise ValueError(f"task module {module.__name__} ({module.__file__}) lacks {', '.join(missing)}; see "
                             "data/task.py")
    return Task(task.data, with_own_reward(task.rewards, rewards)) if rewards else task


def sample_hash(task: Task, sample) -> str:
    """8 hexadecimal digits of a sample's id, text and target: it goes with a prediction or a response of the sample, so
    that a file made from other data is noticed although ids coincide. Where the data lies makes no difference."""
    words = [sample.id, task.data.target(sample)]
    words += [getattr(sample, name, None) for name in ("text", "entity", "question")]
    return hashlib.sha256(json.dumps(words, default=str).encode()).hexdigest()[:8]


def with_own_reward(task: ModuleType, name: str) -> SimpleNamespace:
    """A task's rewards half with what a module of yours has in its place: `reward`, and WEIGHTS if that gives several
    parts; a `reward` that gives a number is one part of this name."""
    own = load_module(name, "--rewards")
    if not callable(getattr(own, "reward", None)):
        raise ValueError(f"--rewards {name}: no function reward(completion, sample)")
    halves = {key: getattr(own, key, value) for key, value in vars(task).items() if not key.startswith("__")}
    if not hasattr(own, "WEIGHTS"):
        halves["WEIGHTS"] = {"reward": 1.0}
        halves["reward"] = wraps(own.reward)(lambda *one, **options: {"reward": own.reward(*one, **options)})
    return SimpleNamespace(**halves, __name__=name)


def load_module(name: str, setting: str) -> ModuleType:
    """A module of yours by its name or by the path of its .py file; ValueError where there is none."""
    if not name.endswith(".py"):
        return import_module(name, name, f"{setting} {name}: no such module, nor a .py file")
    if not Path(name).is_file():
        raise ValueError(f"{setting} {name}: no such file")
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_samples(task: Task, settings, split: str, seen_size: Callable | None = None) -> list:
    """The samples of a split. ValueError, naming both, for two of one id: answers are told apart by it."""
    takes = inspect.signature(task.data.load).parameters.keys() - {"data", "split"}
    given = {name: value for name, value in {**vars(settings), "seen_size": seen_size}.items() if name in takes}
    samples, places = task.data.load(settings.data, split, **given), {}
    for place, sample in enumerate(samples, 1):
        if (before := places.setdefault(sample.id, place)) != place:
            raise ValueError(f"{settings.data}: samples {before} and {place} of split {split} have the same id "
                             f"{sample.id!r}; each needs its own")
    if not samples:
        raise ValueError(f"{settings.data}: split {split} has no sample")
    return samples


def import_module(module: str, name: str, complaint: str = "") -> ModuleType:
    """ValueError where there is no such module: the complaint, or one about a task; a fault inside it is not hidden."""
    try:
        if module and not module.startswith("."):
            return importlib.import_module(module)
    except ImportError as problem:
        # Only "this module is not there" is about the name; a task that itself misses a library must say so.
        if not isinstance(problem, ModuleNotFoundError) or not f"{module}.".startswith(f"{problem.name}."):
            package = (problem.name or "").partition(".")[0]
            if package not in ("data", "rewards", "sft", "grpo"):
                raise
            raise ValueError(f"{module}: {problem}: {sys.modules.get(package, package)} comes before a module of yours "
                             f"of that name, which needs another one") from None
    here, rewards = ({path.stem for path in Path(__file__).parent.parent.glob(f"{package}/[!_]*.py")}
                     for package in ("data", "rewards"))
    known = sorted(here & rewards - {name})
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}, or a module of yours"
    raise ValueError(complaint or f"unknown task {name!r}: no module {module}; {hint}")
