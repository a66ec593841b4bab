"""Shampoo: a preconditioner for each axis of a tensor."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet.core import Optimizer, Tree
from funcnet.errors import check_count
from funcnet.optimizers import axes
from funcnet.optimizers.checks import Number, check_options, is_on
from funcnet.optimizers.choose import choose
from funcnet.optimizers.each import each
from funcnet.optimizers.leaves import at_least_float32
from funcnet.optimizers.lift import stateful, zero_step
from funcnet.optimizers.named import check_named, named_chain
from funcnet.optimizers.transforms import (
    LearningRate,
    add_decayed_weights,
    negate,
    scale_by_learning_rate,
    trace,
)


class ShampooState(NamedTuple):
    """The number of updates so far, the matrices of each leaf's axes, and their inverse roots.

    Trees like the params in names. A leaf's matrices are one after another in a vector; a leaf
    without matrices has the sum of g^2 of each element instead, and no roots.
    """

    step: Tensor
    statistics: Tree
    roots: Tree


def scale_by_shampoo(
    eps: float = 1e-4,
    beta2: Number = 1.0,
    precondition_frequency: int = 1,
    max_precond_dim: int = 1024,
) -> Optimizer:
    """``L^(-1/4) G R^(-1/4)`` of a matrix G, with sums L of ``G G^T`` and R of ``G^T G``.

    See `funcnet.shampoo` for tensors of other shapes and for the options, which are the same.

    Source: Gupta, Koren and Singer 2018.

    >>> params = {"w": torch.tensor([[4.0, 0.0], [0.0, 1.0]])}
    >>> transform = scale_by_shampoo(eps=0.0)
    >>> transform.update(params, transform.init_state(params), params)[0]
    {'w': tensor([[1., 0.],
            [0., 1.]])}
    """
    check_options("scale_by_shampoo", eps=eps, beta2=beta2)
    check_count(
        "scale_by_shampoo",
        precondition_frequency=precondition_frequency,
        max_precond_dim=max_precond_dim,
    )
    # A tensor is the decay of a mean, whatever its value.
    is_sum = not isinstance(beta2, Tensor) and beta2 == 1.0
    kept, added = (1.0, 1.0) if is_sum else (beta2, 1.0 - beta2)

    def sizes_of(p: Tensor) -> axes.Sizes:
        return axes.sizes_of(p, max_precond_dim)

    def start(p: Tensor) -> tuple[Tensor, Tensor]:
        sizes = sizes_of(p)
        if not any(sizes):
            return torch.full_like(at_least_float32(p), eps), at_least_float32(p).new_zeros(0)
        return axes.start(p, sizes, eps), axes.start(p, sizes, 1.0)

    def init(p: Any) -> ShampooState:
        return ShampooState(zero_step(p), *each(start, p, outputs=2))

    def summed(g: Tensor, statistics: Tensor) -> Tensor:
        g, sizes = at_least_float32(g), sizes_of(g)
        new = axes.pack(axes.outer(g, sizes), g) if any(sizes) else g * g
        return kept * statistics + added * new

    def roots_of(statistics: Tensor, p: Tensor) -> Tensor:
        sizes = sizes_of(p)
        if not any(sizes):
            return statistics.new_zeros(0)
        order = 2 * sum(map(bool, sizes))
        return axes.changed(lambda matrix: axes.inverse_root(matrix, order), statistics, sizes)

    def direction(g: Tensor, statistics: Tensor, roots: Tensor) -> Tensor:
        g, sizes = at_least_float32(g), sizes_of(g)
        if any(sizes):
            return axes.rotate(g, axes.unpack(roots, sizes))
        return g / statistics.sqrt().clamp(min=torch.finfo(g.dtype).tiny)

    def update(g: Any, state: ShampooState, p: Any) -> tuple[Any, ShampooState]:
        statistics = each(summed, g, state.statistics)
        roots = choose(
            state.step % precondition_frequency == 0,
            lambda: each(roots_of, statistics, p),
            lambda: state.roots,
            branches=True,
        )
        return each(direction, g, statistics, roots), ShampooState(
            state.step + 1, statistics, roots
        )

    return stateful(init, update)


def shampoo(
    lr: LearningRate = 0.1,
    momentum: Number = 0.0,
    weight_decay: Number = 0.0,
    eps: float = 1e-4,
    beta2: Number = 1.0,
    precondition_frequency: int = 1,
    max_precond_dim: int = 1024,
    *,
    maximize: bool = False,
) -> Optimizer:
    """``p - lr L^(-1/4) G R^(-1/4)``: a matrix G with a preconditioner for rows and for columns.

    ``L = L + G G^T`` and ``R = R + G^T G``, from ``eps`` times the identity. A tensor of k axes
    has k such matrices, of the products of its slices along the axis, and each to the power of
    ``-1 / (2 k)``: a vector is full-matrix Adagrad. An axis of 1, or of more than
    ``max_precond_dim``, has no matrix and does not count, so a matrix may be preconditioned on one
    side, by ``L^(-1/2)``; a tensor without any has Adagrad's ``g / sqrt(eps + sum of g^2)``.

    Args:
        lr: a number, a 0-d tensor, or a function of the number of updates so far.
        momentum: replaces the direction u by ``b = momentum b + u``.
        weight_decay: decoupled: shrinks the params by ``lr * weight_decay`` of their size.
        eps: what the matrices start from, times the identity, a number >= 0.
        beta2: below 1, running means ``beta2 L + (1 - beta2) G G^T`` instead of sums.
        precondition_frequency: every how many updates the roots are computed anew.
        max_precond_dim: the longest axis that has a matrix, of its length squared.
        maximize: ascends instead: negates the gradient before all else.

    The roots are of eigenvalues, in float32 for half precision. They are what an update costs: of
    two matrices of 512 x 512, on one core, 110 ms with and 28 without. In eager mode on the CPU and
    under jit the updates between do without. Eagerly on a GPU, where no update waits to read its
    number, and under torch.vmap, each computes the roots, and those between do not use them.

    Source: Gupta, Koren and Singer 2018.

    >>> params = {"w": torch.tensor([[4.0, 0.0], [0.0, 1.0]])}
    >>> optimizer = shampoo(0.1, eps=0.0)
    >>> optimizer.update(params, optimizer.init_state(params), params)[0]
    {'w': tensor([[-0.1000, -0.0000],
            [-0.0000, -0.1000]])}
    """
    check_named("shampoo", lr, momentum=momentum, weight_decay=weight_decay)
    return named_chain(
        "shampoo",
        maximize and negate(),
        scale_by_shampoo(eps, beta2, precondition_frequency, max_precond_dim),
        is_on(momentum) and trace(momentum),
        is_on(weight_decay) and add_decayed_weights(weight_decay),
        scale_by_learning_rate(lr),
    )
