"""What funcnet's and PyTorch's workers do alike on a device: wait for it, watch its memory."""

from collections.abc import Callable
from typing import Any

import torch


def waiting(device: str) -> Callable[[Any], None]:
    """A function that returns when all that was begun on a device is computed."""
    if device == "cpu":
        return lambda state: None
    return lambda state: torch.cuda.synchronize(device)


def device_memory() -> Callable[[], float]:
    """The peak of torch's tensors on the GPU beyond what they take now."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    return lambda: (torch.cuda.max_memory_allocated() - before) / 2**20
