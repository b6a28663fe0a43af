"""One dataclass a program: its fields are the command line, their help texts the manual. No torch here.

Unknown or ill-typed settings are refused in one line with the nearest right name. `--config FILE` reads settings
from a JSON object first; the command line overrides it. Besides its help text, a field may say of itself:

    group     the title under which --help lists it; top=True: among those that are set first
    choices   what it may be; a number's `least`, `most`, or what it must be `above` or `below`
    path      "file", "folder", "data" (a folder or a file) or "model" that must be there, "output" for one to write
    resume    where a run goes on: "free" may differ, "never" must not, anything else takes --resume changed
    family    a function, name → dataclass of further settings beside the program's own, with a `name` and a `source`
    positional  given without its name"""

import argparse
import difflib
import json
import math
import re
import sys
import typing
from collections import Counter
from dataclasses import dataclass, fields, replace
from functools import partial
from operator import ge, gt, le, lt
from pathlib import Path
from typing import Iterator, Mapping, NamedTuple

from data.read import read_object
from data.task import resolve_task
from grpo.runtime.program import run_program
from grpo.variants import check_choice, setting

LORA_TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"  # attention and MLP: every matrix of a layer
FIRST = "set first"
KINDS = {bool: ("True|False", "true or false"), int: ("N", "a whole number"), float: ("X", "a number"),
         str: ("TEXT", "a text")}
TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
BOUNDS = {"least": (ge, "at least"), "above": (gt, "above"), "most": (le, "at most"), "below": (lt, "below")}
# ours: what other trainers call it, or an earlier version of this one
ELSEWHERE = json.loads(Path(__file__).with_name("elsewhere.json").read_text("utf-8"))


def required(help: str, **more):
    """A field that the command line must give (dataclasses want a default once one field has one)."""
    return setting("", help, required=True, top=True, **more)


inputs, from_file, validation, trained, optimizer = (partial(setting, group=title) for title in (
    "data and model", "questions from a file (--task jsonl)", "validation", "what trains", "optimizer"))
speed, saving, ranks = (partial(setting, group=title, resume="free") for title in (
    "memory and speed", "checkpoints and logs", "ranks"))


@dataclass
class TaskSettings:
    """Which samples there are, and what a right answer is."""

    data: str = required("folder of the dataset; jsonl: a file, or a folder of one a split", path="data", resume="free")
    task: str = setting("more", "more, jmere, jsonl (questions and answers from a file), your own module, or "
                                "data_module,rewards_module", top=True, resume="never")
    rewards: str = setting("", "module or .py file with reward(completion, sample); empty: the task's", group="reward")
    missing_images: str = inputs("stop", "images that are not there: stop, drop the samples, or blank (a grey one)",
                                 choices=("stop", "drop", "blank"))
    verifier: str = from_file("auto", "exact, text (case, space, punctuation ignored), number, choice, boxes (IoU), "
                                      "regex, my.module:function; auto: choice, number or text by the line")
    tolerance: float = from_file(1e-6, "a number may be wrong by this share of the right one", least=0)
    whole_answer: bool = from_file(False, "a completion without <answer> and \\boxed{} is an answer as a whole")
    exif_orientation: bool = from_file(True, "turn photos as EXIF says; off: as stored, where boxes refer to that")
    split_seed: int = from_file(0, "random seed that parts a single file into train, valid and test")


@dataclass
class CommonSettings(TaskSettings):
    """What every program that runs a model on a task asks for."""

    model: str = required("checkpoint folder or hub name: Llama, Qwen2.5, Qwen3, Qwen2.5-VL, Qwen3-VL, LLaVA-1.5",
                          path="model", resume="free")
    output: str = required("folder for everything this run writes", path="output", resume="free")
    adapter: str = inputs("", "adapter of --model in PEFT's format, <output>/adapter of a stage before; training goes "
                              "on with it, and GRPO's reference is the model with it", path="folder", resume="never")
    reasoning: bool | None = setting(None, "ask for <think>…</think> before the answer; none: as the model was "
                                           "trained, else True (sft.train: whether there are --responses)", top=True)
    max_pixels: int = inputs(1280 * 28 * 28, "largest area of an image in pixels; 28 × 28 become one token "
                                             "(Qwen3-VL: 32 × 32; LLaVA-1.5 has one size and does not ask)")
    max_completion_tokens: int = setting(1024, "longest completion, end token included", top=True, above=0)
    rollout_rows: int = speed(64, "completions written at once on each rank; changes memory use only", above=0)
    read_every: int = speed(0, "decode steps between two times that the host reads what an accelerator has drawn, of "
                               "fixed shapes; 0: 8, and on a CPU one step, its shapes following the rows", least=0)
    speculate: str = speed("auto", "auto: guess tokens from earlier answers and check several in one pass, where that "
                                   "pays; changes the number of passes, not what is drawn", choices=("auto", "off"))
    dtype: str = inputs("auto", "what is computed in; masters are float32. auto: bfloat16 on a GPU that has it "
                                "natively; float16 is refused", choices=("auto", "float32", "bfloat16", "float16"))
    seed: int = inputs(0, "random seed: data order, curriculum, sampling noise")

    def check(self) -> None:
        check_values(self)


@dataclass
class TrainingSettings(CommonSettings):
    """What both trainers ask for besides."""

    split: str = inputs("train", "split to train on", resume="never")
    valid_split: str = validation("valid", "split for validation; empty for none, then the last weights are kept")
    valid_samples: int = validation(0, "validate on this many, drawn by the seed; 0 for all", least=0)
    valid_metric: str = validation("", "which of the task's metrics decides the best checkpoint; empty: its first")
    cache_gigabytes: float = speed(4.0, "memory for encoded images that are kept between epochs, on each rank")
    keep_features: bool = speed(False, "keep a frozen vision encoder's features between epochs, not the pixels: it "
                                       "sees no image twice; two runs then agree to rounding, not to the bit")
    offload_reference: bool = speed(False, "keep the reference's weights in host memory between its layers' turns")
    offload_optimizer: bool = speed(False, "keep the optimizer's state in host memory between its steps")
    train_vision: bool = trained(False, "train vision encoder and projector too; the papers do not", resume="never")
    lora_rank: int = trained(0, "train an adapter of this rank, not the language model's weights; 0 for none. <output>/"
                                "model has it merged, <output>/adapter alone", top=True, resume="never", least=0)
    lora_alpha: float = trained(64.0, "the adapter's output is scaled by α / rank", resume="never", above=0)
    lora_targets: str = trained(LORA_TARGETS, "names of the adapted matrices, separated by commas", resume="never")
    lora_dropout: float = trained(0.0, "on the adapter's input in the update pass alone; above 0 GRPO's ratios past "
                                       "the first pass and its KL hold its noise too", least=0, below=1)
    tokens_per_pass: int = speed(16384, "packed tokens of one forward and backward; changes memory use only", above=0)
    gradient_checkpointing: bool = speed(False, "recompute activations by layer: less memory, more time", top=True)
    warmup: float = optimizer(0.05, "share of the updates in which the learning rate rises", least=0, most=1)
    schedule: str = optimizer("cosine", "learning rate after the warm-up", choices=("cosine", "constant"))
    weight_decay: float = optimizer(0.1, "AdamW's, on matrices only")
    adam_beta1: float = optimizer(0.9, "AdamW β₁")
    adam_beta2: float = optimizer(0.95, "AdamW β₂")
    max_grad_norm: float = optimizer(1.0, "gradients are scaled down to this norm", above=0)
    max_bad_updates: int = saving(3, "stop after so many updates in a row with a loss or gradient not finite", above=0)
    checkpoint_every: int = saving(20, "rollouts of GRPO, updates of SFT, between checkpoints of the training state in "
                                       "<output>/checkpoints; 0: only at the end and on SIGTERM", least=0)
    checkpoints_kept: int = saving(2, "so many stay, the newest; the best weights are in <output>/model", above=0)
    resume: str = saving("auto", "auto: from the newest whole checkpoint, refused if settings or data differ; changed: "
                                 "with the new ones; never: begin anew", choices=("auto", "changed", "never"))
    hang_minutes: float = ranks(30.0, "end, and name the missing rank, after so long without progress", above=0)
    shard_size: int = ranks(0, "shard the weights over so many ranks and keep a copy in each further so many (hybrid "
                               "sharding, for slow links between machines); 0: over all", least=0)
    rollout_weights: str = ranks("auto", "sharded weights are gathered whole for a rollout, or layers for every token; "
                                         "auto: whole if they fit", choices=("auto", "whole", "layers"))
    export_dtype: str = saving("auto", "type of the weights in <output>/model; auto: --model's, of an adapter float32",
                               choices=("auto", "float32", "bfloat16", "float16"))
    tensorboard: str = saving("auto", "event files in <output>/tensorboard; auto: where tensorboard is installed",
                              choices=("auto", "on", "off"))

    def check(self) -> None:
        super().check()
        if (self.lora_rank or self.adapter) and self.train_vision:
            raise ValueError(f"--train_vision with {'--adapter' if self.adapter else '--lora_rank'}: an adapter "
                             "leaves all else frozen; give one of the two")


class Option(NamedTuple):
    """One setting: its field's name, type and metadata, its value, and the title under which --help lists it."""

    name: str
    type: type
    about: Mapping
    value: object
    title: str

    @property
    def flag(self) -> str:
        return self.about.get("metavar", self.name) if self.about.get("positional") else f"--{self.name}"

    @property
    def metavar(self) -> str | None:
        """What stands for the value in --help; None: its choices."""
        usual = self.about.get("path", "").upper() or KINDS[plain_type(self.type)[0]][0]
        return None if "choices" in self.about else self.about.get("metavar", usual)


def options(settings, title: str = "settings") -> Iterator[Option]:
    """Every setting: the program's own before those that it inherits, a family's members behind the family's name."""
    types = typing.get_type_hints(type(settings))
    inherited = getattr(type(settings).__base__, "__dataclass_fields__", ())
    for f in sorted(fields(settings), key=lambda f: f.name in inherited):
        value, about = getattr(settings, f.name), f.metadata
        if "family" in about:
            yield Option(f.name, str, about, value.name, FIRST)
            yield from options(value, f"{f.name} {value.name}: {value.source}".rstrip(": "))
        elif "help" in about:
            yield Option(f.name, types[f.name], about, value, FIRST if about.get("top") else about.get("group", title))


def as_dict(settings) -> dict:
    """Name → value of every setting: what settings.json holds."""
    return {option.name: option.value for option in options(settings)}


def resume_rules(settings) -> dict[str, str]:
    """Name → "free" or "never" of the settings that may, or must not, differ where a run goes on."""
    return {option.name: option.about["resume"] for option in options(settings) if "resume" in option.about}


def parse(kind: type, words: list[str] | None = None):
    """Command line → settings. Raises ValueError, in one line, for whatever does not fit."""
    words, settings = list(sys.argv[1:] if words is None else words), kind()
    families = {f.name: f.metadata["family"] for f in fields(kind) if "family" in f.metadata}
    chooser = Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name in ("config", *families):  # what decides which settings there are
        chooser.add_argument(f"--{name}")
    chosen = vars(chooser.parse_known_args(words)[0])
    path = chosen.pop("config", None)
    recipe = {} if path is None else read_recipe(path)
    chosen = recipe | chosen
    for name in (name for name in families if chosen.get(name) is not None):
        settings = replace(settings, **{name: families[name](str(chosen[name]))})
    known = {option.name: option for option in options(settings)}
    found, rest = make_parser(kind, settings).parse_known_args(words)
    if rest:
        raise ValueError(no_setting(rest[0], known))
    given = {name: recipe_value(path, name, value, known) for name, value in recipe.items()} | vars(found)
    if missing := [f"--{name}" for name, option in known.items() if option.about.get("required") and name not in given]:
        raise ValueError(f"the following arguments are required: {', '.join(missing)}")
    return with_values(settings, given)


def with_values(settings, given: dict):
    """`settings` with the given values, a family's members in their own dataclass."""
    values = {f.name: with_values(getattr(settings, f.name), given) if "family" in f.metadata else given[f.name]
              for f in fields(settings) if "family" in f.metadata or "help" in f.metadata and f.name in given}
    return replace(settings, **values)


class Parser(argparse.ArgumentParser):
    """argparse that raises its message instead of printing the usage of fifty settings over it."""

    def error(self, message: str):
        raise ValueError(message)


def make_parser(kind: type, settings) -> Parser:
    """The command line of `settings`, whose values are the defaults."""
    known = sorted(options(settings), key=lambda one: not one.about.get("required"))
    (name, count), = Counter(one.name for one in known).most_common(1)
    if count > 1:
        raise ValueError(f"there are two settings {name}: a module's own cannot have a name of the program's")
    started = getattr(sys.modules["__main__"], "__spec__", None)
    program = (started.name if started else kind.__module__).removesuffix(".__main__")
    positional = [one.metavar for one in known if one.about.get("positional")]
    words = positional + [f"{one.flag} {one.metavar}" for one in known if one.about.get("required")]
    parser = Parser(
        usage=f"python -m {program} {' '.join(words)} [--setting value …]", description=kind.__doc__, add_help=False,
        allow_abbrev=False, argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32))
    titles = dict.fromkeys([FIRST, *(one.title for one in known)])
    groups = {title: parser.add_argument_group(title) for title in titles}
    for one in known:
        add_option(groups[one.title], one, flags=bool(positional))
    groups[FIRST].add_argument("--config", metavar="FILE", help="JSON file of settings; the command line overrides it")
    groups[FIRST].add_argument("--help", "-h", action="help", help="say this")
    return parser


def add_option(group, one: Option, flags: bool) -> None:
    """One setting to argparse. flags: a bool takes no value, which beside positional words could be one of them."""
    (kind, _, many), name = plain_type(one.type), one.name if one.about.get("positional") else one.flag
    default = " ".join(map(str, one.value)) if many else "none" if one.value is None else str(one.value)
    end = " (required)" if one.about.get("required") else f" (default {default})" if default else ""
    more = {"help": (one.about["help"] + end).replace("%", "%%")}
    if flags and kind is bool:
        more["action"] = "store_true"
    else:
        more |= {"type": partial(from_word, one.type), "metavar": one.metavar, "choices": one.about.get("choices")}
        more |= {"nargs": "+"} if many else {"nargs": "?", "const": True} if kind is bool else {}
    group.add_argument(name, default=argparse.SUPPRESS, **more)


def plain_type(kind) -> tuple[type, bool, bool]:
    """(type of one value, whether it may be none, whether there are several): of int | None, list[int], int."""
    inside = typing.get_args(kind)
    plain = next((one for one in inside if one is not type(None)), kind)
    return plain, type(None) in inside, typing.get_origin(kind) is list


def from_word(kind, word: str):
    kind, optional, _ = plain_type(kind)
    if optional and word.lower() == "none":
        return None
    try:
        return TRUTH[word.lower()] if kind is bool else kind(word)
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"found {word!r}; {KINDS[kind][1]} expected") from None


def read_recipe(path: str) -> dict:
    """A JSON object of settings; a byte order mark, as some editors write it, is read over."""
    expected = "a JSON object of settings"
    try:
        return read_object(path, expected)
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}; expected {expected}") from None
    except ValueError as error:
        raise ValueError(f"--config {error}") from None


def recipe_value(path: str, name: str, value, known: dict[str, Option]):
    """A recipe's value, if it is of its setting's type."""
    if name not in known:
        raise ValueError(f"--config {path}: {no_setting(name, known)}")
    kind, optional, many = plain_type(known[name].type)
    each = [value] if not many else value if isinstance(value, list) else [None]
    whole = lambda one: kind is float and type(one) is int and abs(one) < 1e308  # for a number, so that it can be one
    if not all(type(one) is kind or whole(one) or optional and one is None for one in each):
        expected = ("a list, each of it " if many else "") + KINDS[kind][1] + (" or null" if optional else "")
        raise ValueError(f"--config {path}: {name} is {json.dumps(value)[:60]}; {expected} expected")
    return float(value) if kind is float and type(value) is int else value


def no_setting(word: str, known) -> str:
    """What to say of a name that is none: ours for another trainer's, or the nearest."""
    name = word.lstrip("-").split("=")[0].replace("-", "_").removeprefix("no_")
    close = [ours for ours, theirs in ELSEWHERE.items() if ours in known and name in theirs.split()]
    close = close or difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"no setting {' '.join(word.split())[:60]}" + (f"; did you mean {close[0]}?" if close else "")


def read_settings(kind: type, words: list[str] | None = None):
    """`parse`, and a refusal of what cannot run: bad values, files and folders that are not there, an unknown task."""
    settings = parse(kind, words)
    check_values(settings)
    getattr(settings, "check", lambda: None)()
    check_paths(settings)
    return settings


def refuse_early(kind: type, module: str) -> None:
    """Stands above a program's heavy imports: --help and what read_settings refuses then need not wait for them."""
    if module == "__main__":
        run_program(lambda: read_settings(kind), ends=False)


def check_values(settings) -> None:
    """ValueError for a number outside its field's bounds, for one that is none, and for what is not of its choices."""
    for one in options(settings):
        if "choices" in one.about:
            check_choice(one.flag, one.value, one.about["choices"])
        for bound, (holds, words) in BOUNDS.items():
            if bound in one.about and one.value is not None and not holds(one.value, one.about[bound]):
                raise ValueError(f"{one.flag} is {one.value}; it must be {words} {one.about[bound]}")
        if isinstance(one.value, float) and not math.isfinite(one.value):
            raise ValueError(f"{one.flag} is {one.value}; a finite number expected")


def check_paths(settings) -> None:
    """ValueError for what is not there; a fork's task may make of --data what it likes."""
    task, rewards = getattr(settings, "task", ""), getattr(settings, "rewards", "")
    ours = not set(task) & {".", ","} and (not task or resolve_task(task, rewards).data.__name__ == f"data.{task}")
    for one in options(settings):
        if not one.value or "path" not in one.about or one.name == "data" and not ours:
            continue
        path = Path(one.value)
        there, missing = {
            "file": (path.is_file(), "no such file"), "folder": (path.is_dir(), "no such folder"),
            "data": (path.exists(), "no such folder or file"),
            "model": (path.exists() or maybe_on_hub(one.value), "no such folder, nor a model of the hub"),
            "output": (all(place.is_dir() for place in (path, *path.parents) if place.exists()),
                       "a file; a folder expected")}[one.about["path"]]
        if not there:
            raise ValueError(f"{one.flag} {path}: {missing}")


def maybe_on_hub(model: str) -> bool:
    """Whether it can be a hub's owner/name: no path, and no folder here has the owner's name."""
    return bool(re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", model)) and not ("/" in model and Path(model).parent.is_dir())


def parse_options(text: str, name: str) -> dict[str, float]:
    """"format=1,length=0.5" → {"format": 1, "length": 0.5}."""
    options = {}
    for item in filter(str.strip, text.split(",")):
        key, _, value = item.partition("=")
        try:
            options[key.strip()] = number = json.loads(value)
        except ValueError:
            number = None
        if type(number) not in (int, float) or not math.isfinite(number):
            raise ValueError(f"--{name}: found {item.strip()!r}; expected name=number, separated by commas")
    return options
