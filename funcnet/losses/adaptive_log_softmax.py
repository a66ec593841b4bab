"""The adaptive softmax: classes that are rare are chosen in two steps."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from funcnet import runtime
from funcnet.batch_axis import BatchAxis
from funcnet.combinators.combine import Pull, Run, combine
from funcnet.combinators.parallel import parallel
from funcnet.combinators.serial import serial
from funcnet.core import Layer, Tree, sum_cotangents
from funcnet.errors import require
from funcnet.global_forms import all_in_global_form
from funcnet.layers.linear import linear, linear_to
from funcnet.layers.softmax import log_softmax
from funcnet.losses.checks import check_indices
from funcnet.losses.heads import form_of, input_and_target, like_form
from funcnet.losses.reductions import of_all_ranks

_NAME = "adaptive_log_softmax"


def adaptive_forward(
    run: Run, x: Tree, cutoffs: tuple[int, ...], axis: BatchAxis | None = None
) -> tuple[Tree, Mapping[str, Tree]]:
    """The log-probability of each target and the mean loss, or those of all classes."""
    clusters = [*pairwise(cutoffs)]
    if isinstance(x, Tensor):
        require(x.dim() > 0, f"{_NAME}: expects an input of (*, in_features), got ()")
        head = run("normalize", run("head", x))
        tail = run("tail", (x,) * len(clusters))
        of_clusters = head[..., cutoffs[0] :].split(1, -1)
        rare = [log_p + each for log_p, each in zip(tail, of_clusters, strict=True)]
        return torch.cat([head[..., : cutoffs[0]], *rare], -1), {}
    given, target = _checked(x, cutoffs[-1])
    rows, classes = given.reshape(-1, given.shape[-1]), target.reshape(-1)
    parts = [_part(rows, classes, *cluster) for cluster in clusters]
    head = run("normalize", run("head", rows))
    tail = run("tail", tuple([rows[part["rows"]] for part in parts]))
    place = classes
    for index, (low, high) in enumerate(clusters):
        place = torch.where((classes >= low) & (classes < high), cutoffs[0] + index, place)
    output = head.gather(1, place[:, None])[:, 0]
    for log_p, part in zip(tail, parts, strict=True):
        local = torch.where(part["inside"], log_p.gather(1, part["class"][:, None])[:, 0], 0.0)
        output = output.index_add(0, part["rows"], local)
    residuals = {"form": form_of(x), "place": place, "parts": parts}
    if axis is None:
        loss = -output.mean()
    else:
        loss, residuals["n"] = of_all_ranks(axis, -output.sum(), len(output))
    return (output.reshape(target.shape), loss), residuals


def _part(rows: Tensor, classes: Tensor, low: int, high: int) -> dict[str, Tensor]:
    """The rows that a cluster is computed for, which of them are inside, and their class there.

    All rows where values cannot be read, since shapes must not depend on values there.
    """
    inside = (classes >= low) & (classes < high)
    if rows.is_cpu and not runtime.is_transformed(rows, classes):
        which = inside.nonzero()[:, 0]
        inside = inside[which]
    else:
        which = torch.arange(len(classes), device=classes.device)
    return {
        "rows": which,
        "inside": inside,
        "class": torch.where(inside, classes[which] - low, 0),
    }


def adaptive_backward(
    pull: Pull,
    dy: Tree,
    residuals: Mapping[str, Any],
    cutoffs: tuple[int, ...],
    axis: BatchAxis | None = None,
) -> Tree:
    """A target's cotangent goes to its class in the head, or its cluster's, and in the cluster."""
    clusters = [*pairwise(cutoffs)]
    if not residuals:
        head, *tail = dy.split([cutoffs[0], *[high - low for low, high in clusters]], -1)
        of_clusters = [each.sum(-1, keepdim=True) for each in tail]
        dx = pull("tail", tuple(tail), needed=pull.x)
        of_head = torch.cat([head, *of_clusters], -1)
        return sum_cotangents(_through_head(pull, of_head), *(dx or ()))
    doutput, dloss = dy
    d = doutput.reshape(-1)
    if axis is not None:
        d = d - axis.sum(dloss) / residuals["n"]
    elif len(d):
        d = d - dloss / len(d)
    of_tail = []
    for part, (low, high) in zip(residuals["parts"], clusters, strict=True):
        own = torch.where(part["inside"], d[part["rows"]], 0.0)
        of_tail.append(_scattered(own, part["class"], high - low))
    pieces = pull("tail", tuple(of_tail), needed=pull.x)
    of_head = _scattered(d, residuals["place"], cutoffs[0] + len(clusters))
    dx = _through_head(pull, of_head)
    if not pull.x:
        return None
    for piece, part in zip(pieces, residuals["parts"], strict=True):
        dx = dx.index_add(0, part["rows"], piece)
    shape = (*doutput.shape, dx.shape[-1])
    return like_form(residuals["form"], dx.reshape(shape))


def _scattered(d: Tensor, places: Tensor, size: int) -> Tensor:
    """Rows of zeros, but for d at one place in each."""
    return d.new_zeros(len(d), size).scatter(1, places[:, None], d[:, None])


def _through_head(pull: Pull, d: Tensor) -> Any:
    return pull("head", pull("normalize", d), needed=pull.x)


def _checked(x: Tree, n_classes: int) -> tuple[Tensor, Tensor]:
    try:
        given, target = input_and_target(x)
    except (ValueError, TypeError) as error:
        error.args = (f"{_NAME}: {error}",)
        raise
    integer = target.dtype == torch.int64
    require(integer, f"{_NAME}: expects an int64 target, got {target.dtype}", TypeError)
    got = f"got {tuple(given.shape)} and {tuple(target.shape)}"
    fits = given.dim() in (1, 2) and target.shape == given.shape[:-1]
    words = "expects input (batch, in_features) and target (batch,), or (in_features,) and ()"
    require(fits, f"{_NAME}: {words}, {got}")
    check_indices(_NAME, target, 0, n_classes)
    return given, target


def adaptive_log_softmax(
    n_classes: int,
    cutoffs: Sequence[int],
    div_value: float = 4.0,
    head_bias: bool = False,
) -> Layer:
    """``log p(class)``, where a rare class is chosen within its cluster: p(cluster) p(class | it).

    The head chooses among the ``cutoffs[0]`` most frequent classes and the clusters of others.
    Cluster i has the classes from ``cutoffs[i]`` up to the next cutoff. Its logits are of a
    projection of the input to ``in_features // div_value**(i + 1)`` features. In eager mode on the
    CPU a cluster is computed for the rows whose target is in it, as torch does. Elsewhere it is
    computed for all rows, since shapes must not depend on values: that takes as long as the
    log-probabilities of all classes.

    Args:
        n_classes: of all classes, which are numbered from the most frequent one on.
        cutoffs: where the clusters begin, ascending, each in [1, n_classes - 1].
        div_value: by which the features of a cluster are fewer than those of the one before.
        head_bias: whether the head learns a bias.

    Inputs:
        x = (input, target), or a dict with these names, of shapes (batch, in_features) and
        (batch,), or (in_features,) and (); the target is int64. Or x = input alone,
        ``(*, in_features)``.
    Returns:
        y = (output, loss), the log-probabilities of the targets, of their shape, and their negative
        mean; of an input alone ``log p`` of all classes, ``(*, n_classes)``.
    Learned params:
        ``head.weight`` (cutoffs[0] + clusters, in_features), ``head.bias``, ``tail.i.0.weight``
        (hidden, in_features), ``tail.i.1.weight`` (classes of the cluster, hidden).
    VJP:
        that of a log_softmax and of the two linear layers at the target's place in each.
    Raises:
        ValueError: a target out of range, in eager mode, and cutoffs out of order.

    Source: ``torch.nn.AdaptiveLogSoftmaxWithLoss``; Grave et al. 2017.

    >>> import funcnet as fn
    >>> layer = fn.adaptive_log_softmax(10, [4, 7])
    >>> x = torch.ones(3, 16)
    >>> params, _ = layer.init(fn.key(0), x)
    >>> {path: tuple(leaf.shape) for path, leaf in fn.tree.to_dotted(params["tail"]).items()}
    {'0.0.weight': (4, 16), '0.1.weight': (3, 4), '1.0.weight': (1, 16), '1.1.weight': (3, 1)}
    >>> (output, loss), _ = layer.apply(params, (x, torch.tensor([0, 5, 9])))
    >>> output.shape, torch.allclose(loss, -output.mean())
    (torch.Size([3]), True)
    >>> layer.apply(params, x)[0].exp().sum(-1)
    tensor([1., 1., 1.])
    """
    order = all([isinstance(cut, int) for cut in cutoffs]) and sorted(set(cutoffs)) == [*cutoffs]
    inside = len(cutoffs) > 0 and cutoffs[0] >= 1 and cutoffs[-1] <= n_classes - 1
    words = f"ascending cutoffs, each in [1, {n_classes - 1}]"
    require(order and inside, f"{_NAME}: expects {words}, got {cutoffs}")
    require(div_value > 0, f"{_NAME}: div_value must be > 0, got {div_value}")
    ends = (*cutoffs, n_classes)
    tail = [
        serial(
            linear_to(_divided(div_value ** (index + 1)), bias=False),
            linear(high - low, bias=False),
            log_softmax(-1),
        )
        for index, (low, high) in enumerate(pairwise(ends))
    ]
    children = {
        "head": linear(cutoffs[0] + len(cutoffs), head_bias),
        "normalize": log_softmax(-1),
        "tail": parallel(*tail),
    }
    return _of_parts(children, ends)


def _of_parts(
    children: Mapping[Any, Layer], cutoffs: tuple[int, ...], axis: BatchAxis | None = None
) -> Layer:
    def global_form(children: Mapping[Any, Layer], axis: BatchAxis) -> Layer:
        return _of_parts(all_in_global_form(children, axis), cutoffs, axis)

    passes, told = (adaptive_forward, adaptive_backward), (cutoffs, axis)
    return combine(_NAME, children, *passes, *told, global_form=global_form)


def _divided(divisor: float) -> Any:
    return lambda features: int(features // divisor)
