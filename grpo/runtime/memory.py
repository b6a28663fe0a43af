"""Memory: what to lower when it runs out, and what may wait in host memory."""

from contextlib import contextmanager

import torch


@contextmanager
def enough_memory(what: str, lower: str):
    """Out of memory inside ends in one line (ValueError) that says what was being done and which setting to lower."""
    try:
        yield
    except RuntimeError as error:  # a GPU's OutOfMemoryError is one; the host's allocator raises a bare one
        every = error, error.__context__  # in a capture, whose end is an error then too, the second
        if not any(isinstance(one, torch.OutOfMemoryError) for one in every) and "can't allocate" not in str(error):
            raise
        raise ValueError(f"out of memory {what}; {lower}") from error


def keep_state_on_host(optimizer: torch.optim.Optimizer) -> None:
    """Adam's two moments wait in host memory; in a step those of one parameter after the other visit the device."""
    step_all = optimizer.step

    def step() -> None:
        groups = optimizer.param_groups
        try:
            for group in groups:
                for parameter in group["params"]:
                    optimizer.param_groups = [{**group, "params": [parameter]}]
                    move_state(optimizer.state[parameter], parameter, parameter.device)
                    step_all()
                    move_state(optimizer.state[parameter], parameter, "cpu")
        finally:
            optimizer.param_groups = groups

    optimizer.step = step


def move_state(state: dict, parameter: torch.Tensor, device) -> None:
    """What the optimizer keeps of one parameter."""
    for name, value in state.items():
        if torch.is_tensor(value) and value.shape == parameter.shape:
            state[name] = value.to(device)
