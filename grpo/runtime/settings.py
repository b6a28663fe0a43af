"""One dataclass a program: its fields are the command line, their help texts the manual.

Unknown or ill-typed settings are refused in one line with the nearest right name. `--config FILE` reads settings
from a JSON object first; the command line overrides it.
"""

import dataclasses
import difflib
import json
import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, TypeVar

from transformers import HfArgumentParser

T = TypeVar("T")
LORA_TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"  # attention and MLP: every matrix of a layer


def setting(default, help: str, **more):
    """A dataclass field with a help text."""
    return field(default=default, metadata={"help": help, **more})


def required(help: str):
    """A field that the command line must give (dataclasses want a default once one field has one)."""
    return field(default="", metadata={"help": help + " (required)", "required": True})


@dataclass
class CommonSettings:
    """What every program that runs a model on a task asks for."""

    model: str = required("checkpoint folder or hub name: Qwen2.5-VL, Qwen3-VL or LLaVA-1.5 weights")
    data: str = required("folder of the task's dataset")
    output: str = required("folder for everything this run writes")
    task: str = setting("more", "a task here (more, jmere), a module of yours with both halves, or data_module,rewards_module")
    missing_images: str = setting("stop", "images that are not there: stop, drop the samples, or blank (a grey one)",
                                  choices=("stop", "drop", "blank"))
    max_pixels: int = setting(1280 * 28 * 28, "largest area of an image in pixels; 28 × 28 become one token "
                                                "(Qwen3-VL: 32 × 32; LLaVA-1.5 has one size and does not ask)")
    max_completion_tokens: int = setting(1024, "longest completion, end token included")
    rollout_rows: int = setting(64, "completions written at once on each process: memory, not result")
    dtype: str = setting("auto", "what is computed in; masters are float32. auto: bfloat16 on a GPU that has it",
                         choices=("auto", "float32", "bfloat16"))
    seed: int = setting(0, "of every draw: data order, curriculum, sampling noise")


@dataclass
class TrainingSettings(CommonSettings):
    """What both trainers ask for besides."""

    split: str = setting("train", "split to train on")
    valid_split: str = setting("valid", "split for validation; empty for none, then the last weights are kept")
    valid_samples: int = setting(0, "validate on this many, drawn by the seed; 0 for all")
    valid_metric: str = setting("f1", "which of the task's metrics decides the best checkpoint")
    cache_gigabytes: float = setting(4.0, "memory for encoded images that are kept between epochs, on each process")
    keep_features: bool = setting(False, "keep a frozen vision encoder's features between epochs in the pixels' place, so "
                                  "that it sees no image twice; two runs then agree to rounding, not to the bit")
    offload_reference: bool = setting(False, "keep the reference's weights in host memory between its layers' turns")
    offload_optimizer: bool = setting(False, "keep the optimizer's state in host memory between its steps")
    train_vision: bool = setting(False, "train the vision encoder and its projector too; the papers keep them frozen")
    lora_rank: int = setting(0, "train an adapter of this rank on the language model instead of its weights; 0 for "
                                "none. <output>/model has it merged, <output>/adapter holds it alone, as peft loads it")
    lora_alpha: float = setting(64.0, "the adapter's output is scaled by α / rank (JMERE-R1: rank 128, α 64)")
    lora_targets: str = setting(LORA_TARGETS, "names of the adapted matrices, separated by commas")
    lora_dropout: float = setting(0.0, "dropout on the adapter's input in the update pass alone; above 0 GRPO's ratios "
                                       "past the first pass and its KL hold the dropout's noise too")
    tokens_per_pass: int = setting(16384, "packed tokens of one forward and backward: memory, not result")
    gradient_checkpointing: bool = setting(False, "recompute activations layer by layer: less memory, more time")
    warmup: float = setting(0.05, "share of the updates in which the learning rate rises")
    schedule: str = setting("cosine", "learning rate after the warm-up", choices=("cosine", "constant"))
    weight_decay: float = setting(0.1, "AdamW's, on matrices only")
    adam_beta1: float = setting(0.9, "AdamW β₁")
    adam_beta2: float = setting(0.95, "AdamW β₂")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")
    max_bad_updates: int = setting(3, "an update whose loss or gradient is not finite is skipped; stop after so many in a row")
    checkpoint_every: int = setting(20, "updates of SFT, rollouts of GRPO, between checkpoints of the whole training state in "
                                        "<output>/checkpoints; 0: only at the end and on SIGTERM")
    checkpoints_kept: int = setting(2, "the newest so many stay; the best weights are in <output>/model besides")
    resume: str = setting("auto", "what to do with checkpoints in --output. auto: go on from the newest whole one, refuse if "
                                  "settings or data differ; changed: go on with the new settings; never: begin anew",
                          choices=("auto", "changed", "never"))
    hang_minutes: float = setting(30.0, "end, and say which process is missing, when none has made progress for so long")
    shard_size: int = setting(0, "spread the weights over so many processes and keep a copy in each further so many (hybrid "
                                 "sharding, for slow links between machines); 0: over all")
    load_in_turns: bool = setting(False, "the processes of a machine load one after the other: host memory for one set of "
                                         "float32 weights instead of one each, for as many times the time")
    rollout_weights: str = setting("auto", "of sharded weights in a rollout. whole: gathered once on every process; layers: a layer "
                                           "at a time, every token; auto: whole where it fits", choices=("auto", "whole", "layers"))
    tensorboard: str = setting("auto", "event files in <output>/tensorboard; auto: where tensorboard is installed",
                               choices=("auto", "on", "off"))

    def check(self) -> None:
        """Refuse what no training can be done with."""
        positive = ("learning_rate", "epochs", "tokens_per_pass", "max_grad_norm", "rollout_rows", "max_completion_tokens",
                    "max_bad_updates", "checkpoints_kept", "hang_minutes")
        for name in positive:
            if not getattr(self, name) > 0:  # so said, it refuses what is no number too
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be above 0")
        for name in ("valid_samples", "checkpoint_every", "shard_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be 0 or more")
        if self.lora_rank < 0 or self.lora_alpha <= 0 or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_rank is {self.lora_rank}, --lora_alpha {self.lora_alpha}, --lora_dropout "
                             f"{self.lora_dropout}; expected a rank from 0, an α above 0, a dropout from 0 to below 1")
        if self.lora_rank and self.train_vision:
            raise ValueError("--train_vision with --lora_rank: an adapter leaves all else frozen; give one of the two")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"--warmup is {self.warmup}; it is a share between 0 and 1")


class Parser(HfArgumentParser):
    """argparse that raises its message instead of printing the usage of fifty settings over it."""

    def error(self, message: str):
        raise ValueError(message)


def nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def read_config(path: str, known: list[str]) -> list[str]:
    """A recipe file's settings as command-line words."""
    try:
        recipe = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"--config {path}: {error}; expected a JSON object of settings") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"--config {path}: found a {type(recipe).__name__}; expected a JSON object of settings")
    for name in recipe:
        if name not in known:
            raise ValueError(f"--config {path}: no setting {name!r}{nearest(name, known)}")
    return [word for name, value in recipe.items() for word in (f"--{name}", str(value))]


def parse(kind: type[T], words: list[str] | None = None) -> T:
    """Command line → settings. Raises ValueError, in one line, for whatever does not fit."""
    words = list(sys.argv[1:] if words is None else words)
    known = [f.name for f in dataclasses.fields(kind)]
    parser = Parser(kind, allow_abbrev=False, description=kind.__doc__)
    if "--config" in words:
        at = words.index("--config")
        if at + 1 == len(words):
            raise ValueError("--config: expected a file name")
        words = read_config(words[at + 1], known) + words[:at] + words[at + 2 :]
    settings, rest = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if rest:
        name = rest[0].lstrip("-").split("=")[0].replace("-", "_")
        raise ValueError(f"no setting {rest[0]}{nearest(name, known)}")
    return settings


def parse_options(text: str, name: str) -> dict[str, float]:
    """"format=1,length=0.5" → {"format": 1.0, "length": 0.5}."""
    options = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = item.partition("=")
        try:
            options[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            equals = ""
        value = options.get(key.strip())
        if not equals or isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"--{name}: found {item!r}; expected name=number, separated by commas")
    return options


def lost_company(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is no more; that one's end has its own cause."""
    if type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError"):
        return True
    return any(words in str(error) for words in ("Connection closed by peer", "Connection reset by peer", "have not come in"))


def leave(status: int) -> None:
    """Under torchrun all is written and the process group is closed; taking the interpreter down around what is left of
    its communication threads aborts now and then ("terminate called without an active exception")."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_program(main: Callable[[], None]) -> None:
    """Run a program; what the user can mend ends in one line and exit status 2."""
    try:
        main()
        if "TORCHELASTIC_RUN_ID" in os.environ:
            leave(0)
    except SystemExit as end:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            leave(end.code)
        raise
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("GRPO_TRACEBACK") or isinstance(error, RuntimeError) and not lost_company(error):
            raise
        if isinstance(error, RuntimeError):
            error = f"another process of this run is no more ({str(error).splitlines()[0][:200]})"
        process = int(os.environ.get("RANK", 0))
        if process:
            # All processes usually find the same fault and the first one says it; torchrun ends the others
            # meanwhile. Whoever is still here after that has a fault of its own.
            time.sleep(10)
        print(f"error: {error}" if not process else f"error (process {process}): {error}", file=sys.stderr, flush=True)
        sys.exit(2)
