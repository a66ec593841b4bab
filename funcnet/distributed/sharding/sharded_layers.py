"""`sharded`: a layer of whose parameters each rank has a part."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet import tree
from funcnet.checks import check_kind
from funcnet.collectives import Axis, Split
from funcnet.core import (
    Applied,
    Box,
    Forward,
    Grads,
    Key,
    Layer,
    Params,
    Pullback,
    Tree,
    around,
    barrier,
    pull,
    takes_box,
)
from funcnet.deferred import Defer, defers, mapped
from funcnet.distributed.processes.start import Mesh, axis_of
from funcnet.distributed.sharding.flat_messages import gathered, reduced
from funcnet.errors import require
from funcnet.lift import stateful
from funcnet.parted_params import for_each_form
from funcnet.random import key as key_of
from funcnet.runtime import is_batched, is_transformed, storage_id

Named = tuple[tuple[str, Split], ...]
"""The dotted path of each leaf of a layer's params, and how it is parted."""


def sharded(
    layer: Layer, mesh: Mesh, keep: bool = False, *, axis: str = "data", sums: bool = False
) -> Layer:
    """The same layer, of whose params each rank of an axis has a part: ZeRO-2 and 3.

    The params are gathered for the forward pass, and go after it; gathered again for the backward
    pass; and of the mean of the ranks' gradients each rank gets its part. An optimizer updates the
    parts. So of params, gradients and the optimizer's state a rank has its part, and beside them
    the whole of one sharded layer at a time: shard the blocks of a model one by one, not the model.

    Args:
        layer: any layer, also one whose params are parts over another axis.
        mesh: a DeviceMesh, or a dict of the sizes of its axes.
        keep: whether gathered params are kept for the backward pass: more memory, and two thirds
            of the messages.
        axis: the name of the axis.
        sums: whether gradients are summed, not averaged: for a loss that `total` makes of parts.

    There is one message for each dtype; half precision is summed in float32. Layers that keep
    copies of their params for the backward pass, as `funcnet.cast` does, keep them here too:
    ``sharded(fn.remat(layer), mesh)`` keeps none. Over one rank it is the layer itself.

    Params:
        those of the layer, under their names; each leaf is a vector, this rank's part of it, with
        zeros at the end where the ranks do not divide it. So what goes by a leaf's shape, such as
        weight decay of matrices alone, is to go by its name. `over_parts` makes clipping by the
        norm of all of them right.
    State:
        that of the layer, whole.
    VJP:
        ``dparams = part of mean(dparams)``, over the ranks; dx is that of the layer.
    Raises:
        ValueError: params that are not parts of those of the layer.

    Source: Rajbhandari et al. 2020, *ZeRO*; Zhao et al. 2023, *PyTorch FSDP*;
    ``torch.distributed.fsdp.fully_shard``.

    >>> x = torch.ones(5, 3, device="meta")
    >>> net = sharded(fn.linear(4), {"data": 8})
    >>> params, _ = net.init(fn.key(0), x)
    >>> {path: tuple(leaf.shape) for path, leaf in params.items()}
    {'weight': (2,), 'bias': (1,)}
    >>> y, pullback, _ = net.vjp(params, x)
    >>> y.shape, sorted(pullback.residuals["params"])
    (torch.Size([5, 4]), ['weight'])
    """
    check_kind("sharded", layer, Layer)
    require(isinstance(keep, bool), f"sharded: keep must be a bool, got {keep!r}", TypeError)
    over = axis_of(mesh, axis)
    if over.size == 1:
        return layer

    shards_of = for_each_form(lambda x: _Shards.of(over, layer.init(key_of(0), x)[0]))

    def init(key: Tensor, x: Tree) -> tuple[Params, Params]:
        params, state = layer.init(key, x)
        shards = _Shards.of(over, params)
        leaves = tree.leaves(params)
        del params
        # One by one, so that the whole leaves go.
        parts = [split.part(leaves.pop(0)) for _, split in shards.named]
        return shards.treedef.unflatten(parts), state

    def placed(x: Tree) -> Mapping[str, Split]:
        kind = "sum" if sums else "mean"
        return {name: replace(split, reduced=kind) for name, split in shards_of(x).named}

    def apply(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Applied:
        shards = shards_of(x)
        whole = shards.whole(shards.checked(params))
        return layer.apply(whole, x, state, key=key, train=train)

    def forward(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Forward:
        shards = shards_of(x)
        own = shards.checked(params)
        whole = shards.whole(own)
        y, pullback, new_state = layer.forward(whole, x, state, key, train)
        residuals: dict[str, Any] = {"": pullback}
        form = None
        if not keep:
            residuals, form = _without(pullback, tree.leaves(whole), own, shards.named)
        static = (shards.named, not sums, form)
        return y, Pullback(sharded_rule, residuals, static), new_state

    def again(layer: Layer) -> Layer:
        return sharded(layer, mesh, keep, axis=axis, sums=sums)

    told = around(layer, again)
    return stateful(init, forward, apply=apply, name="sharded", placed=placed, **told)


class _Shards(NamedTuple):
    """How the params of a layer are parted: their tree, and the Split of each leaf."""

    treedef: Any
    named: Named

    @classmethod
    def of(cls, axis: Axis, params: Params) -> "_Shards":
        """Those of whole params."""
        leaves, treedef = tree.flatten(params)
        names = [tree.path_string(path) for path in treedef.paths()]
        splits = [Split(axis, tuple(leaf.shape)) for leaf in leaves]
        return cls(treedef, tuple(zip(names, splits, strict=True)))

    def checked(self, params: Params) -> list[Tensor]:
        """The leaves, if they are parts of those of the layer."""
        shapes = [torch.Size(split.part_shape) for _, split in self.named]
        try:
            return tree.leaves_like(shapes, self.treedef, params, "sharded: params")
        except ValueError as error:
            hint = "its leaves are this rank's parts, as of init"
            raise ValueError(
                f"{error}; {hint}, and fn.distributed.placements tells of what"
            ) from None

    def whole(self, parts: Sequence[Tensor]) -> Params:
        """The params of the layer, on all ranks."""
        made: Params = self.treedef.unflatten(gathered([*parts], [s for _, s in self.named]))
        return made


class _Form(NamedTuple):
    """What a pullback was made of, of which the params are left out."""

    treedef: Any
    places: tuple[Any, ...]
    """For each of its leaves the `_Place` in the params that it is, or None."""


class _Place(NamedTuple):
    """A parameter, by its index among those that are gathered again, or a view of it."""

    which: int
    view: tuple[tuple[int, ...], tuple[int, ...], int] | None
    """Its shape and strides, and where it begins."""


def _without(
    pullback: Pullback, whole: list[Tensor], own: list[Tensor], named: Named
) -> tuple[dict[str, Any], _Form]:
    """A pullback's residuals but for those that are params, and the parts of these."""
    leaves, treedef = tree.flatten(pullback)
    find = _finder(whole)
    found = [find(leaf) for leaf in leaves]
    used = sorted({place.which for place in found if place is not None})
    places = [
        None if place is None else place._replace(which=used.index(place.which)) for place in found
    ]
    residuals = {
        "saved": [leaf for leaf, place in zip(leaves, places, strict=True) if place is None],
        "params": {named[index][0]: own[index] for index in used},
    }
    return residuals, _Form(treedef, tuple(places))


def _finder(whole: list[Tensor]) -> Any:
    """``leaf -> place``: which of the params a tensor is, or is a view of; None for another one.

    Views are found in eager mode alone: recorded, they have no strides, and cost what they cost.
    """
    by_id = {id(leaf): index for index, leaf in enumerate(whole)}
    storages: dict[int, int] = {}
    if not is_batched() and not is_transformed(*whole):
        storages = {storage_id(leaf): index for index, leaf in enumerate(whole) if leaf.numel()}

    def find(leaf: Tensor) -> _Place | None:
        if id(leaf) in by_id:
            return _Place(by_id[id(leaf)], None)
        index = storages.get(storage_id(leaf)) if storages else None
        if index is None or leaf.dtype != whole[index].dtype:
            return None
        offset = int(leaf.storage_offset() - whole[index].storage_offset())
        return _Place(index, (tuple(leaf.shape), leaf.stride(), offset))

    return find


def _restored(residuals: dict[str, Any], box: Box, named: Named, form: _Form) -> dict[str, Any]:
    """The pullback with its params, which are gathered when the cotangent is there."""
    names = list(residuals["params"])
    parts, dy = barrier(([*residuals["params"].values()], box.pop()))
    box.append(dy)
    del dy
    splits = dict(named)
    whole = gathered(parts, [splits[name] for name in names])
    saved = iter(residuals["saved"])

    def at(place: _Place) -> Tensor:
        leaf = whole[place.which]
        if place.view is None:
            return leaf
        shape, strides, offset = place.view
        return leaf.as_strided(shape, strides, leaf.storage_offset() + offset)

    leaves = [next(saved) if place is None else at(place) for place in form.places]
    return {"": form.treedef.unflatten(leaves)}


@takes_box
@defers
def sharded_rule(
    residuals: dict[str, Any],
    dy: Tree | Box,
    named: Named,
    mean: bool,
    form: _Form | None,
    *,
    params: bool | Defer,
    x: bool,
) -> Grads:
    """The params are gathered again; then the layer's pullback, and this rank's gradients."""
    box = dy if isinstance(dy, Box) else Box([dy])
    del dy
    if form is not None:
        residuals = _restored(residuals, box, named, form)
    dparams, dx = pull(residuals, "", box, params=params, x=x)
    return mapped(own_gradients, dparams, None, named, mean) if params else None, dx


def own_gradients(dparams: Params, residuals: None, named: Named, mean: bool) -> Params:
    """This rank's part of the mean, or the sum, of the ranks' gradients."""
    flat, splits = tree.to_dotted(dparams), dict(named)
    names = list(flat)
    parts = reduced([flat.pop(name) for name in names], [splits[name] for name in names], mean)
    return tree.from_dotted(dict(zip(names, parts, strict=True)))
