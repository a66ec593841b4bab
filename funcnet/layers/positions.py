"""Positions in a sequence: learned or sinusoidal ones are added, `rotary` rotates.

The positions of a sequence are 0, 1, ..., unless they are given: then x is a tuple of the values
and an int tensor of absolute positions, (seq,) or (batch, seq). They have no cotangent.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet import initializers, runtime, tree
from funcnet.core import EMPTY, Forward, Grads, Key, Layer, Params, Pullback, Tree
from funcnet.errors import require
from funcnet.initializers import Initializer
from funcnet.layers.embedding import embedding_backward, is_index
from funcnet.lift import Step, fastest, parameterless, stateful
from funcnet.params import Param, State, declare


def values_and_positions(x: Tree, seq_dim: int = -2) -> tuple[Tensor, Tensor | None]:
    """The values and their positions, None if x has none; else ValueError or TypeError."""
    pair = type(x) is tuple and len(x) == 2
    values: Any = x[0] if pair else x
    positions: Any = x[1] if pair else None
    floating = isinstance(values, Tensor) and values.is_floating_point()
    words = "expects a floating-point tensor, or a tuple of one and its positions"
    require(floating, f"{words}, got {tree.describe(x)}", TypeError)
    shape = tuple(values.shape)
    require(len(shape) >= -seq_dim, f"expects (..., seq, features), got {shape}")
    if pair:
        words = f"expects int32 or int64 positions, got {tree.describe(positions)}"
        require(is_index(positions), words, TypeError)
        several = len(shape) > -seq_dim and tuple(positions.shape) == (shape[0], shape[seq_dim])
        fits = several or tuple(positions.shape) == (shape[seq_dim],)
        words = "positions of shape (seq,) or (batch, seq)"
        require(fits, f"expects {words} for x of {shape}, got {tuple(positions.shape)}")
    return values, positions


def beside(rows: Tensor, x: Tensor) -> Tensor:
    """Rows of shape (seq, ...) or (batch, seq, ...) in one that broadcasts against x."""
    between = x.dim() - 3
    return rows if rows.dim() < 3 or between < 1 else rows[(slice(None), *[None] * between)]


def of_pair(dy: Tensor, pair: bool) -> Tree:
    """``dx = dy`` of the values, in the structure of x."""
    return (dy, None) if pair else dy


def positional_rule(
    residuals: dict[str, Tensor], dy: Tensor, max_len: int, pair: bool, *, params: bool, x: bool
) -> Grads:
    """``dweight[p] = sum of dy at position p``, ``dx = dy``; without a table dx alone."""
    dparams: Params | None = {} if params else None
    if params and max_len:
        positions = residuals.get("positions")
        kept = 2 if positions is None else 1 + positions.dim()
        # All but the sequence and its features, and the batch where each member has positions.
        dims = [*range(dy.dim() - 2)] if kept == 2 else [*range(1, dy.dim() - 2)]
        rows = dy.sum(dims) if dims else dy
        if positions is None:
            dweight = F.pad(rows, (0, 0, 0, max_len - rows.shape[0]))
        else:
            inside = (positions >= 0) & (positions < max_len)
            rows = torch.where(inside[..., None], rows, 0.0)
            index = positions.clamp(0, max_len - 1)
            dweight = fastest(embedding_backward, rows)(rows, index, max_len, -1, False)
        dparams = {"weight": dweight}
    return dparams, of_pair(dy, pair) if x else None


def _placed(
    name: str, x: Tree, state: Params, max_len: int
) -> tuple[Tensor, Tensor | None, Params, bool]:
    """The values, their positions, the new state, and whether all are known to be in the table.

    Raises ValueError for a position that is not, where values can be read.
    """
    values, positions = values_and_positions(x)
    seq, known = values.shape[-2], not max_len
    low, high, after = 0, seq, {}
    if state:
        length = state["length"]
        after = {"length": length + seq}
        positions = length + torch.arange(seq, device=values.device)
    if positions is not None and max_len:
        ends: Any = (None, None)
        if positions.is_cpu and positions.numel():
            ends = tuple([runtime.read(end) for end in positions.aminmax()])
        known = None not in ends or not positions.numel()
        low, high = (ends[0], ends[1] + 1) if None not in ends else (0, 0)
    fits = not max_len or (low >= 0 and high <= max_len)
    got = f"got positions from {low} to {high - 1}"
    require(fits, f"{name}: expects positions in [0, {max_len}), {got}")
    return values, positions, after, known


def _length(cache: bool) -> dict[str, Param]:
    return {"length": State((), initializers.zeros(), torch.int64)} if cache else {}


def _check(x: Tree, cache: bool) -> Tensor:
    values, positions = values_and_positions(x)
    with_both = "expects x alone, since the cache has its positions"
    require(not (cache and positions is not None), f"{with_both}, got {tree.describe(x)}")
    return values


def learned_positions(
    max_len: int,
    *,
    weight_init: Initializer | None = None,
    dtype: torch.dtype | None = None,
    cache: bool = False,
) -> Layer:
    """``y = x + weight[position]``.

    Args:
        max_len: the number of rows of the table.
        weight_init: default N(0, 0.02^2), as in GPT-2.
        dtype: of the weight; default that of x.
        cache: whether positions go on where the call before ended: the first one is the state's
            ``length``, to which each call adds the length of its sequence.

    Inputs:
        x of shape ``(*, seq, features)``, floating, or (x, positions).
    Learned params:
        ``weight`` (max_len, features).
    State:
        with ``cache`` ``length``, int64, of shape ().
    VJP:
        ``dweight[p] = sum of dy at p``, ``dx = dy``; positions have none.
    Raises:
        ValueError: a position outside of the table in eager mode on the CPU. Where values are
            not read, such as under `jit`, its output is NaN.

    Source: Gehring et al. 2017; Radford et al. 2019.

    >>> import funcnet as fn
    >>> layer = learned_positions(3, weight_init=fn.initializers.ones(), cache=True)
    >>> params, state = layer.init(fn.key(0), torch.zeros(2, 4))
    >>> y, state = layer.apply(params, torch.zeros(2, 4), state)
    >>> y.shape, state
    (torch.Size([2, 4]), {'length': tensor(2)})
    >>> layer.apply(params, torch.zeros(2, 4), state)
    Traceback (most recent call last):
    ...
    ValueError: learned_positions: expects positions in [0, 3), got positions from 2 to 3
    """
    name = "learned_positions"
    enough = isinstance(max_len, int) and max_len > 0
    require(enough, f"{name}: max_len must be > 0, got {max_len!r}")

    @declare
    def init(x: Tree) -> dict[str, Param]:
        values, start = _check(x, cache), weight_init or initializers.normal(0.02)
        features = (1, "{} features in the last dimension")
        weight = Param((max_len, values.shape[-1]), start, dtype, of_x=features)
        return {"weight": weight, **_length(cache)}

    def forward(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Forward:
        values, positions, after, known = _placed(name, x, state, max_len)
        residuals = {}
        if positions is None:
            rows = params["weight"][: values.shape[-2]]
        else:
            residuals["positions"] = positions
            rows = params["weight"][positions.clamp(0, max_len - 1)]
            if not known:
                inside = (positions >= 0) & (positions < max_len)
                rows = torch.where(inside[..., None], rows, torch.nan)
        pair = isinstance(x, tuple)
        pullback = Pullback(positional_rule, residuals, (max_len, pair))
        return values + beside(rows, values), pullback, after

    return stateful(init, forward, name=name)


def sinusoids(positions: Tensor, features: int, base: float, dtype: torch.dtype) -> Tensor:
    """``sin(p base^(-2i/features))`` at 2i, the cosine at 2i + 1: (*positions, features)."""
    angles = _angles(positions, features, base, dtype)
    both = torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)
    return both[..., :features].to(dtype)


def _angles(positions: Tensor, features: int, base: float, dtype: torch.dtype) -> Tensor:
    """``p base^(-2i/features)``, (*positions, ceil(features / 2)), in float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    places = torch.arange(0, features, 2, device=positions.device).to(wide)
    return positions[..., None].to(wide) * base ** (-places / max(features, 1))


def sinusoidal_positions(base: float = 10000.0, *, cache: bool = False) -> Layer:
    """``y = x + table[position]``, a sine and a cosine for each of ``features / 2`` frequencies.

    ``table[p, 2i] = sin(p base^(-2i/features))``, ``table[p, 2i+1]`` the cosine of the same.

    Args:
        base: the greatest wavelength is ``2 pi base``.
        cache: as in `learned_positions`; here no position is too large.

    Inputs:
        x of shape ``(*, seq, features)``, floating, or (x, positions).
    State:
        with ``cache`` ``length``, int64, of shape ().
    VJP:
        ``dx = dy``; positions have none.

    Source: Vaswani et al. 2017.

    >>> sinusoidal_positions().apply({}, torch.zeros(2, 4))[0]
    tensor([[0.0000, 1.0000, 0.0000, 1.0000],
            [0.8415, 0.5403, 0.0100, 0.9999]])
    """
    name = "sinusoidal_positions"
    require(base > 0, f"{name}: base must be > 0, got {base}")

    @declare
    def init(x: Tree) -> Mapping[str, Param]:
        _check(x, cache)
        return _length(cache)

    def forward(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Forward:
        values, positions, after, _ = _placed(name, x, state, 0)
        if positions is None:
            positions = torch.arange(values.shape[-2], device=values.device)
        rows = sinusoids(positions, values.shape[-1], base, values.dtype)
        pullback = Pullback(positional_rule, {}, (0, isinstance(x, tuple)))
        return values + beside(rows, values), pullback, after

    return stateful(init, forward, name=name)


def rotate(
    x: Tensor,
    positions: Tensor | None = None,
    base: float = 10000.0,
    scale: float = 1.0,
    interleaved: bool = False,
    dim: int | None = None,
    *,
    inverse: bool = False,
) -> Tensor:
    """Pairs of features of x (..., seq, features) rotated by ``p theta_i``; see `rotary`.

    ``inverse`` rotates by minus that, which is the derivative, transposed.

    Args:
        x: queries or keys.
        positions: of x, ints (seq,) or (batch, seq); default 0, 1, ...
        base, scale, interleaved, dim: as in `rotary`.
        inverse: whether to rotate back, by minus that, which is the derivative, transposed.

    >>> rotate(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    tensor([[1.0000, 0.0000],
            [0.5403, 0.8415]])
    """
    dim = x.shape[-1] if dim is None else dim
    if positions is None:
        positions = torch.arange(x.shape[-2], device=x.device)
    # With two features there is one frequency, 1, whatever the base.
    stretched = base * scale ** (dim / (dim - 2)) if dim > 2 else base
    angles = beside(_angles(positions, dim, stretched, x.dtype), x)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    sin = -sin if inverse else sin
    rotated = x[..., :dim]
    if interleaved:
        a, b = rotated.unflatten(-1, (dim // 2, 2)).unbind(-1)
        rotated = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = rotated.chunk(2, -1) if dim else (rotated, rotated)
        rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return rotated if dim == x.shape[-1] else torch.cat([rotated, x[..., dim:]], -1)


def rotary_backward(dy: Tensor, pair: bool, *options: Any, positions: Tensor | None = None) -> Tree:
    """The rotation by minus the angles."""
    return of_pair(rotate(dy, positions, *options, inverse=True), pair)


def rotary(
    base: float = 10000.0,
    scale: float = 1.0,
    interleaved: bool = False,
    dim: int | None = None,
) -> Layer:
    """Each pair of features (a, b) at position p rotated by the angle ``p theta_i``.

    ``y = (a cos - b sin, b cos + a sin)`` with ``theta_i = base^(-2i / dim)``. The product of two
    vectors that are rotated so depends on the difference of their positions alone.

    Args:
        base: the slowest rotation takes about ``2 pi base`` positions.
        scale: how many times longer sequences are than those that ``base`` was made for. The base
            becomes ``base scale^(dim / (dim - 2))``, so that the slowest rotation takes ``scale``
            times as many positions, and the fastest one as many as before ("NTK-aware" scaling).
        interleaved: whether a pair is features 2i and 2i + 1, as in GPT-J; by default it is
            features i and i + dim / 2, as in GPT-NeoX and Llama.
        dim: how many of the features are rotated, the first ones; by default all.

    Inputs:
        x of shape ``(*, seq, features)``, floating, or (x, positions).
    VJP:
        the rotation by minus the angles; positions have none.
    Raises:
        ValueError: an odd number of features that are rotated.

    Source: Su et al. 2021; bloc97 2023 for the scaling.

    >>> y, pullback, _ = rotary().vjp({}, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    >>> y, pullback(y)[1]
    (tensor([[1.0000, 0.0000],
            [0.5403, 0.8415]]), tensor([[1., 0.],
            [1., 0.]]))
    """
    require(base > 0 and scale > 0, f"rotary: base and scale must be > 0, got {base} and {scale}")
    even = dim is None or (dim >= 0 and dim % 2 == 0)
    require(even, f"rotary: dim must be even, got {dim}")

    def declaration(x: Tree) -> Mapping[str, Param]:
        features = values_and_positions(x)[0].shape[-1]
        words = "an even number of features" if dim is None else f"at least {dim} features"
        fits = features % 2 == 0 if dim is None else features >= dim
        require(fits, f"expects {words} in the last dimension, got {features}")
        return EMPTY

    def forward(x: Tree) -> Step:
        values, positions = values_and_positions(x)
        options = (base, scale, interleaved, dim)
        residuals = {} if positions is None else {"positions": positions}
        return rotate(values, positions, *options), residuals, (isinstance(x, tuple), *options)

    return parameterless(forward, rotary_backward, declaration=declaration)
