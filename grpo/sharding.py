"""Many processes: start, shard, make whole for the rollout, sum, gather. The only file that knows of FSDP.

Order of wrapping: gradient checkpointing is a flag of the layers, then every decoder layer is sharded, then the
root (embeddings, vision encoder, norm, head). One process in float32 needs none of it and gets none.
"""

import logging
import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from grpo.group import Group
from grpo.meeting import connect, meet
from grpo.memory import enough_memory
from grpo.policy import Policy
from grpo.rollout import Sampling, cache_bytes, sample
from grpo.watchdog import Watchdog, pulse


def start(hang_minutes: float = 30.0) -> torch.device:
    """Join the processes torchrun has started (alone without it) and take this one's device.

    Where no process makes progress for `hang_minutes` the run ends and says who is missing, see grpo/watchdog.py; a
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


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """"auto" is bfloat16 on a GPU that has it, else float32; masters are float32 always."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def shard(policy: Policy, dtype: torch.dtype, device: torch.device, offload: bool = False, shard_size: int = 0,
          rollout_weights: str = "auto", mesh: DeviceMesh | None = None) -> Policy:
    """Spread float32 masters over all processes; compute in `dtype`; gradients are reduced in float32.

    offload: on a GPU, the weights wait in host memory and each layer's visit the device for its turn.
    shard_size: hybrid sharding, weights spread over so many processes and the same again in the next so many, which
    exchange gradients alone: for a fast link within a machine and a slow one between machines. 0: over all.
    rollout_weights: how `sample_whole` and `see_whole` hold the weights, see `holds_whole`.
    mesh: of `mesh_of`, whose making every process must join; with one given there is no collective here.

    The weights come from host memory: a GPU sees, beside its shard, one layer at a time or the root's own.
    """
    policy.rollout_weights, policy.compute_dtype = rollout_weights, dtype
    offload = offload and device.type == "cuda"
    if world_size() == 1 and dtype == torch.float32 and not offload:
        return policy.to(device)
    options = dict(mesh=mesh or mesh_of(device, shard_size),
                   mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
    if offload:
        options["offload_policy"] = CPUOffloadPolicy()
    for layer in policy.trunk_layers:
        fully_shard(layer, **options)
    fully_shard(policy, **options)
    register_fsdp_forward_method(policy, "call_inside")
    return policy


def mesh_of(device: torch.device, shard_size: int) -> DeviceMesh:
    """All processes in a row, or rows of `shard_size`: (copies, processes that share one copy)."""
    size = shard_size or world_size()
    if world_size() % size:
        raise ValueError(f"--shard_size is {size}; expected a divisor of the {world_size()} processes")
    if size == world_size():
        return dist.init_device_mesh(device.type, (size,))
    return dist.init_device_mesh(device.type, (world_size() // size, size), mesh_dim_names=("copy", "part"))


def in_turns(load, one_by_one: bool):
    """`load()` on every process; one_by_one: on those of a machine one after the other, so that its memory holds one
    set of whole weights and not one for each."""
    place, processes = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    processes = max(gather([processes]))  # machines may have unequal numbers, and every turn is a collective
    loaded = load() if not one_by_one else None
    for turn in range(processes if one_by_one else 0):
        if turn == place:
            loaded = load()
        gather([])
        pulse()
    return loaded


def sharded_modules(policy: Policy) -> list[FSDPModule]:
    return [module for module in policy.modules() if isinstance(module, FSDPModule)]


def reshard(policy: Policy) -> None:
    """Let go of gathered weights: after a forward without backward the root would keep its own."""
    for module in sharded_modules(policy):
        module.reshard()


@contextmanager
def whole(policy: Policy):
    """Every process holds all weights inside: forwards need no collective, so each may do as many as it likes."""
    modules = sharded_modules(policy)
    for module in modules:
        module.set_reshard_after_forward(False)
        module.unshard()
    try:
        yield policy
    finally:
        reshard(policy)
        for module in modules:
            module.set_reshard_after_forward(module is not policy)  # the root's are needed again at once


def holds_whole(policy: Policy, more_bytes: int) -> bool:
    """Whether every process gathers all weights for a rollout, or layer by layer in every pass.

    Whole is faster and takes the weights' room in compute precision, `more_bytes` of caches beside them; layer by layer
    each token of a rollout gathers every layer once. "auto": whole where it fits on every process.
    """
    if policy.rollout_weights != "auto" or policy.device.type != "cuda":
        return policy.rollout_weights != "layers"
    free, _ = torch.cuda.mem_get_info(policy.device)
    free += torch.cuda.memory_reserved(policy.device) - torch.cuda.memory_allocated(policy.device)
    weights = sum(p.numel() for p in policy.parameters()) * policy.compute_dtype.itemsize
    fits = torch.tensor(float(weights + more_bytes < 0.9 * free), device=policy.device)
    return bool(total(fits, dist.ReduceOp.MIN))


def anyone(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any process."""
    return bool(total(torch.tensor(float(flag), device=device), dist.ReduceOp.MAX))


def sample_whole(policy: Policy, prompts: list, group_size: int, sampling: Sampling, on_tokens=None) -> list[Group]:
    """`sample` on sharded weights: whole, or layer by layer, where every process makes as many passes as the busiest."""
    needed = cache_bytes(policy, prompts, group_size, sampling, policy.compute_dtype.itemsize)
    with enough_memory("in a rollout", "lower --rollout_rows or --max_completion_tokens"):
        if not sharded_modules(policy) or holds_whole(policy, needed):
            with whole(policy):
                return policy.call_inside(sample, prompts, group_size, sampling, on_tokens)
        try:
            return policy.call_inside(sample, prompts, group_size, sampling, on_tokens,
                                      lambda working: anyone(working, policy.device))
        finally:
            reshard(policy)


def see_whole(policy: Policy, prompts) -> None:
    """`keep_features` on sharded weights, where pictures may be distributed unequally. The encoder is the root's own,
    and the root is whole inside `call_inside`, the layers need not be."""
    with enough_memory("in the vision encoder", "lower --max_pixels"):
        policy.call_inside(Policy.keep_features, prompts)
        reshard(policy)


def total(values: Tensor, op=dist.ReduceOp.SUM) -> Tensor:
    """Sum (or other reduction) over all processes, of a small tensor."""
    values = values.clone()
    if world_size() > 1:
        dist.all_reduce(values, op=op)
    return values


def gather(rows: list) -> list:
    """Every process's list, in the order of ranks, on every process."""
    if world_size() == 1:
        return list(rows)
    lists = [None] * world_size()
    dist.all_gather_object(lists, rows)
    return [row for part in lists for row in part]


def from_first(make):
    """What `make()` gives on the first process, on every process."""
    return gather([make()] if rank() == 0 else [])[0]


def is_first_copy(policy: Policy) -> bool:
    """Whether this process holds rows of the first of hybrid sharding's copies; without copies all do."""
    for parameter in policy.parameters():
        if isinstance(parameter, DTensor) and parameter.device_mesh.ndim == 2:
            return parameter.device_mesh.get_local_rank(0) == 0
    return rank() == 0 or bool(sharded_modules(policy))


def share(items: list) -> list:
    """This process's part: every world_size-th item."""
    return items[rank() :: world_size()]


def unshare(items: list) -> list:
    """The way back: parts in the order of ranks, as `gather` gives them → the original order."""
    parts, start = [], 0
    for r in range(world_size()):
        length = len(range(r, len(items), world_size()))
        parts.append(items[start : start + length])
        start += length
    return [parts[i % world_size()][i // world_size()] for i in range(len(items))]


def clip_gradients(policy: Policy, limit: float) -> float:
    """Norm over all processes' gradients; they are scaled down to `limit` if it is larger."""
    norm = torch.nn.utils.clip_grad_norm_([p for p in policy.parameters() if p.requires_grad], limit)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def whole_weights(policy: Policy) -> dict[str, Tensor]:
    """All weights, unsharded, on the CPU of the first process (empty elsewhere). Every process must call it."""
    return get_model_state_dict(policy.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
