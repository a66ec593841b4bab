"""The forward and the backward pass of a batch whose examples stay apart."""

from collections.abc import Callable, Iterator
from typing import Any

import optree
from torch import Tensor

from funcnet import tree
from funcnet.checks import check_key, check_kind
from funcnet.core import EMPTY, Layer, Loss, Params, Tree, defer, join_paths
from funcnet.data import pair
from funcnet.deferred import Deferred
from funcnet.parted_params import refuse_parts
from funcnet.random import split
from funcnet.runtime import is_mapped
from funcnet.transforms.vmap import Axes, batched

OfExamples = tuple[Tensor, Deferred, Params]
"""The value of each example, the Deferred of all of them, and the new state."""


def defer_examples(
    model: Layer, loss: Loss, in_axes: Axes = 0, *, name: str = "defer_examples"
) -> Callable[..., OfExamples]:
    """The values of a loss and the deferred gradients of each example of a batch.

    An example is what vmap says: x and the target are sliced along ``in_axes``, and each slice goes
    through the model as a batch of one. So it does not depend on which axis a layer takes for the
    batch. Params and state are the same for all, keys are not: a dropout drops other values in each
    example. The value of an example is the loss of a batch of one; for a loss that is a mean over
    the examples the mean of the values is the loss of the batch, for a sum their sum is.

    Args:
        model, loss: as of `value_and_grad`.
        in_axes: the axis of the examples in x and target: an int, or a pair of trees that are
            prefixes of them, with None for what all examples share, as `vmap` takes it.
        name: what errors call it.

    Returns:
        ``(params, batch, state={}, *, key=None, train=True) -> (values, deferred, state)``: values
        of shape (examples,), and a `Deferred` whose tensors have the axis of the examples in front,
        for `example_gradients`, `example_norms` and `weighted`.
    Raises:
        ValueError: a layer that mixes examples, by path, such as `batch_norm`, or whose params are
            parts over ranks; or a state that depends on examples.

    >>> import funcnet as fn
    >>> f = defer_examples(fn.linear(1), fn.mse())
    >>> params, batch = fn.linear(1).init(fn.key(0), torch.ones(5, 2))[0], torch.ones(5, 2)
    >>> values, deferred, _ = f(params, (batch, torch.zeros(5, 1)))
    >>> values.shape, fn.example_norms(deferred).shape
    (torch.Size([5]), torch.Size([5]))
    """
    check_kind(name, model, Layer, "model")
    refuse_parts(name, model)
    check_kind(name, loss, Loss, "loss")
    for path, layer in mixing_layers(model):
        place = f"{model.name}[{path!r}] " if path else ""
        hint = "use one that normalizes each example, such as group_norm" * (
            layer.name == "batch_norm"
        )
        raise ValueError(
            f"{name}: {place}{layer.name} computes what is of one example from others of its "
            f"batch, so that no example has a gradient of its own{'; ' * bool(hint)}{hint}"
        )

    def run(
        params: Params,
        batch: tuple[Tree, Tree],
        state: Params = EMPTY,
        *,
        key: Tensor | None = None,
        train: bool = True,
    ) -> OfExamples:
        inputs = pair(name, batch)
        axes = axes_of(name, in_axes, inputs)
        if key is not None:
            check_key(name, key)
        count = count_of(name, inputs, axes)
        keys = split(key, count) if key is not None and model.takes_key else None

        def one(inputs: tuple[Tree, Tree], key: Tensor | None) -> tuple[Tensor, Deferred, Params]:
            # A batch of one: the axis comes back that vmap took away.
            x, target = tree.map(_with_axis, inputs, axes)
            y, pullback, after = model.forward(params, x, {**state}, key, train)
            value, loss_pullback = loss.vjp(y, target)
            if value.dim():
                raise ValueError(
                    f"{name}: expects a loss with a scalar value, got {tuple(value.shape)}; "
                    "pass reduction='mean' or reduction='sum' to the loss"
                )
            _check_state(name, after)
            deferred, _ = defer(pullback)(loss_pullback(), x=False)
            return value, deferred, after

        mapped_axes = tree.map(lambda axis: None if axis is _SHARED else axis, axes)
        in_axes_of_all = (mapped_axes, None if keys is None else 0)
        return batched(one, in_axes_of_all, (0, 0, None) if state else 0)(inputs, keys)

    return run


_SHARED = object()
"""Stands for the axis None, which in a tree would be no leaf."""


def axes_of(name: str, in_axes: Axes, inputs: tuple[Tree, Tree]) -> Tree:
    """An axis for each tensor of x and target, those below 0 counted from the front."""
    of: Any = inputs
    try:
        whole = optree.broadcast_prefix(
            in_axes, of, is_leaf=lambda each: each is None, none_is_leaf=True
        )
    except ValueError as error:
        raise TypeError(f"{name}: in_axes {in_axes!r} does not fit the batch: {error}") from None
    leaves, treedef = optree.tree_flatten(of, none_is_leaf=True)
    found: list[Any] = [
        _SHARED if axis is None or leaf is None else _axis(name, axis, leaf)
        for leaf, axis in zip(leaves, whole, strict=True)
    ]
    return treedef.unflatten(found)


def _axis(name: str, axis: int, leaf: Tensor) -> int:
    if not isinstance(axis, int) or isinstance(axis, bool):
        raise TypeError(f"{name}: in_axes expects integers and None, got {axis!r}")
    if not -leaf.dim() <= axis < leaf.dim():
        raise ValueError(f"{name}: in_axes: {axis} is no axis of {tree.describe(leaf)}")
    return axis % leaf.dim()


def _with_axis(leaf: Tensor, axis: Any) -> Tensor:
    return leaf if axis is _SHARED else leaf.unsqueeze(axis)


def count_of(name: str, inputs: Tree, axes: Tree) -> int:
    """How many examples a batch has."""
    pairs = zip(tree.leaves(inputs), tree.leaves(axes), strict=True)
    lengths = [leaf.shape[axis] for leaf, axis in pairs if axis is not _SHARED]
    if not lengths or not lengths[0]:
        raise ValueError(f"{name}: expects a batch of at least one example")
    return lengths[0]


def _check_state(name: str, state: Params) -> None:
    for path, leaf in tree.to_dotted(state).items():
        if is_mapped(leaf):
            raise ValueError(
                f"{name}: the new state {path!r} depends on the examples, so that each has its own"
            )


def mixing_layers(model: Layer, path: str = "") -> Iterator[tuple[str, Layer]]:
    """The layers that compute what is of one example from others, with their paths.

    >>> import funcnet as fn
    >>> [path for path, _ in mixing_layers(fn.serial(fn.linear(3), fn.batch_norm()))]
    ['1']
    """
    if not model.mixes_examples:
        return
    mixing = {name: child for name, child in model.children.items() if child.mixes_examples}
    if not mixing:
        yield path, model
    for name, child in mixing.items():
        yield from mixing_layers(child, join_paths(path, name))
