"""Connectionist temporal classification: a loss of sequences that are not aligned."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet import runtime, tree
from funcnet.control_flow import scan
from funcnet.core import Loss, Tree
from funcnet.errors import require
from funcnet.losses.checks import check_prediction, check_range, refuse_reduction
from funcnet.losses.lift import Elements, loss_of

# The logarithm of an impossible path. It is finite so that a derivative of the formula is not NaN.
_NEVER = -1e30
_PARTS = ("targets", "input_lengths", "target_lengths")


class Alignment(NamedTuple):
    """What the log-probabilities are aligned with: a batch of padded targets, and the lengths."""

    targets: Tensor
    input_lengths: Tensor
    target_lengths: Tensor

    def states(self, blank: int, size: int) -> tuple[Tensor, Tensor]:
        """The labels with a blank around each, (batch, size), and where a path may skip the blank
        before a label: it may not between two labels that are equal."""
        is_label = torch.arange(self.targets.shape[1], device=self.targets.device)
        targets = torch.where(is_label < self.target_lengths[:, None], self.targets, blank)
        labels = torch.stack([torch.full_like(targets, blank), targets], -1).flatten(1)
        labels = F.pad(labels, (0, 1), value=blank)[:, :size]
        return labels, (labels != blank) & (labels != F.pad(labels, (2, 0), value=blank)[:, :size])

    def last(self, states: Tensor) -> Tensor:
        """Those of a path's states that may be its last: the last label, or the blank after it."""
        ends = 2 * self.target_lengths[:, None] - states
        return (ends == 0) | (ends == 1)


def _either(*paths: Tensor) -> Tensor:
    return torch.logsumexp(torch.stack(paths), 0)


def _moved(paths: Tensor, by: int) -> Tensor:
    """Each state's number is that of the state ``by`` before it."""
    size = paths.shape[1]
    if by > 0:
        return F.pad(paths, (by, 0), value=_NEVER)[:, :size]
    return F.pad(paths, (0, -by), value=_NEVER)[:, -by:]


def forward_paths(log_p: Tensor, alignment: Alignment, blank: int) -> tuple[Tensor, Tensor]:
    """``(-log p(target), alpha)``: alpha[t, n, s] sums the paths that are in state s at time t.

    ``alpha_t(s) = log_p_t(label_s) + log(sum of exp alpha_{t-1} over s, s - 1 and s - 2)``, the
    last where the blank in between may be skipped.
    """
    size = 2 * alignment.targets.shape[1] + 1
    labels, skips = alignment.states(blank, size)
    emitted = log_p.gather(2, labels.expand(log_p.shape[0], *labels.shape))
    states = torch.arange(size, device=log_p.device)
    start = torch.where(states == 0, 0.0, _NEVER).to(log_p.dtype).expand(labels.shape)

    def step(alpha: Tensor, emitted: Tensor) -> tuple[Tensor, Tensor]:
        skipped = torch.where(skips, _moved(alpha, 2), _NEVER)
        alpha = emitted + _either(alpha, _moved(alpha, 1), skipped)
        return alpha, alpha

    _, alpha = scan(step, start, emitted)
    lengths = alignment.input_lengths[:, None]
    at_end = alpha.gather(0, (lengths - 1).clamp(min=0).expand(labels.shape)[None])[0]
    at_end = torch.where(lengths > 0, at_end, start)
    likelihood = torch.where(alignment.last(states), at_end, _NEVER).logsumexp(1)
    return torch.where(likelihood < _NEVER / 2, torch.inf, -likelihood), alpha


def occupied(log_p: Tensor, alignment: Alignment, nll: Tensor, alpha: Tensor, blank: int) -> Tensor:
    """The probability to emit a class at a time, given the target, of the shape of log_p.

    It is the sum of ``exp(alpha + beta + nll)`` over the states of the class, with
    ``beta_t(s) = log(sum of exp(beta_{t+1} + log_p_{t+1}) over s, s + 1 and s + 2)``.
    """
    size = alpha.shape[2]
    labels, skips = alignment.states(blank, size)
    index = labels.expand(alpha.shape)
    times = torch.arange(log_p.shape[0], device=log_p.device)
    last = alignment.last(torch.arange(size, device=log_p.device))
    end = torch.where(last, 0.0, _NEVER).to(log_p.dtype)
    lengths = alignment.input_lengths[:, None]

    def step(after: Tensor, at: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        emitted, time = at
        skipped = _moved(torch.where(skips, after, _NEVER), -2)
        beta = _either(after, _moved(after, -1), skipped)
        beta = torch.where(time == lengths - 1, end, beta)
        return emitted + beta, beta

    xs = log_p.gather(2, index), times
    _, beta = scan(step, torch.full_like(end, _NEVER), xs, reverse=True)
    paths = (alpha + beta + nll[:, None]).exp()
    classes = torch.zeros_like(log_p).scatter_add(2, index, paths)
    classes = torch.where((nll == torch.inf)[:, None], torch.nan, classes)
    return torch.where(times[:, None, None] < lengths, classes, 0.0)


def forward_paths_by_kernel(
    log_p: Tensor, alignment: Alignment, blank: int
) -> tuple[Tensor, Tensor]:
    """`forward_paths` from the kernel."""
    nll, alpha = runtime.ctc_loss(log_p, *alignment, blank)
    return nll, alpha.transpose(0, 1)


def occupied_by_kernel(
    log_p: Tensor, alignment: Alignment, nll: Tensor, alpha: Tensor, blank: int
) -> Tensor:
    """`occupied` from the kernel's gradient, which is ``exp(log_p) - occupied``.

    That is the derivative of the loss where ``exp(log_p)`` is made to sum to 1 by a log_softmax,
    by the input of that.
    """
    ones, alpha = torch.ones_like(nll), alpha.transpose(0, 1)
    gradient = runtime.ctc_loss_backward(ones, log_p, *alignment, nll, alpha, blank)
    times = torch.arange(log_p.shape[0])[:, None, None]
    # Where log_p is minus infinity the kernel has NaN.
    within = (times < alignment.input_lengths[:, None]) & (log_p > -torch.inf)
    return torch.where(within, log_p.exp() - gradient, 0.0)


def _has_kernel(*tensors: Tensor) -> bool:
    on_cpu = all([tensor.is_cpu for tensor in tensors])
    return on_cpu and not runtime.is_transformed(*tensors)


def ctc_backward(
    d: Tensor | float,
    blank: int,
    zero_infinity: bool,
    *,
    log_p: Tensor,
    alignment: Alignment,
    nll: Tensor,
    alpha: Tensor,
    lengths: Tensor | None,
) -> Tensor:
    """``-d occupied``, divided by the lengths for the mean."""
    wide = _wide(log_p if log_p.dim() == 3 else log_p[:, None])
    kernel = _has_kernel(wide, nll) and alpha.shape[2] == 2 * alignment.targets.shape[1] + 1
    formula = occupied_by_kernel if kernel else occupied
    d = d if lengths is None else d / lengths
    d = -d[..., None] if isinstance(d, Tensor) and d.dim() else -d
    gradient = d * formula(wide, alignment, nll, alpha, blank)
    if zero_infinity:
        gradient = torch.where(nll[:, None] == torch.inf, 0.0, gradient)
    return gradient.reshape(log_p.shape).to(log_p.dtype)


def _wide(log_p: Tensor) -> Tensor:
    return log_p if log_p.dtype == torch.float64 else log_p.float()


def _aligned(name: str, log_p: Tensor, target: Any, blank: int) -> Alignment:
    """The parts of the target, padded and as a batch; ValueError or TypeError unless they fit."""
    check_prediction(name, log_p)
    if isinstance(target, dict) and set(target) == set(_PARTS):
        target = tuple([target[part] for part in _PARTS])
    three = isinstance(target, tuple) and len(target) == 3
    integers = three and all([_is_integer(part) for part in target])
    expected = f"a tuple or dict ({', '.join(_PARTS)}) of int32 or int64 tensors as target"
    require(integers, f"{name}: expects {expected}, got {tree.describe(target)}", TypeError)
    got = tuple(log_p.shape)
    fits = log_p.dim() in (2, 3) and log_p.shape[0] > 0
    require(fits, f"{name}: expects (time, batch, classes) or (time, classes), got {got}")
    inside = 0 <= blank < log_p.shape[-1]
    require(inside, f"{name}: expects blank within {log_p.shape[-1]} classes, got {blank}")
    targets, *lengths = target
    single = log_p.dim() == 2
    batch = 1 if single else log_p.shape[1]
    for part, length in zip(_PARTS[1:], lengths, strict=True):
        shapes = ((), (1,)) if single else ((batch,),)
        words = f"{part} of shape {shapes[0]}, got {tuple(length.shape)}"
        require(tuple(length.shape) in shapes, f"{name}: expects {words}")
    input_lengths, target_lengths = (length.long().reshape(batch) for length in lengths)
    check_range(name, "input_lengths", input_lengths, 0, log_p.shape[0])
    found = tuple(targets.shape)
    if targets.dim() == 1:
        targets = _padded(name, targets, target_lengths)
    else:
        words = f"targets of shape (batch, size) or concatenated for a batch of {batch}"
        fits = targets.dim() == 2 and found[0] == batch
        require(fits, f"{name}: expects {words}, got {found}")
        check_range(name, "target_lengths", target_lengths, 0, targets.shape[1])
    targets = targets.long()
    longest = _read(target_lengths)
    if longest is not None:
        targets = targets[:, : max(longest, default=0)]
    within = torch.arange(targets.shape[1], device=targets.device) < target_lengths[:, None]
    labels = torch.where(within, targets, 0 if blank else 1)
    check_range(name, "targets", labels, 0, log_p.shape[-1] - 1)
    if _read((labels == blank).any()):
        raise ValueError(f"{name}: expects targets other than the blank {blank}")
    return Alignment(targets, input_lengths, target_lengths)


def _is_integer(part: Any) -> bool:
    return isinstance(part, Tensor) and part.dtype in (torch.int32, torch.int64)


def _read(tensor: Tensor) -> Any:
    return None if tensor.is_meta else runtime.read(tensor)


def _padded(name: str, targets: Tensor, lengths: Tensor) -> Tensor:
    """Concatenated targets as (batch, size): the longest, or all where no length can be read."""
    total, known = targets.shape[0], _read(lengths)
    if known is not None:
        fits = min(known, default=0) >= 0 and sum(known) == total
        require(fits, f"{name}: expects target_lengths that add up to {total}, got {known}")
    places = torch.arange(total if known is None else max(known, default=0), device=targets.device)
    if not total:
        return targets.new_zeros(len(lengths), 0)
    starts = lengths.cumsum(0) - lengths
    return targets[(starts[:, None] + places).clamp(max=total - 1)]


def ctc(blank: int = 0, reduction: str = "mean", zero_infinity: bool = False) -> Loss:
    """``-log p(target)``, summed over all alignments of the target with the prediction.

    An alignment names a class, or the blank, at each time; without its repetitions and then
    without its blanks it is the target. The sums are those of the forward-backward algorithm, in
    logarithms. On the CPU, in eager mode, they are PyTorch's kernel.

    Args:
        blank: the class that stands for nothing.
        reduction: "none", "sum", or "mean": of the losses divided by their target's length.
        zero_infinity: whether the loss of an input that is too short for its target, which is
            infinite, and its gradient, which is NaN, are 0.

    Inputs:
        prediction, log-probabilities (time, batch, classes) or (time, classes); target, a tuple
        ``(targets, input_lengths, target_lengths)`` or a dict with these names, of int32 or int64
        tensors. The targets are (batch, size), padded, or concatenated to one dimension: under
        `jit` each of these takes the time of one as long as all together. The lengths are (batch,)
        or ().
    Returns:
        with "none", a tensor of shape (batch,) or ().
    VJP:
        ``dprediction[t, i, c] = -d_i p(class c at time t | target_i)``, where d_i is dvalue over
        what the reduction divides by. It is the derivative for any prediction. PyTorch's has
        ``d_i exp(prediction)`` added to it: it supposes a log_softmax before the loss, for whose
        input the two are the same.
    Raises:
        ValueError: targets out of range, or lengths that are longer than what they measure.

    Source: ``torch.nn.CTCLoss``; Graves et al. 2006.

    >>> log_p = torch.full((2, 3), 1 / 3).log()
    >>> target = (torch.tensor([1]), torch.tensor(2), torch.tensor(1))
    >>> value, pullback = ctc().vjp(log_p, target)  # 3 of 9 paths: 1 1, 1 0, 0 1
    >>> value.exp(), pullback()
    (tensor(3.), tensor([[-0.3333, -0.6667, -0.0000],
            [-0.3333, -0.6667, -0.0000]]))
    """
    refuse_reduction("ctc", blank)
    wrong = f"ctc: blank must be an int, got {blank!r}"
    require(isinstance(blank, int) and not isinstance(blank, bool), wrong, TypeError)

    def forward(prediction: Tensor, target: Tree) -> Elements:
        alignment = _aligned("ctc", prediction, target, blank)
        log_p = _wide(prediction if prediction.dim() == 3 else prediction[:, None])
        kernel = _has_kernel(log_p, *alignment)
        formula = forward_paths_by_kernel if kernel else forward_paths
        nll, alpha = formula(log_p, alignment, blank)
        elements = torch.where(nll == torch.inf, 0.0, nll) if zero_infinity else nll
        lengths = None
        if reduction == "mean":
            lengths = alignment.target_lengths.clamp(min=1).to(log_p.dtype)
        elements = elements if lengths is None else elements / lengths
        residuals = {
            "log_p": prediction,
            "alignment": alignment,
            "nll": nll,
            "alpha": alpha,
            "lengths": lengths,
        }
        shape = prediction.shape[1:-1]
        elements = elements.to(prediction.dtype).reshape(shape)
        return Elements(elements, residuals, (blank, zero_infinity))

    return loss_of(forward, ctc_backward, reduction, name="ctc")
