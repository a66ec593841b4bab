"""SOAP: Adam in the eigenvectors of Shampoo's preconditioners."""

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
from funcnet.optimizers.named import check_betas, check_named, named_chain
from funcnet.optimizers.transforms import (
    LearningRate,
    add_decayed_weights,
    negate,
    scale_by_learning_rate,
)


class SoapState(NamedTuple):
    """The number of updates so far, Adam's means, and the matrices and bases of each leaf's axes.

    ``mu`` and ``nu`` are trees like the params, of means in the bases. ``statistics`` and ``bases``
    are like them in names: a leaf's matrices are one after another in a vector.
    """

    step: Tensor
    mu: Tree
    nu: Tree
    statistics: Tree
    bases: Tree


def scale_by_soap(
    betas: tuple[Number, Number] = (0.95, 0.95),
    shampoo_beta: Number | None = None,
    eps: Number = 1e-8,
    precondition_frequency: int = 10,
    max_precond_dim: int = 10000,
    precondition_1d: bool = False,
    normalize_grads: bool = False,
    correct_bias: bool = True,
) -> Optimizer:
    """``Q_L u Q_R^T``, where u is Adam's direction of ``Q_L^T G Q_R``.

    See `funcnet.soap` for the bases Q and the options, which are the same.

    Source: Vyas et al. 2024.

    >>> params = {"w": torch.tensor([[4.0, 0.0], [0.0, 1.0]])}
    >>> transform = scale_by_soap()
    >>> updates, state = transform.update(params, transform.init_state(params), params)
    >>> updates["w"], transform.update(params, state, params)[0]["w"]
    (tensor([[0., 0.],
            [0., 0.]]),
     tensor([[1.0000, 0.0000],
            [0.0000, 1.0000]]))
    """
    name = "scale_by_soap"
    check_betas(name, betas)
    b1, b2 = betas
    b_shampoo = b2 if shampoo_beta is None else shampoo_beta
    check_options(name, below=1.0, shampoo_beta=b_shampoo)
    check_options(name, eps=eps)
    check_count(
        name, precondition_frequency=precondition_frequency, max_precond_dim=max_precond_dim
    )

    def sizes_of(p: Tensor) -> axes.Sizes:
        return axes.sizes_of(p, max_precond_dim, least_axes=1 if precondition_1d else 2)

    def init(p: Any) -> SoapState:
        statistics = each(lambda p: axes.start(p, sizes_of(p), 0.0), p)
        bases = each(lambda p: axes.start(p, sizes_of(p), 1.0), p)
        return SoapState(zero_step(p), torch.zeros_like(p), torch.zeros_like(p), statistics, bases)

    def adam(
        g: Tensor, mu: Tensor, nu: Tensor, bases: Tensor, started: Tensor, spread: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        sizes = sizes_of(g)
        g, mu, nu = map(at_least_float32, (g, mu, nu))
        q = axes.unpack(bases, sizes)
        g = torch.where(started, axes.rotate(g, q), 0.0)
        mu = mu + (1.0 - b1) * (g - mu)
        nu = b2 * nu + (1.0 - b2) * g * g
        direction = axes.rotate(mu / (nu.sqrt() + eps), axes.transposed(q)) * spread
        if normalize_grads:
            direction = direction / (1e-30 + direction.square().mean().sqrt())
        return direction, mu, nu

    def summed(g: Tensor, statistics: Tensor) -> Tensor:
        g = at_least_float32(g)
        new = axes.pack(axes.outer(g, sizes_of(g)), g)
        return statistics + (1.0 - b_shampoo) * (new - statistics)

    def by_eigenvectors(statistics: Tensor, p: Tensor) -> Tensor:
        """Those of the greatest eigenvalues first."""
        return axes.changed(lambda m: axes.eigh(m)[1].flip(-1), statistics, sizes_of(p))

    def by_power_iteration(statistics: Tensor, bases: Tensor, nu: Tensor) -> tuple[Tensor, Tensor]:
        sizes, q = sizes_of(nu), axes.unpack(bases, sizes_of(nu))
        matrices, found = axes.unpack(statistics, sizes), list(q)
        for axis, (matrix, basis) in enumerate(zip(matrices, q, strict=True)):
            if matrix is None or basis is None:
                continue
            eigenvalues = (basis * (matrix @ basis)).sum(0)
            order = eigenvalues.argsort(descending=True)
            nu = nu.index_select(axis, order)
            found[axis] = torch.linalg.qr(matrix @ basis.index_select(1, order))[0]
        return axes.pack(found, bases), nu

    def turned(mu: Tensor, before: Tensor, after: Tensor) -> Tensor:
        sizes = sizes_of(mu)
        back = axes.rotate(at_least_float32(mu), axes.transposed(axes.unpack(before, sizes)))
        return axes.rotate(back, axes.unpack(after, sizes))

    def update(g: Any, state: SoapState, p: Any) -> tuple[Any, SoapState]:
        step, mu, nu, statistics, bases = state
        started, t = step > 0, step.clamp(min=1).double()
        spread = (1.0 - b2**t).sqrt() / (1.0 - b1**t) if correct_bias else torch.ones_like(t)
        direction, mu, nu = each(adam, g, mu, nu, bases, started, spread, outputs=3)
        statistics = each(summed, g, statistics)

        def refreshed() -> Any:
            after, order = choose(
                started,
                lambda: each(by_power_iteration, statistics, bases, nu, outputs=2),
                lambda: (each(by_eigenvectors, statistics, p), nu),
                branches=True,
            )
            return each(turned, mu, bases, after), order, after

        due = step % precondition_frequency == 0
        mu, nu, bases = choose(due, refreshed, lambda: (mu, nu, bases), branches=True)
        return direction, SoapState(step + 1, mu, nu, statistics, bases)

    return stateful(init, update)


def soap(
    lr: LearningRate = 3e-3,
    betas: tuple[Number, Number] = (0.95, 0.95),
    shampoo_beta: Number | None = None,
    eps: Number = 1e-8,
    weight_decay: Number = 0.01,
    precondition_frequency: int = 10,
    max_precond_dim: int = 10000,
    precondition_1d: bool = False,
    normalize_grads: bool = False,
    correct_bias: bool = True,
    *,
    maximize: bool = False,
) -> Optimizer:
    """``p - lr (Q_L u Q_R^T + weight_decay p)``: u is Adam's direction in Shampoo's eigenvectors.

        g = Q_L^T G Q_R
        m = b1 m + (1 - b1) g
        v = b2 v + (1 - b2) g^2
        u = m / (sqrt(v) + eps) * sqrt(1 - b2^t) / (1 - b1^t)
        L = b L + (1 - b) G G^T     R = b R + (1 - b) G^T G

    Q_L and Q_R are the eigenvectors of L and R at the first update, which only finds these and
    has no direction: t counts the updates after it. Every ``precondition_frequency`` updates they
    become the Q of ``L Q = Q R``, one power iteration: m is turned from the old ones to the new,
    and v is ordered as they are, by falling eigenvalue. A tensor has a basis for each axis, but for
    those of 1 and of more than ``max_precond_dim``, and a vector none: without any it is Adam.

    Args:
        lr: a number, a 0-d tensor, or a function of the number of updates so far.
        betas: b1 and b2, the decays of Adam's means, in [0, 1).
        shampoo_beta: b, the decay of L and R; None for b2.
        eps: added to the root.
        weight_decay: decoupled: shrinks the params by ``lr * weight_decay`` of their size.
        precondition_frequency: every how many updates the bases follow L and R.
        max_precond_dim: the longest axis that has a basis, of its length squared.
        precondition_1d: whether vectors have one too.
        normalize_grads: divides the direction by its root mean square, leaf by leaf.
        correct_bias: whether u has the factor of b1^t and b2^t.
        maximize: ascends instead: negates the gradient before all else.

    In eager mode on the CPU and under jit the updates between two power iterations do without: of
    two matrices of 512 x 512, on one core, 43 ms, and 140 with. Eagerly on a GPU, where no update
    waits to read its number, and under torch.vmap, each computes one, and the eigenvectors as at
    the first update, 220 ms, and those between do not use them. Half precision is computed in
    float32. Where L has an eigenvalue several times, as 0 where a matrix has more rows than
    columns, rounding chooses among its eigenvectors.

    Source: Vyas et al. 2024, https://github.com/nikhilvyas/SOAP, whose weight decay is of the
    params after the step.

    >>> params = {"w": torch.tensor([[4.0, 0.0], [0.0, 1.0]])}
    >>> optimizer = soap(0.1, weight_decay=0.0)
    >>> _, opt_state = optimizer.update(params, optimizer.init_state(params), params)
    >>> optimizer.update(params, opt_state, params)[0]
    {'w': tensor([[-0.1000, -0.0000],
            [-0.0000, -0.1000]])}
    """
    check_named("soap", lr, weight_decay=weight_decay)
    return named_chain(
        "soap",
        maximize and negate(),
        scale_by_soap(
            betas,
            shampoo_beta,
            eps,
            precondition_frequency,
            max_precond_dim,
            precondition_1d,
            normalize_grads,
            correct_bias,
        ),
        is_on(weight_decay) and add_decayed_weights(weight_decay),
        scale_by_learning_rate(lr),
    )
