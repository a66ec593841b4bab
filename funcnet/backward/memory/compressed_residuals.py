"""`compressed`: a model that stores its activations for the backward pass in less memory."""

import threading
import weakref
from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from funcnet import tree
from funcnet.backward.memory.storage import HALVES, Form, Told, check_form, decode, encode
from funcnet.batch_axis import BatchAxis
from funcnet.checks import check_kind
from funcnet.core import (
    Applied,
    Forward,
    Grads,
    Key,
    Layer,
    Params,
    Pullback,
    Tree,
    around,
    map_layers,
    pull,
)
from funcnet.deferred import DEFER, defers, term
from funcnet.errors import locate, require
from funcnet.global_forms import in_global_form
from funcnet.lift import backward_rule, elementwise_rule, stateful, with_forward, with_kernel
from funcnet.random import fold_in
from funcnet.runtime import is_differentiated

Choose = Form | Callable[[str, str, Tensor], Form | None]
"""A form for all activations, or a function ``(path, name, tensor) -> form``; None leaves it."""

_SMALL = 8
"""A form for all is not for tensors this many times smaller than the largest of their layer, such
as the statistics of a norm: they are few, and all values of a row depend on each."""


def compressed(model: Layer, choose: Choose = "int8") -> Layer:
    """The same model, which stores its activations for the backward pass in less memory.

    The forward pass is unchanged. As each layer's ``vjp`` returns, what it keeps is encoded, and
    it is decoded when the layer's pullback is called, one layer at a time. Parameters and state
    are kept as they are. A tensor that two layers keep, such as the output of one and the input of
    the next, is stored once.

    Args:
        model: any layer. What `remat` and `reversible` compute again is not encoded.
        choose: a form, or a function ``(path, name, tensor) -> form`` of the dotted path of the
            layer's params, the name of the residual and its value. The forms:

            - "int8": a byte for each value and a scale for each block of 128. With a key, values
              are rounded at random to one of the two nearest steps, so that the stored value has
              the right mean, and so has the gradient of a layer that is linear in it. Without one
              they are rounded to the nearest.
            - "bfloat16", "float16": that dtype.
            - a `torch.device`: moved there, and back.
            - "bit": one bit for each value, of a boolean tensor, or of what an activation such as
              `relu` keeps, whose derivative is 0 or 1. Exact. The dtypes and int8 imply it.
            - None: as it is.

    Params, State: those of the model.
    VJP:
        that of the model, at the decoded residuals. So it is not exactly the derivative, but for
        "bit" and devices. Where torch.func takes a derivative of it, nothing is encoded.
    Raises:
        ValueError: int8 of values that are not finite; under `jit` and `vmap`, and on devices that
            would have to be waited for, the gradients that depend on their blocks are NaN. A form
            that is not known, or "bit" for what needs more.

    Source: Chakrabarti and Moseley 2019; Chen et al. 2021, ActNN; Liu et al. 2022, GACT.

    >>> import funcnet as fn
    >>> net = fn.serial(fn.linear(64), fn.layer_norm(), fn.relu(), fn.linear(8))
    >>> x = fn.random.normal(fn.key(0), (512, 64))
    >>> params, _ = net.init(fn.key(1), x)
    >>> def kept(net):
    ...     _, pullback, _ = net.vjp(params, x, key=fn.key(2))
    ...     return fn.tree.bytes(pullback) - fn.tree.bytes(params)
    >>> kept(compressed(net)) < 0.3 * kept(net)
    True
    """
    check_kind("compressed", model, Layer)
    if not callable(choose):
        check_form("compressed: choose", choose, "a function")
    call = _Call()

    def one(path: str, layer: Layer) -> Layer:
        return layer if layer.rebuild is not None else _encoding(layer, path, choose, call)

    inside = map_layers(one, model)

    def apply(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Applied:
        return model.apply(params, x, state, key=key, train=train)

    def forward(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Forward:
        before, call.stored = call.stored, {}
        try:
            return inside.forward(params, x, state, key, train)
        finally:
            call.stored = before

    def global_form(axis: BatchAxis) -> Layer:
        exact = not callable(choose) and choose != "int8"
        require(exact, "its int8, rounded at random in blocks of the batch, has no global form")
        return compressed(in_global_form(model, axis), choose)

    metadata = around(model, lambda model: compressed(model, choose))
    metadata |= {"takes_key": True, "global_form": global_form}
    return stateful(model.init, forward, apply=apply, name="compressed", **metadata)


_Stored = dict[tuple[int, Form], tuple[weakref.ref[Tensor], tuple[dict[str, Tensor], Told]]]
"""What was stored in a call of ``vjp``, by the tensor's id and its form.

A weak reference to the tensor, so that it can go, and what `encode` gave."""

_Encoded = tuple[str, Any, tuple[Told | None, ...]]
"""The name of a residual, its structure, and what `decode` is told of each of its tensors."""


class _Call(threading.local):
    """What was stored in the call of ``vjp`` that is under way; None outside of one."""

    stored: _Stored | None = None


def _encoding(layer: Layer, path: str, choose: Choose, call: _Call) -> Layer:
    """A leaf layer that encodes its residuals while a call is under way."""

    def forward(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Forward:
        own_key = key if layer.takes_key else None
        y, pullback, new_state = layer.forward(params, x, state, own_key, train)
        if call.stored is not None and not is_differentiated(*tree.leaves((pullback, params, x))):
            kept = {id(leaf) for leaf in tree.leaves((params, state, key))}
            try:
                pullback = _encoded(pullback, kept, path, choose, key, call.stored)
            except ValueError as error:
                locate(error, f"{layer.name}:")
                raise
        return y, pullback, new_state

    made = with_forward(layer, forward)
    made.takes_key = True  # to round at random
    return made


def _encoded(
    pullback: Pullback, kept: set[int], path: str, choose: Choose, key: Key, stored: _Stored
) -> Pullback:
    """The pullback with its residuals encoded, but for those whose ids are in ``kept``."""
    names, leaves = tree.paths(pullback.residuals), tree.leaves(pullback.residuals)
    largest = max([leaf.numel() for leaf in leaves if id(leaf) not in kept], default=0)
    is_mask = _needs_a_bit(pullback)
    forms = [
        None if id(leaf) in kept else _form_of(path, name, leaf, choose, largest, is_mask)
        for name, leaf in zip(names, leaves, strict=True)
    ]
    if is_mask and forms == ["bit"]:
        derivative, *options = cast(Any, pullback.static)
        leaves = [derivative(*leaves, *options)]
        pullback = Pullback(backward_rule, {"mask": leaves[0]}, (masked_backward,))
    form, name_of = iter(forms), iter(names)
    residuals: dict[str, Any] = {}
    encoded: list[_Encoded] = []
    for name, residual in sorted(pullback.residuals.items()):  # the order of the leaves
        parts, treedef = tree.flatten(residual)
        made = [_once(part, next(form), next(name_of), key, stored) for part in parts]
        residuals[name] = treedef.unflatten([each for each, _ in made])
        told = tuple([told for _, told in made])
        if any(told):
            encoded.append((name, treedef, told))
    if not encoded:
        return pullback
    return Pullback(compressed_rule, residuals, (pullback.rule, pullback.static, tuple(encoded)))


def _form_of(
    path: str, name: str, leaf: Tensor, choose: Choose, largest: int, is_mask: bool
) -> Form | None:
    """The form of a residual; ``is_mask`` if only one bit of it is read."""
    if not leaf.numel():
        return None
    if callable(choose):
        form = choose(path, name, leaf)
    else:
        form = choose if leaf.numel() * _SMALL > largest else None
    if form is None or isinstance(form, torch.device):
        return form
    check_form(f"choose({path!r}, {name!r}, ...)", form)
    if leaf.dtype == torch.bool or is_mask:
        return "bit"
    if form == "bit":
        what = "a boolean tensor, or what an activation keeps whose derivative is 0 or 1"
        wrong = f"'bit' is for {what}, got {name!r}, {tree.describe(leaf)}"
        require(not callable(choose), wrong)
        return None
    narrower = HALVES.get(form, torch.int8).itemsize < leaf.dtype.itemsize
    return form if leaf.is_floating_point() and narrower else None


def _once(
    leaf: Tensor, form: Form | None, name: str, key: Key, stored: _Stored
) -> tuple[Any, Told | None]:
    """The encoded tensor; the same one for a tensor that was encoded so in this call."""
    if form is None:
        return leaf, None
    found = stored.get((id(leaf), form))
    if found is None or found[0]() is not leaf:
        own_key = None if key is None or form != "int8" else fold_in(key, f"stored {name}")
        try:
            found = weakref.ref(leaf), encode(leaf, form, own_key)
        except ValueError as error:
            locate(error, f"{name!r}:")
            raise
        stored[id(leaf), form] = found
    return found[1]


def _needs_a_bit(pullback: Pullback) -> bool:
    """Whether it is that of an activation whose derivative is 0 or 1."""
    return pullback.rule is elementwise_rule and _is_boolean(*pullback.static)


@lru_cache(maxsize=256)
def _is_boolean(derivative: Callable[..., Tensor], *options: Any) -> bool:
    return derivative(torch.zeros(0), *options).dtype == torch.bool


def _masked_kernel(dy: Tensor, mask: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward.default(dy, mask.to(dy.dtype), 0)


@with_kernel(_masked_kernel)  # seven times as fast as torch.where on a CPU
def masked_backward(dy: Tensor, mask: Tensor) -> Tensor:
    """``dx = dy [mask]``."""
    return torch.where(mask, dy, 0.0)


@defers
def compressed_rule(
    residuals: Any,
    dy: Tree,
    rule: Any,
    static: tuple[Hashable, ...],
    encoded: tuple[_Encoded, ...],
    *,
    params: Any,
    x: bool,
) -> Grads:
    """Decode the residuals, then the layer's own rule. A deferred gradient keeps them encoded."""
    deferred = None
    if params is DEFER:

        def make(rule: Any, residuals: Any, static: Any) -> Pullback:
            return Pullback(compressed_rule, residuals, (rule, static, encoded))

        deferred, params = term(make, rule, residuals, static, dy), False
        if not x:
            return deferred, None
    inside = {"": _decoded(residuals, rule, static, encoded)}
    dparams, dx = pull(inside, "", dy, params=params, x=x)
    return (dparams if deferred is None else deferred), dx


def decompressed(pullback: Pullback) -> Pullback:
    """A leaf layer's pullback with its residuals decoded; one without encoded ones as it is.

    For what reads residuals by name, or slices them along the batch.
    """
    if pullback.rule is not compressed_rule:
        return pullback
    made = _decoded(dict(pullback.residuals), *cast(Any, pullback.static))
    made.expected = pullback.expected
    return made


def _decoded(
    residuals: dict[str, Any], rule: Any, static: Any, encoded: tuple[_Encoded, ...]
) -> Pullback:
    """The layer's own pullback. It writes to ``residuals``, a dict of the caller's own."""
    for name, treedef, told in encoded:
        parts = zip(treedef.flatten_up_to(residuals[name]), told, strict=True)
        decoded = [one if its is None else decode(one, its) for one, its in parts]
        residuals[name] = treedef.unflatten(decoded)
    return Pullback(rule, residuals, static)
