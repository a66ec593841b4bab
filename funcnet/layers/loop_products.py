"""Products with one weight in each iteration of a loop."""

from collections.abc import Callable

import torch
from torch import Tensor

from funcnet.compiler.loops import is_recording

Product = Callable[..., Tensor]

_WIDTH = 32
_MOST_ROWS = 64
_LEAST_SIZE = 2**14


def product_with(weight: Tensor, rows: int) -> Product:
    """``product(x, added=None) = x weight + added``, for a loop over x with so many rows.

    A compiled product of matrices lays its second one out in panels of a few columns, each in one
    piece, each time that it runs: with few rows that takes longer than the product. Here it is
    done once, before the loop: a training step of an LSTM takes 0.79 of its processor time (89 to
    70 ms on one thread, 2 layers of 256 features, batch 32 x 64 steps).
    """
    features, columns = weight.shape
    if not is_recording() or weight.device.type != "cpu":

        def plain(x: Tensor, added: Tensor | None = None) -> Tensor:
            return x.mm(weight) if added is None else torch.addmm(added, x, weight)

        return plain
    in_panels = columns % _WIDTH == 0 and rows <= _MOST_ROWS and weight.numel() >= _LEAST_SIZE
    count = columns // _WIDTH if in_panels else 1
    panels = weight.unflatten(1, (count, columns // count)).transpose(0, 1).contiguous()

    def in_loop(x: Tensor, added: Tensor | None = None) -> Tensor:
        if count == 1:
            y = x.mm(panels[0])
        else:
            y = x.expand(count, rows, features).bmm(panels).transpose(0, 1).flatten(1)
        return y if added is None else y + added

    return in_loop
