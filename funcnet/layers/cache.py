"""What attention remembers when it decodes token by token: keys, values, and how many there are."""

from typing import Any

import torch
from torch import Tensor

from funcnet import initializers, runtime, tree
from funcnet.core import Forward, Grads, Key, Layer, Params, Pullback, Tree
from funcnet.errors import require
from funcnet.layers.arguments import zero_cotangent
from funcnet.lift import accept_any, stateful
from funcnet.params import Param, State, declare


def counter(max_len: int) -> Layer:
    """The positions of the next tokens, from 0 on, at most ``max_len`` of them in all.

    Inputs:
        x of shape ``(*, tokens, features)``.
    Returns:
        int64 positions of shape (tokens,).
    State:
        ``length``, how many tokens came before.
    VJP:
        dx is zero.
    Raises:
        ValueError: no token, and more tokens than max_len. Where values cannot be read, under
            `jit` and `vmap`, the positions that are too many are max_len and above.
    """

    def declaration(x: Tensor) -> dict[str, Param]:
        accept_any(x)
        return {"length": State((), initializers.zeros(), torch.int64)}

    def forward(params: Params, x: Tensor, state: Params, key: Key, train: bool) -> Forward:
        tokens, length = x.shape[-2], state["length"]
        require(tokens > 0, f"cache: expects at least one token, got {tree.describe(x)}")
        before = runtime.read(length)
        if before is not None:
            full = f"cache: has {before} of at most {max_len} tokens, {tokens} more do not fit"
            require(before + tokens <= max_len, full)
        positions = length + torch.arange(tokens, device=length.device)
        pullback = Pullback(counter_rule, {}, (tuple(x.shape), x.dtype, x.device))
        return positions, pullback, {"length": length + tokens}

    return stateful(declare(declaration), forward)


def counter_rule(
    residuals: Any, dy: Any, shape: Any, dtype: Any, device: Any, *, params: bool, x: bool
) -> Grads:
    """Zero: the number of tokens alone was read."""
    return ({} if params else None), zero_cotangent(shape, dtype, device) if x else None


def key_value_cache(max_len: int) -> Layer:
    """The keys and values of all tokens up to now, from those of the next ones.

    Inputs:
        x, a tuple (key, value, positions): of shape ``(*, tokens, features)`` and (tokens,).
    Returns:
        y, a tuple (key, value), of shape ``(*, max_len, features)``; zeros beyond the last token.
    State:
        ``key`` and ``value``, like y.
    VJP:
        ``dkey`` and ``dvalue``, those of y at the positions; the state is a constant. A position of
        max_len or above, which only `jit` and `vmap` let pass, makes all of y NaN.
    """

    def declaration(x: Tree) -> dict[str, Param]:
        *kinds, _ = x
        names = zip(("key", "value"), kinds, strict=True)
        return {
            name: State((*each.shape[:-2], max_len, each.shape[-1]), initializers.zeros())
            for name, each in names
        }

    def forward(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Forward:
        *new, positions = x
        slots = torch.arange(max_len, device=positions.device)
        # For each slot the token that goes there, without a scatter: elementwise, in place in a
        # program to which the state is donated.
        tokens = slots - positions[:1]
        is_new = ((tokens >= 0) & (tokens < len(positions)))[:, None]
        tokens = tokens.clamp(0, len(positions) - 1)
        overflow = positions[-1:] >= max_len
        made = []
        for each, old in zip(new, state.values(), strict=True):
            filled = torch.where(is_new, each.index_select(-2, tokens), old)
            made.append(torch.where(overflow[:, None], torch.nan, filled))
        pullback = Pullback(cache_rule, {"positions": positions}, (max_len,))
        return tuple(made), pullback, dict(zip(state, made, strict=True))

    return stateful(declare(declaration), forward)


def cache_rule(residuals: Any, dy: Tree, max_len: int, *, params: bool, x: bool) -> Grads:
    """The cotangents of the slots that were written."""
    slots = residuals["positions"].clamp(max=max_len - 1)
    dx = (*[each.index_select(-2, slots) for each in dy], None) if x else None
    return {} if params else None, dx
