"""The state of a training run on disk, so that it can be stopped at any instant and go on as if it had not been.

    <output>/checkpoints/step-00000120/
        part-00000-of-00002.safetensors    what rank 0 holds: rows of weights and of Adam's moments, random states
        part-00001-of-00002.safetensors
        state.json                         step, cursor, settings, hashes of what was read, of every part

A folder is written beside its place and renamed when every part is on disk: what stands there is whole. Only what
trains is saved; the rest is in --model. Nothing is ever unpickled. A part names the rows that it holds of each tensor,
so any number of ranks can read what any other number has written."""

import hashlib
import json
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from grpo.engine.policy import Policy
from grpo.engine.weights import local, rows_of
from grpo.runtime.dist import all_gather, broadcast_from_rank_0, rank, split_across_ranks, world_size
from grpo.runtime.files import sha256, sync, write_json
from grpo.runtime.folder import FolderWriter
from grpo.runtime.fsdp import is_first_replica
from grpo.runtime.liveness import heartbeat_during
from grpo.runtime.log import say
from grpo.runtime.provenance import FILES

FORMAT = 2


class Checkpoints:
    """The checkpoints of one run. Every rank must call every method: they agree on what they do."""

    def __init__(self, output: Path, kept: int):
        self.folder, self.kept = output / "checkpoints", kept
        self.good: Path | None = None  # the newest that is known to be whole
        self.parts: list[str] = []  # its files, in the order of the ranks that wrote them

    def save(self, policy: Policy, optimizer: torch.optim.Optimizer, step: int, state: dict,
             history: dict[str, torch.Tensor] | None = None) -> None:
        """Write the run after `step` updates; `state` is what else it needs, as JSON, `history` what all ranks hold
        alike. OSError if that fails, and then everything that was there before still is."""
        writer = FolderWriter(self.folder / f"step-{step:08}", "the checkpoint", self.last_good())
        parts = dict(writer.do(lambda: write_part(writer.new, policy, optimizer, history or {}), everywhere=True))

        def write_state():
            content = {"format": FORMAT, "step": step, "parts": parts, **state}
            write_json(writer.new / "state.json", {**content, "sha256": seal(content)})
            sync(writer.new / "state.json")

        def remove_others():
            # those beyond were passed over as damaged; beside this one they would be the future of another run
            beyond = [other for other in self.found() if other > writer.place]
            for old in [*beyond, *self.found()[len(beyond) + self.kept:]]:
                shutil.rmtree(old)

        writer.do(write_state)
        writer.end()
        writer.do(remove_others)
        self.good = writer.place

    def last_good(self) -> str:
        return f"the last good one is {self.good}" if self.good else "there is none before it"

    def found(self) -> list[Path]:
        """Checkpoints in their places, the newest first."""
        return sorted((p for p in self.folder.glob("step-*") if p.suffix == ""), reverse=True)

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
        is_whole = lambda path: path.is_file() and sha256(path) == parts[path.name]
        with heartbeat_during():
            mine = [name for name in split_across_ranks(sorted(parts)) if not is_whole(place / name)]
        faults = all_gather(mine)
        return f"{faults[0]} is missing or not what was written" if faults else ""

    def load(self, policy: Policy, optimizer: torch.optim.Optimizer, on_host: bool = False) -> dict[str, torch.Tensor]:
        """The newest good checkpoint's weights, optimizer (on_host: into host memory), random states; its history."""
        with heartbeat_during():
            read_parts([self.good / name for name in self.parts], policy, optimizer, on_host)
            first = safe_open(self.good / self.parts[0], "pt")
            return {key.partition("/")[2]: first.get_tensor(key) for key in first.keys() if key.startswith("history/")}

    def forget(self) -> None:
        """Begin anew: what an earlier run has left goes away."""
        if rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        broadcast_from_rank_0(lambda: None)


def state_tensors(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """"kind/parameter's name" → (parameter, tensor): what trains, and all that the optimizer keeps of it."""
    found = {}
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            tensors = {"weight": parameter.detach(), **optimizer.state.get(parameter, {})}
            found |= {f"{kind}/{name}": (parameter, tensor) for kind, tensor in tensors.items()}
    return found


def write_part(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, history: dict) -> tuple[str, str]:
    """This rank's rows, of hybrid sharding's copies those of the first; rank 0 the history too. (File name, hash.)"""
    path = folder / f"part-{rank():05}-of-{world_size():05}.safetensors"
    tensors, rows = {}, {}
    for key, (parameter, tensor) in state_tensors(policy, optimizer).items() if is_first_replica(policy) else ():
        if tensor.ndim:  # a number stands for itself
            rows[key] = rows_of(parameter)
        tensors[key] = local(tensor).cpu().contiguous()
    tensors |= {f"history/{name}": tensor for name, tensor in history.items() if rank() == 0}
    save_file(tensors, path, metadata={"rows": json.dumps(rows), "random": json.dumps(random_states())})
    sync(path)
    return path.name, sha256(path)


def read_parts(paths: list[Path], policy: Policy, optimizer: torch.optim.Optimizer, on_host: bool = False) -> None:
    """The rows that this rank holds, from whichever parts have them."""
    parts = [safe_open(path, "pt") for path in paths]
    holders: dict[str, list[tuple]] = {}  # "kind/parameter's name" → (rows, part) of each part that has some
    for part in parts:
        rows = json.loads(part.metadata()["rows"])
        for key in part.keys():
            holders.setdefault(key, []).append((rows.get(key), part))
    trained = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    for key, pieces in holders.items():
        kind, _, name = key.partition("/")
        if (parameter := trained.get(name)) is None:
            continue
        if pieces[0][0] is None:  # a number, Adam's count of steps
            optimizer.state[parameter][kind] = pieces[0][1].get_tensor(key).to(local(parameter).device)
            continue
        target = parameter.detach()
        if kind != "weight":
            target = torch.zeros_like(target, device="cpu" if on_host else target.device)
            optimizer.state[parameter][kind] = target
        fill(local(target), rows_of(parameter), [(rows, part.get_slice(key)) for rows, part in pieces], key)
    if world_size() == len(parts):
        set_random_states(json.loads(parts[rank()].metadata()["random"]))


def fill(target: torch.Tensor, wanted: tuple[int, int], pieces: list, key: str) -> None:
    """Rows `wanted` of a tensor into `target`, from pieces ([start, stop), lazily read rows)."""
    filled = 0
    for (start, stop), piece in pieces:
        first, last = max(start, wanted[0]), min(stop, wanted[1])
        if first < last:
            target[first - wanted[0] : last - wanted[0]].copy_(piece[first - start : last - start])
            filled += last - first
    if filled != wanted[1] - wanted[0]:
        raise ValueError(f"{key}: rows {wanted[0]} to {wanted[1]} wanted, the checkpoint has {filled} of them")


def random_states() -> dict[str, list]:
    """Of every generator that a task, a fork or dropout may draw from; our own draws have generators of their own."""
    kind, keys, *rest = np.random.get_state()
    states = {"torch": torch.get_rng_state().tolist(), "numpy": [kind, keys.tolist(), *rest],
              "python": random.getstate()}
    return states | ({"cuda": torch.cuda.get_rng_state().tolist()} if torch.cuda.is_available() else {})


def set_random_states(states: dict[str, list]) -> None:
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    np.random.set_state(tuple(states["numpy"]))
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(states["cuda"], dtype=torch.uint8))


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
            return f"{path.name} is not what was written"
        return state
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path.name}: {type(error).__name__}: {error}"


def differences(before: dict, now: dict, rules: dict[str, str]) -> dict[str, tuple]:
    """Name → (before, now) of everything in two runs' provenance that decides what is learned; see provenance.what_ran.

    `rules` says of a setting's name whether it is "free" to differ (settings.resume_rules)."""
    def deciding(ran: dict) -> dict:
        settings = {name: value for name, value in ran["settings"].items() if rules.get(name) != "free"}
        files = {name: ran["file_hashes"].get(name) for name in FILES}  # None: not given, which is a difference too
        return settings | {name: ran[name] for name in ("model_hash", "data_hash")} | files

    before, now = deciding(before), deciding(now)
    return {name: (before[name], now[name]) for name in before if name in now and before[name] != now[name]}


def refusal(changed: dict[str, tuple], place: Path, resume: str, rules: dict[str, str]) -> str:
    """Why a run must not go on from `place`, "" if it may."""
    forbidden = {name: pair for name, pair in changed.items() if name == "model_hash" or rules.get(name) == "never"}
    if not changed or resume == "changed" and not forbidden:
        return ""
    shown = ", ".join(f"{name} {old!r} → {new!r}" for name, (old, new) in (forbidden or changed).items())
    if forbidden:
        return f"{place} is of another run: {shown}; choose another --output, or --resume never to begin anew here"
    return (f"{place} was made with other settings: {shown}; --resume changed goes on with the new ones, "
            f"--resume never begins anew")
