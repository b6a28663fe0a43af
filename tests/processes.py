"""Run a function of a test file in several processes that talk through gloo, as torchrun would start them."""

import pickle
import socket
import sys
import tempfile

from programs import TESTS, begin, end


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_processes(function, world: int, *arguments) -> None:
    """`function(*arguments)` in every process; where one fails, all of them end and the test fails with what they
    said."""
    address = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(free_port())}
    with tempfile.NamedTemporaryFile() as call:
        pickle.dump((function, arguments), call)
        call.flush()
        ranks = [begin(TESTS / "processes.py", call.name,
                       environment={**address, "RANK": str(rank), "LOCAL_RANK": str(rank)})
                 for rank in range(world)]
        try:
            ends = [end(rank) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    assert not any(status for status, _ in ends), "\n".join(text for _, text in ends)


def gather_weights(policy) -> dict:
    """All weights, unsharded; every process must call it."""
    from torch.distributed.tensor import DTensor

    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()
            for name, tensor in policy.model.state_dict().items()}


if __name__ == "__main__":
    from grpo.runtime.dist import finish, start

    with open(sys.argv[1], "rb") as call:
        function, arguments = pickle.load(call)
    start()
    function(*arguments)
    finish()
