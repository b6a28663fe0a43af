"""What both trainers do around their loops: load, freeze, shard, validate, keep the best, stop and go on."""

import json
import math
import random
import signal
import sys
from dataclasses import fields
from pathlib import Path
from typing import Callable

import torch

from data.read import read_json, read_json_lines, shown
from data.task import Task, load_samples, resolve_task, sample_hash
from grpo.engine.encode import Encoder
from grpo.engine.files import reasoning_of
from grpo.engine.lora import AdapterFile, add_adapter, begin_adapter, keep_start
from grpo.engine.policy import Policy
from grpo.engine.rollout import Sampling
from grpo.engine.speculation import Speculation
from grpo.engine.weights import Checkpoint, empty_policy, fill
from grpo.group import Pack
from grpo.runtime.answer import Prompts, answer
from grpo.runtime.checkpoints import Checkpoints, differences, refusal
from grpo.runtime.dist import all_gather, all_reduce_max, broadcast_from_rank_0, finish, rank, start
from grpo.runtime.export import export, export_adapter
from grpo.runtime.files import hold_lock, link_folder, write_json
from grpo.runtime.fsdp import compute_dtype, make_mesh, shard
from grpo.runtime.liveness import StopSignals, heartbeat, heartbeat_during
from grpo.runtime.log import say
from grpo.runtime.metrics import MetricsLog
from grpo.runtime.optim import not_finite, set_gradient_checkpointing
from grpo.runtime.provenance import check_base, fingerprint, what_ran
from grpo.runtime.settings import CommonSettings, TrainingSettings, resume_rules

BEST, LAST = ("model", "adapter"), ("last", "last_adapter")  # folders of the best and of the last weights in <output>


def read_lines(path: str, samples: list, field: str, kind: type, task: Task | None = None) -> list[tuple]:
    """(sample, value of `field`) of every line of a JSONL file of {id, field, …}. ValueError for what does not fit."""
    named, values, expected = [], [], f"a JSON object with id and {field}"
    for where, entry in read_json_lines(path, expected):
        if not isinstance(value := entry.get(field), kind):
            raise ValueError(f"{where}: found {shown(value)} for {field!r}; expected {expected}")
        named.append((where, entry.get("id"), entry.get("sample")))
        values.append(value)
    if not values:
        raise ValueError(f"{path}: empty; expected {expected} a line")
    return list(zip(find_samples(path, samples, task, named), values))


def read_ids(path: str, samples: list, task: Task | None = None) -> set[str]:
    """The sample ids of a JSON list, or of an object {id: sample hash}. ValueError names file and what does not fit."""
    expected = "a JSON list of sample ids, or an object of ids and sample hashes"
    ids = read_json(path, expected)
    if not isinstance(ids, (list, dict)):
        raise ValueError(f"{path}: found {shown(ids)}; expected {expected}")
    named = [(path, one, ids[one] if isinstance(ids, dict) else None) for one in ids]
    return {sample.id for sample in find_samples(path, samples, task, named)}


def find_samples(path: str, samples: list, task: Task | None, named: list[tuple]) -> list:
    """The samples that a file names, (where, id, sample's hash or None) each. ValueError for those of other data."""
    known, found = {sample.id: sample for sample in samples}, []
    for where, id, digest in named:
        if not isinstance(id, (str, int)) or id not in known:
            raise ValueError(f"{where}: found {shown(id)}; expected the id of a sample of the split")
        if digest is not None and digest != (expected := sample_hash(task, known[id])):
            raise ValueError(f"{where}: {id}: made from other data: its sample has the hash {digest!r:.20}, here it is "
                             f"{expected!r} (without hashes a file is taken unchecked)")
        found.append(known[id])
    unchecked = sum(digest is None for *_, digest in named)
    say(f"{path}: {len({sample.id for sample in found})} of {len(samples)} samples"
        + (f", {unchecked} of them without a hash of the data that they come from" if unchecked else ""))
    return found


def claim_folder(folder: Path) -> None:
    """One run in a folder, and all ranks see the same one: parts of one checkpoint lie in it together."""
    def claim() -> tuple[bool, str]:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return hold_lock(folder / ".lock")
        except OSError as error:
            say(f"{folder}: no lock can be held there ({error}); a second run in it would go unnoticed")
            return True, ""

    ours, holder = broadcast_from_rank_0(claim)
    if not ours:
        raise ValueError(f"{folder}: another run is at work there ({holder}); wait, or choose another --output")
    lock = folder / ".lock"  # rank 0 must not read it: closing a file gives up its own lock on it
    seen = rank() == 0 or lock.exists() and lock.read_text(encoding="utf-8").strip() == holder
    if blind := all_gather([] if seen else [rank()]):
        raise ValueError(f"{folder}: rank {blind[0]} does not see rank 0's files; expected a folder that all share")


def load_frozen(model: str, adapter: str, dtype: torch.dtype, device: torch.device, vocabulary: int | None = None,
                offload: bool = False, **sharding) -> Policy:
    """A policy that does not train, in the compute type, with an adapter from a folder, "" for none."""
    policy, file = empty_policy(model, vocabulary), AdapterFile(adapter) if adapter else None
    if file:
        check_base(adapter, model)
        add_adapter(policy, file.rank, file.alpha, file.targets)
    shard(policy.requires_grad_(False), dtype, device, offload, **sharding)
    with heartbeat_during():
        fill(policy, Checkpoint(model), device, host=offload)
        if file:
            file.fill(policy)
    return policy


def load_answering(model: str, adapter: str, dtype: str, max_pixels: int) -> tuple[Encoder, Policy]:
    """What it takes to answer a prompt on this machine's own device, in one process."""
    device, encoder = torch.device("cuda" if torch.cuda.is_available() else "cpu"), Encoder(model, max_pixels)
    return encoder, load_frozen(model, adapter, compute_dtype(dtype, device), device, encoder.vocabulary)


def take_adapter(settings: TrainingSettings) -> None:
    """Rank, α and targets are those of --adapter. ValueError for another rank, or an adapter of another model."""
    file = AdapterFile(settings.adapter)
    check_base(settings.adapter, settings.model)
    if settings.lora_rank not in (0, file.rank):
        raise ValueError(f"--lora_rank is {settings.lora_rank}; --adapter {settings.adapter} has rank {file.rank}")
    settings.lora_rank, settings.lora_alpha, settings.lora_targets = file.rank, file.alpha, file.targets


class Run:
    """One training run: its policy, its data halves, its folder, its best checkpoint so far."""

    def __init__(self, settings: TrainingSettings, reasoning: bool | None = None):
        """reasoning: what --reasoning is where it is not given; None: as the model was trained."""
        settings.check()
        self.device = start(settings.hang_minutes)
        self.signals = StopSignals()
        self.settings, self.output = settings, Path(settings.output)
        if settings.adapter:
            take_adapter(settings)
        self.task: Task = resolve_task(settings.task, settings.rewards)
        reasoning = reasoning if settings.reasoning is None else settings.reasoning
        settings.reasoning = reasoning_of(settings.adapter or settings.model, reasoning)
        self.encoder = Encoder(settings.model, settings.max_pixels)
        self.valid = self.load_valid()
        self.check_metric()
        self.checkpoints = Checkpoints(self.output, settings.checkpoints_kept)
        self.ran = broadcast_from_rank_0(lambda: what_ran(settings))
        self.saved = self.find_checkpoint()
        self.dtype = compute_dtype(settings.dtype, self.device)
        self.mesh = make_mesh(self.device, settings.shard_size)
        self.policy = self.load_policy()
        self.prompts = Prompts(self.encoder, self.task, settings.reasoning, settings.cache_gigabytes * 2**30,
                               settings.keep_features)
        kinds = ("rollout", "validate") if settings.speculate == "auto" else ()
        self.speculation = {name: Speculation() for name in kinds}  # what each answered before, to guess from
        self.step = self.saved.get("step", 0)  # updates, or rollouts, that are behind it
        self.metrics_log = MetricsLog(settings.output, events=settings.tensorboard, lines=self.saved.get("lines", 0),
                                      step=self.step)
        if rank() == 0:
            write_json(self.output / "settings.json", self.ran | ({"resumed_after": self.step} if self.step else {}))
        best = self.saved.get("best")
        self.best, self.best_step = (-math.inf, 0) if best is None else (best, self.saved["best_step"])
        self.bad_updates, self.bad_in_a_row = self.saved.get("bad_updates", 0), 0

    def load_policy(self) -> Policy:
        """What trains is decided on shapes; then every rank reads its own rows."""
        settings, policy = self.settings, empty_policy(self.settings.model, self.encoder.vocabulary)
        if settings.train_vision and not self.encoder.sees:
            raise ValueError(f"--train_vision: {settings.model} reads text alone, it has no vision encoder")
        if not settings.train_vision:
            policy.freeze_vision()
        if settings.lora_rank:
            self.add_adapter(policy)
        set_gradient_checkpointing(policy, settings.gradient_checkpointing)
        shard(policy, self.dtype, self.device, rollout_weights=settings.rollout_weights, mesh=self.mesh)
        with heartbeat_during():
            fill(policy, Checkpoint(settings.model), self.device)
        if settings.adapter:
            AdapterFile(settings.adapter).fill(policy)
            keep_start(policy)
        elif settings.lora_rank:
            begin_adapter(policy, settings.seed)
        return policy

    def find_checkpoint(self) -> dict:
        """The state from which this run goes on, {} where it begins. ValueError if it is another run's."""
        claim_folder(self.output)
        if self.settings.resume == "never":
            self.checkpoints.forget()
            return {}
        saved = self.checkpoints.newest()
        if saved is None:
            return {}
        rules = resume_rules(self.settings)
        changed = differences(saved["ran"], self.ran, rules)
        if fault := refusal(changed, self.checkpoints.good, self.settings.resume, rules):
            raise ValueError(fault)
        say(f"{self.checkpoints.good}: going on after step {saved['step']}"
            + "".join(f"; {name} {old!r} → {new!r}" for name, (old, new) in changed.items()))
        if set(changed) & {"task", "valid_metric", "valid_split", "valid_samples", "data_hash"}:
            saved["best"] = None  # it was the best by another measure
        return saved

    def restore(self, optimizer) -> dict:
        """Weights, optimizer and random states as they were, where this run goes on; the trainer's own progress."""
        if not self.saved:
            return {}
        history = self.checkpoints.load(self.policy, optimizer, on_host=self.settings.offload_optimizer)
        for name, speculation in self.speculation.items():
            if f"{name}/tokens" in history:  # a run without speculation has none
                speculation.restore({part: history[f"{name}/{part}"] for part in ("tokens", "index")})
        return self.saved["progress"]

    def checkpoint(self, optimizer, step: int, progress: Callable[[], dict], last: bool = False) -> None:
        """The state after `step`, every so often, at the end, and on SIGTERM or Ctrl-C, which then end the run here."""
        heartbeat("checkpoint")
        self.step, every = step, self.settings.checkpoint_every
        stopping = int(all_reduce_max(torch.tensor(float(self.signals.number), device=self.device)))
        if stopping or last or every and step % every == 0:
            state = {"ran": self.ran, "best": self.best if math.isfinite(self.best) else None,
                     "best_step": self.best_step, "lines": self.metrics_log.lines, "bad_updates": self.bad_updates,
                     "progress": progress()}
            history = {f"{name}/{part}": tensor for name, one in self.speculation.items()
                       for part, tensor in one.state().items()}
            self.checkpoints.save(self.policy, optimizer, step, state, history)
        if stopping and not last:
            say(f"stopped after step {step} by {signal.Signals(stopping).name}; the same command goes on from "
                f"{self.checkpoints.good}")
            finish()
            sys.exit(128 + stopping)

    def judge(self, norms: list[float], packs: list[Pack]) -> dict:
        """Count the updates that were skipped, loss or gradient not finite; name the samples; end a run of them."""
        for norm in norms:
            self.bad_in_a_row = 0 if math.isfinite(norm) else self.bad_in_a_row + 1
            self.bad_updates += not math.isfinite(norm)
        if self.bad_in_a_row:
            ids = all_gather([id for pack in packs for id in not_finite(pack)])
            more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
            at = f"its loss is not finite at {', '.join(ids[:5])}{more}" if ids else "its gradient is not finite"
            say(f"update skipped: {at} ({self.bad_in_a_row} in a row)")
        if self.bad_in_a_row >= self.settings.max_bad_updates:
            raise ValueError(f"{self.bad_in_a_row} updates in a row had a loss or gradient that is not finite "
                             f"(--max_bad_updates; the last: {at}); {self.checkpoints.last_good()}; lower "
                             "--learning_rate or check the rewards")
        return {"bad_updates": self.bad_updates} if self.bad_updates else {}

    def load(self, split: str) -> list:
        return load_samples(self.task, self.settings, split, self.encoder.seen_size)

    def load_valid(self) -> list:
        samples = self.load(self.settings.valid_split) if self.settings.valid_split else []
        most = min(self.settings.valid_samples or len(samples), len(samples))
        return samples if most == len(samples) else random.Random(self.settings.seed).sample(samples, most)

    def check_metric(self) -> None:
        if not self.valid:
            return
        known = self.task.rewards.metrics([""] * len(self.valid), self.valid)
        self.settings.valid_metric = self.settings.valid_metric or next(iter(known))
        if self.settings.valid_metric not in known:
            raise ValueError(f"--valid_metric {self.settings.valid_metric}: the task offers {', '.join(known)}")

    def add_adapter(self, policy: Policy) -> None:
        s = self.settings
        add_adapter(policy, s.lora_rank, s.lora_alpha, s.lora_targets, s.lora_dropout, s.seed)
        trained, frozen = ([p.numel() for p in policy.parameters() if p.requires_grad == on] for on in (True, False))
        say(f"an adapter of rank {s.lora_rank} on {len(trained) // 2} matrices: {sum(trained):,} numbers train, "
            f"{sum(frozen):,} are frozen")

    def reference(self, model: str) -> Policy:
        """What the run began with: the policy itself, whose adapter is off for it, or a frozen copy, sharded alike."""
        if self.settings.lora_rank:
            return self.policy
        return load_frozen(model, "", self.dtype, self.device, self.encoder.vocabulary, self.settings.offload_reference,
                           mesh=self.mesh)

    def validate(self, step: int) -> dict:
        """Greedy metrics on the validation samples; a new best is exported to <output>/model."""
        if not self.valid:
            return {}
        heartbeat("validate")
        sampling = Sampling(self.settings.max_completion_tokens, self.encoder.end_tokens, temperature=0.0,
                            rows=self.settings.rollout_rows, read_every=self.settings.read_every)
        if metrics := {} if step else broadcast_from_rank_0(self.validated_before):
            say(f"validation: as it was when {self.settings.model} was made")
        else:
            texts = answer(self.policy, self.prompts, self.valid, sampling, what="validate",
                           speculation=self.speculation.get("validate"))
            metrics = self.task.rewards.metrics([text for text, in texts], self.valid)
        found = metrics[self.settings.valid_metric]
        if not math.isfinite(found):
            raise ValueError(f"--valid_metric {self.settings.valid_metric} is {found} after step {step}; a finite "
                             "number expected")
        better = found >= self.best  # of equals the newer: its loss may still have fallen
        if better:
            self.best, self.best_step = found, step
            self.save()
            if rank() == 0:
                write_json(self.output / "best.json", {"step": step, "valid": metrics, **self.of_export()})
        say(f"step {step}: validation " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            + ("  (best so far, kept)" if better else ""))
        return {f"valid/{name}": value for name, value in metrics.items()}

    @property
    def validated(self) -> dict:
        """What decides a validation's numbers: weights, samples, prompts, reward."""
        free = {name for name, rule in resume_rules(self.settings).items() if rule == "free"}
        names = {f.name for f in fields(CommonSettings)} - free | {"valid_split", "valid_samples"}
        return {**{name: getattr(self.settings, name) for name in sorted(names)}, "dtype": str(self.dtype),
                **{name: self.ran[name] for name in ("data_hash", "model_hash", "commit")}}

    def of_export(self) -> dict:
        """The same of the weights just exported, where they are no others than those that were validated."""
        kinds = {lazy.get_dtype() for lazy in Checkpoint(str(self.output / BEST[0])).slices.values()}
        exact = kinds <= {"F32", "BF16" if self.dtype == torch.bfloat16 else "F32"} and not self.settings.lora_rank
        return {"of": {**self.validated, "model_hash": fingerprint(self.output / BEST[0])}} if exact else {}

    def validated_before(self) -> dict:
        """The metrics of these very weights, where the run that made them has left them beside --model; else {}."""
        try:
            best = json.loads((Path(self.settings.model).parent / "best.json").read_text(encoding="utf-8"))
            same = best["of"] == self.validated and self.settings.valid_metric in best["valid"]
            return {name: float(value) for name, value in best["valid"].items()} if same else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def save(self, names: tuple[str, str] = BEST) -> None:
        """<output>/model: a checkpoint that stock transformers loads; with --lora_rank <output>/adapter beside it."""
        settings, training = self.settings, {"reasoning": self.settings.reasoning}
        with heartbeat_during():
            if settings.lora_rank:
                base = {"model": settings.model, "model_hash": self.ran["model_hash"]}
                export_adapter(self.policy, settings.lora_targets, training | base, self.output / names[1])
            export(self.policy, settings.model, self.output / names[0], settings.export_dtype, training)

    def close(self) -> None:
        """The last weights in <output>/last, and the line that says which step's stand in <output>/model."""
        if not self.valid:
            self.save()
            self.best_step = self.step
        if self.best_step != self.step:
            self.save(LAST)
        elif rank() == 0:
            for best, last in list(zip(BEST, LAST))[: 2 if self.settings.lora_rank else 1]:
                link_folder(self.output / best, self.output / last)
        which = f"step {self.best_step} of {self.step}"
        which += f", best {self.settings.valid_metric} {self.best:.4f}" if self.valid else ""
        which += "" if self.best_step else ": the model that it began with"
        say(f"wrote {self.output / 'model'} ({which}), {self.output / 'last'} (step {self.step}) and "
            f"{self.metrics_log.path}")
