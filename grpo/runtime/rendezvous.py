"""Where the processes of a run find each other, and why a restart does not find its dead.

torchrun keeps one store for all lives of a run, and a process that starts faster than the others reads from it the
addresses that their predecessors have left (torch 2.13, --max-restarts with the c10d rendezvous: "connection refused", or
a wait without end). So every life agrees on a name that no earlier one had, and all of its keys stand below it.
"""

import os
import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore


def connect(timeout: timedelta, host: bool = False) -> Store:
    """A connection to the store at MASTER_ADDR:MASTER_PORT; `host`: it is here, unless torchrun's agent has it."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=host and not agent, timeout=timeout,
                    wait_for_workers=False)


def meet(rank: int, world: int, minutes: float) -> tuple[Store, str]:
    """(store, name of this life). RuntimeError names the processes that have not come after so many minutes."""
    timeout = timedelta(minutes=minutes)
    store = connect(timeout, host=rank == 0)
    life = name_life(store, world, 60 * minutes) if rank == 0 else ask_for_life(store, rank)
    return PrefixStore(life, store), life


def ask_for_life(store: Store, rank: int) -> str:
    """The answer to a question that only this very process has asked."""
    question = uuid.uuid4().hex
    store.set(f"question/{rank}", question)
    life = store.get(f"answer/{question}").decode()  # waits for it
    store.set(f"{life}/here/{rank}", "")
    return life


def name_life(store: Store, world: int, seconds: float) -> str:
    """Answers whoever asks, the dead too, until every rank of this life is here."""
    life, start = uuid.uuid4().hex, time.monotonic()
    while missing := [r for r in range(1, world) if not store.check([f"{life}/here/{r}"])]:
        if time.monotonic() - start > seconds:
            raise RuntimeError(f"processes {', '.join(map(str, missing))} of {world} have not come in {seconds / 60:.3g} minutes")
        for r in missing:
            if store.check([f"question/{r}"]):
                store.set(f"answer/{store.get(f'question/{r}').decode()}", life)
        time.sleep(0.02)
    return life
