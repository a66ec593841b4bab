"""The embedding of bags of indices: the sum, mean or greatest of the rows of each bag."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet import runtime, tree
from funcnet.core import Grads, Layer, Params, Pullback
from funcnet.deferred import for_dx
from funcnet.errors import require
from funcnet.initializers import Initializer
from funcnet.layers.embedding import (
    Rows,
    by_all_frequencies,
    embedding_backward,
    is_index,
    renormalized,
)
from funcnet.lift import fastest, stateless, with_kernel
from funcnet.params import Param, declare

_MODES = ("sum", "mean", "max")


class Options(NamedTuple):
    """The options of the layer, and how many rows its weight has."""

    rows: int
    padding: int
    max_norm: float | None
    norm_type: float
    scale_grad_by_freq: bool
    mode: str
    include_last_offset: bool


class Bags(NamedTuple):
    """Indices in one dimension, where in it each bag begins, and the indices' weights if any."""

    indices: Tensor
    offsets: Tensor
    weights: Tensor | None


def _parts(x: Any) -> tuple[Any, Any, Any]:
    """The indices, offsets and weights of an input, None where there are none."""
    return (*(x if isinstance(x, tuple) else (x,)), None, None)[:3]


def _bags(x: Any, include_last_offset: bool) -> Bags:
    """The indices of an input, flattened; each row of a matrix is a bag."""
    indices, offsets, weights = _parts(x)
    if offsets is None:
        rows, length = indices.shape
        offsets = torch.arange(rows + include_last_offset, device=indices.device) * length
    weights = None if weights is None else weights.reshape(-1)
    return Bags(indices.long().reshape(-1), offsets.long(), weights)


def _number(bags: Bags, options: Options) -> int:
    """The number of bags; what is behind the last offset, if that is included, is none."""
    return len(bags.offsets) - options.include_last_offset


def _bag_of_each(bags: Bags) -> Tensor:
    """The bag that each index is in: the last one that begins at or before it."""
    n, offsets = len(bags.indices), bags.offsets
    begins = offsets.new_zeros(n + 1).scatter_add(0, offsets, torch.ones_like(offsets))
    return begins.cumsum(0)[:n] - 1


def _kept(bags: Bags, options: Options) -> Tensor:
    """Which indices are not the padding."""
    return bags.indices != options.padding


def _lengths(bags: Bags, bag: Tensor, options: Options) -> Tensor:
    """How many indices are in each bag, without the padding."""
    return torch.zeros_like(bags.offsets).index_add(0, bag, _kept(bags, options).long())


def _factors(bags: Bags, bag: Tensor, options: Options, dtype: torch.dtype) -> Tensor:
    """The factor of each row in the sum over its bag: 1, its weight, or 1 / the bag's length.

    It is 0 for the padding.
    """
    factors = _kept(bags, options).to(dtype)
    if options.mode == "mean":
        return factors / _lengths(bags, bag, options).clamp(min=1)[bag]
    return factors if bags.weights is None else factors * bags.weights


def _embedding_bag_kernel(
    weight: Tensor, bags: Bags, options: Options
) -> tuple[Tensor, Tensor | None]:
    # It has no rule for vmap, and takes no rows that are scaled.
    if options.max_norm is not None or runtime.is_transformed() or len(bags.offsets) == 0:
        return embedding_bag_forward(weight, bags, options)
    indices, offsets, weights = bags
    padding = options.padding if options.padding >= 0 else None
    mode, count = _MODES.index(options.mode), _number(bags, options)
    # Given the last offset as such, it does not expect indices behind it; as a bag, it does.
    y, _, lengths, chosen = torch.embedding_bag(
        weight, indices, offsets, False, mode, False, weights, False, padding
    )
    if options.mode != "max":
        return y[:count], None
    return y[:count], torch.where(lengths.unsqueeze(1) == 0, options.rows, chosen)[:count]


@with_kernel(_embedding_bag_kernel)
def embedding_bag_forward(
    weight: Tensor, bags: Bags, options: Options
) -> tuple[Tensor, Tensor | None]:
    """``y_b = sum of factor_i weight[index_i]`` over the bag, or the greatest in each column.

    Beside y, for the greatest, the row that it comes from, or the number of rows in an empty bag.
    """
    bag, number = _bag_of_each(bags), len(bags.offsets)
    rows = renormalized(F.embedding(bags.indices, weight), options.max_norm, options.norm_type)
    kept = _kept(bags, options).unsqueeze(1)
    if options.mode == "max":
        place = _first_greatest(rows, kept, bag, number)[: _number(bags, options)]
        # At the end, for empty bags, a row of zeros, and an index that no row of the weight has.
        chosen = torch.cat([bags.indices, bag.new_full((1,), options.rows)])[place]
        return _with_end(rows).gather(0, place), chosen
    # Sums of many numbers, which half precision would round at each.
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    terms = torch.where(kept, rows * _factors(bags, bag, options, rows.dtype).unsqueeze(1), 0.0)
    y = rows.new_zeros(number, rows.shape[1]).index_add(0, bag, terms)
    return y[: _number(bags, options)].to(weight.dtype), None


def _first_greatest(rows: Tensor, kept: Tensor, bag: Tensor, number: int) -> Tensor:
    """Where each bag has its greatest value of a column first; ``len(rows)`` in an empty bag."""
    n, shape, where = len(rows), (number, rows.shape[1]), bag.unsqueeze(1).expand_as(rows)
    values = torch.where(kept, rows, -torch.inf)
    greatest = rows.new_full(shape, -torch.inf).scatter_reduce(0, where, values, "amax")
    is_greatest = kept & ((rows == greatest[bag]) | rows.isnan())
    place = torch.where(is_greatest, torch.arange(n, device=rows.device).unsqueeze(1), n)
    return bag.new_full(shape, n).scatter_reduce(0, where, place, "amin")


def _with_end(rows: Tensor) -> Tensor:
    """The rows, and one of zeros at the end."""
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])


def _embedding_bag_backward_kernel(
    dy: Tensor, bags: Bags, chosen: Tensor | None, options: Options
) -> Tensor:
    # It divides by wrong frequencies, and has no rule for vmap.
    if options.scale_grad_by_freq or runtime.is_transformed():
        return embedding_bag_backward(dy, bags, chosen, options)
    indices, offsets, weights = bags
    bag, mode = _bag_of_each(bags), _MODES.index(options.mode)
    if chosen is None and len(dy) < len(offsets):
        dy = _with_end(dy)  # for the indices behind the last bag
    lengths = _lengths(bags, bag, options)[: len(dy)]
    return runtime.embedding_bag_backward(
        *(dy, indices, bag, lengths, lengths if chosen is None else chosen),
        *(options.rows, options.scale_grad_by_freq, mode, weights, options.padding),
    )


@with_kernel(_embedding_bag_backward_kernel)
def embedding_bag_backward(
    dy: Tensor, bags: Bags, chosen: Tensor | None, options: Options
) -> Tensor:
    """``dweight[i] = sum of factor_j dy[bag of j] where index_j = i``; of the greatest, dy."""
    if chosen is not None:
        return dy.new_zeros(options.rows + 1, dy.shape[1]).scatter_add(0, chosen, dy)[:-1]
    bag = _bag_of_each(bags)
    wide = torch.promote_types(dy.dtype, torch.float32)
    # The end is for the indices behind the last bag.
    drows = (_with_end(dy)[bag] * _factors(bags, bag, options, wide).unsqueeze(1)).to(dy.dtype)
    backward = fastest(embedding_backward, drows)
    return backward(drows, bags.indices, options.rows, options.padding, options.scale_grad_by_freq)


def weights_backward(dy: Tensor, weight: Tensor, bags: Bags, options: Options) -> Tensor:
    """``dweights_i = dy[bag of i] . weight[index_i]``, 0 for the padding."""
    rows = renormalized(F.embedding(bags.indices, weight), options.max_norm, options.norm_type)
    products = (_with_end(dy)[_bag_of_each(bags)] * rows).sum(-1)
    return torch.where(_kept(bags, options), products, 0.0)


@for_dx("weight")
def embedding_bag_rule(
    residuals: dict[str, Any], dy: Tensor, options: Options, *, params: bool, x: bool
) -> Grads:
    """`embedding_bag_backward` and `weights_backward`; indices and offsets have no cotangent."""
    inputs = residuals["x"]
    bags, dparams = _bags(inputs, options.include_last_offset), None
    dx: Any = None
    if params:
        chosen = residuals.get("chosen")
        backward = fastest(embedding_bag_backward, *tree.leaves((dy, residuals)))
        dparams = {"weight": backward(dy, bags, chosen, options)}
    if x and isinstance(inputs, tuple):
        dx = (None,) * len(inputs)
        if bags.weights is not None:
            dweights = weights_backward(dy, residuals["weight"], bags, options)
            dx = None, None, dweights.reshape(inputs[2].shape)
    return dparams, dx


def _require_form(x: Any, options: Options) -> None:
    """ValueError or TypeError unless x is indices, with offsets and weights that go with them."""
    form = "indices or a tuple (indices, offsets or None, per_sample_weights or None)"
    fits = not isinstance(x, tuple) or 1 <= len(x) <= 3
    require(fits, f"expects {form}, got {tree.describe(x)}")
    indices, offsets, weights = _parts(x)
    wrong = f"expects int32 or int64 indices, got {tree.describe(indices)}"
    require(is_index(indices), wrong, TypeError)
    fits = indices.dim() == (2 if offsets is None else 1)
    shapes = "expects indices of shape (batch, length), or (n,) with offsets"
    require(fits, f"{shapes}, got {tree.describe(x)}")
    if offsets is not None:
        wrong = f"expects int32 or int64 offsets, got {tree.describe(offsets)}"
        require(is_index(offsets), wrong, TypeError)
        require(offsets.dim() == 1, f"expects offsets of shape (bags,), got {tuple(offsets.shape)}")
        enough = len(offsets) > 0 or not (len(indices) > 0 or options.include_last_offset)
        require(enough, "expects at least one offset, got none")
    if weights is not None:
        only = f"expects per_sample_weights with mode 'sum' only, got {options.mode!r}"
        require(options.mode == "sum", only)
        wrong = f"expects floating-point per_sample_weights, got {tree.describe(weights)}"
        floating = isinstance(weights, Tensor) and weights.is_floating_point()
        require(floating, wrong, TypeError)
        wrong = f"expects per_sample_weights of the indices' shape {tuple(indices.shape)}"
        require(weights.shape == indices.shape, f"{wrong}, got {tuple(weights.shape)}")


def _require_values(indices: Tensor, offsets: Tensor | None, count: int) -> None:
    """ValueError for indices out of range, or offsets that are not those of bags."""
    n = indices.numel()
    if n > 0:
        low, high = runtime.read(torch.stack(indices.aminmax())) or (0, 0)
        wrong = f"embedding_bag: expects indices in [0, {count}), got indices from {low} to {high}"
        require(low >= 0 and high < count, wrong)
    if offsets is not None and len(offsets) > 0:
        falls = (offsets[1:] < offsets[:-1]).sum()
        found = runtime.read(torch.stack([offsets[0], offsets[-1], falls]))
        first, last, unsorted = found or (0, 0, 0)
        require(not unsorted, "embedding_bag: expects sorted offsets, got some that fall")
        require(first == 0, f"embedding_bag: expects offsets that start at 0, got {first}")
        beyond = f"embedding_bag: expects offsets up to the number of indices {n}, got {last}"
        require(last <= n, beyond)


def embedding_bag(
    num_embeddings: int,
    embedding_dim: int,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    *,
    weight_init: Initializer | None = None,
    dtype: torch.dtype | None = None,
) -> Layer:
    """The sum, mean or greatest of the rows ``weight[i]`` of each bag of indices i.

    Args:
        num_embeddings: the number of rows; indices lie in [0, num_embeddings).
        embedding_dim: the size of a row.
        max_norm: rows longer than this are scaled to this length in y. In torch that changes the
            weight itself; here the weight stays, and its gradient is what torch's would be: as
            if the scaled row had been the parameter.
        norm_type: the p of the p-norm that ``max_norm`` limits.
        scale_grad_by_freq: divide a row's gradient by how often the row occurs in x; not for max.
        mode: "sum", "mean" or "max", which is taken in each column.
        sparse: only False: gradients have the structure of the params.
        include_last_offset: whether offsets has one more element, where the last bag ends.
        padding_idx: a row that starts as zeros, is left out of all bags, and gets no gradient.
        weight_init: default N(0, 1).
        dtype: of the weight; default that of per_sample_weights, or float32.

    Inputs:
        indices, int32 or int64, of shape (batch, length), each row a bag; or a tuple (indices,
        offsets) of shapes (n,) and (batch,), where offsets are the first places of the bags, in
        order from 0; or (indices, offsets or None, per_sample_weights), where the last, for sums
        only, has the shape of the indices: what each row is multiplied by.
    Returns:
        y of shape (batch, embedding_dim); zeros for an empty bag.
    Learned params:
        ``weight`` (num_embeddings, embedding_dim).
    VJP:
        ``dweight[i]`` is the sum of dy over the bags that i is in, each times i's weight there, or
        divided by the bag's length, or where i is the (first) greatest.
        ``dper_sample_weights = dy . weight[i]``; the rest of dx is None.
    Raises:
        TypeError: what is no integer.
        ValueError: indices out of range, and offsets that are not sorted, do not start at 0 or
            go beyond the indices.

    Source: ``torch.nn.EmbeddingBag``.

    >>> import funcnet as fn
    >>> layer = fn.embedding_bag(3, 2, mode="sum")
    >>> params = {"weight": torch.arange(6.0).reshape(3, 2)}
    >>> x = (torch.tensor([2, 0, 1]), torch.tensor([0, 2, 2]))
    >>> y, pullback, _ = layer.vjp(params, x)
    >>> y
    tensor([[4., 6.],
            [0., 0.],
            [2., 3.]])
    >>> pullback(torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]))
    ({'weight': tensor([[1., 1.],
            [3., 3.],
            [1., 1.]])}, (None, None))
    """
    rows = Rows.of("embedding_bag", num_embeddings, embedding_dim, padding_idx, sparse)
    wrong = f"embedding_bag: mode must be one of {', '.join(_MODES)}, got {mode!r}"
    require(mode in _MODES, wrong)
    by_freq = "embedding_bag: scale_grad_by_freq is for mode 'sum' or 'mean', got 'max'"
    require(not (scale_grad_by_freq and mode == "max"), by_freq)
    options = Options(
        rows.number,
        rows.padding,
        max_norm,
        norm_type,
        scale_grad_by_freq,
        mode,
        include_last_offset,
    )

    @declare
    def init(x: Any) -> dict[str, Param]:
        _require_form(x, options)
        return rows.declared(weight_init, dtype)

    def forward(params: Params, x: Any) -> tuple[Tensor, Tensor | None]:
        indices, offsets, _ = _parts(x)
        _require_values(indices, offsets, rows.number)
        bags, weight = _bags(x, include_last_offset), params["weight"]
        return fastest(embedding_bag_forward, weight, *tree.leaves(x))(weight, bags, options)

    def apply(params: Params, x: Any) -> Tensor:
        return forward(params, x)[0]

    def vjp(params: Params, x: Any) -> tuple[Tensor, Pullback]:
        y, chosen = forward(params, x)
        residuals = {"x": x} if chosen is None else {"x": x, "chosen": chosen}
        if _parts(x)[2] is not None:
            residuals["weight"] = params["weight"]
        return y, Pullback(embedding_bag_rule, residuals, (options,))

    # What torch calls the gradient then is not the derivative.
    breaks = ("derivative",) if max_norm is not None or scale_grad_by_freq else ()
    made = stateless(init, apply, vjp, mixes_examples=scale_grad_by_freq, breaks=breaks)
    return by_all_frequencies(made, lambda x: _parts(x)[0]) if scale_grad_by_freq else made
