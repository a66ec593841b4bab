"""Combinators: constructors of layers from layers.

Parameters, state and pullbacks of the children are dicts by child name, sparse: a child without
them has no entry. A child's key is folded from the combinator's by the child's name, so adding a
layer changes no other layer's noise. `residual` and `shared` have one child and add nothing: its
parameters are theirs.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from funcnet import tree
from funcnet.core import (
    EMPTY,
    Anatomy,
    Layer,
    Params,
    Pullback,
    Tree,
    anatomy,
    locate,
    pull,
    sum_cotangents,
    with_anatomy,
)
from funcnet.random import fold_in


class _Child:
    """A named child of a combinator: its entry of each tree, its key, its place in errors."""

    __slots__ = ("_takes_key", "layer", "name", "place", "short_apply", "short_vjp")

    def __init__(self, parent: str, name: str, layer: Layer) -> None:
        self.name = name
        self.layer = layer
        self.place = f"{parent}[{name!r}]"
        self._takes_key = anatomy(layer).takes_key
        self.short_apply: Callable[..., Any] | None
        self.short_vjp: Callable[..., Any] | None
        self.short_apply, self.short_vjp = anatomy(layer).short or (None, None)

    def _key(self, key: Tensor | None) -> Tensor | None:
        return fold_in(key, self.name) if self._takes_key and key is not None else None

    def init(self, key: Tensor, x: Tree) -> tuple[Params, Params]:
        """The child's ``(params, state)``."""
        return _within(self.place, lambda: self.layer.init(fold_in(key, self.name), x))

    def infer(self, params: Params, x: Tree, state: Params) -> Tree:
        """The child's output, on the meta device."""
        key = torch.empty(2, dtype=torch.int64, device="meta") if self._takes_key else None
        params, state = tree.to_meta(params), tree.to_meta(state)
        return _within(self.place, self.layer.apply, params, x, state, key=key)[0]

    def apply(
        self, params: Params, x: Tree, state: Params, key: Tensor | None, train: bool
    ) -> tuple[Tree, Params]:
        """The child's ``(y, state)``, of the combinator's trees and key."""
        name = self.name
        own = params.get(name, EMPTY)
        try:
            if self.short_apply is not None and name not in state:
                return self.short_apply(own, x), {}
            own_state = state.get(name, {})
            return self.layer.apply(own, x, own_state, key=self._key(key), train=train)
        except Exception as error:
            locate(error, self.place)
            raise

    def vjp(
        self, params: Params, x: Tree, state: Params, key: Tensor | None, train: bool
    ) -> tuple[Tree, Pullback, Params]:
        """The child's ``(y, pullback, state)``, of the combinator's trees and key."""
        name = self.name
        own = params.get(name, EMPTY)
        try:
            if self.short_vjp is not None and name not in state:
                return *self.short_vjp(own, x), {}
            own_state = state.get(name, {})
            return self.layer.vjp(own, x, own_state, key=self._key(key), train=train)
        except Exception as error:
            locate(error, self.place)
            raise


def _within(where: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function; its errors get ``where`` in front."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        locate(error, where)
        raise


def _named(parent: str, layers: tuple[Layer, ...], named: Mapping[str, Layer]) -> dict[str, Layer]:
    if layers and named:
        raise TypeError(f"{parent}: expects layers by position or by name, not both")
    children = dict(named) or {str(position): layer for position, layer in enumerate(layers)}
    for name, layer in children.items():
        if not isinstance(layer, Layer):
            hint = "; call its constructor" if callable(layer) else ""
            raise TypeError(
                f"{parent}[{name!r}]: expects a Layer, got {type(layer).__name__}{hint}"
            )
        if not name or "." in name:
            raise ValueError(f"{parent}: a name must not be empty or have a dot, got {name!r}")
    return children


def _check_names(parent: str, what: str, found: Params, children: Mapping[str, Layer]) -> None:
    if type(found) is not dict and not isinstance(found, Mapping):
        raise TypeError(f"{parent}: expects a dict of {what}, got {tree.describe(found)}")
    if not found.keys() <= children.keys():
        extra = sorted(found.keys() - children.keys())
        raise ValueError(f"{parent}: {what} has {extra}, but the layers are {list(children)}")


def serial(*layers: Layer, **named: Layer) -> Layer:
    """Layers one after another: ``y = f_n(... f_1(x))``.

    Args:
        layers: children, named "0", "1", ... as in ``torch.nn.Sequential``; or
        named: children by name.

    Params: ``{name: params of the child}``, so that dotted paths are Sequential's.
    VJP: the children's pullbacks, last to first.
    Raises: the children's errors, with ``serial['name']`` in front.
    Source: ``torch.nn.Sequential``.

    >>> import funcnet as fn
    >>> net = fn.serial(hidden=fn.linear(25), act=fn.relu(), out=fn.linear(2))
    >>> params, _ = net.init(fn.key(0), torch.ones(100, 3))
    >>> {path: tuple(leaf.shape) for path, leaf in fn.tree.to_dotted(params).items()}
    {'hidden.weight': (25, 3), 'hidden.bias': (25,), 'out.weight': (2, 25), 'out.bias': (2,)}
    """
    return _serial(_named("serial", layers, named))


def serial_rule(
    residuals: dict[str, Any],
    dy: Tree,
    names: tuple[str, ...],
    learned: frozenset[str],
    *,
    params: bool,
    x: bool,
) -> tuple[Params | None, Tree]:
    """The children's pullbacks from the last to the first that is needed."""
    dparams: dict[str, Params] = {name: {} for name in names if name in learned}
    remaining = len(learned) if params else 0
    for name in reversed(names):
        learns = params and name in learned
        remaining -= learns
        if not x and remaining == 0 and not learns:
            return (dparams if params else None), None
        try:
            dchild, dy = pull(residuals, name, dy, params=learns, x=x or remaining > 0)
            if dy is None and remaining:
                raise TypeError("passes no cotangent to the layers before it, which have params")
        except Exception as error:
            locate(error, f"serial[{name!r}]")
            raise
        if learns:
            dparams[name] = dchild
    return (dparams if params else None), dy if x else None


def _serial(layers: Mapping[str, Layer]) -> Layer:
    children = [_Child("serial", name, layer) for name, layer in layers.items()]
    names = tuple(layers)

    def init(key: Tensor, x: Tree) -> tuple[Params, Params]:
        params, state = {}, {}
        device = _within("serial:", tree.device_of, x)
        example = tree.to_meta(x)
        for child in children:
            own, own_state = child.init(key, tree.placeholder(example, device))
            example = child.infer(own, example, own_state)
            if own:
                params[child.name] = own
            if own_state:
                state[child.name] = own_state
        return params, state

    def check(params: Params, state: Params) -> None:
        _check_names("serial", "params", params, layers)
        if state:
            _check_names("serial", "state", state, layers)

    def apply(
        params: Params,
        x: Tree,
        state: Params = EMPTY,
        *,
        key: Tensor | None = None,
        train: bool = False,
    ) -> tuple[Tree, Params]:
        check(params, state)
        new_state = {}
        for child in children:
            x, own_state = child.apply(params, x, state, key, train)
            if own_state:
                new_state[child.name] = own_state
        return x, new_state

    def vjp(
        params: Params,
        x: Tree,
        state: Params = EMPTY,
        *,
        key: Tensor | None = None,
        train: bool = True,
    ) -> tuple[Tree, Pullback, Params]:
        check(params, state)
        new_state, pullbacks = {}, {}
        for child in children:
            x, pullbacks[child.name], own_state = child.vjp(params, x, state, key, train)
            if own_state:
                new_state[child.name] = own_state
        return x, Pullback(serial_rule, pullbacks, (names, frozenset(params)), x), new_state

    return with_anatomy(Layer(init, apply, vjp), _anatomy("serial", layers, _serial))


def _anatomy(
    name: str, layers: Mapping[str, Layer], rebuild: Callable[[Mapping[str, Layer]], Layer]
) -> Anatomy:
    takes_key = any(anatomy(layer).takes_key for layer in layers.values())
    return Anatomy(name, layers, rebuild, takes_key)


def parallel(*layers: Layer, **named: Layer) -> Layer:
    """Layers side by side: the i-th layer is applied to the i-th input.

    Inputs: x, a tuple with one tree a layer, or, for named layers, a dict with their names.
    Returns: y, a tuple or dict like x.
    Params: ``{name: params of the child}``.
    VJP: the children's, side by side.

    >>> import funcnet as fn
    >>> net = fn.parallel(fn.relu(), fn.tanh())
    >>> net.apply({}, (torch.tensor([-1.0]), torch.tensor([0.0])))[0]
    (tensor([0.]), tensor([0.]))
    """
    return _side_by_side("parallel", _named("parallel", layers, named))


def branch(*layers: Layer, **named: Layer) -> Layer:
    """Several layers of one input: ``y = (f_1(x), ..., f_n(x))``.

    Returns: y, a tuple, or for named layers a dict.
    Params: ``{name: params of the child}``.
    VJP: dx is the sum of the children's.

    >>> import funcnet as fn
    >>> fn.branch(fn.relu(), fn.identity()).apply({}, torch.tensor([-1.0]))[0]
    (tensor([0.]), tensor([-1.]))
    """
    return _side_by_side("branch", _named("branch", layers, named))


def side_by_side_rule(
    residuals: dict[str, Any],
    dy: Tree,
    kind: str,
    names: tuple[str, ...],
    learned: frozenset[str],
    as_dict: bool,
    *,
    params: bool,
    x: bool,
) -> tuple[Params | None, Tree]:
    """Each child's pullback of its own cotangent; one common input gets the sum."""
    dparams: dict[str, Params] = {}
    dx = []
    pieces = [dy[name] for name in names] if as_dict else dy
    for name, own_dy in zip(names, pieces, strict=True):
        learns = params and name in learned
        place = f"{kind}[{name!r}]"
        dchild, own_dx = _within(place, pull, residuals, name, own_dy, params=learns, x=x)
        if learns:
            dparams[name] = dchild
        dx.append(own_dx)
    if not x:
        return (dparams if params else None), None
    together = sum_cotangents(dx) if kind == "branch" else _collect(names, dx, as_dict)
    return (dparams if params else None), together


def _pieces(kind: str, x: Tree, names: tuple[str, ...], as_dict: bool) -> list[Tree]:
    """One tree for each child of a tuple or dict of them."""
    if as_dict and isinstance(x, Mapping):
        if type(x) is not dict or x.keys() != set(names):
            raise ValueError(f"{kind}: x expects a dict with {list(names)}, got {sorted(x)}")
        return [x[name] for name in names]
    if not as_dict and type(x) is tuple and len(x) == len(names):
        return list(x)
    form = f"a dict with {list(names)}" if as_dict else f"a tuple of {len(names)}"
    got = f"a tuple of {len(x)}" if type(x) is tuple else tree.describe(x)
    raise ValueError(f"{kind}: x expects {form}, got {got}")


def _collect(names: tuple[str, ...], values: list[Tree], as_dict: bool) -> Tree:
    return dict(zip(names, values, strict=True)) if as_dict else tuple(values)


def _side_by_side(kind: str, layers: Mapping[str, Layer]) -> Layer:
    children = [_Child(kind, name, layer) for name, layer in layers.items()]
    names = tuple(layers)
    positional = names == tuple(str(position) for position in range(len(names)))

    def inputs(x: Tree) -> tuple[list[Tree], bool]:
        if kind == "branch":
            return [x] * len(children), not positional
        as_dict = not positional and not isinstance(x, tuple)
        return _pieces(kind, x, names, as_dict), as_dict

    def prepared(params: Params, x: Tree, state: Params) -> tuple[list[Tree], bool]:
        _check_names(kind, "params", params, layers)
        _check_names(kind, "state", state, layers)
        return inputs(x)

    def init(key: Tensor, x: Tree) -> tuple[Params, Params]:
        params, state = {}, {}
        for child, piece in zip(children, inputs(x)[0], strict=True):
            own, own_state = child.init(key, piece)
            if own:
                params[child.name] = own
            if own_state:
                state[child.name] = own_state
        return params, state

    def apply(
        params: Params,
        x: Tree,
        state: Params = EMPTY,
        *,
        key: Tensor | None = None,
        train: bool = False,
    ) -> tuple[Tree, Params]:
        pieces, as_dict = prepared(params, x, state)
        y, new_state = [], {}
        for child, piece in zip(children, pieces, strict=True):
            own_y, own_state = child.apply(params, piece, state, key, train)
            y.append(own_y)
            if own_state:
                new_state[child.name] = own_state
        return _collect(names, y, as_dict), new_state

    def vjp(
        params: Params,
        x: Tree,
        state: Params = EMPTY,
        *,
        key: Tensor | None = None,
        train: bool = True,
    ) -> tuple[Tree, Pullback, Params]:
        pieces, as_dict = prepared(params, x, state)
        y, pullbacks, new_state = [], {}, {}
        for child, piece in zip(children, pieces, strict=True):
            own_y, pullbacks[child.name], own_state = child.vjp(params, piece, state, key, train)
            y.append(own_y)
            if own_state:
                new_state[child.name] = own_state
        static = (kind, names, frozenset(params), as_dict)
        together = _collect(names, y, as_dict)
        return together, Pullback(side_by_side_rule, pullbacks, static, together), new_state

    return with_anatomy(
        Layer(init, apply, vjp),
        _anatomy(kind, layers, lambda layers: _side_by_side(kind, layers)),
    )


def residual_rule(
    residuals: dict[str, Any], dy: Tree, *, params: bool, x: bool
) -> tuple[Params | None, Tree]:
    """``dx = dy + df``."""
    dparams, dx = _within("residual", pull, residuals, "layer", dy, params=params, x=x)
    return dparams, sum_cotangents([dy, dx]) if x else None


def residual(layer: Layer) -> Layer:
    """``y = x + f(x)``, for a layer that keeps the shape.

    Params, state and key: those of the layer, with nothing in between.
    VJP: ``dx = dy + df(dy)``.
    Source: He et al. 2016.

    >>> import funcnet as fn
    >>> fn.residual(fn.relu()).apply({}, torch.tensor([-1.0, 2.0]))[0]
    tensor([-1.,  4.])
    """
    _named("residual", (layer,), {})

    def join(x: Tree, y: Tree) -> Tree:
        if not tree.alike(x, y):
            raise ValueError(
                f"residual: the layer must keep the shape and dtype {tree.describe(x)}, "
                f"got {tree.describe(y)}"
            )
        return tree.map(torch.add, x, y)

    def apply(
        params: Params,
        x: Tree,
        state: Params = EMPTY,
        *,
        key: Tensor | None = None,
        train: bool = False,
    ) -> tuple[Tree, Params]:
        y, state = _within("residual", layer.apply, params, x, {**state}, key=key, train=train)
        return join(x, y), state

    def vjp(
        params: Params,
        x: Tree,
        state: Params = EMPTY,
        *,
        key: Tensor | None = None,
        train: bool = True,
    ) -> tuple[Tree, Pullback, Params]:
        y, pullback, state = _within(
            "residual", layer.vjp, params, x, {**state}, key=key, train=train
        )
        y = join(x, y)
        return y, Pullback(residual_rule, {"layer": pullback}, y=y), state

    def init(key: Tensor, x: Tree) -> tuple[Params, Params]:
        return _within("residual", layer.init, key, x)

    return with_anatomy(
        Layer(init, apply, vjp),
        Anatomy(
            "residual",
            {"": layer},
            lambda children: residual(children[""]),
            anatomy(layer).takes_key,
        ),
    )


def shared_rule(
    residuals: dict[str, Any], dy: tuple[Tree, ...], *, params: bool, x: bool
) -> tuple[Params | None, tuple[Tree, ...] | None]:
    """The gradients of all uses are summed."""
    dparams, dx = None, []
    for name, own_dy in zip(list(residuals), dy, strict=True):
        own_dparams, own_dx = _within(
            f"shared[{name}]", pull, residuals, name, own_dy, params=params, x=x
        )
        if params:
            dparams = own_dparams if dparams is None else sum_cotangents([dparams, own_dparams])
        dx.append(own_dx)
    return dparams, tuple(dx) if x else None


def shared(layer: Layer) -> Layer:
    """One layer, with one set of parameters, applied to each of a tuple of inputs.

    State passes from one use to the next; the key is folded by the position of the input.

    Inputs: x, a tuple of trees of one shape.
    Returns: y, a tuple.
    Params: those of the layer.
    VJP: ``dparams`` is the sum over the uses.
    Source: siamese networks, Bromley et al. 1993.

    >>> import funcnet as fn
    >>> net = fn.shared(fn.linear(1, bias=False))
    >>> y, pullback, _ = net.vjp({"weight": torch.ones(1, 2)}, (torch.ones(2), torch.zeros(2)))
    >>> y
    (tensor([2.]), tensor([0.]))
    >>> pullback((torch.ones(1), torch.ones(1)))[0]
    {'weight': tensor([[1., 1.]])}
    """
    _named("shared", (layer,), {})
    takes_key = anatomy(layer).takes_key

    def uses(x: tuple[Tree, ...], key: Tensor | None) -> list[tuple[Tree, Tensor | None]]:
        if type(x) is not tuple or not x:
            raise ValueError(f"shared: expects a tuple of inputs, got {tree.describe(x)}")
        if key is None or not takes_key:
            return [(piece, None) for piece in x]
        return [(piece, fold_in(key, use)) for use, piece in enumerate(x)]

    def init(key: Tensor, x: tuple[Tree, ...]) -> tuple[Params, Params]:
        return _within("shared", layer.init, key, uses(x, None)[0][0])

    def apply(
        params: Params,
        x: tuple[Tree, ...],
        state: Params = EMPTY,
        *,
        key: Tensor | None = None,
        train: bool = False,
    ) -> tuple[tuple[Tree, ...], Params]:
        y = []
        state = {**state}
        for use, (piece, own_key) in enumerate(uses(x, key)):
            own_y, state = _within(
                f"shared[{use}]", layer.apply, params, piece, state, key=own_key, train=train
            )
            y.append(own_y)
        return tuple(y), state

    def vjp(
        params: Params,
        x: tuple[Tree, ...],
        state: Params = EMPTY,
        *,
        key: Tensor | None = None,
        train: bool = True,
    ) -> tuple[tuple[Tree, ...], Pullback, Params]:
        y, pullbacks = [], {}
        state = {**state}
        for use, (piece, own_key) in enumerate(uses(x, key)):
            own_y, pullbacks[str(use)], state = _within(
                f"shared[{use}]", layer.vjp, params, piece, state, key=own_key, train=train
            )
            y.append(own_y)
        return tuple(y), Pullback(shared_rule, pullbacks, y=tuple(y)), state

    return with_anatomy(
        Layer(init, apply, vjp),
        Anatomy("shared", {"": layer}, lambda children: shared(children[""]), takes_key),
    )
