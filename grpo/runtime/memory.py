"""Memory: what to lower when it runs out, and what may wait in host memory."""

from contextlib import contextmanager

import torch


@contextmanager
def enough_memory(what: str, lower: str):
    """Out of memory inside ends in one line (ValueError) that says what was being done and which setting to lower."""
    try:
        yield
    except RuntimeError as error:  # a GPU's OutOfMemoryError is one; the host's allocator raises a bare one
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise ValueError(f"out of memory {what}; {lower}") from error


def keep_state_on_host(optimizer: torch.optim.Optimizer) -> None:
    """Adam's two moments wait in host memory and visit the device for the step alone, when no activation is there."""
    optimizer.register_step_pre_hook(lambda *_: move_state(optimizer, to_host=False))
    optimizer.register_step_post_hook(lambda *_: move_state(optimizer, to_host=True))


def move_state(optimizer: torch.optim.Optimizer, to_host: bool) -> None:
    """What the optimizer keeps of each parameter, to host memory or to where the parameter is."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                state[name] = value.to("cpu" if to_host else parameter.device)
