"""What this machine really does in a second, in the words of grpo.plan; `./launch.sh check --rates FILE` writes it.

tflops             a large matrix product in the type that is computed in
efficiency         of that, what forward and backward of a packed pass reach, in layers as wide as the 3B model's
bandwidth          bytes read and written by a large copy
memory_efficiency  of that, what decode steps reach in such layers; launches and Python are in it, as they are in a run
link, network      bytes that each rank receives a second in an all-gather, within a machine and between machines
host_link          bytes a second from pinned host memory to a GPU

On a CPU the layers are narrower, or it would take minutes; that its cache holds them makes decoding look better.
"""

import os
import statistics
import time
from itertools import pairwise

import torch
import torch.distributed as dist

from benchmarks import gpu
from grpo.engine.policy import Policy
from grpo.engine.rollout import Sampling
from grpo.group import make_packs
from grpo.runtime.dist import all_reduce_max, world_size
from grpo.runtime.fsdp import compute_dtype, encode_images_unsharded, sample_unsharded, shard
from grpo.runtime.optim import backward, packed_pass

LAYERS = {
    "cuda": {**gpu.SHAPES["3b"], "layers": 2, "vocabulary": 16_384, "vision_hidden": 320, "vision_depth": 4,
             "vision_heads": 4, "vision_intermediate": 640},
    "cpu": dict(gpu.SHAPES["tiny"], hidden=512, intermediate=2752, layers=2, heads=4, key_value_heads=2),
}
SIZES = {"cuda": (4, 1000, 64), "cpu": (1, 560, 12)}  # prompts, their tokens, new tokens of each completion
REPEATS = 3


def best(device: torch.device, action, repeats: int = REPEATS) -> float:
    """Seconds of the fastest of some; one before them warms up."""
    action()
    times = []
    for _ in range(repeats):
        with gpu.Clock(device) as clock:
            action()
        times.append(clock.seconds)
    return min(times)


def layers_reach(device: torch.device, dtype: torch.dtype, products: float, copies: float) -> tuple[float, float]:
    """(share of the product rate that a packed pass reaches, share of the copy rate that decoding reaches)."""
    kind = device.type if device.type in LAYERS else "cuda"
    count, tokens, new = SIZES[kind]
    gpu.SHAPES["rates"] = LAYERS[kind]
    policy = Policy(gpu.random_model("rates", device, torch.float32))
    policy.freeze_vision()
    prompts, sampling = gpu.make_prompts(count, tokens), Sampling(new, (), 0.8, rows=count * gpu.G)
    shard(policy, dtype, device)
    encode_images_unsharded(policy, prompts)
    groups, stamps = [], []

    def note(written, *_):
        stamps.append((time.perf_counter(), written))

    def roll_out():
        stamps.clear()
        groups[:] = sample_unsharded(policy, prompts, gpu.G, sampling, note)

    best(device, roll_out, 1)
    # of one token of every row; the host reads the tokens of one step or of several at once
    step = statistics.median(
        (after - before) * sampling.rows / written for (before, _), (after, written) in pairwise(stamps) if written
    )
    (pack, *_), work = make_packs(groups, 10**9, device), gpu.score_operations(policy, groups)

    def update():
        with packed_pass(pack):
            backward(-policy.score(pack.groups).logp.mean())

    passed = best(device, update)
    reading = gpu.rollout_bytes(policy, prompts, new, dtype.itemsize) / new / copies
    return 3 * work / products / passed, reading / step


def gathered(device: torch.device) -> float:
    """Bytes a second that each rank receives while all gather 64 MB from each."""
    mine = torch.zeros(2**24, device=device)
    every = torch.empty(world_size() * len(mine), device=device)
    seconds = best(device, lambda: dist.all_gather_into_tensor(every, mine))
    seconds = float(all_reduce_max(torch.tensor(seconds, device=device)))
    return (world_size() - 1) * mine.nbytes / seconds


def launch_seconds(device: torch.device) -> float:
    """Of one operation on next to nothing."""
    one = torch.zeros(8, device=device)

    def many():
        for _ in range(2000):
            one.add_(1.0)

    return best(device, many) / 2000


def measure(device: torch.device, dtype_name: str = "auto") -> dict:
    """{"rates": settings of grpo.plan, …}: the content of the file."""
    dtype = compute_dtype(dtype_name, device)
    products, copies = gpu.rates(device, dtype)
    passed, read = layers_reach(device, dtype, products, copies)
    found = {"tflops": products / 1e12, "efficiency": passed, "bandwidth": copies / 1e9, "memory_efficiency": read}
    if world_size() > 1:
        machines = world_size() > int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
        found["network" if machines else "link"] = gathered(device) / 1e9
    if device.type == "cuda":
        host = torch.empty(2**26, pin_memory=True)
        found["host_link"] = host.nbytes / best(device, lambda: host.to(device)) / 1e9
    return {
        "rates": {name: float(f"{value:.4g}") for name, value in found.items()},
        "dtype": str(dtype).removeprefix("torch."),
        "ranks": world_size(),
        "microseconds_of_a_launch": round(1e6 * launch_seconds(device), 2),
        "measured": time.strftime("%Y-%m-%d"),
    }
