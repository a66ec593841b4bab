"""From a formula to an optimizer: the formula knows leaves, the optimizer knows trees."""

from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet import tree
from funcnet.core import Optimizer, Params, Tree, function_name
from funcnet.optimizers.leaves import Leaves, leafwise

_flatten = tree.Flattener()
_dtype = attrgetter("dtype")


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

    def lifted(grads: Tree, opt_state: Tree, params: Params) -> tuple[Tree, Params]:
        if opt_state:
            raise ValueError(f"{name}: has no state, got state with {sorted(opt_state)}")
        trees = _Trees(name, params)
        return trees.join(formula(trees.split(grads, "grads"), trees.params), trees.params), {}

    return Optimizer(lambda params: {}, lifted, name)


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
        trees = _Trees(name, params)
        state = start(trees.params)
        return kind(*[trees.join(e, e) if isinstance(e, Leaves) else e for e in state])

    def lifted(grads: Tree, opt_state: Tree, params: Params) -> tuple[Tree, Tree]:
        if not isinstance(opt_state, kind):
            raise TypeError(
                f"{name}: expects the state {kind.__name__}({', '.join(kind._fields)}), "
                f"got {tree.describe(opt_state)}"
            )
        trees = _Trees(name, params)
        g = trees.split(grads, "grads")
        old = [
            trees.split(entry, f"state.{field}") if is_tree else entry
            for field, entry, is_tree in zip(kind._fields, opt_state, like_params, strict=True)
        ]
        updates, *rest = formula(g, kind(*old), trees.params)
        if len(rest) != 1 or not isinstance(rest[0], kind):
            raise TypeError(f"{name}: the formula must give (updates, {kind.__name__})")
        new = [
            trees.join(entry, before) if isinstance(before, Leaves) else entry
            for entry, before in zip(rest[0], old, strict=True)
        ]
        return trees.join(updates, trees.params), kind(*new)

    return Optimizer(init_state, lifted, name)


class _Trees:
    """The params of an update, flattened, and the trees that must be like them."""

    def __init__(self, name: str, params: Params) -> None:
        self.name = name
        leaves, self.treedef = _flatten(params)
        self.params = Leaves(leaves)

    def split(self, found: Tree, what: str) -> Leaves:
        what = f"{self.name}: {what}"
        return Leaves(tree.leaves_like(self.params.tensors, self.treedef, found, what))

    def join(self, leaves: Leaves, like: Leaves) -> Tree:
        new, old = leaves.tensors, like.tensors
        if [*map(_dtype, new)] != [*map(_dtype, old)]:
            new = [leaf.to(other.dtype) for leaf, other in zip(new, old, strict=True)]
        return self.treedef.unflatten(new)


def apply_updates(params: Params, updates: Tree) -> Any:
    """``params + updates``, leaf by leaf.

    >>> apply_updates({"w": torch.ones(1)}, {"w": torch.ones(1)})
    {'w': tensor([2.])}
    """
    trees = _Trees("apply_updates", params)
    return trees.join(
        leafwise(torch.add, trees.params, trees.split(updates, "updates")), trees.params
    )


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
