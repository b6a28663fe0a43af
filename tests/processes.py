"""Run a function of a test file in several processes that talk through gloo, as torchrun would start them."""

import multiprocessing
import os
import socket

import torch.multiprocessing

# Processes fork from a server that has imported the slow things once, and nothing else.
multiprocessing.set_forkserver_preload(["grpo.runtime.run", "tiny"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _enter(rank, function, world, port, arguments):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    import torch

    torch.set_num_threads(1)
    from grpo.runtime.dist import finish, start

    start()
    function(*arguments)
    finish()


def run_processes(function, world: int, *arguments) -> None:
    """`function(*arguments)` in every process; the first one that fails fails the test with its traceback."""
    torch.multiprocessing.start_processes(
        _enter, (function, world, free_port(), arguments), nprocs=world, start_method="forkserver")
