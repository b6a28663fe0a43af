"""torchrun as launch.sh uses it: what a rank has said in one line is not followed by torchrun's own traceback and page.

    python -m grpo.runtime.launch --nproc-per-node 8 -m grpo.train …

Takes torchrun's words; the exit status is that of the rank that ended first, 130 after Ctrl-C, 143 after SIGTERM."""

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def main(words: list[str] | None = None) -> None:
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.elastic.agent.server.api").setLevel(logging.CRITICAL)
    try:
        run(parse_args(words))
    except SignalException as end:
        sys.exit(128 + end.sigval)
    except ChildFailedError as error:
        ended_by_others = lambda failure: failure.error_file == "<N/A>" and failure.exitcode in (2, -signal.SIGTERM)
        rank, failure = min(error.failures.items(), key=lambda one: (ended_by_others(one[1]), one[1].timestamp))
        if failure.exitcode < 0:  # it could not say anything itself
            print(f"error: rank {rank} (pid {failure.pid}) was ended by {failure.signal_name()}; the same command "
                  "goes on from the last checkpoint", file=sys.stderr, flush=True)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)


if __name__ == "__main__":
    main()
