"""Muon: momentum whose matrices are made nearly orthogonal."""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet.control_flow import scan
from funcnet.core import Optimizer, Tree
from funcnet.optimizers.checks import Number, check_options, is_on
from funcnet.optimizers.each import by_shape, each
from funcnet.optimizers.lift import paths, stateful
from funcnet.optimizers.named import check_named, named_chain
from funcnet.optimizers.transforms import (
    LearningRate,
    add_decayed_weights,
    scale_by_learning_rate,
)

Coefficients = tuple[float, float, float]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class MuonState(NamedTuple):
    """The running mean of g, a tree like the params."""

    mu: Tree


def orthogonalize(
    m: Tensor,
    ns_coefficients: Coefficients = _COEFFICIENTS,
    ns_steps: int = 5,
    eps: Number = 1e-7,
    ns_dtype: torch.dtype | None = torch.bfloat16,
) -> Tensor:
    """Nearly ``U V^T`` of each matrix ``m = U S V^T``: its singular values become about 1.

    Newton and Schulz's iteration from ``x = m / max(|m|, eps)``, ``ns_steps`` times:

        x = a x + (b A + c A A) x,    A = x x^T

    The coefficients of torch and of Jordan are those that let small singular values grow
    fastest; with them 5 steps take all singular values to between about 0.7 and 1.2.

    Args:
        m: of shape (..., n, m).
        ns_coefficients: a, b and c.
        ns_steps: the number of iterations, below 100.
        eps: the least norm to divide by.
        ns_dtype: the dtype to compute in; None for that of m.

    Returns:
        a tensor in the dtype it was computed in.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; ``torch.optim.Muon``.

    >>> orthogonalize(torch.eye(2), ns_steps=20, ns_coefficients=(1.5, -0.5, 0.0))
    tensor([[1., 0.],
            [0., 1.]], dtype=torch.bfloat16)
    """
    x = m if ns_dtype is None else m.to(ns_dtype)
    tall = m.shape[-2] > m.shape[-1]
    x = x.mT if tall else x
    stack = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
    iterations = partial(_newton_schulz, ns_coefficients, ns_steps, eps)
    if x.is_cpu and x.shape[-2] >= _LARGE and stack.shape[0]:
        stack = scan(lambda _, x: ((), iterations(x)), (), stack)[1]
    else:
        stack = iterations(stack)
    x = stack.reshape(x.shape)
    return x.mT if tall else x


# From so many rows on, a product is faster for one matrix at a time on the CPU, whose cache holds
# it, and in halves where it is symmetric: a compiled step of Muon with 20 matrices of 512 x 512
# takes 6 % less (tests/benchmarks/muon.py).
_LARGE = 256


def _newton_schulz(coefficients: Coefficients, steps: int, eps: Number, x: Tensor) -> Tensor:
    a, b, c = coefficients
    # The greatest singular value is at most the norm.
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = _symmetric(x, x.mT)
        x = _plus(_symmetric(gram, gram, gram, b, c), x, x, a)
    return x


def _symmetric(
    x: Tensor, y: Tensor, base: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """``beta base + alpha x y``, which is symmetric: a quarter of it is another's transpose."""
    n = x.shape[-2]
    if n < _LARGE or x.dim() != 2:
        return _plus(x, y, base, beta, alpha)
    half = n // 2
    low = _plus(x[half:], y, None if base is None else base[half:], beta, alpha)
    corner = None if base is None else base[:half, :half]
    corner = _plus(x[:half], y[:, :half], corner, beta, alpha)
    high = torch.cat([corner, low[:, :half].mT.contiguous()], 1)
    return torch.cat([high, low])


def _plus(
    x: Tensor, y: Tensor, base: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """``beta base + alpha x y`` in one operator, which rounds once."""
    if base is None:
        return x @ y
    add = torch.addmm if x.dim() == 2 else torch.baddbmm
    return add(base, x, y, beta=beta, alpha=alpha)


def scale_by_muon(
    momentum: Number = 0.95,
    nesterov: bool = True,
    ns_coefficients: Coefficients = _COEFFICIENTS,
    eps: Number = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
    *,
    ns_dtype: torch.dtype | None = torch.bfloat16,
) -> Optimizer:
    """``r O``, where O is the momentum b of a matrix, made nearly orthogonal by `orthogonalize`.

    ``b = momentum b + (1 - momentum) g``, and r is a factor of the matrix's shape: see
    `funcnet.muon` for the options, which are the same.

    Source: Jordan et al. 2024; ``torch.optim.Muon``.

    >>> params = {"w": torch.tensor([[3.0, 0.0], [0.0, 2.0]])}
    >>> transform = scale_by_muon()
    >>> transform.update(params, transform.init_state(params), params)[0]
    {'w': tensor([[1.1250, 0.0000],
            [0.0000, 0.6797]])}
    """
    check_options("muon", momentum=momentum, eps=eps)
    if isinstance(ns_steps, bool) or not isinstance(ns_steps, int) or not 0 <= ns_steps < 100:
        raise ValueError(f"muon: ns_steps must be an integer from 0 to 99, got {ns_steps!r}")
    if not isinstance(ns_coefficients, (tuple, list)) or len(ns_coefficients) != 3:
        raise ValueError(f"muon: ns_coefficients must be three numbers, got {ns_coefficients!r}")
    if adjust_lr_fn not in _RATIOS:
        names = ", ".join(map(repr, _RATIOS))
        raise ValueError(f"muon: adjust_lr_fn must be one of {names}, got {adjust_lr_fn!r}")
    if ns_dtype is not None and not (
        isinstance(ns_dtype, torch.dtype) and ns_dtype.is_floating_point
    ):
        raise TypeError(f"muon: ns_dtype must be a floating dtype or None, got {ns_dtype!r}")
    ratio = _RATIOS[adjust_lr_fn]

    def direction(m: Tensor) -> Tensor:
        return orthogonalize(m, ns_coefficients, ns_steps, eps, None)

    def scaled(o: Tensor, p: Tensor) -> Tensor:
        return ratio(*p.shape) * o.to(torch.promote_types(p.dtype, torch.float32))

    def init(p: Any) -> MuonState:
        _require_matrices(p)
        return MuonState(torch.zeros_like(p))

    def update(g: Any, state: MuonState, p: Any) -> tuple[Any, MuonState]:
        _require_matrices(p)
        mu: Any = torch.lerp(state.mu, g, 1.0 - momentum)
        m: Any = torch.lerp(g, mu, momentum) if nesterov else mu
        o = by_shape(direction, m if ns_dtype is None else m.to(ns_dtype))
        return each(scaled, o, p), MuonState(mu)

    return stateful(init, update)


_RATIOS: dict[str | None, Any] = {
    None: lambda n, m: math.sqrt(max(1.0, n / max(m, 1))),
    "original": lambda n, m: math.sqrt(max(1.0, n / max(m, 1))),
    "match_rms_adamw": lambda n, m: 0.2 * math.sqrt(max(n, m)),
}
"""By what a step is multiplied, of the numbers of rows and columns of a matrix."""


def _require_matrices(p: Any) -> None:
    for index, leaf in enumerate(p):
        if leaf.dim() != 2:
            raise ValueError(
                f"muon: expects matrices, got {tuple(leaf.shape)} at {paths(p)[index]!r}; "
                "give such params another optimizer with fn.optimizers.partition"
            )


def muon(
    lr: LearningRate = 1e-3,
    weight_decay: Number = 0.1,
    momentum: Number = 0.95,
    nesterov: bool = True,
    ns_coefficients: Coefficients = _COEFFICIENTS,
    eps: Number = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
    *,
    ns_dtype: torch.dtype | None = torch.bfloat16,
) -> Optimizer:
    """``p - lr (r O + weight_decay p)``, where O is the momentum, made nearly orthogonal.

    ``b = momentum b + (1 - momentum) g``, from b = 0, and O is `funcnet.optimizers.orthogonalize`
    of b, or, with ``nesterov``, of ``(1 - momentum) g + momentum b``. For matrices alone, of hidden
    layers: biases, embeddings and the last layer are given another optimizer, by ``partition``.

    Args:
        lr: a number, a 0-d tensor, or a function of the number of updates so far.
        weight_decay: decoupled: shrinks the params by ``lr * weight_decay`` of their size.
        momentum: the decay of the running mean b.
        nesterov: whether to look ahead.
        ns_coefficients: the coefficients (a, b, c) of Newton and Schulz's iteration.
        eps: the least norm that the iteration divides by.
        ns_steps: its number of steps.
        adjust_lr_fn: the factor r of an (n, m) matrix: ``"original"``, or None, for
            ``sqrt(max(1, n / m))``; ``"match_rms_adamw"`` for ``0.2 sqrt(max(n, m))``, with which
            learning rates and weight decays are those of AdamW (Liu et al. 2025).
        ns_dtype: the dtype of the iteration. torch's is bfloat16; None is that of the params. On a
            CPU that has instructions for bfloat16, float32 takes 4 times as long.

    Matrices of one shape and dtype are computed as one batch.

    Raises:
        ValueError: a leaf that is no matrix, with its path.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; ``torch.optim.Muon``.

    >>> params = {"w": torch.tensor([[3.0, 0.0], [0.0, 2.0]])}
    >>> optimizer = muon(0.1, weight_decay=0.0)
    >>> optimizer.update(params, optimizer.init_state(params), params)[0]
    {'w': tensor([[-0.1125, -0.0000],
            [-0.0000, -0.0680]])}
    """
    check_named("muon", lr, weight_decay=weight_decay)
    return named_chain(
        "muon",
        scale_by_muon(
            momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn, ns_dtype=ns_dtype
        ),
        is_on(weight_decay) and add_decayed_weights(weight_decay),
        scale_by_learning_rate(lr),
    )
