"""`observe`: figures of what each layer gives and of what comes back to it, as metrics of a step.

What comes back is known in the backward pass alone, of which only cotangents come out. So an
observed layer has a probe: an entry of its params that it does not read, whose gradient is its
figures. Only a training step makes probes, beside the params, and takes their gradients from the
others: no optimizer, initializer or checkpoint sees them.

The figures of a probe are sums, as gradients are, so that what adds up gradients, of several uses
of a layer or of several parts of a batch, adds up figures.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcnet import tree
from funcnet.checks import check_kind
from funcnet.core import (
    Forward,
    Grads,
    Key,
    Layer,
    Params,
    Probe,
    Pullback,
    Tree,
    global_form_of,
    join_paths,
    map_layers,
    pull,
    rebuilt,
    told_by,
)
from funcnet.data import pair
from funcnet.errors import require
from funcnet.lift import stateful
from funcnet.tree import Where, selector

_PROBE = "observed"
FIGURES = ".figures"
"""Where the figures are in what is measured; a metric is not called so."""
_SUMS = 4
"""The numbers of a tree of which a probe tells: see `_sums`."""


def observe(model: Layer, where: Where | None = None) -> Layer:
    """The model, of whose layers a training step tells figures among its metrics.

    They are there by the path of the layer, as "0.y_norm": ``y_norm``, ``y_mean`` and ``y_zeros``
    of the layer's output, and ``dy_norm``, ``dy_mean`` and ``dy_zeros`` of the cotangent that came
    back to it. They are the Euclidean norm, the mean, and the part of the numbers that are zero, of
    all numbers of a batch together, in float32.

    Args:
        model: any layer; the layers that have no layers within are observed.
        where: which of them: dotted paths of layers, or a function of the path; default all.

    Params, State: those of the model. It computes what the model computes, at six reductions for
    each layer and step, and nothing more where no step asks, as in `evaluate`.

    Of a layer with several uses, as in `shared`, the figures are those of all uses together; of the
    copies in a `repeat`, each figure is a vector. With a loss scale, dy is that of the loss itself.
    A layer all of whose params are frozen by its path, by `freeze` or `lora`, tells nothing.

    Raises:
        ValueError: no layer is chosen, or those that are tell nothing.

    Source: ``torch.nn.Module.register_forward_hook`` and ``register_full_backward_hook``.

    >>> net = observe(fn.serial(fn.linear(3), fn.relu(), fn.linear(1)))
    >>> optimizer = fn.sgd(0.1)
    >>> step = fn.train_step(net, fn.mse(), optimizer)
    >>> state = fn.init_train_state(net, optimizer, fn.key(0), torch.ones(4, 2))
    >>> state, metrics = step(state, (torch.ones(4, 2), torch.ones(4, 1)))
    >>> [name for name in metrics if name.startswith("1.")]
    ['1.y_norm', '1.y_mean', '1.y_zeros', '1.dy_norm', '1.dy_mean', '1.dy_zeros']

    With `funcnet.optimizers.set_to_zero` as the optimizer, a step observes and learns nothing.
    """
    check_kind("observe", model, Layer)
    chosen = selector("*" if where is None else where)
    found: list[str] = []

    def watched(path: str, layer: Layer) -> Layer:
        if layer.rebuild is not None and layer.children:
            children = {
                # One of several entries of its parent's params has no place for an entry more.
                name: watched(join_paths(path, name), child) if isinstance(name, str) else child
                for name, child in layer.children.items()
            }
            return rebuilt(layer, children)
        if layer.children or not chosen(path):
            return layer
        found.append(path)
        return _observed(layer)

    made = watched("", model)
    require(found, f"observe: where chooses none of the layers of {model!r}")
    return made


def _observed(layer: Layer) -> Layer:
    """A layer that gives its figures as the gradient of a probe, if there is one in its params."""

    def own(params: Params) -> Params:
        return {name: params[name] for name in params if name != _PROBE}

    def apply(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Any:
        return layer.apply(own(params), x, state, key=key, train=train)

    def forward(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Forward:
        y, pullback, state = layer.forward(own(params), x, state, key, train)
        if _PROBE in params:
            pullback = Pullback(observed_rule, {"": pullback, "y": _sums(y)})
        return y, pullback, state

    told: dict[str, Any] = told_by(layer) | {"probe": _OF_OUTPUTS}
    told["global_form"] = global_form_of(layer, _observed)
    made = stateful(layer.init, forward, apply=apply, name=layer.name, **told)
    made.call = layer.call
    return made


def observed_rule(residuals: Any, dy: Tree, *, params: bool, x: bool) -> Grads:
    """The layer's pullback, and the sums of y and dy as the gradient of the probe."""
    sums = torch.cat([residuals.pop("y"), _sums(dy)]) if params else None
    dparams, dx = pull(residuals, "", dy, params=params, x=x)
    return {**dparams, _PROBE: sums} if params else None, dx


def _sums(values: Tree) -> Tensor:
    """How many numbers there are, their sum, that of their squares, and how many are zero."""
    found = [leaf for leaf in tree.leaves(values) if leaf.is_floating_point()]
    total = torch.zeros(_SUMS, device=found[0].device if found else None)
    for leaf in found:
        kind = torch.promote_types(leaf.dtype, torch.float32)
        squares = torch.linalg.vector_norm(leaf, dtype=kind).square()
        count = torch.full_like(squares, leaf.numel())
        zeros = count - torch.linalg.vector_norm(leaf.sign(), 1, dtype=kind)
        total = total + torch.stack([count, leaf.sum(dtype=kind), squares, zeros]).float()
    return total


def _figures(sums: Tensor, dvalue: float | Tensor) -> dict[str, Tensor]:
    """The figures by name, of the gradient of a probe."""
    named: dict[str, Tensor] = {}
    for name, part, scale in zip(("y", "dy"), sums.split(_SUMS, -1), (1.0, dvalue), strict=True):
        count, total, squares, zeros = part.unbind(-1)
        count = count.clamp(min=1)
        named[f"{name}_norm"] = squares.sqrt() / scale
        named[f"{name}_mean"] = total / count / scale
        named[f"{name}_zeros"] = zeros / count
    return named


_OF_OUTPUTS = Probe(_PROBE, 2 * _SUMS, _figures)


def with_figures(run: Callable[..., Any], model: Layer) -> Callable[..., Any]:
    """The same forward and backward pass, with the figures of an observed model.

    Args:
        run: ``(params, batch, state, key, train, dvalue) -> (grads, state, measured)``.
        model: the model of it.

    Returns: a function of the same arguments, whose ``measured`` has ``FIGURES`` too: a dict from
    names, as "0.y_norm", to tensors.
    """
    kinds: dict[str, Probe] = {}  # by the name of the entry

    def probed(path: str, layer: Layer) -> Layer:
        probe = layer.probe
        if probe is None:
            return layer
        kinds[probe.entry] = probe

        def init(key: Tensor, x: Tree) -> tuple[Params, Params]:
            params, state = layer.init(key, x)
            zeros = torch.zeros(probe.size, device=tree.device_of(x))
            return {**params, probe.entry: zeros}, state

        return layer._replace(init=init)

    with_probes = map_layers(probed, model)
    if not kinds:
        return run
    shapes: dict[str, Any] = {}  # of the probes by path, which do not depend on the batch

    def probes(x: Tree) -> Params:
        if not shapes:
            key = torch.empty(2, dtype=torch.int64, device="meta")
            flat = tree.to_dotted(with_probes.init(key, tree.map(_on_meta, x))[0])
            shapes.update({path: leaf.shape for path, leaf in flat.items() if entry(path) in kinds})
            tells = _PROBE not in kinds or _PROBE in map(entry, shapes)
            require(tells, "observe: all layers that are observed are frozen, and tell nothing")
        zero = torch.zeros((), device=tree.device_of(x))
        return tree.from_dotted({path: zero.expand(shape) for path, shape in shapes.items()})

    def entry(path: str) -> str:
        return path.rpartition(".")[2]

    def run_with_figures(
        params: Params,
        batch: Any,
        state: Params,
        key: Key,
        train: bool,
        dvalue: float | Tensor = 1.0,
    ) -> Any:
        x, _ = pair("train_step", batch)
        everything = tree.merge(params, probes(x))
        grads, state, measured = run(everything, batch, state, key, train, dvalue)
        sums, grads = tree.partition(lambda path: path in shapes, grads)
        figures = {
            path.removesuffix(entry(path)) + name: figure
            for path, each in tree.to_dotted(sums).items()
            for name, figure in kinds[entry(path)].figures(each, dvalue).items()
        }
        return grads, state, {**measured, FIGURES: figures}

    return run_with_figures


def _on_meta(leaf: Tensor) -> Tensor:
    return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
