"""`serial`: layers one after another."""

from collections.abc import Mapping
from typing import Any

from funcnet.combinators.combine import Pull, Run, combine
from funcnet.core import Box, Layer, Tree


def serial_forward(run: Run, x: Tree) -> tuple[Tree, Mapping[str, Tree]]:
    """Each child's output is the next one's input."""
    for child in run.names:
        x = run(child, x)
    return x, {}


def serial_backward(pull: Pull, dy: Tree, residuals: Mapping[str, Tree]) -> Tree:
    """The pullbacks from the last child to the first that is needed."""
    names, x, box = pull.names, pull.x, Box([dy])
    del dy
    first = next((i for i, child in enumerate(names) if child in pull.learned), len(names))
    for index in range(len(names) - 1, -1 if x else first - 1, -1):
        box.append(pull(names[index], box, needed=x or index > first))
        if box[0] is None and index > first:
            what = "passes no cotangent to the layers before it, which have params"
            raise TypeError(f"serial[{names[index]!r}] {what}")
    return box.pop()


def serial(*layers: Layer, **named: Layer) -> Layer:
    """Layers one after another: ``y = f_n(... f_1(x))``.

    Args:
        layers: children, named "0", "1", ... as in ``torch.nn.Sequential``; or
        named: children by name.

    Learned params:
        ``{name: params of the child}``, so that dotted paths are Sequential's.
    VJP:
        the children's pullbacks, last to first.
    Raises:
        the children's errors, with ``serial['name']`` in front.

    Source: ``torch.nn.Sequential``.

    >>> import torch
    >>> import funcnet as fn
    >>> net = fn.serial(hidden=fn.linear(25), act=fn.relu(), out=fn.linear(2))
    >>> params, _ = net.init(fn.key(0), torch.ones(100, 3))
    >>> {path: tuple(leaf.shape) for path, leaf in fn.tree.to_dotted(params).items()}
    {'hidden.weight': (25, 3), 'hidden.bias': (25,), 'out.weight': (2, 25), 'out.bias': (2,)}
    """
    return combine("serial", children_of("serial", layers, named), serial_forward, serial_backward)


def children_of(
    parent: str, layers: tuple[Layer, ...], named: Mapping[str, Layer]
) -> Mapping[str, Any]:
    """Layers given by position, which are named "0", "1", ..., or by name."""
    if layers and named:
        raise TypeError(f"{parent}: expects layers by position or by name, not both")
    if "" in named:
        raise ValueError(f"{parent}: a name must not be empty or have a dot, got ''")
    return dict(named) or {str(index): layer for index, layer in enumerate(layers)}
