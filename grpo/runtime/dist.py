"""The ranks of a run: start, sum, gather, split. Imports no engine; one rank alone needs no torchrun."""

import logging
import os
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from grpo.runtime.liveness import Watchdog, joined_collective, stop_watching
from grpo.runtime.rendezvous import connect, rendezvous


def start(hang_minutes: float = 30.0) -> torch.device:
    """Join the ranks that torchrun has started (one alone without it) and take this one's device. Where no rank makes
    progress for `hang_minutes` liveness.py ends the run and says who is missing."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda" and local >= torch.cuda.device_count():
        raise ValueError(f"rank {local} of this machine has no GPU of its own: there are {torch.cuda.device_count()}; "
                         "expected at most as many ranks (--nproc-per-node)")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        mine, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        store, restart = rendezvous(mine, world, hang_minutes) if "RANK" in os.environ else (dist.HashStore(), "")
        timeout = timedelta(minutes=2 * hang_minutes)
        dist.init_process_group(backend, store=store, rank=mine, world_size=world, timeout=timeout)
        Watchdog(connect(timedelta(minutes=hang_minutes)) if world > 1 else store, restart, mine, world, hang_minutes)
    if rank():
        logging.disable(logging.WARNING)  # every rank finds the same; rank 0 says it
    return device


def finish() -> None:
    stop_watching()
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def any_rank(flag: bool, device: torch.device) -> bool:
    return bool(all_reduce_max(torch.tensor(float(flag), device=device)))


def all_reduce(values: torch.Tensor, op) -> torch.Tensor:
    values = values.clone()
    if world_size() > 1:
        joined_collective()
        dist.all_reduce(values, op=op)
    return values


all_reduce_sum, all_reduce_max = partial(all_reduce, op=dist.ReduceOp.SUM), partial(all_reduce, op=dist.ReduceOp.MAX)


def all_gather(rows: list) -> list:
    """Every rank's list, in the order of ranks, on every rank."""
    if world_size() == 1:
        return list(rows)
    lists = [None] * world_size()
    joined_collective()
    dist.all_gather_object(lists, rows)
    return [row for part in lists for row in part]


def broadcast_from_rank_0(make):
    """What `make()` gives on rank 0, on every rank."""
    return all_gather([make()] if rank() == 0 else [])[0]


def split_across_ranks(items: list) -> list:
    """This rank's part: every world_size-th item."""
    return items[rank() :: world_size()]


def merge_from_ranks(items: list) -> list:
    """The way back: parts in the order of ranks, as `all_gather` gives them → the original order."""
    places = [place for r in range(world_size()) for place in range(r, len(items), world_size())]
    return [item for _, item in sorted(zip(places, items), key=lambda pair: pair[0])]
