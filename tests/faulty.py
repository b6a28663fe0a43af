"""grpo.train, or PROGRAM=sft.train, with faults in it: python tests/faulty.py SETTINGS, under torchrun.

FAULTS="place:kind@restart …": in the process of rank 1 (0 where it is alone), at the second call of the place in the
life number `restart`, one of kill (−9), hang, raise. Places: rollout (a reward), score, update (between backward and
step), writing (a checkpoint's part, half of which is on disk by then).
"""

import os
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import grpo.runtime.checkpoints  # noqa: E402
import grpo.runtime.optim  # noqa: E402
import grpo.train  # noqa: E402
import sft.train  # noqa: E402
from grpo.runtime.settings import run_program  # noqa: E402


def strike(kind: str) -> None:
    print(f"fault: {kind}", flush=True)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hang":
        time.sleep(600)
    raise RuntimeError("a fault of the test's own")


def half_a_file(tensors, path, **_):
    Path(path).write_bytes(b"half of what there is to write")


PLACES = {
    "rollout": (grpo.train.Trainer, "reward", None), "score": (grpo.train.Trainer, "score_reference", None),
    "update": (grpo.runtime.optim, "clip_gradients", None),
    "writing": (grpo.runtime.checkpoints, "save_file", half_a_file),
}


def plant(place: str, kind: str) -> None:
    owner, name, before = PLACES[place]
    real, calls = getattr(owner, name), []

    def faulty(*arguments, **keywords):
        calls.append(0)
        if len(calls) == 2:
            if before:
                before(*arguments, **keywords)
            strike(kind)
        return real(*arguments, **keywords)

    setattr(owner, name, faulty)


if __name__ == "__main__":
    victim = min(1, int(os.environ.get("WORLD_SIZE", 1)) - 1)
    for fault in os.environ.get("FAULTS", "").split() if int(os.environ.get("RANK", 0)) == victim else ():
        place, rest = fault.split(":")
        kind, life = rest.split("@")
        if life == os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"):
            plant(place, kind)
    run_program(sft.train.main if os.environ.get("PROGRAM") == "sft.train" else grpo.train.main)
