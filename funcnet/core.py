"""The protocol: what a layer, a loss and an optimizer are, and how a layer is lifted into it.

::

    Layer      = (init, apply, vjp)
      init (key, x)                                         -> (params, state)
      apply(params, x, state={}, *, key=None, train=False)  -> (y, state)
      vjp  (params, x, state={}, *, key=None, train=True)   -> (y, pullback, state)
           pullback(dy, *, params=True, x=True)             -> (dparams, dx)

    Loss       = (apply, vjp)
      apply(prediction, target)                             -> value
      vjp  (prediction, target)                             -> (value, pullback)
           pullback(dvalue=1.0)                             -> dprediction

    Optimizer  = (init_state, update)
      init_state(params)                                    -> opt_state
      update(grads, opt_state, params)                      -> (updates, opt_state)
"""

from collections.abc import Callable, Hashable, Mapping
from functools import reduce
from typing import Any, NamedTuple, NoReturn

import optree
import torch
from torch import Tensor

from funcnet import tree

Tree = Any
"""A pytree of tensors: a tensor, or a tuple or dict of trees."""

Params = Mapping[str, Any]
"""A nested dict with string keys and tensor leaves. State is one too."""

EMPTY: Params = {}
"""What stands for absent params and state. Nothing writes to it, and nobody gets it as a result:
a caller owns what is returned, and may write to it."""


class Layer(NamedTuple):
    """Three pure functions, ``(init, apply, vjp)``; see the module's docstring for the protocol.

    A layer is made by a constructor such as `linear`, by a combinator such as `serial`, by
    `stateless` from the short triple, or directly: ``Layer(init, apply, vjp)``.
    """

    init: Callable[..., tuple[Params, Params]]
    apply: Callable[..., tuple[Tree, Params]]
    vjp: Callable[..., tuple[Tree, "Pullback", Params]]

    def __repr__(self) -> str:
        name, children, *_ = anatomy(self)
        inside = ", ".join(
            f"{child}={layer!r}" if child else repr(layer) for child, layer in children.items()
        )
        return f"{name}({inside})"


class Loss(NamedTuple):
    """Two pure functions, ``(apply, vjp)``: a scalar of a prediction and a target."""

    apply: Callable[[Tree, Tree], Tensor]
    vjp: Callable[[Tree, Tree], tuple[Tensor, "LossPullback"]]


class Optimizer(NamedTuple):
    """Two pure functions, ``(init_state, update)``: from gradients to what is added to params."""

    init_state: Callable[[Params], Tree]
    update: Callable[[Tree, Tree, Params], tuple[Tree, Tree]]


class TrainState(NamedTuple):
    """All that a training run is: restore it, and the run goes on bit for bit.

    ``step`` is a 0-d int64 tensor: the number of steps that were taken. The key of a step is
    ``fold_in(key, step)``.
    """

    params: Params
    state: Params
    opt_state: Tree
    key: Tensor
    step: Tensor


class Pullback:
    """The linear map from the cotangent of a layer's output to those of its params and input.

    It is a rule and the residuals that the forward pass left for it: ``pullback(dy)`` is
    ``rule(residuals, dy, *static, params=True, x=True)``. As a pytree node its leaves are the
    residual tensors, so optree functions map over, move, count and compress them.

    Args:
        rule: a module-level function ``(residuals, dy, *static, params, x) -> (dparams, dx)``.
            It gets a dict of its own and may empty it, to let residuals go early. It returns
            None for the half that was not asked for, and does not compute it.
        residuals: a dict from names to trees; other pullbacks may be among them.
        static: hashable arguments of the rule. A rule that serves several layers takes the
            layer's name first.
        y: the output, if known. Its shape is kept, and a ``dy`` of another is refused. Layers
            that `stateless` lifts need not give it.

    >>> import funcnet as fn
    >>> y, pullback, _ = fn.tanh().vjp({}, torch.tensor([0.0, 1.0]))
    >>> pullback
    Pullback(elementwise_rule, residuals=['y'], static=('tanh',))
    >>> pullback(torch.ones(2))
    ({}, tensor([1.0000, 0.4200]))
    >>> pullback(torch.ones(()))
    Traceback (most recent call last):
    ...
    ValueError: tanh: pullback expects dy of shape (2,), got ()
    """

    __slots__ = ("expected", "residuals", "rule", "static")

    def __init__(
        self,
        rule: Callable[..., Any],
        residuals: Mapping[str, Tree],
        static: tuple[Hashable, ...] = (),
        y: Tree = None,
    ) -> None:
        self.rule = rule
        self.residuals = residuals
        self.static = static
        self.expected = _kinds(y)

    def __call__(self, dy: Tree, *, params: bool = True, x: bool = True) -> tuple[Tree, Tree]:
        """``(dparams, dx)``; the half that is not asked for is None and costs nothing."""
        self._check(dy)
        return self.rule(dict(self.residuals), dy, *self.static, params=params, x=x)

    def _check(self, dy: Tree) -> None:
        if self.expected is None:
            return
        name = getattr(self.rule, "__name__", "").removesuffix("_rule")
        if self.static and isinstance(self.static[0], str):
            name = self.static[0]
        treedef, kinds = self.expected
        try:
            cotangents = treedef.flatten_up_to(dy)
        except (ValueError, TypeError):
            raise ValueError(
                f"{name}: pullback expects a {treedef.type.__name__} "
                f"of {treedef.num_children}, got {tree.describe(dy)}"
            ) from None
        for cotangent, (shape, dtype) in zip(cotangents, kinds, strict=True):
            if not dtype.is_floating_point:
                if cotangent is not None:
                    raise ValueError(
                        f"{name}: pullback expects dy None for an integer output, "
                        f"got {tree.describe(dy)}"
                    )
            elif not isinstance(cotangent, Tensor) or cotangent.shape != shape:
                got = tuple(dy.shape) if isinstance(dy, Tensor) else tree.describe(dy)
                raise ValueError(f"{name}: pullback expects dy of shape {tuple(shape)}, got {got}")
            elif cotangent.dtype != dtype:
                raise TypeError(f"{name}: pullback expects dy of {dtype}, got {tree.describe(dy)}")

    def __repr__(self) -> str:
        rule = getattr(self.rule, "__name__", self.rule)
        return (
            f"{type(self).__name__}({rule}, residuals={list(self.residuals)}, static={self.static})"
        )


_LEAF = optree.treespec_leaf()


def _kinds(y: Tree) -> tuple[Any, tuple[Any, ...]] | None:
    """The structure of an output and the shapes and dtypes of its leaves; None if not known."""
    if y is None:
        return None
    if type(y) is Tensor:
        return _LEAF, ((y.shape, y.dtype),)
    leaves, treedef = optree.tree_flatten(y)
    return treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


class LossPullback(Pullback):
    """The pullback of a loss: ``pullback(dvalue=1.0) -> dprediction``."""

    __slots__ = ()

    def __call__(self, dvalue: Tensor | float = 1.0) -> Tree:  # type: ignore[override]
        if isinstance(dvalue, Tensor) and dvalue.dim() != 0:
            raise ValueError(f"pullback expects a scalar dvalue, got {tree.describe(dvalue)}")
        return self.rule(dict(self.residuals), dvalue, *self.static)


def _register(kind: type[Pullback]) -> None:
    def flatten(pullback: Any) -> tuple[Any, Any, Any]:
        metadata = (pullback.rule, pullback.static, pullback.expected)
        return (pullback.residuals,), metadata, ("residuals",)

    def unflatten(metadata: Any, children: Any) -> Any:
        (rule, static, expected), (residuals,) = metadata, children
        pullback = kind(rule, residuals, static)
        pullback.expected = expected
        return pullback

    optree.register_pytree_node(
        kind,  # type: ignore[arg-type]
        flatten,
        unflatten,
        namespace=optree.registry.__GLOBAL_NAMESPACE,
    )


_register(Pullback)
_register(LossPullback)


def pull(
    pullbacks: dict[str, Any], name: str, dy: Tree, *, params: bool, x: bool
) -> tuple[Tree, Tree]:
    """Take a child's pullback out of a rule's own dict and call it.

    In a training step nothing else holds the child's residuals by then, so they are freed as
    the backward pass consumes them, layer by layer. A pullback that somebody keeps keeps them.
    """
    pullback = pullbacks.pop(name)
    rule, residuals, static = pullback.rule, dict(pullback.residuals), pullback.static
    del pullback
    return rule(residuals, dy, *static, params=params, x=x)


def sum_cotangents(cotangents: list[Tree]) -> Tree:
    """The sum of cotangents of one value; None is the cotangent of an integer."""
    present = [cotangent for cotangent in cotangents if cotangent is not None]
    if not present:
        return None
    return reduce(lambda a, b: tree.map(torch.add, a, b), present)


class Anatomy(NamedTuple):
    """What a layer is made of, for code that walks a model: `map_layers`, `summary`.

    ``children`` is by name; a child whose parameters are its parent's own is named "".
    ``rebuild`` makes the same combinator of other children. A layer with ``takes_key`` False
    ignores the key, so nobody need fold one for it. ``short`` is the ``(apply, vjp)`` of the
    short triple that a stateless layer was lifted from.
    """

    name: str
    children: Mapping[str, Layer] = EMPTY
    rebuild: Callable[[Mapping[str, Layer]], Layer] | None = None
    takes_key: bool = True
    short: tuple[Callable[..., Any], Callable[..., Any]] | None = None


def with_anatomy(layer: Layer, anatomy: Anatomy) -> Layer:
    """Record what a layer is made of. Its ``init`` must be a function of this layer alone."""
    layer.init.anatomy = (layer, anatomy)  # type: ignore[attr-defined]
    return layer


def anatomy(layer: Layer) -> Anatomy:
    """What a layer is made of; a layer that says nothing, or was edited, is a leaf.

    >>> import funcnet as fn
    >>> list(anatomy(fn.serial(fn.linear(3), fn.relu())).children)
    ['0', '1']
    """
    described, found = getattr(layer.init, "anatomy", ((), None))
    # After layer._replace(vjp=...) the record no longer tells what the layer does.
    if found is not None and layer == described:
        return found
    return Anatomy(function_name(layer.apply))


def map_layers(function: Callable[[str, Layer], Layer], layer: Layer, path: str = "") -> Layer:
    """A model rebuilt with ``function(path, layer)`` in place of each layer, children first.

    ``path`` is the dotted path of the layer's parameters, "" for the model itself.

    >>> import funcnet as fn
    >>> paths = []
    >>> _ = map_layers(lambda path, layer: paths.append(path) or layer,
    ...                fn.serial(fn.linear(3), fn.relu()))
    >>> paths
    ['0', '1', '']
    """
    _, children, rebuild, *_ = anatomy(layer)
    if rebuild is not None:
        layer = rebuild(
            {
                name: map_layers(function, child, ".".join(part for part in (path, name) if part))
                for name, child in children.items()
            }
        )
    return function(path, layer)


def function_name(function: Callable[..., Any]) -> str:
    """``linear`` for the function ``linear.<locals>.apply``."""
    return getattr(function, "__qualname__", type(function).__name__).split(".")[0]


def stateless(
    init: Callable[[Tensor, Tree], Params],
    apply: Callable[[Params, Tree], Tree],
    vjp: Callable[[Params, Tree], tuple[Tree, Pullback]],
    *,
    name: str | None = None,
) -> Layer:
    """A layer without state and randomness, lifted from the short triple.

    Args:
        init: ``(key, x) -> params``.
        apply: ``(params, x) -> y``.
        vjp: ``(params, x) -> (y, pullback)``.
        name: what errors and summaries call the layer; by default the constructor's name.

    >>> import funcnet as fn
    >>> def scale_rule(residuals, dy, *, params, x):
    ...     dparams = {"scale": (dy * residuals["x"]).sum()} if params else None
    ...     return dparams, dy * residuals["scale"] if x else None
    >>> def scale():
    ...     def init(key, x):
    ...         return {"scale": torch.ones((), dtype=x.dtype, device=x.device)}
    ...     def apply(params, x):
    ...         return params["scale"] * x
    ...     def vjp(params, x):
    ...         return apply(params, x), fn.Pullback(scale_rule, {"x": x, **params})
    ...     return fn.stateless(init, apply, vjp)
    >>> scale()
    scale()
    >>> fn.testing.check_layer(scale(), torch.randn(4, 3, dtype=torch.float64))
    """
    name = name or function_name(apply)

    def lifted_init(key: Tensor, x: Tree) -> tuple[Params, Params]:
        return init(key, x), {}

    def lifted_apply(
        params: Params,
        x: Tree,
        state: Params = EMPTY,
        *,
        key: Tensor | None = None,
        train: bool = False,
    ) -> tuple[Tree, Params]:
        if state:
            refuse_state(name, state)
        return apply(params, x), {}

    def lifted_vjp(
        params: Params,
        x: Tree,
        state: Params = EMPTY,
        *,
        key: Tensor | None = None,
        train: bool = True,
    ) -> tuple[Tree, Pullback, Params]:
        if state:
            refuse_state(name, state)
        y, pullback = vjp(params, x)
        return y, Pullback(pullback.rule, pullback.residuals, pullback.static, y), {}

    layer = Layer(lifted_init, lifted_apply, lifted_vjp)
    return with_anatomy(layer, Anatomy(name, takes_key=False, short=(apply, vjp)))


def locate(error: Exception, where: str) -> None:
    """Put a layer's place in front of an error's message, as it passes a combinator."""
    if isinstance(error, (ValueError, TypeError)) and len(error.args) == 1:
        error.args = (f"{where} {error.args[0]}",)
    else:
        error.add_note(f"in {where}")


def refuse_state(name: str, state: Params) -> NoReturn:
    """Raise ValueError for state given to a layer that has none."""
    raise ValueError(f"{name}: has no state, got state with {sorted(state)}")


def check_floating(name: str, x: Tree) -> None:
    """Raise TypeError unless ``x`` is a tensor of real floating-point numbers."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name}: expects a floating-point tensor, got {tree.describe(x)}")


def check_params(name: str, params: Params, expected: tuple[str, ...]) -> None:
    """Raise ValueError unless ``params`` has just the expected names."""
    if not isinstance(params, Mapping):
        raise TypeError(f"{name}: expects a dict of params, got {tree.describe(params)}")
    if len(params) != len(expected) or not all([entry in params for entry in expected]):
        raise ValueError(f"{name}: expects params {sorted(expected)}, got {sorted(params)}")
