"""The protocol: what a layer, a loss, an optimizer and a training state are.

    Layer      = (init, apply, vjp)
      init (key, x)                                         -> (params, state)
      apply(params, x, state={}, *, key=None, train=False)  -> (y, state)
      vjp  (params, x, state={}, *, key=None, train=True)   -> (y, pullback, state)
           pullback(dy, *, params=True, x=True)             -> (dparams, dx)

    Loss       = (apply, vjp)
      apply(prediction, target)                             -> value
      vjp  (prediction, target)                             -> (value, pullback)
           pullback(dvalue=1.0)                             -> dprediction
      The value is a scalar or, with reduction="none", one number per element; dvalue has its
      shape, and a Python number stands for one that is the same for all elements.

    Optimizer  = (init_state, update)
      init_state(params)                                    -> opt_state
      update(grads, opt_state, params)                      -> (updates, opt_state)

    train_step(model, loss, optimizer, ...)                 -> step
      step(train_state, batch)                              -> (train_state, metrics)

A batch is ``(x, target)``. The key of a step is ``fold_in(train_state.key, train_state.step)``.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from funcnet.batch_axis import BatchAxis
from funcnet.collectives import Split
from funcnet.constructors import Call, Constructed, call_of, function_name as function_name
from funcnet.pullbacks import (
    Box as Box,
    LossPullback as LossPullback,
    Pullback as Pullback,
    Sums as Sums,
    Tree as Tree,
    barrier as barrier,
    defer as defer,
    kinds_of as kinds_of,
    pull as pull,
    sum_cotangents as sum_cotangents,
    takes_box as takes_box,
    takes_sums as takes_sums,
)
from funcnet.training_types import (
    Fraction as Fraction,
    Loss as Loss,
    Optimizer as Optimizer,
    Params as Params,
    TrainState as TrainState,
)

Key = Tensor | None
"""A key of `funcnet.random`, or None where there is no randomness."""

Grads = tuple[Any, Tree]
"""``(dparams, dx)``; None for the half that was not asked for, a `Deferred` for dparams that are
to be computed later."""

EMPTY: Params = {}
"""The default for params and state that are absent. Nothing writes to it, and nobody gets it as a
result: a caller owns what is returned, and may write to it."""


class Probe(NamedTuple):
    """What a layer tells of its backward pass: the gradient of an entry of its params.

    Only a training step makes the entry, beside the params; see `funcnet.observing`.
    """

    entry: str
    """Its name among the params of the layer."""

    size: int
    """How many numbers the layer tells. They are sums, as gradients are."""

    figures: Callable[[Tensor, Any], dict[str, Tensor]]
    """``(sums, dvalue) -> figures``, by name; ``dvalue`` is the scale of the loss."""


class _Triple(NamedTuple):
    init: Callable[..., tuple[Params, Params]]
    apply: Callable[..., tuple[Tree, Params]]
    vjp: Callable[..., tuple[Tree, Pullback, Params]]


class Layer(Constructed, _Triple):
    """Three pure functions, ``(init, apply, vjp)``.

    ``init`` reads only shape, dtype and device of x. ``vjp`` gives the y of ``apply``, and a
    `Pullback` from the cotangent of y to those of params and x. State is returned, not changed.

    A layer is made by a constructor such as `linear`, by a combinator such as `serial`, by
    `stateless` or `stateful` from formulas, or directly: ``Layer(init, apply, vjp)``. It unpacks
    into its three functions. Beside them it carries metadata, for code that walks a model.

    >>> import funcnet as fn
    >>> net = fn.serial(fn.linear(3), fn.relu())
    >>> net.name, list(net.children), net.takes_key
    ('serial', ['0', '1'], False)
    """

    init: Callable[..., tuple[Params, Params]]
    """``init(key, x) -> (params, state)``."""

    apply: Callable[..., tuple[Tree, Params]]
    """``apply(params, x, state={}, *, key=None, train=False) -> (y, state)``."""

    vjp: Callable[..., tuple[Tree, Pullback, Params]]
    """``vjp(params, x, state={}, *, key=None, train=True) -> (y, pullback, state)``."""

    forward: Callable[..., tuple[Tree, Pullback, Params]]
    """``vjp`` with all arguments by position, and a pullback that checks no dy: what combinators
    call. `stateful` gives it; default ``vjp`` itself."""

    name: str
    """What errors and summaries call the layer; default the name of its constructor."""

    children: Mapping[str, "Layer"]
    """The layers that it is made of, by name. A child named "" has the very params and state of its
    parent."""

    rebuild: Callable[[Mapping[str, "Layer"]], "Layer"] | None
    """Makes the same layer of other children."""

    takes_key: bool
    """False for a layer that ignores the key, so that nobody need make one for it."""

    mixes_examples: bool
    """True for a layer that computes what is of one example from others of its batch, as
    `batch_norm` does, or has a child that does."""

    mixes_itself: bool
    """Whether it does so beside its children."""

    breaks: frozenset[str]
    """The laws that its pullback, or a child's, is not meant to keep: "derivative", "linear"."""

    probe: "Probe | None"
    """What it tells of a training step as the gradient of an entry of its params; see `observe`."""

    global_form: "Callable[[BatchAxis], Layer] | None"
    """Makes the layer that computes, of a rank's part of a batch, what this one does of all of it;
    for a layer that draws numbers or mixes examples. It has the children in their global forms too,
    if there are any. See `funcnet.distributed.data_parallel`."""

    placed: "Callable[[Tree], Mapping[str, Split]] | None"
    """How params of its own are parted over ranks, by dotted path, for an input x; see
    `funcnet.distributed.placements`. None: each rank has all of them."""

    call: Call | None
    """The call of the constructor that made it, which is its ``repr``, or None."""

    def __new__(
        cls,
        init: Callable[..., tuple[Params, Params]],
        apply: Callable[..., tuple[Tree, Params]],
        vjp: Callable[..., tuple[Tree, Pullback, Params]],
        *,
        forward: Callable[..., tuple[Tree, Pullback, Params]] | None = None,
        name: str | None = None,
        children: Mapping[str, "Layer"] = EMPTY,
        rebuild: Callable[[Mapping[str, "Layer"]], "Layer"] | None = None,
        takes_key: bool = True,
        mixes_examples: bool = False,
        breaks: Iterable[str] = (),
        probe: "Probe | None" = None,
        global_form: "Callable[[BatchAxis], Layer] | None" = None,
        placed: "Callable[[Tree], Mapping[str, Split]] | None" = None,
    ) -> "Layer":
        layer = super().__new__(cls, init, apply, vjp)
        layer.forward = forward or (
            lambda params, x, state, key, train: vjp(params, x, state, key=key, train=train)
        )
        layer.name = name or function_name(apply)
        layer.children, layer.rebuild, layer.takes_key = children, rebuild, takes_key
        mixes = [child.mixes_examples for child in children.values()]
        layer.mixes_itself, layer.mixes_examples = mixes_examples, mixes_examples or any(mixes)
        broken = [child.breaks for child in children.values()]
        layer.breaks, layer.probe = frozenset(breaks).union(*broken), probe
        layer.global_form, layer.placed = global_form, placed
        layer.call = call_of(layer.name)
        return layer

    not_called = (
        "a layer is not called, its functions are: "
        "y, state = net.apply(params, x, state), or y, pullback, state = net.vjp(params, x)"
    )

    def _replace(self, **functions: Any) -> "Layer":
        """The layer with other functions, under the same name.

        It has no children any more: a layer that is rebuilt of them would lose the new functions.
        """
        layer = Layer(*super()._replace(**functions), name=self.name, **told_by(self))
        layer.call = self.call
        return layer


Applied = tuple[Tree, Params]
"""What ``apply`` returns: y and the new state."""

Forward = tuple[Tree, Pullback, Params]
"""What ``vjp`` returns: y, the pullback and the new state."""


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
    if layer.rebuild is not None:
        layer = rebuilt(
            layer,
            {
                name: map_layers(function, child, join_paths(path, name))
                for name, child in layer.children.items()
            },
        )
    return function(path, layer)


def rebuilt(layer: Layer, children: Mapping[str, Layer]) -> Layer:
    """The same layer of other children, by ``layer.rebuild``; it keeps its repr.

    >>> import funcnet as fn
    >>> rebuilt(fn.residual(fn.relu()), {"": fn.tanh()})
    residual(tanh())
    """
    assert layer.rebuild is not None
    made = layer.rebuild(children)
    if layer.call is not None:
        made.call = layer.call.of_others(layer.children.values(), children.values())
    return made


def join_paths(path: str, name: str | tuple[str, ...]) -> str:
    """The dotted path of a child; one named "", or by several entries of its parent, has its path.

    >>> join_paths("", "body"), join_paths("body", "0"), join_paths("body", "")
    ('body', 'body.0', 'body')
    >>> join_paths("body", ("weight", "bias"))
    'body'
    """
    return ".".join([part for part in (path, name) if part and isinstance(part, str)])


def place_of(layer: Layer, path: str) -> str:
    """What an error calls a layer inside a model, such as ``linear at '1.0'``."""
    return f"{layer.name} at {path!r}" if path else layer.name


def layers_of(layer: Layer, path: str = "") -> Iterator[tuple[str, Layer]]:
    """A model and all layers that it is made of, with their paths."""
    yield path, layer
    for name, child in layer.children.items():
        yield from layers_of(child, join_paths(path, name))


def wrap(layer: Layer, functions: Callable[[Layer], Layer]) -> Layer:
    """A layer with other functions around its own, which keeps its name and its children.

    Args:
        layer: any layer.
        functions: ``layer -> layer``, such as ``lambda layer: layer._replace(vjp=...)``. It is
            called again for a layer that is rebuilt of other children.

    >>> import funcnet as fn
    >>> def halved(layer):
    ...     def apply(*args, **options):
    ...         y, state = layer.apply(*args, **options)
    ...         return y / 2, state
    ...     return layer._replace(apply=apply)
    >>> net = wrap(fn.serial(fn.relu()), halved)
    >>> net, net.apply({}, torch.ones(1))[0]
    (serial(relu()), tensor([0.5000]))
    """
    rebuild = layer.rebuild

    def wrapped(children: Mapping[str, Layer]) -> Layer:
        assert rebuild is not None
        return wrap(rebuild(children), functions)

    made = Layer(
        *functions(layer),
        name=layer.name,
        children=layer.children,
        rebuild=None if rebuild is None else wrapped,
        global_form=global_form_of(layer, lambda layer: wrap(layer, functions)),
        **told_by(layer) | {"mixes_examples": layer.mixes_itself},
    )
    made.call = layer.call
    return made


def global_form_of(
    layer: Layer, again: Callable[[Layer], Layer]
) -> Callable[[BatchAxis], Layer] | None:
    """The global form of ``again(layer)``: the same of the layer's, if it has one."""
    form = layer.global_form
    return None if form is None else lambda axis: again(form(axis))


def told_by(layer: Layer) -> dict[str, Any]:
    """What a layer tells of itself, for one that is made of it with other functions.

    Its global form is not among it, since that has not the other functions; see `global_form_of`.
    """
    told = "takes_key", "mixes_examples", "breaks", "probe", "placed"
    return {each: getattr(layer, each) for each in told}


def around(layer: Layer, rebuild: Callable[[Layer], Layer]) -> dict[str, Any]:
    """The metadata of a layer around another one; ``rebuild`` makes the same of another layer.

    >>> import funcnet as fn
    >>> made = Layer(*fn.tanh(), name="twice", **around(fn.tanh(), lambda layer: layer))
    >>> made, made.takes_key
    (twice(tanh()), False)
    """
    return {
        "children": {"": layer},
        "rebuild": lambda children: rebuild(children[""]),
        "takes_key": layer.takes_key,
    }
