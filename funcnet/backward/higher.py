"""Higher derivatives: `jvp`, the derivative in a direction, and `hvp`, the Hessian times a vector.

A pullback is a function like others, so its derivative is that of a function too. Layers need no
rules for it: what a rule computes with, tensors and PyTorch's operators, has derivatives.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funcnet import tree
from funcnet.checks import check_function
from funcnet.core import EMPTY, Layer, Loss, Params, Tree
from funcnet.errors import require
from funcnet.train import Batch, value_and_grad


def jvp(
    f: Callable[..., Any],
    primals: Sequence[Tree],
    tangents: Sequence[Tree],
    *,
    has_aux: bool = False,
) -> tuple[Any, ...]:
    """``f(*primals)``, and its derivative there in the direction of the tangents.

        jvp(f, (x,), (v,)) = (f(x), df/dx v)

    It is forward mode, ``torch.func.jvp`` of trees: each operator's value and derivative are
    computed side by side, in the order of f. No tape is recorded, and the cost is at most about
    three times that of f, whatever the number of arguments. Of a function that calls a pullback it
    is a second derivative, as `hvp` is; of one that calls jvp, too.

    Args:
        f: a function of trees of tensors.
        primals: its arguments, a tuple.
        tangents: the directions, a tuple of the same length. Each is a tree like its primal, with
            None for an integer tensor; or None for an argument that is held fixed, such as a key.
        has_aux: whether f gives a pair, ``(out, aux)``, of which only out is derived.

    Returns:
        ``(out, tangent_out)``, or ``(out, tangent_out, aux)``. tangent_out is a tree like out; it
        has zeros where out does not depend on what moves, and None for integers.

    It works under `jit`, where loops of f are unrolled, `vmap` and in `scan`, and torch.func can
    derive it again. A `Pullback` is linear: its own derivative by dy is a call of it.

    Raises:
        ValueError: a tangent differs from its primal in structure or shape.
        TypeError: it differs in dtype; f is no function, or gives no pair although ``has_aux``.

    Source: ``jax.jvp``, ``torch.func.jvp``.

    >>> jvp(lambda x: x.square(), (torch.tensor([1.0, 3.0]),), (torch.tensor([1.0, 0.5]),))
    (tensor([1., 9.]), tensor([2., 3.]))
    >>> import funcnet as fn
    >>> def slope(x):
    ...     y, pullback, _ = fn.tanh().vjp({}, x)
    ...     return pullback(torch.ones_like(y))[1]
    >>> x = torch.tensor(0.5)
    >>> first, second = jvp(slope, (x,), (torch.ones(()),))
    >>> torch.allclose(second, -2 * x.tanh() * first)
    True
    """
    check_function("jvp", f)
    leaves, treedef = tree.flatten(_arguments("primals", primals))
    directions = _directions(tuple(primals), _arguments("tangents", tangents))
    moving = [place for place, direction in enumerate(directions) if direction is not None]
    require(moving, "jvp: expects a tangent that is not None")
    form: Any = None
    results: list[Any] = []
    real: list[int] = []

    def run(*moved: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        nonlocal form, results, real
        inputs = list(leaves)
        for place, each in zip(moving, moved, strict=True):
            inputs[place] = each
        result = f(*treedef.unflatten(inputs))
        results, form = tree.flatten(_pair(result) if has_aux else (result, None))
        out = results[: form.children()[0].num_leaves]
        real = [place for place, each in enumerate(out) if _is_real(each)]
        require(real, "jvp: f gives no floating-point tensor, so nothing to derive", TypeError)
        tensors = [each for each in results if isinstance(each, Tensor)]
        return [out[place] for place in real], tensors

    primal_leaves = tuple([leaves[place] for place in moving])
    tangent_leaves = tuple([directions[place] for place in moving])
    forward_mode: Any = torch.func.jvp
    _, found, values = forward_mode(run, primal_leaves, tangent_leaves, has_aux=True)
    given = iter(values)
    out, aux = form.unflatten([next(given) if isinstance(r, Tensor) else r for r in results])
    along: list[Any] = [None] * form.children()[0].num_leaves
    for place, each in zip(real, found, strict=True):
        along[place] = each
    tangent_out = form.children()[0].unflatten(along)
    return (out, tangent_out, aux) if has_aux else (out, tangent_out)


def _arguments(what: str, given: Any) -> tuple[Tree, ...]:
    if not isinstance(given, (tuple, list)):
        raise TypeError(f"jvp: expects a tuple of {what}, got {tree.describe(given)}")
    return tuple(given)


def _directions(primals: tuple[Tree, ...], tangents: tuple[Tree, ...]) -> list[Tensor | None]:
    """A direction for each leaf of the primals; None for those that are held fixed."""
    counts = f"{len(primals)} primals and {len(tangents)}"
    require(len(primals) == len(tangents), f"jvp: expects a tangent for each primal, got {counts}")
    found: list[Tensor | None] = []
    for index, (primal, tangent) in enumerate(zip(primals, tangents, strict=True)):
        leaves, treedef = tree.flatten(primal)
        if tangent is None:
            found += [None] * len(leaves)
            continue
        try:
            directions = treedef.flatten_up_to(tangent)
        except ValueError as error:
            raise ValueError(f"jvp: tangent {index} is no tree like its primal: {error}") from None
        for path, leaf, direction in zip(treedef.paths(), leaves, directions, strict=True):
            _check_direction(tree.path_string((index, *path)), leaf, direction)
        found += directions
    return found


def _check_direction(path: str, leaf: Any, direction: Any) -> None:
    if direction is None:
        return
    wrong = f"jvp: expects at {path!r} a tangent like {tree.describe(leaf)}"
    if not _is_real(leaf):
        got = tree.describe(direction)
        raise TypeError(f"jvp: expects None at {path!r}, for {tree.describe(leaf)}, got {got}")
    if not isinstance(direction, Tensor) or direction.dtype != leaf.dtype:
        raise TypeError(f"{wrong}, got {tree.describe(direction)}")
    require(direction.shape == leaf.shape, f"{wrong}, got {tree.describe(direction)}")


def _is_real(leaf: Any) -> bool:
    """Whether it has derivatives: a tensor of floating-point or complex numbers."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _pair(result: Any) -> tuple[Any, Any]:
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(
            f"jvp: f gives a pair, (out, aux), with has_aux, got {tree.describe(result)}"
        )
    return result


def hvp(model: Layer, loss: Loss) -> Callable[..., tuple[Params, Params]]:
    """The Hessian of a training loss by the params, times a vector of the user's.

        g = dL/dp,    H v = d/dt g(p + t v) at t = 0

    It is forward over reverse: the `jvp` of the explicit backward pass `value_and_grad`, at about
    twice the cost of that, in about twice its memory. H is never formed.

    Args:
        model, loss: as for `train_step`; the loss's value is a scalar.

    Returns:
        ``(params, batch, v, state={}, *, key=None, train=True) -> (grads, H v)``: v, the grads and
        H v are trees like params. The state that the layers give, such as running statistics, is
        left out; the same key gives the same dropout to both.

    Raises:
        ValueError, TypeError: v is no tree like params, by path.

    Source: Pearlmutter 1994, Fast exact multiplication by the Hessian; ``torch.func`` says
    ``jvp(grad(f), (p,), (v,))``.

    >>> import funcnet as fn
    >>> net, x, target = fn.linear(1, bias=False), torch.ones(4, 1), torch.zeros(4, 1)
    >>> hessian_times = fn.hvp(net, fn.mse())
    >>> params, v = {"weight": torch.full((1, 1), 3.0)}, {"weight": torch.ones(1, 1)}
    >>> hessian_times(params, (x, target), v)  # of the loss w^2
    ({'weight': tensor([[6.]])}, {'weight': tensor([[2.]])})
    """
    gradient = value_and_grad(model, loss)

    def product(
        params: Params,
        batch: Batch,
        v: Params,
        state: Params = EMPTY,
        *,
        key: Tensor | None = None,
        train: bool = True,
    ) -> tuple[Params, Params]:
        tree.check_same_structure(params, v, "hvp: v")

        def of_params(params: Params) -> Params:
            return gradient(params, batch, state, key=key, train=train)[1]

        grads, product = jvp(of_params, (params,), (v,))
        return grads, product

    return product
