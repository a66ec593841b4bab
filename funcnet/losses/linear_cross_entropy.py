"""The last linear layer and the cross entropy as one layer, which can do without all logits."""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from funcnet import tree
from funcnet.batch_axis import BatchAxis
from funcnet.combinators.combine import Pull, Run, combine
from funcnet.control_flow import scan
from funcnet.core import Applied, Forward, Grads, Key, Layer, Params, Pullback, Tree, pull
from funcnet.errors import located, refuse_state, require
from funcnet.global_forms import all_in_global_form, in_global_form
from funcnet.initializers import Initializer
from funcnet.layers.linear import linear
from funcnet.lift import stateful
from funcnet.losses.checks import class_dim
from funcnet.losses.classification import by_class, cross_entropy, total_weight
from funcnet.losses.heads import form_of, input_and_target, like_form
from funcnet.losses.reductions import divided, of_all_ranks, reduced, summed

_NAME = "linear_cross_entropy"


class Head(NamedTuple):
    """What the loss of the logits is."""

    shape: tuple[int, ...]
    reduction: str
    weight: Tensor | None
    ignore_index: int | None
    label_smoothing: float

    @property
    def ignored(self) -> int:
        """The class index that counts nothing."""
        return -100 if self.ignore_index is None else self.ignore_index

    def weight_for(self, logits: Tensor) -> Tensor | None:
        """The weight of each class; without values where init computes shapes alone."""
        weight = self.weight
        return weight.to("meta") if weight is not None and logits.is_meta else weight

    def checked(self, x: Tree) -> tuple[Tensor, Tensor]:
        """The input and the target; ValueError or TypeError for what cross_entropy would take."""
        given, target = input_and_target(x)
        got, several = tuple(given.shape), len(self.shape) > 1
        forms = "(batch, in_features)" if several else "(batch, in_features) or (in_features,)"
        fits = given.dim() == 2 or (given.dim() == 1 and not several)
        require(fits, f"expects an input of {forms}, got {got}")
        ignores = self.ignore_index is not None and target.is_floating_point()
        require(not ignores, f"ignores no class of probabilities, got {self.ignore_index}")
        return given, target

    def layer(self, child: Layer, reduction: str, axis: BatchAxis | None = None) -> Layer:
        """The loss of a linear layer's output, all of it at once; over ranks that of all parts."""
        axis = None if reduction == "none" else axis

        def forward(run: Run, x: Tree, axis: BatchAxis | None) -> tuple[Tree, Mapping[str, Tree]]:
            with located(f"{_NAME}:"):
                given, target = self.checked(x)
            logits = run("linear", given)
            logits = logits.unflatten(-1, self.shape) if len(self.shape) > 1 else logits
            # In half precision the difference of two probabilities would lose most of its digits.
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if target.dtype == given.dtype:
                target = target.to(logits.dtype)
            weight = self.weight_for(logits)
            options = (weight, self.ignored, reduction, self.label_smoothing)
            loss = cross_entropy(*options)
            n: Any = None
            with located(f"{_NAME}:"):
                if axis is None:
                    value, pullback = loss.vjp(logits, target)
                else:
                    assert loss.fraction is not None
                    numerator, n, pullback = loss.fraction(logits, target)
                    value, n = of_all_ranks(axis, numerator, n)
            residuals = {"loss": pullback, "form": form_of(x)}
            if n is not None:
                residuals["n"] = n
            if target.is_floating_point():
                # The derivative of each element by the target.
                by_target = (self.label_smoothing - 1) * logits.log_softmax(class_dim(logits))
                if weight is not None:
                    by_target = by_target * by_class(weight, logits)
                if reduction == "mean" and axis is None:
                    by_target = by_target * (self.shape[0] / max(logits.numel(), 1))
                residuals["by_target"] = by_target
            return value.to(given.dtype), residuals

        def global_form(children: Mapping[Any, Layer], axis: BatchAxis) -> Layer:
            return self.layer(all_in_global_form(children, axis)["linear"], reduction, axis)

        children, passes = {"linear": child}, (forward, head_backward)
        return combine(_NAME, children, *passes, axis, global_form=global_form)


def head_backward(
    pull: Pull, dy: Tensor, residuals: Mapping[str, Any], axis: BatchAxis | None
) -> Tree:
    """The cross entropy's gradient of the logits, through the linear layer."""
    if axis is not None:
        dy = torch.as_tensor(divided(axis.sum(dy), residuals.get("n", 1)))
    dtarget = residuals.get("by_target")
    if dtarget is not None:
        dtarget = dtarget * (dy.unsqueeze(min(1, dtarget.dim() - 1)) if dy.dim() else dy)
        dtarget = dtarget.to(dy.dtype)
    dlogits = residuals["loss"](dy)
    dlogits = dlogits.flatten(1) if dlogits.dim() > 2 else dlogits
    dlogits = dlogits.to(dy.dtype)
    return like_form(residuals["form"], pull("linear", dlogits, needed=pull.x), dtarget)


def in_chunks(
    f: Callable[[Tree, Tree], tuple[Tree, Tree]], carry: Tree, xs: Tree, rows: int, size: int
) -> tuple[Tree, Tree]:
    """`scan` of f over chunks of rows, the last of which may be smaller; the y are joined."""
    whole = rows // size
    chunks = tree.map(lambda x: x[: whole * size].unflatten(0, (whole, size)), xs)
    carry, ys = scan(f, carry, chunks)
    ys = tree.map(lambda y: y.flatten(0, 1), ys)
    if rows % size:
        carry, rest = f(carry, tree.map(lambda x: x[whole * size :], xs))
        ys = tree.map(lambda y, more: torch.cat([y, more]), ys, rest)
    return carry, ys


def chunked(
    head: Head,
    child: Layer,
    options: nn.LinearCrossEntropyOptions,
    axis: BatchAxis | None = None,
) -> Layer:
    """The layer that computes the logits of one chunk of the rows at a time."""
    whole, elements = head.layer(child, head.reduction, axis), head.layer(child, "none")
    axis = None if head.reduction == "none" else axis

    def size_of(x: Tree) -> int:
        with located(f"{_NAME}:"):
            given, _ = head.checked(x)
        rows, features = given.shape if given.dim() == 2 else (1, *given.shape)
        size = chunk_size(options, rows, features, head.shape[0])
        return size if size < rows else 0

    def run(params: Params, x: Tree, size: int) -> tuple[Tensor, Any]:
        def body(nothing: Tree, chunk: Tree) -> tuple[Tree, Tree]:
            return nothing, elements.apply(params, chunk)[0]

        given, target = head.checked(x)
        _, values = in_chunks(body, {}, (given, target), len(given), size)
        total = None
        if head.reduction == "mean" and target.is_floating_point():
            total = values.numel()
        elif head.reduction == "mean":
            total = total_weight(target, head.weight_for(given), head.ignored, given.dtype)
        if axis is None:
            return reduced(values, head.reduction, total)
        value, n = of_all_ranks(axis, *summed(values, head.reduction, total))
        return value.to(values.dtype), 1 if n is None else n

    def apply(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Applied:
        size = size_of(x)
        if not size:
            return whole.apply(params, x, state, key=key, train=train)
        if state:
            refuse_state(_NAME, state)
        return run(params, x, size)[0], {}

    def forward(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Forward:
        size = size_of(x)
        if not size:
            return whole.forward(params, x, state, key, train)
        if state:
            refuse_state(_NAME, state)
        value, n = run(params, x, size)
        residuals = {"params": params, "x": head.checked(x), "form": form_of(x)}
        if isinstance(n, Tensor):
            residuals["n"], n = n, 1
        told = (elements, size, n, head.shape[1:], axis)
        return value, Pullback(chunked_rule, residuals, told), {}

    def global_form(axis: BatchAxis) -> Layer:
        return chunked(head, in_global_form(child, axis, "linear"), options, axis)

    return stateful(
        whole.init,
        forward,
        apply=apply,
        name=_NAME,
        children=whole.children,
        rebuild=lambda children: chunked(head, children["linear"], options, axis),
        takes_key=False,
        global_form=global_form,
    )


def chunked_rule(
    residuals: Any,
    dy: Tensor,
    layer: Layer,
    size: int,
    n: float,
    out_features: tuple[int, ...],
    axis: BatchAxis | None,
    *,
    params: bool,
    x: bool,
) -> Grads:
    """The pullback of each chunk, whose logits are computed again; the dparams are summed."""
    learned, (given, target) = residuals["params"], residuals["x"]
    d: Any = divided(dy if axis is None else axis.sum(dy), residuals.get("n", n))
    d = d.to(dy.dtype).expand(len(given), *out_features)

    def body(sums: Tree, chunk: Tree) -> tuple[Tree, Tree]:
        pair, d = chunk
        _, pullback, _ = layer.forward(learned, pair, {}, None, False)
        dparams, dx = pull({"": pullback}, "", d, params=params, x=x)
        if params:
            sums = tree.map(torch.add, sums, dparams)
        return sums, dx if x else None

    # In half precision a sum of many chunks would lose what the later ones add.
    sums = tree.map(
        lambda leaf: torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32)),
        learned if params else {},
    )
    sums, dx = in_chunks(body, sums, ((given, target), d), len(given), size)
    if params:
        sums = tree.map(lambda leaf, total: total.to(leaf.dtype), learned, sums)
    return sums if params else None, like_form(residuals["form"], *dx) if x else None


def chunk_size(options: nn.LinearCrossEntropyOptions, rows: int, features: int, size: int) -> int:
    """The rows of a chunk: as many as are given, or those by torch's rule ``aspect_ratio:n``.

    By that, the logits of a chunk take as much memory as the input, or the n-th part of that.
    """
    method, given = options.chunking_method, options.batch_chunk_size
    if method == "auto":
        method = "aspect_ratio:2" if given is None else None
    if method is None:
        return rows if given is None else given
    both = f"expects a chunk size or a chunking method, got {given} and {method!r}"
    require(given is None, both)
    fitting = -(-rows // -(-size // features)) if features and size else rows
    power = 1 << max(fitting - 1, 0).bit_length()
    return max(min(power // int(method.partition(":")[2] or 1), rows), 1)


def linear_cross_entropy(
    num_classes: int,
    *,
    out_features: tuple[int, ...] = (),
    bias: bool = False,
    reduction: str = "mean",
    weight: Tensor | None = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: nn.LinearCrossEntropyOptions | None = None,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: torch.dtype | None = None,
) -> Layer:
    """`cross_entropy` of the logits ``x weight^T + bias``, as a layer since it learns the weight.

    With ``options`` the logits of a chunk of the batch are computed at a time, and once more in
    the backward pass, so that the logits of all rows are never there: four products of matrices in
    place of three.

    Args:
        num_classes: the number of classes.
        out_features: further dimensions of the target: each of its elements has weights.
        bias: whether a bias is learned.
        reduction, weight, label_smoothing: those of `cross_entropy`.
        ignore_index: a class index that counts nothing; by default -100.
        options: how large a chunk is, by ``batch_chunk_size`` or ``chunking_method``; "auto" is
            "aspect_ratio:2". Gradients of chunks are summed in float32 at least, and a pullback may
            be called again, so the other options change nothing.
        weight_init, bias_init, dtype: those of `linear`.

    Inputs:
        x = (input, target), or a dict with these names. The input is (batch, in_features), or
        (in_features,) without ``out_features``; the target has class indices, int64, of shape
        ``(batch, *out_features)`` or (), or probabilities ``(batch, num_classes, *out_features)``.
    Returns:
        y, the loss: a scalar; with "none", a tensor of shape ``(batch, *out_features)`` or ().
    Learned params:
        ``linear.weight`` (num_classes * prod(out_features), in_features), ``linear.bias``.
    VJP:
        ``dlogits = d (softmax q_sum - q) / n`` with the target distribution q, then that of
        `linear`; of probabilities as target,
        ``dtarget = -d weight (1 - label_smoothing) log p / n``.
    Raises:
        ValueError: a class, or a probability, out of range.

    Source: ``torch.nn.LinearCrossEntropyLoss``.

    >>> import funcnet as fn
    >>> chunks = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    >>> layer = fn.linear_cross_entropy(3, options=chunks)
    >>> x = torch.ones(5, 2), torch.tensor([0, 1, 2, 0, 0])
    >>> params, _ = layer.init(fn.key(0), x)
    >>> value, pullback, _ = layer.vjp({"linear": {"weight": torch.zeros(3, 2)}}, x)
    >>> value, pullback(torch.ones(()))[0]["linear"]["weight"][:, 0]
    (tensor(1.0986), tensor([-0.2667,  0.1333,  0.1333]))
    """
    classes = isinstance(num_classes, int) and num_classes > 0
    require(classes, f"{_NAME}: num_classes must be > 0, got {num_classes}")
    whole = isinstance(out_features, tuple) and all([isinstance(n, int) for n in out_features])
    require(whole, f"{_NAME}: out_features must be a tuple of ints, got {out_features}", TypeError)
    fits = weight is None or tuple(weight.shape) == (num_classes,)
    got = tuple(getattr(weight, "shape", ()))
    require(fits, f"{_NAME}: expects a weight for each of {num_classes} classes, got {got}")
    shape = (num_classes, *out_features)
    head = Head(shape, reduction, weight, ignore_index, label_smoothing)
    child = linear(prod(shape), bias, weight_init=weight_init, bias_init=bias_init, dtype=dtype)
    return head.layer(child, reduction) if options is None else chunked(head, child, options)
