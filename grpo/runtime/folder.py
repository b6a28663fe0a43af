"""A folder that all ranks write together, whole or not at all."""

import shutil
from pathlib import Path
from typing import Callable

from safetensors import SafetensorError

from grpo.runtime.dist import all_gather, rank
from grpo.runtime.files import replace_folder
from grpo.runtime.liveness import heartbeat_during


class FolderWriter:
    """Writes into `new`, beside the folder's place, which it takes at the end; every rank calls every method.

    Where any rank cannot write, all raise OSError, with `what` and what `remains`; nothing half-written stays."""

    def __init__(self, place: Path, what: str, remains: str):
        self.place, self.new = place, place.with_name(place.name + ".new")
        self.what, self.remains = what, remains
        self.do(lambda: shutil.rmtree(self.new, ignore_errors=True))
        self.do(lambda: self.new.mkdir(parents=True))

    def do(self, action: Callable, everywhere: bool = False) -> list:
        """`action` on rank 0, or everywhere; what it gave, rank by rank."""
        fault = value = None
        try:
            if everywhere or rank() == 0:
                with heartbeat_during():
                    value = action()
        except (OSError, SafetensorError) as error:
            fault = f"rank {rank()}: {error}"
        faults, values = zip(*all_gather([(fault, value)]))
        if any(faults):
            if rank() == 0:
                shutil.rmtree(self.new, ignore_errors=True)
            raise OSError(f"{self.place}: {self.what} cannot be written ({next(filter(None, faults))}); {self.remains}")
        return list(values)

    def end(self) -> None:
        self.do(lambda: replace_folder(self.new, self.place))
