"""`solver_figures`: how the solvers in a model went, from its state."""

from torch import Tensor

from funcnet import tree
from funcnet.core import Params

_LAYERS = ("fixed_point", "neural_ode")


def solver_figures(state: Params) -> dict[str, Tensor]:
    """What the solvers in a model say of their last call, by path, with or without training.

    Of each `fixed_point` the ``iterations``, the relative ``residual`` and whether it has
    ``converged``; of each adaptive `neural_ode` the ``steps``, those that were ``rejected``, the
    time that it has ``reached`` and whether it has ``finished``.

    Args:
        state: of the model, such as ``train_state.state``.

    >>> import funcnet as fn
    >>> f = fn.serial(fn.parallel(fn.identity(), fn.linear(3, bias=False)), fn.add(), fn.tanh())
    >>> net, x = fn.serial(fn.linear(3), fn.fixed_point(f, tol=1e-3)), torch.ones(4, 2)
    >>> params, state = net.init(fn.key(0), x)
    >>> _, state = net.apply(params, x, state)
    >>> figures = solver_figures(state)
    >>> list(figures), bool(figures["1.fixed_point.converged"])
    (['1.fixed_point.iterations', '1.fixed_point.residual', '1.fixed_point.converged'], True)
    """
    flat = tree.to_dotted(state).items()
    return {path: leaf for path, leaf in flat if f".{path}".split(".")[-2] in _LAYERS}
