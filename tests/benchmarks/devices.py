"""Whether a device can be used, and what to call it: for ``pytest --device`` and `compare.py`."""

import torch


def missing(name: str) -> str | None:
    """Why torch cannot compute on a device, in a line; None if it can."""
    version = f"this torch ({torch.__version__})"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        return f"torch knows no such device: {first_sentence(error)}"
    if device.type == "cuda":
        if not (torch.version.cuda or torch.version.hip):
            return f"{version} is built without CUDA"
        if not torch.cuda.is_available():
            return "torch sees no CUDA device: is a driver installed?"
        if (device.index or 0) >= (count := torch.cuda.device_count()):
            return f"torch sees {count} CUDA devices, counted from 0"
    try:
        torch.ones((), device=device).item()
    except Exception as error:  # each backend has errors of its own
        return f"{version} cannot compute there: {first_sentence(error)}"
    return None


def first_sentence(error: Exception) -> str:
    """The first sentence of an error: torch goes on with lists of its backends."""
    return (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0]


def gpu(name: str) -> str:
    """What the maker calls a CUDA device."""
    return torch.cuda.get_device_name(torch.device(name))
