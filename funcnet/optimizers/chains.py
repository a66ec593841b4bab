"""One transform after another."""

from collections.abc import Callable, Mapping
from typing import Any

import optree

from funcnet.checks import check_kind
from funcnet.core import EMPTY, Optimizer, Params, Tree
from funcnet.errors import locate
from funcnet.optimizers.leaves import Leaves
from funcnet.optimizers.lift import leaves_update, lifted
from funcnet.optimizers.param_trees import Trees


def chain(*transforms: Optimizer, **named: Optimizer) -> Optimizer:
    """One transform after another: each takes what the one before it gives for the gradients.

    Args:
        transforms: called by the names of their constructors; and after them
        named: transforms with names of the user's, for two of one constructor.

    State:
        ``{name: state of the transform}``, without those that have none.
    Raises:
        the transforms' errors, with ``chain['name']`` in front.
        ValueError: two of one name; gradients that are reduced over ranks, as by
            `funcnet.distributed.mean`, after a transform that needs all of them.

    >>> transforms = fn.optimizers
    >>> optimizer = fn.chain(transforms.trace(0.9), transforms.scale_by_learning_rate(0.1))
    >>> params = {"w": torch.ones(1)}
    >>> optimizer.update(params, optimizer.init_state(params), params)
    ({'w': tensor([-0.1000])},
     {'trace': TraceState(trace={'w': tensor([1.])}, step=tensor(1))})
    """
    children: dict[str, Optimizer] = {}
    for given, transform in [*((None, t) for t in transforms), *named.items()]:
        check_kind("chain", transform, Optimizer)
        name = given or transform.name
        if name in children:
            raise ValueError(f"chain: two are named {name!r}; name one, as in chain(a, other=b)")
        early = [child for child, part in children.items() if part.needs_all_leaves]
        if transform.reduces and early:
            raise ValueError(
                f"chain: {name!r} reduces gradients over ranks, so it must come before "
                f"{early[0]!r}, which needs those of all ranks"
            )
        children[name] = transform
    return chained("chain", children)


def chained(name: str, children: Mapping[str, Optimizer]) -> Optimizer:
    """A chain of transforms by name, called ``name`` itself."""

    def init_state(params: Params) -> Params:
        return present({child: part.init_state(params) for child, part in children.items()})

    updates = {child: leaves_update(part) for child, part in children.items()}

    def update_leaves(g: Leaves, opt_state: Params, trees: Trees) -> tuple[Leaves, Params]:
        check_states(name, children, opt_state)
        states, params = {}, trees.params
        donated, last = params.fresh, next(reversed(updates), None)
        for child, update in updates.items():
            params.fresh = donated and child == last
            try:
                g, states[child] = update(g, opt_state.get(child, EMPTY), trees)
            except Exception as error:
                locate(error, f"{name}[{child!r}]")
                raise
        params.fresh = donated
        return g, present(states)

    needs_all_leaves = any([part.needs_all_leaves for part in children.values()])
    elementwise = all([part.elementwise for part in children.values()])
    reduces = tuple([pair for part in children.values() for pair in part.reduces])
    return lifted(name, init_state, update_leaves, needs_all_leaves, elementwise, reduces)


def check_states(name: str, children: Mapping[str, Optimizer], opt_state: Tree) -> None:
    """Raise ValueError unless it is a dict of states of some of these."""
    is_dict = isinstance(opt_state, Mapping)
    if not (is_dict and opt_state.keys() <= children.keys()):
        found = sorted(opt_state) if is_dict else type(opt_state).__name__
        expected = f"a dict of the states of {list(children)}"
        raise ValueError(f"{name}: expects {expected}, got {found}")


def find_states(opt_state: Tree, wanted: Callable[[Any], bool]) -> list[Any]:
    """The states for which ``wanted`` is true in the state of a whole optimizer; the outermost.

    >>> nested = {"scale_by_adam": (1, 2), "others": {"inner": (3,)}}
    >>> find_states(nested, lambda state: isinstance(state, tuple))
    [(3,), (1, 2)]
    """
    leaves = optree.tree_leaves(opt_state, is_leaf=wanted)
    return [*filter(wanted, leaves)]


def present(states: Params) -> Params:
    """The states but those that are ``{}``."""
    return {name: state for name, state in states.items() if not isinstance(state, dict) or state}
