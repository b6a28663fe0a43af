"""The ranks of a run: start, sum, gather, split. Imports no engine; one process alone needs no torchrun."""

import logging
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from grpo.runtime.liveness import Watchdog, heartbeat
from grpo.runtime.rendezvous import connect, meet


def start(hang_minutes: float = 30.0) -> torch.device:
    """Join the processes torchrun has started (alone without it) and take this one's device.

    Where no process makes progress for `hang_minutes` the run ends and says who is missing, see grpo/runtime/liveness.py; a
    collective would wait twice as long.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda" and local >= torch.cuda.device_count():
        raise ValueError(f"process {local} of this machine has no GPU of its own: there are {torch.cuda.device_count()}; "
                         f"expected at most as many processes (--nproc-per-node)")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        mine, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        store, life = meet(mine, world, hang_minutes) if "RANK" in os.environ else (dist.HashStore(), "")
        dist.init_process_group(backend, store=store, rank=mine, world_size=world, timeout=timedelta(minutes=2 * hang_minutes))
        if world > 1:
            Watchdog(connect(timedelta(minutes=hang_minutes)), life, mine, world, hang_minutes)
    if rank():
        logging.disable(logging.WARNING)  # every process finds the same; the first one says it
    return device


def finish() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def one_rank_at_a_time(load, one_by_one: bool):
    """`load()` on every process; one_by_one: on those of a machine one after the other, so that its memory holds one
    set of whole weights and not one for each."""
    place, processes = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    processes = max(all_gather([processes]))  # machines may have unequal numbers, and every turn is a collective
    loaded = load() if not one_by_one else None
    for turn in range(processes if one_by_one else 0):
        if turn == place:
            loaded = load()
        all_gather([])
        heartbeat()
    return loaded


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any process."""
    return bool(all_reduce_max(torch.tensor(float(flag), device=device)))


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum of a small tensor over all ranks."""
    return _all_reduce(values, dist.ReduceOp.SUM)


def all_reduce_max(values: Tensor) -> Tensor:
    """Maximum of a small tensor over all ranks."""
    return _all_reduce(values, dist.ReduceOp.MAX)


def _all_reduce(values: Tensor, op) -> Tensor:
    values = values.clone()
    if world_size() > 1:
        dist.all_reduce(values, op=op)
    return values


def all_gather(rows: list) -> list:
    """Every process's list, in the order of ranks, on every process."""
    if world_size() == 1:
        return list(rows)
    lists = [None] * world_size()
    dist.all_gather_object(lists, rows)
    return [row for part in lists for row in part]


def broadcast_from_rank_0(make):
    """What `make()` gives on the first process, on every process."""
    return all_gather([make()] if rank() == 0 else [])[0]


def split_across_ranks(items: list) -> list:
    """This process's part: every world_size-th item."""
    return items[rank() :: world_size()]


def merge_from_ranks(items: list) -> list:
    """The way back: parts in the order of ranks, as `gather` gives them → the original order."""
    parts, start = [], 0
    for r in range(world_size()):
        length = len(range(r, len(items), world_size()))
        parts.append(items[start : start + length])
        start += length
    return [parts[i % world_size()][i // world_size()] for i in range(len(items))]
