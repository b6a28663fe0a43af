"""The rendezvous of a run's ranks, and why a restart does not find its dead.

torchrun keeps one store for all restarts of a run, and a rank that starts faster than the others reads from it the
addresses that their predecessors have left (torch 2.13, --max-restarts with the c10d rendezvous: "connection refused",
or a wait without end). So every restart agrees on a name that no earlier one had, above all of its keys."""

import os
import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore


def connect(timeout: timedelta, host: bool = False) -> Store:
    """A connection to the store at MASTER_ADDR:MASTER_PORT; `host`: it is here, unless torchrun's agent has it."""
    host = host and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=host, timeout=timeout,
                    wait_for_workers=False)


def rendezvous(rank: int, world: int, minutes: float) -> tuple[Store, str]:
    """(store, name of this restart). RuntimeError names the ranks that have not come after so many minutes."""
    timeout = timedelta(minutes=minutes)
    store = connect(timeout, host=rank == 0)
    restart = name_restart(store, world, 60 * minutes) if rank == 0 else ask_for_name(store, rank)
    return PrefixStore(restart, store), restart


def ask_for_name(store: Store, rank: int) -> str:
    """The answer to a question that only this very rank of this restart has asked."""
    question = uuid.uuid4().hex
    store.set(f"question/{rank}", question)
    restart = store.get(f"answer/{question}").decode()  # waits for it
    store.set(f"{restart}/here/{rank}", "")
    return restart


def name_restart(store: Store, world: int, seconds: float) -> str:
    """Answers whoever asks, the dead too, until every rank of this restart is here."""
    restart, start = uuid.uuid4().hex, time.monotonic()
    while missing := [r for r in range(1, world) if not store.check([f"{restart}/here/{r}"])]:
        if time.monotonic() - start > seconds:
            late = ", ".join(map(str, missing))
            raise RuntimeError(f"ranks {late} of {world} have not come in {seconds / 60:.3g} minutes")
        for r in missing:
            if store.check([f"question/{r}"]):
                store.set(f"answer/{store.get(f'question/{r}').decode()}", restart)
        time.sleep(0.02)
    return restart
