"""`parallel` and `branch`: layers side by side, of one input each or of one for all."""

from collections.abc import Mapping

from funcnet import tree
from funcnet.combinators.combine import Pull, Run, combine
from funcnet.combinators.serial import children_of
from funcnet.core import Layer, Tree, sum_cotangents


def by_position(names: tuple[str, ...]) -> bool:
    """Whether the children were given by position."""
    return names == tuple([str(index) for index in range(len(names))])


def pieces_of(names: tuple[str, ...], whole: Tree) -> list[Tree]:
    """The tree of each child from a tuple or dict of them."""
    return list(whole) if isinstance(whole, tuple) else [whole[name] for name in names]


def gathered(names: tuple[str, ...], pieces: list[Tree], as_tuple: bool) -> Tree:
    """A tuple or dict of the tree of each child."""
    return tuple(pieces) if as_tuple else dict(zip(names, pieces, strict=True))


def _check(names: tuple[str, ...], x: Tree) -> None:
    if type(x) is tuple and len(x) == len(names):
        return
    numbered = by_position(names)
    if isinstance(x, Mapping) and not numbered:
        if type(x) is dict and x.keys() == set(names):
            return
        raise ValueError(f"parallel: x expects a dict with {list(names)}, got {sorted(x)}")
    form = f"a tuple of {len(names)}" if numbered else f"a dict with {list(names)}"
    got = f"a tuple of {len(x)}" if type(x) is tuple else tree.describe(x)
    raise ValueError(f"parallel: x expects {form}, got {got}")


def parallel_forward(run: Run, x: Tree) -> tuple[Tree, Mapping[str, Tree]]:
    """Each child of its own piece of x."""
    _check(run.names, x)
    pieces = zip(run.names, pieces_of(run.names, x), strict=True)
    y = [run(child, piece) for child, piece in pieces]
    return gathered(run.names, y, isinstance(x, tuple)), {}


def parallel_backward(pull: Pull, dy: Tree, residuals: Mapping[str, Tree]) -> Tree:
    """Each child's pullback of its own piece of dy."""
    pieces = zip(pull.names, pieces_of(pull.names, dy), strict=True)
    dx = [pull(child, piece, needed=pull.x) for child, piece in pieces]
    return gathered(pull.names, dx, isinstance(dy, tuple))


def parallel(*layers: Layer, **named: Layer) -> Layer:
    """Layers side by side: the i-th layer is applied to the i-th input.

    Inputs:
        x, a tuple with one tree a layer, or, for named layers, a dict with their names.
    Returns:
        y, a tuple or dict like x.
    Learned params:
        ``{name: params of the child}``.
    VJP:
        the children's, side by side.

    >>> import torch
    >>> import funcnet as fn
    >>> net = fn.parallel(fn.relu(), fn.tanh())
    >>> net.apply({}, (torch.tensor([-1.0]), torch.tensor([0.0])))[0]
    (tensor([0.]), tensor([0.]))
    """
    children = children_of("parallel", layers, named)
    return combine("parallel", children, parallel_forward, parallel_backward)


def branch_forward(run: Run, x: Tree) -> tuple[Tree, Mapping[str, Tree]]:
    """Each child of the same x."""
    y = [run(child, x) for child in run.names]
    return gathered(run.names, y, by_position(run.names)), {}


def branch_backward(pull: Pull, dy: Tree, residuals: Mapping[str, Tree]) -> Tree:
    """The sum of the children's dx."""
    pieces = zip(pull.names, pieces_of(pull.names, dy), strict=True)
    return sum_cotangents(*[pull(child, piece, needed=pull.x) for child, piece in pieces])


def branch(*layers: Layer, **named: Layer) -> Layer:
    """Several layers of one input: ``y = (f_1(x), ..., f_n(x))``.

    Returns:
        y, a tuple, or for named layers a dict.
    Learned params:
        ``{name: params of the child}``.
    VJP:
        dx is the sum of the children's.

    >>> import torch
    >>> import funcnet as fn
    >>> fn.branch(fn.relu(), fn.identity()).apply({}, torch.tensor([-1.0]))[0]
    (tensor([0.]), tensor([-1.]))
    """
    children = children_of("branch", layers, named)
    return combine("branch", children, branch_forward, branch_backward)
