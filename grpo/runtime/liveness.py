"""Nobody waits in silence: where no process makes progress any more, who is missing is said by name and the run ends.

Every process counts its steps (`heartbeat`: a phase begun, a token written, a reward given) and a thread of it puts the
count into the store through which the processes found each other, and looks at everybody's. While any count moves, all
is well, however long one process waits for another. Where none has moved for `minutes`, the process with the lowest
count of phases is the one that the others wait for. Under torchrun --max-restarts the end is a new beginning from the
last checkpoint.
"""

import os
import socket
import sys
import threading
import time

from torch.distributed import PrefixStore, Store

from grpo.runtime.log import Stopwatch

EXIT_STATUS = 3
_heartbeat = {"phases": 0, "steps": 0, "phase": "starting"}


def heartbeat(phase: str | None = None) -> None:
    """A sign of life; with a name, a phase that every process goes through begins."""
    _heartbeat["steps"] += 1
    if phase:
        _heartbeat["phases"] += 1
        _heartbeat["phase"] = phase


class Phases(Stopwatch):
    """The seconds of each phase of a step, every one announced to the watchdog: `with phase("rollout"): …`."""

    def __call__(self, phase: str):
        heartbeat(phase)
        return super().__call__(phase)


class Watchdog:
    """A thread of this process; it dies with it. `store` is a connection of its own: the main thread's may be waiting."""

    def __init__(self, store: Store, life: str, rank: int, world: int, minutes: float):
        self.store, self.rank, self.world, self.seconds = PrefixStore(f"{life}/heartbeat", store), rank, world, 60 * minutes
        self.say()
        threading.Thread(target=self.watch, name="watchdog", daemon=True).start()

    def say(self) -> None:
        p = _heartbeat
        self.store.set(str(self.rank), f"{p['phases']} {p['steps']} {os.getpid()} {socket.gethostname()} {p['phase']}")

    def everyone(self) -> list[list[str]]:
        """[phases, steps, process id, host, phase] of each process that has begun to watch."""
        keys = map(str, range(self.world))
        return [self.store.get(key).decode().split(" ", 4) if self.store.check([key]) else ["0", "0", "?", "?", "starting"]
                for key in keys]

    def watch(self) -> None:
        moved, seen = time.monotonic(), None
        while True:
            time.sleep(min(10.0, self.seconds / 5))
            try:
                self.say()
                everyone = self.everyone()
            except (RuntimeError, ValueError):  # the store's host is going down or gone
                everyone = seen
            if everyone != seen:
                moved, seen = time.monotonic(), everyone
            # The first that is alive speaks; its end ends the others.
            if time.monotonic() - moved > self.seconds + 2 * self.rank:
                print("error: " + verdict(everyone or [], self.seconds), file=sys.stderr, flush=True)
                os._exit(EXIT_STATUS)


def verdict(everyone: list[list[str]], seconds: float) -> str:
    """One line: which processes have gone through the fewest phases, and where they stand."""
    last = min((int(phases) for phases, *_ in everyone), default=0)
    late = [f"process {r} (pid {pid} on {host}) in {phase!r}"
            for r, (phases, _, pid, host, phase) in enumerate(everyone) if int(phases) == last]
    waiting = len(everyone) - len(late)
    others = f"; {waiting} others wait for it" if waiting else ""
    return (f"no process has made progress for {seconds / 60:.3g} minutes: {', '.join(late)}{others} "
            f"(--hang_minutes sets the limit)")
