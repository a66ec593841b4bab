"""The stages of a model: which of its layers each rank has, with which params, for which inputs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from funcnet import tree
from funcnet.checks import check_kind
from funcnet.combinators.combine import output_on_meta
from funcnet.combinators.reparametrize import reparametrize, ties_of
from funcnet.core import Layer, Params, Tree, rebuilt
from funcnet.errors import require
from funcnet.random import key

Kinds = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shapes and dtypes of tensors, by dotted path."""

Boundaries = Sequence[str | int]
"""The children at which the second stage and those after it begin, by name or index."""

_AROUND_LAYERS = ("cast", "freeze", "lora", "remat")
"""What may as well be around each layer of a serial as around the serial."""


@dataclass(frozen=True)
class Stage:
    """A part of a model: some of its children, one after another."""

    names: tuple[str, ...]
    """Those of the children."""

    layer: Layer
    """Of the params of the stage, at their dotted paths in the whole model."""

    params: Params
    """On the meta device; `own_params` chooses them from those of the model."""

    x: Tree
    """An input on the meta device."""

    y: Tree
    """An output on the meta device."""

    sends_dx: bool
    """Whether stages before it have params, and so need the cotangent of its input."""


@dataclass(frozen=True)
class Stages:
    """All stages of a model for an input."""

    each: tuple[Stage, ...]
    """In their order."""

    tied: Mapping[str, tuple[int, ...]]
    """For each leaf that several stages have, since others are tied to it, which these are."""


def pipeline_stages(
    model: Layer, x: Tree, stages: int, *, boundaries: Boundaries | None = None
) -> tuple[tuple[str, ...], ...]:
    """The children of a model that each stage of a pipeline has.

    Args:
        model: a `funcnet.serial`, or `funcnet.tie` of one.
        x: an example input, of which only shape, dtype and device matter.
        stages: how many, at most one for each child.
        boundaries: the children, by name or index, at which the second stage and those after it
            begin. Default: such that the stage with the most params has as few as can be.

    Raises:
        ValueError: there are more stages than children; the boundaries are not as many as there
            must be, or not in order.

    >>> import torch
    >>> import funcnet as fn
    >>> net = fn.serial(fn.linear(8), fn.relu(), fn.linear(8), fn.relu(), fn.linear(2))
    >>> pipeline_stages(net, torch.ones(4, 3), 2)
    (('0', '1'), ('2', '3', '4'))
    >>> pipeline_stages(net, torch.ones(4, 3), 2, boundaries=["4"])
    (('0', '1', '2', '3'), ('4',))
    """
    found = stages_of("pipeline_stages", model, x, stages, boundaries)
    return tuple([stage.names for stage in found.each])


def stages_of(
    name: str,
    model: Layer,
    x: Tree,
    count: int,
    boundaries: Boundaries | None,
    given: Sequence[tuple[Kinds, Kinds]] | None = None,
) -> Stages:
    """The stages of a model; nothing is computed but shapes.

    ``given`` are the kinds of the params and the state that each stage has; default those that init
    makes for x.
    """
    inner, ties = _serial_in(name, model)
    names = tuple(inner.children)
    fits = count <= len(names)
    require(fits, f"{name}: {count} stages are more than the {len(names)} layers {list(names)}")
    example = tree.to_meta(x)
    params, state = model.init(key(0), example)
    if boundaries is None:
        sizes = [sum([leaf.numel() for leaf in tree.leaves(params.get(n, {}))]) for n in names]
        starts = _balanced(sizes, count)
    else:
        starts = _given(name, boundaries, names, count)
    ends = (*starts[1:], len(names))
    parts = [names[start:end] for start, end in zip(starts, ends, strict=True)]
    made: list[Stage] = []
    part_of: Any = inner.rebuild
    tied: dict[str, list[int]] = {}
    learned = False
    for index, part in enumerate(parts):
        own_ties = {target: source for target, source in ties.items() if child_of(target) in part}
        paths = [
            path
            for path in tree.to_dotted(params)
            if child_of(path) in part or path in own_ties.values()
        ]
        for path in paths:
            tied.setdefault(path, []).append(index)
        own = {path: leaf for path, leaf in tree.to_dotted(params).items() if path in paths}
        own_state: Params = {child: state[child] for child in part if child in state}
        layer = _with_ties(part_of({child: inner.children[child] for child in part}), own_ties)
        stage_params: Params = tree.from_dotted(own)
        if given is not None:
            stage_params = _as_given(name, index, "params", stage_params, given[index][0])
            own_state = _as_given(name, index, "state", own_state, given[index][1])
        y = output_on_meta(layer, example, stage_params, own_state)
        made.append(Stage(part, layer, stage_params, example, y, learned))
        learned = learned or bool(own)
        example = y
    _check_cotangents(name, made)
    several = {path: tuple(where) for path, where in tied.items() if len(where) > 1}
    return Stages(tuple(made), several)


def kind_of(values: Tree) -> Any:
    """What is the same of trees of one structure, with tensors of the same kinds."""
    leaves, treedef = tree.flatten(values)
    return treedef, tuple([(leaf.shape, leaf.dtype, leaf.device) for leaf in leaves])


def kinds_of(params: Params) -> Kinds:
    """The shapes and dtypes of params, or of state."""
    return {path: (tuple(leaf.shape), leaf.dtype) for path, leaf in tree.to_dotted(params).items()}


def _as_given(name: str, index: int, what: str, made: Params, given: Kinds) -> Params:
    """Params or state in the dtypes that a stage has, which may be others than those of init."""
    where, expected = f"{name}: {what} of stage {index}", kinds_of(made)
    hint = "make the train state by fn.distributed.pipeline_state, with the same boundaries"
    tree.check_same_structure(dict.fromkeys(expected), dict.fromkeys(given), f"{where}, {hint}")
    for path, (shape, _) in expected.items():
        got = given[path][0]
        require(got == shape, f"{where}: expects shape {shape} at {path!r}, got {got}; {hint}")
    return tree.from_dotted(
        {
            path: torch.empty(given[path][0], dtype=given[path][1], device="meta")
            for path in expected
        }
    )


def init_of(model: Layer, stage: Stage) -> Layer:
    """The model, whose init makes the params and state of a stage alone, each with the numbers
    that it has in the whole model."""
    inner, _ = _serial_in("init", model)
    paths = tree.to_dotted(stage.params)
    needed = {*stage.names, *map(child_of, paths)}
    some = rebuilt(
        inner,
        {
            name: child if name in needed else _on_meta(child)
            for name, child in inner.children.items()
        },
    )
    made = some if inner is model else rebuilt(model, {"": some})

    def init(key: Tensor, x: Tree) -> tuple[Params, Params]:
        params, state = made.init(key, x)
        own_state = {child: each for child, each in state.items() if child in stage.names}
        return own_params(stage, params), own_state

    return model._replace(init=init)


def own_params(stage: Stage, params: Params) -> Params:
    """Of a whole model's params those of a stage."""
    paths = tree.to_dotted(stage.params)
    flat = tree.to_dotted(params)
    return tree.from_dotted({path: leaf for path, leaf in flat.items() if path in paths})


def child_of(path: str) -> str:
    """The child of a model that has the leaf of a dotted path."""
    return path.partition(".")[0]


def _on_meta(layer: Layer) -> Layer:
    return layer._replace(init=lambda key, x: layer.init(key, tree.to_meta(x)))


def _serial_in(name: str, model: Layer) -> tuple[Layer, Mapping[str, str]]:
    """The serial that a model is, and which of its leaves are others of them."""
    check_kind(name, model, Layer, "model")
    inner, ties = model, ties_of(model)
    if model.name == "tie" and model.call is not None:
        inner = model.children[""]
    is_serial = inner.name == "serial" and inner.rebuild is not None
    hint = ""
    if inner.name in _AROUND_LAYERS:
        around = inner.name
        hint = f"; put {around} around the layers in the serial, as in serial({around}(a, ...), b)"
    expected = f"{name}: expects a serial, or a tie of one"
    require(is_serial, f"{expected}, got {model!r}{hint}", TypeError)
    return inner, ties


def _with_ties(layer: Layer, ties: Mapping[str, str]) -> Layer:
    """A stage some of whose leaves are others, which may be of another stage: it has both."""
    if not ties:
        return layer
    pairs = tuple(ties.items())
    foreign = {source for source in ties.values() if child_of(source) not in layer.children}

    def inside(params: Params, state: Params, train: bool) -> Any:
        flat = tree.to_dotted(params)
        whole = flat | {target: flat[source] for target, source in pairs}
        own = {path: leaf for path, leaf in whole.items() if path not in foreign}
        return tree.from_dotted(own), state, {}, {}

    return reparametrize(
        "tie",
        layer,
        lambda key, params, state: (params, state),
        inside,
        ties_backward,
        pairs,
        rebuild=lambda layer: _with_ties(layer, ties),
        of_parts=True,
    )


def ties_backward(dparams: Params, residuals: Any, pairs: tuple[tuple[str, str], ...]) -> Params:
    """``dleaf = sum of the gradients of all in this stage that are that leaf``."""
    flat = tree.to_dotted(dparams)
    for target, source in pairs:
        gradient = flat.pop(target)
        flat[source] = flat[source] + gradient if source in flat else gradient
    return tree.from_dotted(flat)


def _balanced(sizes: Sequence[int], count: int) -> tuple[int, ...]:
    """Where parts of a row begin such that the largest is as small as can be.

    >>> _balanced([4, 0, 4, 0, 9], 2), _balanced([1, 1, 1, 1], 3)
    ((0, 4), (0, 2, 3))
    """
    total = [0]
    for size in sizes:
        total.append(total[-1] + size)
    # Of the first n, in k parts: the largest, the sum of the squares, and the starts; a late start
    # of the last part is better, so that a layer without params is with the one before it.
    best: dict[int, Any] = {0: (0, 0, ())}
    for part in range(count):
        best = {
            end: min(
                [
                    (
                        max(best[start][0], total[end] - total[start]),
                        best[start][1] + (total[end] - total[start]) ** 2,
                        (-start, *best[start][2]),
                    )
                    for start in range(part, end)
                    if start in best
                ]
            )
            for end in range(part + 1, len(sizes) + 1)
        }
    return tuple([-start for start in reversed(best[len(sizes)][2])])


def _given(
    name: str, boundaries: Boundaries, names: tuple[str, ...], count: int
) -> tuple[int, ...]:
    """Where the stages begin, as the user says it."""
    one = isinstance(boundaries, (str, int))
    given: list[Any] = [boundaries] if one else [*boundaries]
    found = [names.index(each) if each in names else each for each in given]
    good = len(found) == count - 1 and all([isinstance(each, int) for each in found])
    starts = (0, *found, len(names))
    good = good and all([a < b for a, b in pairwise(starts)])
    expected = f"{count - 1} of the layers {list(names)} in their order, where stages begin"
    require(good, f"{name}: expects as boundaries {expected}, got {boundaries!r}")
    return starts[:-1]


def _check_cotangents(name: str, stages: Iterable[Stage]) -> None:
    """Raise TypeError where no cotangent would come back to a stage that learns."""
    for index, stage in enumerate(stages):
        floating = [leaf.is_floating_point() for leaf in tree.leaves(stage.x)]
        what = f"{name}: stage {index}, which begins with {stage.names[0]!r}, passes no cotangent"
        got = f"its input is {tree.describe(stage.x)}"
        passes = not stage.sends_dx or any(floating)
        require(passes, f"{what} to the layers before it, which have params: {got}", TypeError)
