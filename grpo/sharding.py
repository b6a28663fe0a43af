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
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from grpo.group import Group
from grpo.memory import enough_memory
from grpo.policy import Policy
from grpo.rollout import sample


def start() -> torch.device:
    """Join the processes torchrun has started (alone without it) and take this one's device."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda" and local >= torch.cuda.device_count():
        raise ValueError(f"process {local} of this machine has no GPU of its own: there are {torch.cuda.device_count()}; "
                         f"expected at most as many processes (--nproc-per-node)")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        where = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(backend, timeout=timedelta(minutes=30), **where)
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


def shard(policy: Policy, dtype: torch.dtype, device: torch.device, offload: bool = False) -> Policy:
    """Spread float32 masters over all processes; compute in `dtype`; gradients are reduced in float32.

    offload: on a GPU, the weights wait in host memory and each layer's visit the device for its turn.
    """
    offload = offload and device.type == "cuda"
    if not offload:
        policy.to(device)
    if world_size() == 1 and dtype == torch.float32 and not offload:
        return policy
    mesh = dist.init_device_mesh(device.type, (world_size(),))
    options = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
    if offload:
        options["offload_policy"] = CPUOffloadPolicy()
    for layer in policy.trunk_layers:
        fully_shard(layer, **options)
    fully_shard(policy, **options)
    register_fsdp_forward_method(policy, "call_inside")
    return policy


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


def sample_whole(policy: Policy, *arguments, **keywords) -> list[Group]:
    """`sample` on sharded weights."""
    with enough_memory("in a rollout", "lower --rollout_rows or --max_completion_tokens"), whole(policy):
        return policy.call_inside(sample, *arguments, **keywords)


def see_whole(policy: Policy, prompts) -> None:
    """`keep_features` on sharded weights, where pictures may be distributed unequally."""
    with enough_memory("in the vision encoder", "lower --max_pixels"), whole(policy):
        policy.call_inside(Policy.keep_features, prompts)


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
