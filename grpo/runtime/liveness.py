"""No silent waiting: where no rank makes progress any more, the one that the others wait for is named and the run ends.

Every rank counts its steps (`heartbeat`: a phase begun, a token written, a reward given). A thread of each rank puts
the count into the store through which the ranks found each other, and reads everybody's. While any count moves, all is
well, however long one rank waits for another. Where none has moved for `minutes`, the others wait for the rank that has
gone through the fewest phases and collectives. Under torchrun --max-restarts the run then restarts from its last
checkpoint. The same file hears SIGTERM and Ctrl-C, which ask a run to end after the step at hand."""

import os
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager, suppress

from torch.distributed import PrefixStore, Store

from grpo.runtime.log import Stopwatch, say

EXIT_STATUS = 3
BEAT, LONGEST = 1.0, 2 * 3600.0  # seconds between the heartbeats of `heartbeat_during`, and how long it goes on
_heartbeat = {"phases": 0, "steps": 0, "phase": "starting"}
_watchdog = None


def heartbeat(phase: str | None = None) -> None:
    """A sign of life; with a name, a phase begins that every rank goes through."""
    _heartbeat["steps"] += 1
    if phase:
        _heartbeat["phases"] += 1
        _heartbeat["phase"] = phase
        if _watchdog:
            _watchdog.publish()  # at once: what holds the interpreter from here on would leave the last phase there


def joined_collective() -> None:
    """This rank waits for the others from here on: it has come further than one that has not joined yet."""
    _heartbeat["phases"] += 1


@contextmanager
def heartbeat_during():
    """Heartbeats while a file is read, written, hashed or synced, which gives none of its own. Two hours are a hang."""
    done, end = threading.Event(), time.monotonic() + LONGEST

    def beat() -> None:
        while not done.wait(BEAT) and time.monotonic() < end:
            heartbeat()

    threading.Thread(target=beat, name="heartbeat", daemon=True).start()
    try:
        yield
    finally:
        done.set()


class Phases(Stopwatch):
    """The seconds of each phase of a step, every one announced to the watchdog: `with phase("rollout"): …`."""

    def __call__(self, phase: str):
        heartbeat(phase)
        return super().__call__(phase)


class Watchdog:
    """A thread of this rank. `store` is a connection of its own: the main thread's may be waiting."""

    def __init__(self, store: Store, restart: str, rank: int, world: int, minutes: float):
        global _watchdog
        self.store = PrefixStore(f"{restart}/heartbeat", store)
        self.rank, self.world, self.seconds, self.over = rank, world, 60 * minutes, threading.Event()
        _watchdog = self
        self.publish()
        threading.Thread(target=self.watch, name="watchdog", daemon=True).start()

    def publish(self) -> None:
        phases, steps, phase = _heartbeat.values()
        with suppress(RuntimeError):  # the store's host is going down or gone
            self.store.set(str(self.rank), f"{phases} {steps} {os.getpid()} {socket.gethostname()} {phase}")

    def watch(self) -> None:
        """ranks: [phases, steps, process id, host, phase] of each; those of one that has not begun stand at zero."""
        read = lambda key: self.store.get(key).decode() if self.store.check([key]) else "0 0 ? ? starting"
        moved, ranks = time.monotonic(), []
        while not self.over.wait(min(10.0, self.seconds / 5)):
            self.publish()
            with suppress(RuntimeError):
                before, ranks = ranks, [read(str(one)).split(" ", 4) for one in range(self.world)]
                moved = moved if ranks == before else time.monotonic()
            if time.monotonic() - moved > self.seconds + 2 * self.rank:
                spoken = 0
                with suppress(RuntimeError):
                    spoken = self.store.add("spoken", 1)
                if spoken <= 1:
                    print("error: " + verdict(ranks, self.seconds), file=sys.stderr, flush=True)
                os._exit(EXIT_STATUS)


def stop_watching() -> None:
    global _watchdog
    if _watchdog:
        _watchdog.over.set()
    _watchdog = None


def verdict(ranks: list[list[str]], seconds: float) -> str:
    """One line: which ranks have gone through the fewest phases and collectives, and where they stand."""
    last = min((int(phases) for phases, *_ in ranks), default=0)
    late = [f"rank {r} (pid {pid} on {host}) in {phase!r}"
            for r, (phases, _, pid, host, phase) in enumerate(ranks) if int(phases) == last]
    waiting = len(ranks) - len(late)
    others = f"; {waiting} others wait for it" if waiting else ""
    return (f"no rank has made progress for {seconds / 60:.3g} minutes: {', '.join(late)}{others} "
            f"(--hang_minutes sets the limit)")


class StopSignals:
    """SIGTERM and the first Ctrl-C ask for an end after the step at hand; a second Ctrl-C ends this rank at once.

    A thread hears them: the main thread may be waiting in a collective, where no handler of Python's runs. What comes
    within AGAIN seconds is the first one once more: torchrun passes a Ctrl-C on that the terminal has sent already."""

    AGAIN = 2.0

    def __init__(self):
        self.number, self.since = 0, 0.0  # of the first signal, 0 for none
        self.heard, wakeup = socket.socketpair()
        wakeup.setblocking(False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        if (earlier := signal.set_wakeup_fd(wakeup.detach(), warn_on_full_buffer=False)) >= 0:
            os.close(earlier)  # another run's of this interpreter: its thread ends
        threading.Thread(target=self.listen, name="signals", daemon=True).start()

    def listen(self) -> None:
        while numbers := self.heard.recv(64):
            for number in set(numbers) & {signal.SIGTERM, signal.SIGINT}:
                if not self.number:
                    self.number, self.since = number, time.monotonic()
                    say(f"{signal.Signals(number).name}: ending after this step, with a checkpoint"
                        + ("; Ctrl-C again ends at once" if number == signal.SIGINT else ""))
                elif number == signal.SIGINT and time.monotonic() - self.since > self.AGAIN:
                    say("ended at once by a second Ctrl-C; the same command goes on from the last checkpoint")
                    os._exit(128 + signal.SIGINT)
