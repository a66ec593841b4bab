"""From a formula to an optimizer: the formula knows leaves, the optimizer knows trees."""

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet import tree
from funcnet.core import Box, Optimizer, Params, Tree, function_name
from funcnet.errors import refuse_state
from funcnet.optimizers.leaves import Applied, Leaves, sum_into

_flatten = tree.Flattener()
_shape = attrgetter("shape")


def stateless(update: Callable[[Tensor, Tensor], Tensor], *, name: str | None = None) -> Optimizer:
    """An optimizer, or a transform to chain, without state, lifted from a formula.

    Args:
        update: ``(g, p) -> updates``, where ``g`` are the gradients, or what the transform before
            makes of them, and ``p`` the params. It is written as for one tensor: operators,
            PyTorch's functions and a tensor's methods apply leaf by leaf, to all leaves at once.
        name: what errors and a chain's state call it; by default the constructor's name.

    >>> def clip(limit):
    ...     return fn.optimizers.stateless(lambda g, p: g.clamp(-limit, limit))
    >>> optimizer = fn.chain(clip(1.0), fn.sgd(0.5))
    >>> params = {"w": torch.tensor([1.0, 2.0])}
    >>> optimizer.update({"w": torch.tensor([0.1, 9.0])}, optimizer.init_state(params), params)[0]
    {'w': tensor([-0.0500, -0.5000])}
    """
    name = name or function_name(update)
    formula: Callable[..., Any] = update

    def update_leaves(g: Leaves, opt_state: Tree, trees: Trees) -> tuple[Leaves, Params]:
        if opt_state:
            refuse_state(name, opt_state)
        return formula(g, trees.params).to_dtypes(trees.params), {}

    return lifted(name, lambda params: {}, update_leaves)


def stateful(
    init: Callable[[Tensor], NamedTuple],
    update: Callable[[Tensor, Any, Tensor], tuple[Tensor, Any]],
    *,
    name: str | None = None,
) -> Optimizer:
    """An optimizer, or a transform to chain, with state, lifted from a formula.

    Args:
        init: ``p -> state``, a NamedTuple. What is made of ``p``, such as ``p.zeros_like()``, is
            a tree like the params outside of the formula; anything else is kept as it is.
        update: ``(g, state, p) -> (updates, state)``; see `stateless` for ``g`` and ``p``, and
            how to compute with them and with the entries of the state.
        name: what errors and a chain's state call it; by default the constructor's name.

    Updates have the dtypes of the params, and the state those that it had before.

    A whole optimizer, Lion (Chen et al. 2023):

    >>> from typing import NamedTuple
    >>> class LionState(NamedTuple):
    ...     m: fn.Tree
    >>> def scale_by_lion(b1=0.9, b2=0.99):
    ...     def init(p):
    ...         return LionState(torch.zeros_like(p))
    ...     def update(g, state, p):
    ...         direction = torch.sign(b1 * state.m + (1 - b1) * g)
    ...         return direction, LionState(b2 * state.m + (1 - b2) * g)
    ...     return fn.optimizers.stateful(init, update)
    >>> def lion(lr, weight_decay=0.0):
    ...     return fn.chain(
    ...         scale_by_lion(),
    ...         fn.optimizers.add_decayed_weights(weight_decay),
    ...         fn.optimizers.scale_by_learning_rate(lr),
    ...     )
    >>> params = {"w": torch.tensor([3.0, -2.0])}
    >>> lion(0.1).update(params, lion(0.1).init_state(params), params)
    ({'w': tensor([-0.1000,  0.1000])},
     {'scale_by_lion': LionState(m={'w': tensor([ 0.0300, -0.0200])})})
    >>> fn.testing.check_optimizer(lion(0.1), params)
    """
    name = name or function_name(update)
    formula: Callable[..., Any] = update
    start: Callable[..., Any] = init
    # Which entries are trees does not depend on the params, so none show it as well.
    example = start(Leaves([]))
    kind, like_params = type(example), [isinstance(entry, Leaves) for entry in example]

    def init_state(params: Params) -> Tree:
        trees = Trees(params)
        state = start(trees.params)
        return kind(*[trees.join(e) if isinstance(e, Leaves) else e for e in state])

    def update_leaves(g: Leaves, opt_state: Tree, trees: Trees) -> tuple[Leaves, Tree]:
        if not isinstance(opt_state, kind):
            raise TypeError(
                f"{name}: expects the state {kind.__name__}({', '.join(kind._fields)}), "
                f"got {tree.describe(opt_state)}"
            )
        old = [
            trees.split(entry, f"{name}: state.{field}", trees.donated) if is_tree else entry
            for field, entry, is_tree in zip(kind._fields, opt_state, like_params, strict=True)
        ]
        updates, *rest = formula(g, kind(*old), trees.params)
        if len(rest) != 1 or not isinstance(rest[0], kind):
            raise TypeError(f"{name}: the formula must give (updates, {kind.__name__})")
        new = [
            trees.join(_kept(entry.to_dtypes(before))) if isinstance(before, Leaves) else entry
            for entry, before in zip(rest[0], old, strict=True)
        ]
        return updates.to_dtypes(trees.params), kind(*new)

    return lifted(name, init_state, update_leaves)


class Trees:
    """The params of an update, flattened; takes trees like them apart and puts them together.

    Where params and state are ``donated``, their leaves count as fresh: their memory may be
    written to; `Applied` updates are then those of the last transform of a chain alone.
    """

    def __init__(self, params: Params, donated: bool = False) -> None:
        leaves, self.treedef = _flatten(params)
        # Two leaves that are one tensor would be written to twice.
        self.donated = donated and len({*map(id, leaves)}) == len(leaves)
        self.params = Leaves(leaves, self.donated)
        self.shapes = [*map(_shape, leaves)]

    def split(self, found: Tree, what: str, fresh: bool = False) -> Leaves:
        """The leaves of a tree; ValueError with ``what`` unless it is like the params."""
        return Leaves(tree.leaves_like(self.shapes, self.treedef, found, what), fresh)

    def join(self, leaves: Leaves) -> Any:
        """The tree of these leaves."""
        return self.treedef.unflatten(leaves)


def lifted(
    name: str, init_state: Callable[[Params], Tree], update_leaves: Callable[..., Any]
) -> Optimizer:
    """An optimizer from ``update_leaves(g, opt_state, trees) -> (updates, opt_state)``.

    In it, g and the updates are `Leaves`; ``trees`` are the `Trees` of the params.
    """

    def update(grads: Tree, opt_state: Tree, params: Params) -> tuple[Tree, Tree]:
        trees = Trees(params)
        g = trees.split(grads, f"{name}: grads")
        updates, opt_state = update_leaves(g, opt_state, trees)
        return trees.join(updates), opt_state

    return Optimizer(init_state, update, name, update_leaves)


def leaves_update(optimizer: Optimizer) -> Callable[..., Any]:
    """``update_leaves`` of any optimizer."""
    return optimizer.update_leaves or partial(_update_as_tree, optimizer)


def _update_as_tree(
    optimizer: Optimizer, g: Leaves, opt_state: Tree, trees: Trees
) -> tuple[Leaves, Tree]:
    updates, opt_state = optimizer.update(trees.join(g), opt_state, trees.join(trees.params))
    return trees.split(updates, f"{optimizer.name}: updates"), opt_state


def apply_updates(params: Params, updates: Tree) -> Any:
    """``params + updates``, leaf by leaf.

    >>> apply_updates({"w": torch.ones(1)}, {"w": torch.ones(1)})
    {'w': tensor([2.])}
    """
    trees = Trees(params)
    return trees.join(_added(trees.params, trees.split(updates, "apply_updates: updates")))


def step_params(
    optimizer: Optimizer, grads: Box, opt_state: Tree, params: Params, donated: bool = False
) -> tuple[Any, Tree]:
    """``optimizer.update`` and then `apply_updates`, with the params flattened once.

    With two flattenings an eager step of SGD on a small net takes 5 % longer. ``grads`` are in a
    box, so that they go when they are read: an eighth of the memory of an eager step of Adam.
    ``donated`` says that the memory of params and opt_state may be written to.
    """
    trees = Trees(params, donated)
    left = [trees.split(grads.pop(), f"{optimizer.name}: grads")]
    updates, opt_state = leaves_update(optimizer)(left.pop(), opt_state, trees)
    if [*map(_shape, updates)] != trees.shapes:
        trees.split(trees.join(updates), f"{optimizer.name}: updates")
    return trees.join(_added(trees.params, updates)), opt_state


def _added(params: Leaves, updates: Leaves) -> Leaves:
    if isinstance(updates, Applied):
        return updates
    added = sum_into(params, updates) if params.fresh else sum_into(updates, params)
    return added.to_dtypes(params)


def _kept(leaves: Leaves) -> Leaves:
    """Leaves that the state keeps, and which may be the updates as well."""
    leaves.fresh = False
    return leaves


def zero_step(p: Tensor) -> Tensor:
    """The number of updates before the first, a 0-d int64 zero on the device of the leaves.

    For the ``init`` of a transform that counts:

    >>> class WarmupState(NamedTuple):
    ...     step: Tensor
    >>> def warmup(steps):
    ...     def update(g, state, p):
    ...         step = state.step + 1
    ...         return (step / steps).clamp(max=1.0) * g, WarmupState(step)
    ...     return stateful(lambda p: WarmupState(zero_step(p)), update)
    >>> params = {"w": torch.ones(1)}
    >>> warmup(4).update(params, warmup(4).init_state(params), params)
    ({'w': tensor([0.2500])}, WarmupState(step=tensor(1)))
    """
    device = next((leaf.device for leaf in p), torch.device("cpu"))
    return torch.zeros((), dtype=torch.int64, device=device)
