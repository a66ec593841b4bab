"""The cross entropy of logits that are parted by classes."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet import tree
from funcnet.collectives import Axis, Split
from funcnet.core import Loss
from funcnet.distributed.processes.start import Mesh
from funcnet.distributed.tensor_parallel.parting import axis_for, is_inside, own_rows
from funcnet.errors import check_count, require
from funcnet.losses.checks import check_indices, check_prediction, check_tensor, class_dim
from funcnet.losses.lift import Elements, loss_of
from funcnet.losses.reductions import wide_sum

_NAME = "vocabulary_cross_entropy"


class Classes(NamedTuple):
    """What `vocabulary_cross_entropy` is told."""

    axis: Axis
    weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    number: int | None

    def split(self, prediction: Tensor) -> Split:
        """How the classes are parted."""
        own = prediction.shape[class_dim(prediction)]
        number = own * self.axis.size if self.number is None else self.number
        return Split(self.axis, (number,), 0)

    def check(self, prediction: Any, target: Any) -> Split:
        """How the classes are parted; ValueError or TypeError for what does not fit."""
        check_prediction(_NAME, prediction)
        got = tuple(prediction.shape)
        require(prediction.dim() > 0, f"{_NAME}: expects (batch, classes, *) or (classes,), got ()")
        split, dim = self.split(prediction), class_dim(prediction)
        (number,), (own,) = split.shape, split.part_shape
        words = f"{own} of {number} classes in dimension {dim}"
        require(got[dim] == own, f"{_NAME}: expects a prediction of {words}, got {got}")
        found = None if self.weight is None else tuple(self.weight.shape)
        words = f"a weight for each of {number} classes"
        require(found in (None, (number,)), f"{_NAME}: expects {words}, got {found}")
        is_target = isinstance(target, Tensor) and target.dtype == torch.int64
        words = f"a target of int64 class indices, got {tree.describe(target)}"
        require(is_target, f"{_NAME}: expects {words}", TypeError)
        shape = (*got[:dim], *got[dim + 1 :])
        words = f"a target of shape {shape} for predictions of shape {got}"
        fits = tuple(target.shape) == shape
        require(fits, f"{_NAME}: expects {words}, got {tuple(target.shape)}")
        check_indices(_NAME, target, 0, number, self.ignore_index)
        return split

    def smoothed(self, split: Split, logits: Tensor) -> tuple[Tensor, Tensor] | None:
        """What label smoothing adds to q, at each own class, and its sum over all of them."""
        if not self.label_smoothing:
            return None
        weight, (number,) = self.weight, split.shape
        whole = logits.new_ones(number) if weight is None else weight.to(logits)
        whole = whole * (self.label_smoothing / number)
        return _by_class(split.part(whole), logits), whole.sum()


def _by_class(values: Tensor, logits: Tensor) -> Tensor:
    """A number for each class in a shape that broadcasts against the logits."""
    shape = [1] * logits.dim()
    shape[class_dim(logits)] = -1
    return values.reshape(shape)


def _logits(prediction: Tensor, split: Split) -> Tensor:
    """In float32 at least; minus infinity for what is no class."""
    logits = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
    inside = is_inside(split, logits.device)
    return logits if inside is None else logits.masked_fill(~_by_class(inside, logits), -torch.inf)


def vocabulary_cross_entropy_backward(
    d: Tensor | float,
    split: Split,
    *,
    prediction: Tensor,
    logsumexp: Tensor,
    index: Tensor,
    picked: Tensor,
    total: Tensor,
    smoothed: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``d (softmax(y) total - q)`` of own classes, with q and its total as in the forward pass."""
    dim = class_dim(prediction)
    own, is_own = own_rows(index, split)
    d = d.unsqueeze(dim) if isinstance(d, Tensor) and d.dim() else d
    dlogits = (_logits(prediction, split) - logsumexp).exp() * (total * d)
    if smoothed is not None:
        kept, of_each = smoothed
        dlogits = dlogits - of_each * (kept * d)
    at_class = torch.where(is_own, -(picked * d), 0.0).to(dlogits.dtype)
    return dlogits.scatter_add(dim, own, at_class).to(prediction.dtype)


def vocabulary_cross_entropy(
    mesh: Mesh,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    num_classes: int | None = None,
    axis: str = "model",
) -> Loss:
    """`funcnet.cross_entropy` of logits of which each rank has those of some classes.

    The ranks exchange three numbers for each example, never the logits: the greatest of them, the
    sum of their exponentials and their product with q.

    A net for this loss gives each rank the logits of its own classes only. Metrics and other
    losses, such as `funcnet.metrics.accuracy` and `funcnet.cross_entropy`, would read them as all
    classes there are. For these make the net with ``column_linear(..., gather=True)``: it takes the
    same params, and its loss is `funcnet.cross_entropy`.

    Args:
        mesh: the ranks; see `mesh` and `axis_of`.
        weight: of each class of all ranks, shape (classes,).
        ignore_index, reduction, label_smoothing: those of `funcnet.cross_entropy`.
        num_classes: the classes of all ranks; needed where ranks do not divide them.
        axis: the axis of the mesh over which the classes are parted.

    Inputs:
        prediction, a rank's logits ``(batch, ceil(classes / ranks), *)`` or without the batch, such
        as a `column_linear` gives them; target, class indices, int64, of shape ``(batch, *)`` or
        (), the same on all ranks.
    Returns:
        the value, the same on all ranks; with "none", a tensor of shape ``(batch, *)`` or ().
    VJP:
        ``dprediction = d (softmax(y) sum(q) - q) / n`` of own classes; 0 for those that are none.
    Raises:
        ValueError: another number of classes, a class out of range.
        TypeError: a target that is not of class indices.

    Source: Shoeybi et al. 2019, "Megatron-LM".

    >>> loss = vocabulary_cross_entropy({"model": 1})
    >>> value, pullback = loss.vjp(torch.zeros(2, 2), torch.tensor([0, 1]))
    >>> value, pullback()
    (tensor(0.6931), tensor([[-0.2500,  0.2500],
            [ 0.2500, -0.2500]]))
    """
    check_tensor(_NAME, "weight", weight)
    smooth = 0.0 <= label_smoothing <= 1.0
    require(smooth, f"{_NAME}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if num_classes is not None:
        check_count(_NAME, num_classes=num_classes)
    ranks = axis_for(_NAME, mesh, axis)
    classes = Classes(ranks, weight, ignore_index, label_smoothing, num_classes)

    def forward(prediction: Tensor, target: Tensor) -> Elements:
        split, dim = classes.check(prediction, target), class_dim(prediction)
        logits = _logits(prediction, split)
        kept = (target != ignore_index).unsqueeze(dim)
        index = torch.where(kept, target.unsqueeze(dim), 0)
        # q is the class's weight at the class, and 0 elsewhere, before it is smoothed.
        picked = kept.to(logits.dtype)
        if weight is not None:
            picked = picked * weight.to(logits)[index]
        n = wide_sum(picked) if reduction == "mean" else None
        picked = picked * (1 - label_smoothing) if label_smoothing else picked
        own, is_own = own_rows(index, split)
        top = ranks.max(logits.amax(dim, keepdim=True))
        logits = logits - top
        counts = is_own & (picked != 0)
        product = torch.where(counts, picked * logits.gather(dim, own), 0.0)
        residuals: dict[str, Any] = {"prediction": prediction, "index": index, "picked": picked}
        total = picked
        if smoothing := classes.smoothed(split, logits):
            of_each, of_all = smoothing
            counted = kept.to(logits.dtype)
            residuals["smoothed"] = counted, of_each
            total, q = picked + counted * of_all, counted * of_each
            product = product + torch.where(q == 0, 0.0, q * logits).sum(dim, keepdim=True)
        exponentials = logits.exp().sum(dim, keepdim=True)
        exponentials, product = ranks.sum(torch.stack([exponentials, product])).unbind(0)
        logs = exponentials.log()
        # An example that counts nothing counts 0, whatever its logits are.
        values = torch.where(total == 0, 0.0, total * logs - product).squeeze(dim)
        residuals |= {"logsumexp": top + logs, "total": total}
        return Elements(values.to(prediction.dtype), residuals, (split,), total=n)

    return loss_of(forward, vocabulary_cross_entropy_backward, reduction, name=_NAME)
