"""Shard the weights over the ranks, and gather them for the rollout. The only file that knows of FSDP.

Order of wrapping: gradient checkpointing is a flag of the layers, then every decoder layer is sharded, then the
root (embeddings, vision encoder, norm, head). One rank in float32 needs none of it and gets none."""

from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from grpo.engine.policy import Policy
from grpo.engine.decode import cache_bytes
from grpo.engine.rollout import Sampling, sample
from grpo.engine.speculation import Speculation
from grpo.group import Group
from grpo.runtime.dist import any_rank, rank, world_size
from grpo.runtime.memory import enough_memory


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """"auto" is bfloat16 on a GPU that computes in it natively, else float32; masters are float32 always."""
    if name == "float16":
        raise ValueError("--dtype float16: gradients of 1e-8 are zero in it, and this trainer does not scale losses; "
                         "bfloat16 has float32's range, float32 runs everywhere")
    if name == "auto":  # before Ampere bfloat16 is emulated, slower than float32
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def shard(policy: Policy, dtype: torch.dtype, device: torch.device, offload: bool = False, shard_size: int = 0,
          rollout_weights: str = "auto", mesh: DeviceMesh | None = None) -> Policy:
    """Split float32 masters over all ranks; compute in `dtype`; gradients are reduced in float32.

    What is frozen is kept in `dtype`: a float32 copy would be cast to the same numbers in every layer. On one rank it
    is left as it is, whole, and FSDP only casts what trains. Weights on the meta device stay there, see weights.fill.
    offload: on a GPU, the weights wait in host memory and each layer's visit the device for its turn.
    shard_size: hybrid sharding, weights split over so many ranks and the same again in the next so many, which
    exchange gradients alone: for a fast link within a machine and a slow one between machines. 0: over all.
    rollout_weights: how `sample_unsharded` holds the weights, see `unsharded_fits`.
    mesh: of `make_mesh`, whose making every rank must join; with one given there is no collective here."""
    policy.rollout_weights, policy.compute_dtype = rollout_weights, dtype
    offload, parameters = offload and device.type == "cuda", set(policy.parameters())
    frozen = {parameter for parameter in parameters if not parameter.requires_grad}
    for parameter in frozen:
        parameter.data = parameter.data.to(dtype)
    if world_size() == 1 and not offload:
        if not policy.device.type == "meta":
            policy.to(device)
        if dtype == torch.float32 or frozen == parameters:
            return policy
    options = dict(mesh=mesh or make_mesh(device, shard_size),
                   mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32,
                       cast_forward_inputs=False))  # a cast would copy each Prompt, and its features be kept on a copy
    if offload:
        options["offload_policy"] = CPUOffloadPolicy()
    elif world_size() == 1:
        options["ignored_params"] = frozen
    for layer in policy.trunk_layers:
        fully_shard(layer, **options)
    fully_shard(policy, **options)
    register_fsdp_forward_method(policy, "call_inside")
    return policy


def make_mesh(device: torch.device, shard_size: int) -> DeviceMesh:
    """All ranks in a row, or rows of `shard_size`: (copies, ranks that share one copy)."""
    size = shard_size or world_size()
    if world_size() % size:
        raise ValueError(f"--shard_size is {size}; expected a divisor of the {world_size()} ranks")
    if size == world_size():
        return dist.init_device_mesh(device.type, (size,))
    return dist.init_device_mesh(device.type, (world_size() // size, size), mesh_dim_names=("copy", "part"))


def sharded_modules(policy: Policy) -> list[FSDPModule]:
    return [module for module in policy.modules() if isinstance(module, FSDPModule)]


def reshard(policy: Policy) -> None:
    """Let go of gathered weights: after a forward without backward the root would keep its own."""
    for module in sharded_modules(policy):
        module.reshard()


@contextmanager
def unsharded(policy: Policy, whole: bool = True):
    """Every rank holds all weights inside, if `whole`: forwards need no collective, each may do as many as it likes."""
    modules = sharded_modules(policy) if whole else []
    for module in modules:
        module.set_reshard_after_forward(False)
        module.unshard()
    try:
        yield policy
    finally:
        reshard(policy)
        for module in modules:
            module.set_reshard_after_forward(module is not policy)  # the root's are needed again at once


def unsharded_fits(policy: Policy, more_bytes: int) -> bool:
    """Whether every rank gathers all weights for a rollout, or layer by layer in every pass.

    Whole is faster and takes the weights' room in compute precision, `more_bytes` of caches beside them; layer by layer
    each token of a rollout gathers every layer once. "auto": whole where it fits on every rank."""
    if policy.rollout_weights != "auto" or policy.device.type != "cuda":
        return policy.rollout_weights != "layers"
    free, _ = torch.cuda.mem_get_info(policy.device)
    free += torch.cuda.memory_reserved(policy.device) - torch.cuda.memory_allocated(policy.device)
    weights = sum(p.numel() for p in policy.parameters() if isinstance(p, DTensor)) * policy.compute_dtype.itemsize
    return not any_rank(weights + more_bytes >= 0.9 * free, policy.device)


def sample_unsharded(policy: Policy, prompts: list, group_size: int, sampling: Sampling, on_tokens=None,
                     speculation: Speculation | None = None) -> list[Group]:
    """`sample` on sharded weights: unsharded, or layer by layer, where all make as many passes as the busiest rank."""
    needed = cache_bytes(policy.text_config, prompts, group_size, sampling.rows, sampling.max_tokens,
                         policy.compute_dtype.itemsize)
    with enough_memory("in a rollout", "lower --rollout_rows or --max_completion_tokens"):
        whole = not sharded_modules(policy) or unsharded_fits(policy, needed)
        turn = None if whole else (lambda working: any_rank(working, policy.device))
        with unsharded(policy, whole):
            return policy.call_inside(sample, prompts, group_size, sampling, on_tokens, turn, speculation)


def encode_images_unsharded(policy: Policy, prompts) -> None:
    """`keep_features` on sharded weights, where images may be distributed unequally. The encoder is the root's own,
    and the root is unsharded inside `call_inside`, the layers need not be."""
    with enough_memory("in the vision encoder", "lower --max_pixels"):
        policy.call_inside(Policy.keep_image_features, prompts)
        reshard(policy)


def is_first_replica(policy: Policy) -> bool:
    """Whether this rank holds rows of the first of hybrid sharding's copies; without copies all do."""
    for parameter in policy.parameters():
        if isinstance(parameter, DTensor) and parameter.device_mesh.ndim == 2:
            return parameter.device_mesh.get_local_rank(0) == 0
    return rank() == 0 or bool(sharded_modules(policy))


def clip_gradients(policy: Policy, limit: float) -> float:
    """Norm over all ranks' gradients; they are scaled down to `limit` if it is larger."""
    norm = torch.nn.utils.clip_grad_norm_([p for p in policy.parameters() if p.requires_grad], limit)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
