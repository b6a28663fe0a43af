"""How a program ends: what the user can mend in one line and exit status 2, and how torchrun hears of it. No torch."""

import json
import logging
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Callable

LOST = ("Connection closed by peer", "Connection reset by peer", "have not come in")  # in a RuntimeError's words


def run_program(main: Callable[[], object], ends: bool = True) -> None:
    """Run a program; what the user can mend ends in one line and exit status 2. ends=False: it goes on after `main`."""
    if not sys.warnoptions:  # a library's warning is for who develops with it, and python -W shows it
        warnings.simplefilter("ignore")
        logging.getLogger("transformers").setLevel(logging.ERROR)
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    try:
        main()
        if ends and under_torchrun:
            leave(0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        leave(128 + signal.SIGINT)
    except SystemExit as end:
        if under_torchrun:
            leave(end.code)
        raise
    except (ValueError, OSError, RuntimeError) as error:
        lost, rank = lost_rank(error), int(os.environ.get("RANK", 0))
        if os.environ.get("GRPO_TRACEBACK") or isinstance(error, RuntimeError) and not lost:
            tell_torchrun(f"{type(error).__name__}: {error}")
            raise
        if lost:
            error = f"another rank of this run is gone ({str(error).splitlines()[0][:200]})"
        if rank:
            # Usually rank 0 says the same, and torchrun then ends the others. Who is still here has its own fault.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10)
        if not lost:  # whose end is the cause is the one for the page
            tell_torchrun(f"error: {error}")
        print(f"error (rank {rank}): {error}" if rank else f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def lost_rank(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone; that one's end has its own cause."""
    return (type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
            or isinstance(error, RuntimeError) and any(words in str(error) for words in LOST))


def tell_torchrun(message: str) -> None:
    """The message goes where torchrun's own page of failures shows it."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        more = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": more}}), encoding="utf-8")


def leave(status: int) -> None:
    """Under torchrun all is written and the process group is closed; taking the interpreter down around what is left of
    its communication threads aborts now and then ("terminate called without an active exception")."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
