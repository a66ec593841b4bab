"""One transform after another."""

from collections.abc import Mapping

from funcnet.core import EMPTY, Optimizer, Params, Tree, locate


def chain(*transforms: Optimizer, **named: Optimizer) -> Optimizer:
    """One transform after another: each takes what the one before it gives for the gradients.

    Args:
        transforms: called by the names of their constructors; and after them
        named: transforms with names of the user's, for two of one constructor.

    State: ``{name: state of the transform}``, without those that have none.
    Raises: the transforms' errors, with ``chain['name']`` in front; ValueError for two of one name.

    >>> transforms = fn.optimizers
    >>> optimizer = fn.chain(transforms.trace(0.9), transforms.scale_by_learning_rate(0.1))
    >>> params = {"w": torch.ones(1)}
    >>> optimizer.update(params, optimizer.init_state(params), params)
    ({'w': tensor([-0.1000])},
     {'trace': TraceState(trace={'w': tensor([1.])}, step=tensor(1))})
    """
    children: dict[str, Optimizer] = {}
    for given, transform in [*((None, t) for t in transforms), *named.items()]:
        if not isinstance(transform, Optimizer):
            hint = "; call its constructor" if callable(transform) else ""
            raise TypeError(f"chain: expects optimizers, got {type(transform).__name__}{hint}")
        name = given or transform.name
        if name in children:
            raise ValueError(f"chain: two are named {name!r}; name one, as in chain(a, other=b)")
        children[name] = transform
    return chained("chain", children)


def chained(name: str, children: Mapping[str, Optimizer]) -> Optimizer:
    """A chain of transforms by name, called ``name`` itself."""

    def init_state(params: Params) -> Params:
        return _present({child: part.init_state(params) for child, part in children.items()})

    def update(grads: Tree, opt_state: Params, params: Params) -> tuple[Tree, Params]:
        if not isinstance(opt_state, Mapping) or not opt_state.keys() <= children.keys():
            found = (
                sorted(opt_state) if isinstance(opt_state, Mapping) else type(opt_state).__name__
            )
            raise ValueError(
                f"{name}: expects a dict of the states of {list(children)}, got {found}"
            )
        states = {}
        for child, transform in children.items():
            try:
                grads, states[child] = transform.update(grads, opt_state.get(child, EMPTY), params)
            except Exception as error:
                locate(error, f"{name}[{child!r}]")
                raise
        return grads, _present(states)

    return Optimizer(init_state, update, name)


def _present(states: Params) -> Params:
    """The states but those that are ``{}``."""
    return {name: s for name, s in states.items() if not isinstance(s, Mapping) or s}
