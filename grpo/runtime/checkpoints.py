"""The state of a training run on disk, so that it can be stopped at any instant and go on as if it had not been.

    <output>/checkpoints/step-00000120/
        part-00000-of-00002.safetensors    what rank 0 holds: rows of weights and of Adam's moments, random states
        part-00001-of-00002.safetensors
        state.json                         step, cursor, settings, hashes of what was read, of every part

A folder is written beside its place and renamed when every part is on disk: what stands there is whole. Only what
trains is saved; the rest is in --model. Nothing is ever unpickled. A part names the rows that it holds of each tensor,
so any number of ranks can read what any other number has written.
"""

import hashlib
import json
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from grpo.engine.files import replace_folder
from grpo.engine.policy import Policy
from grpo.engine.weights import local, rows_of
from grpo.runtime.dist import all_gather, broadcast_from_rank_0, rank, world_size
from grpo.runtime.files import sync, write_json
from grpo.runtime.fsdp import is_first_replica
from grpo.runtime.liveness import heartbeat_during
from grpo.runtime.log import say
from grpo.runtime.provenance import FILES

FORMAT = 1


class Checkpoints:
    """The checkpoints of one run. Every rank must call every method: they agree on what they do."""

    def __init__(self, output: Path, kept: int):
        self.folder, self.kept = output / "checkpoints", kept
        self.good: Path | None = None  # the newest that is known to be whole
        self.parts: list[str] = []  # its files, in the order of the ranks that wrote them

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────

    def save(self, policy: Policy, optimizer: torch.optim.Optimizer, step: int, state: dict,
             history: dict[str, Tensor] | None = None) -> None:
        """Write the run after `step` updates; `state` is what else it needs, as JSON, `history` what all ranks hold
        alike. OSError if that fails, and then everything that was there before still is."""
        place = self.folder / f"step-{step:08}"
        new = place.with_name(place.name + ".new")

        def begin():
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)

        def end():
            parts = {name: {"bytes": size, "sha256": digest} for name, size, digest in written}
            content = {"format": FORMAT, "step": step, "parts": parts, **state}
            write_json(new / "state.json", {**content, "sha256": seal(content)})
            sync(new / "state.json")
            replace_folder(new, place)
            sync(self.folder)
            # those beyond were passed over as damaged; beside this one they would be the future of another run
            beyond = [other for other in self.found() if other > place]
            for old in [*beyond, *self.found()[len(beyond) + self.kept:]]:
                shutil.rmtree(old)

        self.attempt(new, begin if rank() == 0 else lambda: None)
        written = self.attempt(new, lambda: write_part(new, policy, optimizer, history or {}))
        self.attempt(new, end if rank() == 0 else lambda: None)
        self.good = place

    def attempt(self, new: Path, action) -> list:
        """Do it on every rank; where it failed on any, all raise and nothing half-written stays."""
        try:
            with heartbeat_during():
                outcome = [(None, action())]
        except (OSError, SafetensorError) as error:
            outcome = [(f"rank {rank()}: {error}", None)]
        outcomes = all_gather(outcome)
        faults = [fault for fault, _ in outcomes if fault]
        if faults:
            if rank() == 0:
                shutil.rmtree(new, ignore_errors=True)
            place = new.with_suffix("")
            raise OSError(f"{place}: the checkpoint cannot be written ({faults[0]}); {self.last_good()}")
        return [value for _, value in outcomes]

    def last_good(self) -> str:
        return f"the last good one is {self.good}" if self.good else "there is none before it"

    def found(self) -> list[Path]:
        """Checkpoints in their places, the newest first."""
        return sorted((p for p in self.folder.glob("step-*") if p.suffix == ""), reverse=True)

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────

    def newest(self) -> dict | None:
        """The state of the newest checkpoint whose parts are all as they were written; damaged ones are named."""
        if rank() == 0:
            for left in [*self.folder.glob("*.new"), *self.folder.glob("*.old")]:  # of a run that was killed
                shutil.rmtree(left)
        for place in broadcast_from_rank_0(self.found):
            state = broadcast_from_rank_0(lambda: read_state(place))
            fault = state if isinstance(state, str) else self.damage(place, state["parts"])
            if not fault:
                self.good, self.parts = place, sorted(state["parts"])
                return state
            say(f"{place}: damaged, passed over: {fault}")
        return None

    def damage(self, place: Path, parts: dict) -> str:
        """What is wrong with the parts, "" if nothing; each rank reads its share of them."""
        with heartbeat_during():
            mine = [fault for name in sorted(parts)[rank() :: world_size()]
                if (fault := part_fault(place / name, parts[name]))]
        faults = all_gather(mine)
        return faults[0] if faults else ""

    def load(self, policy: Policy, optimizer: torch.optim.Optimizer, on_host: bool = False) -> dict[str, Tensor]:
        """Weights, optimizer and random states of the newest good checkpoint into this run. on_host: the optimizer's
        state into host memory. Returns the run's history."""
        with heartbeat_during():
            read_parts([self.good / name for name in self.parts], policy, optimizer, on_host)
            first = safe_open(self.good / self.parts[0], "pt")
            return {key.partition("/")[2]: first.get_tensor(key) for key in first.keys() if key.startswith("history/")}

    def forget(self) -> None:
        """Begin anew: what an earlier run has left goes away."""
        if rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        broadcast_from_rank_0(lambda: None)


# ── one rank's part ───────────────────────────────────────────────────────────────────────────────────────────


def state_tensors(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, tuple[Tensor, Tensor]]:
    """"kind/parameter's name" → (parameter, tensor) for every weight that trains and all that the optimizer keeps
    of it."""
    found = {}
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            found[f"weight/{name}"] = parameter, parameter.detach()
            for kind, tensor in optimizer.state.get(parameter, {}).items():
                found[f"{kind}/{name}"] = parameter, tensor
    return found


def write_part(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, history: dict[str, Tensor]) -> tuple[str,
        int, str]:
    """This rank's rows; (file name, bytes, sha256). Of hybrid sharding's copies the first one writes the rows, and
    rank 0 the history."""
    path = folder / f"part-{rank():05}-of-{world_size():05}.safetensors"
    tensors, rows = {}, {}
    for key, (parameter, tensor) in state_tensors(policy, optimizer).items() if is_first_replica(policy) else ():
        if tensor.ndim:  # a number stands for itself
            rows[key] = rows_of(parameter)
        tensors[key] = local(tensor).cpu().contiguous()
    tensors |= {f"random/{name}": state for name, state in random_states().items()}
    tensors |= {f"history/{name}": tensor for name, tensor in history.items() if rank() == 0}
    save_file(tensors, path, metadata={"rows": json.dumps(rows)})
    sync(path)
    return path.name, path.stat().st_size, sha256(path)


def read_parts(paths: list[Path], policy: Policy, optimizer: torch.optim.Optimizer, on_host: bool = False) -> None:
    """The rows that this rank holds, from whichever parts have them."""
    parts = [safe_open(path, "pt") for path in paths]
    rows = [json.loads(part.metadata()["rows"]) for part in parts]
    holders_of: dict[str, dict[str, list[int]]] = {}  # parameter → kind → the parts that have rows of it
    for i, part in enumerate(parts):
        for key in part.keys():
            kind, _, name = key.partition("/")
            holders_of.setdefault(name, {}).setdefault(kind, []).append(i)
    for name, parameter in policy.named_parameters():
        if not parameter.requires_grad:
            continue
        for kind, holders in holders_of.get(name, {}).items():
            key = f"{kind}/{name}"
            if key not in rows[holders[0]]:  # a number, Adam's count of steps
                optimizer.state[parameter][kind] = parts[holders[0]].get_tensor(key).to(local(parameter).device)
                continue
            target = parameter.detach() if kind == "weight" else torch.zeros_like(parameter, device="cpu" if on_host
                else parameter.device)
            fill(local(target), rows_of(parameter), [(rows[i][key], parts[i].get_slice(key)) for i in holders], key)
            if kind != "weight":
                optimizer.state[parameter][kind] = target
    if world_size() == len(parts):
        set_random_states({key.partition("/")[2]: parts[rank()].get_tensor(key)
                           for key in parts[rank()].keys() if key.startswith("random/")})


def fill(target: Tensor, wanted: tuple[int, int], pieces: list, key: str) -> None:
    """Rows `wanted` of a tensor into `target`, from pieces ([start, stop), lazily read rows)."""
    filled = 0
    for (start, stop), piece in pieces:
        first, last = max(start, wanted[0]), min(stop, wanted[1])
        if first < last:
            target[first - wanted[0] : last - wanted[0]].copy_(piece[first - start : last - start])
            filled += last - first
    if filled != wanted[1] - wanted[0]:
        raise ValueError(f"{key}: rows {wanted[0]} to {wanted[1]} wanted, the checkpoint has {filled} of them")


def random_states() -> dict[str, Tensor]:
    """Of every generator that a task, a fork or dropout may draw from; our own draws have generators of their own."""
    kind, keys, *rest = np.random.get_state()
    _, words, gauss = random.getstate()
    states = {"torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(keys.astype(np.int64)), "numpy_rest": torch.tensor(rest, dtype=torch.float64),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64)}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["torch"])
    place, has_gauss, cached = states["numpy_rest"].tolist()
    np.random.set_state(("MT19937", states["numpy"].numpy().astype(np.uint32), int(place), int(has_gauss), cached))
    gauss = states["python_gauss"].item()
    random.setstate((3, tuple(states["python"].tolist()), None if gauss != gauss else gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


# ── is it whole, and is it ours ──────────────────────────────────────────────────────────────────────────────────


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(content: dict) -> str:
    """sha256 of a state, so that what has changed since is noticed."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_state(place: Path) -> dict | str:
    """state.json, or what is wrong with it."""
    path = place / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if state["format"] != FORMAT or not isinstance(state["parts"], dict) or not state["parts"]:
            return f"{path.name} is of format {state['format']}, {FORMAT} expected"
        if state.pop("sha256") != seal(state):
            return f"the contents of {path.name} are not what was written"
        return state
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path.name}: {type(error).__name__}: {error}"


def part_fault(path: Path, expected: dict) -> str:
    if not path.is_file():
        return f"{path.name} is missing"
    if (size := path.stat().st_size) != expected["bytes"]:
        return f"{path.name} has {size} bytes, {expected['bytes']} expected"
    return "" if sha256(path) == expected["sha256"] else f"the contents of {path.name} are not what was written"


def differences(before: dict, now: dict, rules: dict[str, str]) -> dict[str, tuple]:
    """Name → (before, now) of everything in two runs' provenance that decides what is learned; see provenance.what_ran.

    `rules` says of a setting's name whether it is "free" to differ (settings.resume_rules).
    """
    def deciding(ran: dict) -> dict:
        settings = {name: value for name, value in ran["settings"].items() if rules.get(name) != "free"}
        files = {name: ran["file_hashes"].get(name) for name in FILES}  # None: not given, which is a difference too
        return settings | {name: ran[name] for name in ("model_hash", "data_hash")} | files

    before, now = deciding(before), deciding(now)
    return {name: (before[name], now[name]) for name in before if name in now and before[name] != now[name]}


def refusal(changed: dict[str, tuple], place: Path, resume: str, rules: dict[str, str]) -> str:
    """Why a run must not go on from `place`, "" if it may. Another model, or a setting that "never" may differ, is
    another run."""
    forbidden = {name: pair for name, pair in changed.items() if name == "model_hash" or rules.get(name) == "never"}
    if not changed or resume == "changed" and not forbidden:
        return ""
    shown = ", ".join(f"{name} {old!r} → {new!r}" for name, (old, new) in (forbidden or changed).items())
    if forbidden:
        return f"{place} is of another run: {shown}; choose another --output, or --resume never to begin anew here"
    return (f"{place} was made with other settings: {shown}; --resume changed goes on with the new ones, "
            f"--resume never begins anew")
