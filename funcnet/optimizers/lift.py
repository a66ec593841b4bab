"""From a formula to an optimizer: the formula knows leaves, the optimizer knows trees."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from operator import attrgetter
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from funcnet import tree
from funcnet.checks import check_kind, check_tensors
from funcnet.compiler.loops import without_values
from funcnet.core import EMPTY, Box, Optimizer, Params, Tree, function_name
from funcnet.errors import located, refuse_state
from funcnet.optimizers.each import Shaped
from funcnet.optimizers.leaves import Applied, Leaves, sum_into
from funcnet.optimizers.param_trees import Trees

_shape = attrgetter("shape")


def stateless(
    update: Callable[[Tensor, Tensor], Tensor],
    *,
    name: str | None = None,
    needs_all_leaves: bool = False,
    elementwise: bool = False,
    reduces: tuple[tuple[str, Any], ...] = (),
) -> Optimizer:
    """An optimizer, or a transform to chain, without state, lifted from a formula.

    Args:
        update: ``(g, p) -> updates``, where ``g`` are the gradients, or what the transform before
            makes of them, and ``p`` the params. It is written as for one tensor: operators,
            PyTorch's functions and a tensor's methods apply leaf by leaf, to all leaves at once.
        name: what errors and a chain's state call it; by default the constructor's name.
        needs_all_leaves: whether what the formula gives for a leaf depends on other leaves.
        elementwise: whether what it gives for an element depends on that element alone, so that
            ranks can update parts of a leaf; see `funcnet.Optimizer`.
        reduces: over which ranks it reduces the gradients, and how; see `funcnet.Optimizer`.

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

    return lifted(name, lambda params: {}, update_leaves, needs_all_leaves, elementwise, reduces)


def stateful(
    init: Callable[[Tensor], NamedTuple],
    update: Callable[[Tensor, Any, Tensor], tuple[Tensor, Any]],
    *,
    name: str | None = None,
    needs_all_leaves: bool = False,
    elementwise: bool = False,
) -> Optimizer:
    """An optimizer, or a transform to chain, with state, lifted from a formula.

    Args:
        init: ``p -> state``, a NamedTuple. What is made of ``p``, such as ``p.zeros_like()``, is
            a tree like the params outside of the formula; anything else is kept as it is.
        update: ``(g, state, p) -> (updates, state)``; see `stateless` for ``g`` and ``p``, and
            how to compute with them and with the entries of the state.
        name: what errors and a chain's state call it; by default the constructor's name.
        needs_all_leaves: whether what the formula gives for a leaf depends on other leaves.
        elementwise: whether what it gives for an element depends on that element alone, so that
            ranks can update parts of a leaf; see `funcnet.Optimizer`.

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
    told: Any = {"needs_all_leaves": needs_all_leaves, "elementwise": elementwise}
    return _with_state(name, init, update, **told)


def around(
    optimizer: Optimizer,
    init: Callable[[Tensor, Tree], NamedTuple],
    update: Callable[..., tuple[Tensor, Any]],
    *,
    name: str | None = None,
    gives_state: bool = False,
    needs_all_leaves: bool = False,
    elementwise: bool = False,
) -> Optimizer:
    """An optimizer around another one, lifted from a formula.

    Args:
        optimizer: the one inside.
        init: ``(p, inner) -> state``, a NamedTuple, as for `stateful`; ``inner`` is the first
            state of the optimizer inside, and one of the entries.
        update: ``(g, state, p, inner_update) -> (updates, state)``; see `stateful`. The optimizer
            inside is ``inner_update(g, state.inner) -> (updates, inner)``.
        name: what errors and a chain's state call it; by default the constructor's name.
        gives_state: whether the formula has no use for ``state.inner`` after ``inner_update``,
            which may then write to its memory where that is donated.
        needs_all_leaves: whether what the formula gives for a leaf depends on other leaves.
        elementwise: whether what it does itself for an element depends on that element alone; the
            whole is then as elementwise as the optimizer inside.

    Errors of the optimizer inside get the name in front.

    >>> class AverageState(NamedTuple):
    ...     mean: fn.Tree
    ...     inner: fn.Tree
    >>> def average_params(optimizer, decay):
    ...     def init(p, inner):
    ...         return AverageState(p.clone(), inner)
    ...     def update(g, state, p, inner_update):
    ...         updates, inner = inner_update(g, state.inner)
    ...         return updates, AverageState(torch.lerp(p + updates, state.mean, decay), inner)
    ...     return around(optimizer, init, update)
    >>> params = {"w": torch.ones(1)}
    >>> average = average_params(fn.sgd(0.5), 0.9)
    >>> average.update(params, average.init_state(params), params)
    ({'w': tensor([-0.5000])}, AverageState(mean={'w': tensor([0.9500])}, inner={}))
    """
    name = name or function_name(update)
    check_kind(name, optimizer, Optimizer)
    told: Any = {"needs_all_leaves": needs_all_leaves, "elementwise": elementwise}
    return _with_state(name, init, update, optimizer, gives_state, **told)


def _with_state(
    name: str,
    start: Callable[..., Any],
    formula: Callable[..., Any],
    optimizer: Optimizer | None = None,
    gives_state: bool = False,
    needs_all_leaves: bool = False,
    elementwise: bool = False,
) -> Optimizer:
    """`stateful`, or `around` an optimizer, whose formulas have an argument more."""
    inside = [] if optimizer is None else [optimizer]
    needs_all_leaves = needs_all_leaves or any([each.needs_all_leaves for each in inside])
    elementwise = elementwise and all([each.elementwise for each in inside])
    reduces = optimizer.reduces if optimizer else ()
    # Which entries are trees does not depend on the params, so none show it as well.
    example = start(Leaves([]), *[EMPTY for _ in inside])
    kind, like_params = type(example), [isinstance(entry, Leaves) for entry in example]
    shaped = any([isinstance(entry, Shaped) for entry in example])

    @lru_cache(maxsize=16)
    def shapes_of_state(shapes: tuple[torch.Size, ...]) -> list[list[torch.Size]]:
        """The shapes in each entry that is a tree, for params of these."""
        with without_values():
            params = Leaves([torch.empty(shape) for shape in shapes])
            state = start(params, *[EMPTY for _ in inside])
        return [[*map(_shape, entry)] if isinstance(entry, Leaves) else [] for entry in state]

    def init_state(params: Params) -> Tree:
        trees = Trees(params)
        state = start(trees.params, *[each.init_state(params) for each in inside])
        return kind(*[trees.join(e) if isinstance(e, Leaves) else e for e in state])

    def update_leaves(g: Leaves, opt_state: Tree, trees: Trees) -> tuple[Leaves, Tree]:
        check_state(name, kind, opt_state)
        own = shapes_of_state(tuple(trees.shapes)) if shaped else [trees.shapes] * len(kind._fields)
        old = [
            trees.split(entry, f"{name}: state.{field}", trees.donated, shapes)
            if is_tree
            else entry
            for field, entry, is_tree, shapes in zip(
                kind._fields, opt_state, like_params, own, strict=True
            )
        ]
        within = [partial(_update_inside, name, each, trees, gives_state) for each in inside]
        updates, *rest = formula(g, kind(*old), trees.params, *within)
        if len(rest) != 1 or not isinstance(rest[0], kind):
            raise TypeError(f"{name}: the formula must give (updates, {kind.__name__})")
        new = [
            trees.join(_kept(entry.to_dtypes(before))) if isinstance(before, Leaves) else entry
            for entry, before in zip(rest[0], old, strict=True)
        ]
        return updates.to_dtypes(trees.params), kind(*new)

    return lifted(name, init_state, update_leaves, needs_all_leaves, elementwise, reduces)


def check_state(name: str, kind: Any, opt_state: Tree) -> None:
    """Raise TypeError unless the state is the NamedTuple that the optimizer has."""
    if not isinstance(opt_state, kind):
        raise TypeError(
            f"{name}: expects the state {kind.__name__}({', '.join(kind._fields)}), "
            f"got {tree.describe(opt_state)}"
        )


def _update_inside(
    name: str, optimizer: Optimizer, trees: "Trees", donated: bool, g: Leaves, opt_state: Tree
) -> tuple[Leaves, Tree]:
    # The formula may use g again, which the optimizer inside may write to, or let go.
    given = Leaves(g.tensors)
    with located(name):
        return leaves_update(optimizer)(given, opt_state, trees.within(donated))


def lifted(
    name: str,
    init_state: Callable[[Params], Tree],
    update_leaves: Callable[..., Any],
    needs_all_leaves: bool = False,
    elementwise: bool = False,
    reduces: tuple[tuple[str, Any], ...] = (),
) -> Optimizer:
    """An optimizer from ``update_leaves(g, opt_state, trees) -> (updates, opt_state)``.

    In it, g and the updates are `Leaves`; ``trees`` are the `Trees` of the params.
    """

    def checked_init_state(params: Params) -> Tree:
        check_tensors(name, "params", params)
        return init_state(params)

    def update(grads: Tree, opt_state: Tree, params: Params) -> tuple[Tree, Tree]:
        check_tensors(name, "grads and params", (grads, params))
        trees = Trees(params)
        g = trees.split(grads, f"{name}: grads")
        updates, opt_state = update_leaves(g, opt_state, trees)
        return trees.join(updates), opt_state

    told = needs_all_leaves, elementwise, reduces
    return Optimizer(checked_init_state, update, name, update_leaves, None, *told)


def with_trees(name: str, optimizer: Optimizer, change: Callable[[Trees], Trees]) -> Optimizer:
    """The optimizer, of params of which it is told more."""
    inside = leaves_update(optimizer)

    def update_leaves(g: Leaves, opt_state: Tree, trees: Trees) -> tuple[Leaves, Tree]:
        return inside(g, opt_state, change(trees))

    made = lifted(name, optimizer.init_state, update_leaves, **optimizer.metadata)
    return with_loss_scale(made, optimizer.loss_scale)


def with_loss_scale(optimizer: Optimizer, loss_scale: Callable[[Tree], Tensor] | None) -> Optimizer:
    """The optimizer, whose gradients are to be those of the loss times a scale of its state's."""
    told: Any = optimizer.update_leaves, loss_scale
    return Optimizer(*optimizer, optimizer.name, *told, **optimizer.metadata)


def paths(p: Any) -> Sequence[str]:
    """The dotted path of each leaf of the params, for a formula that needs them.

    >>> stateless(lambda g, p: print(paths(p)) or g).update({"a": {"w": torch.ones(1)}}, {},
    ...                                                     {"a": {"w": torch.ones(1)}})
    ('a.w',)
    ({'a': {'w': tensor([1.])}}, {})
    """
    return _paths(p.treedef) if isinstance(p, Leaves) and p.tensors else ()


@lru_cache(maxsize=64)
def _paths(treedef: optree.PyTreeSpec) -> tuple[str, ...]:
    return tuple([tree.path_string(path) for path in treedef.paths()])


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
    check_tensors("apply_updates", "params and updates", (params, updates))
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
