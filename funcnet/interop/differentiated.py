"""`autodiff`: a layer of any function in torch's operators, whose pullback is autograd's.

The one place of funcnet where autograd is called.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funcnet import lift, tree
from funcnet.core import Applied, Forward, Grads, Key, Layer, Params, Pullback, Tree
from funcnet.errors import require


def autodiff(
    f: Callable[..., Any],
    init: Callable[..., Any] | None = None,
    *,
    stateful: bool = False,
    keyed: bool = False,
    name: str | None = None,
) -> Layer:
    """A layer of any pure function in torch's operators: autograd computes its pullback.

    For what has no layer here: write f alone, and leave the rule to PyTorch. The residuals are
    params, x, state and key: the pullback computes f again, as `funcnet.remat` does, and then its
    derivative.

    Args:
        f: ``(params, x) -> y`` or, without ``init``, ``x -> y``. It must be pure, and made of
            operators that `torch.func.vjp` takes: no in-place operation on its arguments, no
            ``.item()``, no random numbers but those of ``fn.random``.
        init: ``(key, x) -> params``, or what `funcnet.declare` makes of a declaration; default
            none.
        stateful: f is ``(params, x, state, key, train) -> (y, state)`` and ``init`` gives
            ``(params, state)``, as those of `funcnet.stateful`.
        keyed: with ``stateful``, whether f draws random numbers when ``train=True``: a call
            without a key is then an error.
        name: what errors and summaries call the layer; default the function's name.

    VJP:
        ``torch.func.vjp(f, params, x)``, of the floating-point tensors among them.
    Raises:
        TypeError: f returns anything but a tree of tensors.

    Source: ``torch.func.vjp``.

    >>> import funcnet as fn
    >>> def gaussian(params, x):
    ...     return torch.exp(-params["width"] * x.square())
    >>> layer = autodiff(gaussian, lambda key, x: {"width": x.new_ones(())})
    >>> y, pullback, _ = layer.vjp({"width": torch.tensor(1.0)}, torch.tensor([0.0, 1.0]))
    >>> pullback(torch.ones(2))
    ({'width': tensor(-0.3679)}, tensor([-0.0000, -0.7358]))
    >>> fn.testing.check_layer(layer, torch.randn(3, dtype=torch.float64))
    """
    require(callable(f), f"autodiff: expects a function, got {f!r}", TypeError)
    name = name or getattr(f, "__name__", type(f).__name__)
    require(init is None or callable(init), f"{name}: expects a function as init", TypeError)
    require(init is not None or not stateful, f"{name}: stateful=True needs an init")
    require(stateful or not keyed, f"{name}: keyed=True needs stateful=True")
    start: Any = init if stateful or hasattr(init, "check") else _start(init)
    kind = "stateful" if stateful else "x" if init is None else "params and x"
    return autodiff_of(Function(f, kind), start, keyed, str(name))


def _start(init: Any) -> Callable[..., tuple[Params, Params]]:
    return lambda key, x: ({} if init is None else init(key, x), {})


@dataclass(frozen=True)
class Function:
    """A function of a user, with the arguments that it takes.

    Two of one function are equal, so that pullbacks of different calls have one treedef.
    """

    f: Callable[..., Any]
    kind: str

    def of(self, params: Params, x: Tree, state: Params, key: Key, train: bool) -> Applied:
        """y and the new state."""
        if self.kind == "stateful":
            return self.f(params, x, state, key, train)
        return self.f(x) if self.kind == "x" else self.f(params, x), state


def autodiff_of(f: Function, init: Any, keyed: bool, name: str, **metadata: Any) -> Layer:
    """`autodiff`, of a function whose arguments are told."""

    def apply(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Applied:
        y, state = f.of(params, x, state, key, train)
        _check_output(name, y)
        return y, state

    def forward(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Forward:
        y, new_state = apply(params, x, state, key, train)
        residuals = {"params": params, "x": x, "state": state}
        if key is not None:
            residuals["key"] = key
        return y, Pullback(autodiff_rule, residuals, (f, train)), new_state

    return lift.stateful(init, forward, apply=apply, keyed=keyed, name=name, **metadata)


def _check_output(name: str, y: Tree) -> None:
    leaves = tree.leaves(y)
    right = bool(leaves) and all([isinstance(leaf, Tensor) for leaf in leaves])
    require(right, f"{name}: expects y of tensors, got {tree.describe(y)}", TypeError)


def autodiff_rule(
    residuals: Any, dy: Tree, f: Function, train: bool, *, params: bool, x: bool
) -> Grads:
    """``torch.func.vjp`` of what is asked for, at the residuals."""
    given = residuals["params"] if params else {}, residuals["x"] if x else ()
    leaves, treedef = tree.flatten(given)
    places = [i for i, leaf in enumerate(leaves) if leaf.is_floating_point()]
    state, key = residuals["state"], residuals.get("key")

    def outputs(*chosen: Tensor) -> tuple[Tensor, ...]:
        all_leaves = list(leaves)
        for place, leaf in zip(places, chosen, strict=True):
            all_leaves[place] = leaf
        own = treedef.unflatten(all_leaves)
        of_params, of_x = own[0] if params else residuals["params"], own[1] if x else residuals["x"]
        y = tree.leaves(f.of(of_params, of_x, state, key, train)[0])
        return tuple([leaf for leaf in y if leaf.is_floating_point()])

    found: list[Any] = [None] * len(leaves)
    if places:
        pull = torch.func.vjp(outputs, *[leaves[place] for place in places])[1]
        cotangents = tuple([leaf for leaf in tree.leaves(dy) if leaf is not None])
        for place, cotangent in zip(places, pull(cotangents), strict=True):
            found[place] = cotangent
    dparams, dx = treedef.unflatten(found)
    return dparams if params else None, dx if x else None
