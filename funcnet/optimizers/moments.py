"""What the optimizers that divide by a root mean square have in common."""

from typing import Any

import torch

from funcnet.runtime import is_differentiated


def running_square(v: Any, g: Any, decay: Any) -> Any:
    """``decay v + (1 - decay) g^2``; of g itself, the mean is ``torch.lerp(m, g, 1 - decay)``.

    >>> running_square(torch.tensor(1.0), torch.tensor(2.0), 0.5)
    tensor(2.5000)
    """
    return torch.addcmul(decay * v, g, g, value=1.0 - decay)


def sqrt(v: Any) -> Any:
    """``sqrt(v)`` of leaves, whose derivative at 0 is taken as 0."""
    if not is_differentiated(*v):
        return torch.sqrt(v)
    root = torch.where(v > 0, v, 1.0).sqrt()
    return torch.where(v > 0, root, v.detach())
