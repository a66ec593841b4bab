"""Gradients, norms and weighted sums of single examples, from one backward pass of all of them."""

from collections.abc import Callable, Iterator, Mapping
from operator import add
from typing import Any

import torch
from torch import Tensor

from funcnet import tree
from funcnet.backward.per_example.example_rules import AS_ONE_BATCH, FACTORS
from funcnet.backward.per_example.factors import Factors, Formed, Products
from funcnet.combinators.combine import children_rule
from funcnet.combinators.reparametrize import select_learned
from funcnet.combinators.repeat import stacked_rule
from funcnet.combinators.tie import tie_backward
from funcnet.core import Params, Tree, join_paths
from funcnet.deferred import (
    Deferred,
    gradients,
    is_term,
    map_terms,
    mapped_rule,
    shapes_of,
    sum_rule,
    with_absent,
)
from funcnet.layers.recurrence import direction_rule
from funcnet.layers.recurrent_stack import directions_rule, under_names
from funcnet.transforms.vmap import batched

BY = ("all", "layer", "leaf")
"""Of what `example_norms` gives norms."""

ARRANGING = {children_rule, direction_rule, directions_rule}
"""Rules of Deferreds that put gradients in their places and compute nothing with them."""

OF_FACTORS = {tie_backward, select_learned, under_names}
"""Functions of `mapped` that do with gradients what `Factors` can do: add them, put them."""


def example_gradients(deferred: Deferred) -> Params:
    """The gradients of each example: a tree like params, with an axis of examples in front.

    They take as much memory as the params times the number of examples. For norms and weighted sums
    of them they are not needed: see `example_norms` and `weighted`.

    Args:
        deferred: of examples, as `defer_examples` gives it.

    Raises:
        TypeError: no Deferred.
        ValueError: one that was not made under vmap.

    >>> import funcnet as fn
    >>> f = fn.defer_examples(fn.linear(1, bias=False), fn.mse())
    >>> x, target = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [1.0]])
    >>> _, deferred, _ = f({"weight": torch.ones(1, 1)}, (x, target))
    >>> example_gradients(deferred)
    {'weight': tensor([[[ 2.]],
    <BLANKLINE>
            [[12.]]])}
    """
    number_of_examples("example_gradients", deferred)
    return _formed(deferred)


def example_norms(deferred: Deferred, by: str = "all") -> Any:
    """The norm of each example's gradient, without the gradient where there is a formula for it.

    Of a linear layer with one position the norm is ``|dy_i| |x_i|``, with T positions a sum over
    two T x T Gram matrices, unless the gradient is smaller. Convolutions are linear in their
    windows, recurrent layers in their steps; of an embedding dy is summed over equal tokens. All
    else, and layers of the user's, form the gradients of one layer at a time, by vmap of their
    rules. Of params that are used several times the sum is exact: inner products are in it. Where
    positions or uses cancel to less than about a thousandth (float32), the norm may be too large
    by what rounding leaves, and never too small by more.

    Args:
        deferred: of examples, as `defer_examples` gives it.
        by: "all" for the norm of all gradients of an example, "layer" for a dict of those of each
            layer by its dotted path, "leaf" for a tree like params. A layer whose params are made
            of others, as of `tie` or `lora`, is one layer with all that is in it.

    Returns:
        norms of shape (examples,).
    Raises:
        TypeError: no Deferred.
        ValueError: one that was not made under vmap.

    Source: Goodfellow 2015; Li et al. 2022; Bu et al. 2022, "Scalable and efficient training of
    large convolutional neural networks with differential privacy".

    >>> import funcnet as fn
    >>> f = fn.defer_examples(fn.linear(1), fn.mse())
    >>> x, target = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [1.0]])
    >>> params = {"weight": torch.ones(1, 1), "bias": torch.zeros(1)}
    >>> _, deferred, _ = f(params, (x, target))
    >>> example_norms(deferred)
    tensor([ 2.8284, 12.6491])
    >>> example_norms(deferred, by="leaf")
    {'weight': tensor([ 2., 12.]), 'bias': tensor([2., 4.])}
    """
    if by not in BY:
        raise ValueError(f"example_norms: by must be one of {BY}, got {by!r}")
    examples = number_of_examples("example_norms", deferred)
    if by == "leaf":
        return tree.map(torch.sqrt, _walk(deferred, _squares_of))
    squares = squares_by_layer(deferred)
    if by == "layer":
        return {path: each.sqrt() for path, each in squares.items()}
    return total_of(squares, examples).sqrt()


def squares_by_layer(deferred: Deferred) -> dict[str, Tensor]:
    """The squared norm of each example's gradient of each layer, by path."""
    found: dict[str, Tensor] = {}
    for path, layer in _layers(deferred):
        leaves = [each.float() if each.dtype.itemsize < 4 else each for each in _squares(layer)]
        for square in leaves:
            found[path] = found[path] + square if path in found else square
    return found


def total_of(squares: dict[str, Tensor], examples: int) -> Tensor:
    """The squared norms of all layers' gradients together."""
    return torch.stack([*squares.values()]).sum(0) if squares else torch.zeros(examples)


def _squares(deferred: Deferred) -> list[Tensor]:
    return tree.leaves(_walk(deferred, _squares_of))


def _layers(deferred: Deferred, path: str = "") -> Iterator[tuple[str, Deferred]]:
    """Each part of a Deferred that is no combinator of layers with params of their own."""
    if deferred.rule is not children_rule:
        yield path, deferred
        return
    for name, part in deferred.parts.items():
        if isinstance(part, Deferred):
            yield from _layers(part, join_paths(path, "" if name[:1] == "." else name))


def _walk(deferred: Deferred, finish: Callable[[Factors], Any]) -> Tree:
    """A tree like params of ``finish(factors)``, one leaf layer after the other."""
    rule, parts, static = deferred.rule, deferred.parts, deferred.static
    if is_term(deferred):
        return _of_term(deferred, finish)
    if rule in ARRANGING:
        made = {
            name: _Made(_walk(part, finish)) if isinstance(part, Deferred) else part
            for name, part in parts.items()
        }
        return rule(made, *static)
    if rule is sum_rule:
        first, *others = [_walk(part, _same) for _, part in sorted(parts.items())]
        for each in others:
            first = tree.map(add, first, each)
        return tree.map(finish, first)
    if rule is mapped_rule and static[0] in OF_FACTORS:
        found = static[0](_walk(parts[""], _same), None, *static[1:])
        return tree.map(finish, found)
    if rule is stacked_rule:
        (n,) = static
        copies = tree.map(lambda leaf: leaf.flatten(0, 1), parts[""])
        return _walk(copies, lambda factors: finish(factors.copies(n)))
    formed = gradients(deferred) if rule is formed_rule else _formed(deferred)
    return tree.map(lambda leaf: finish(Formed(leaf)), formed)


def _squares_of(factors: Factors) -> Tensor:
    return factors.squares()


def _same(factors: Factors) -> Factors:
    return factors


class _Made(Deferred):
    """Stands for a Deferred in the place of which something else goes through a rule."""

    __slots__ = ()

    def __init__(self, made: Tree) -> None:
        super().__init__(_read, {"made": made})


def _read(parts: Mapping[str, Any]) -> Tree:
    return parts["made"]


def _of_term(term: Deferred, finish: Callable[[Factors], Any]) -> Tree:
    pullback, dy = term.parts["pullback"], term.parts["dy"]
    formula = FACTORS.get(pullback.rule)
    found = formula and formula(with_absent(pullback, dy, *term.static[1:]), dy, *pullback.static)
    if not found:
        return tree.map(lambda leaf: finish(Formed(leaf)), _formed(term))
    return {name: finish(each) for name, each in found.items()}


def _formed(deferred: Deferred) -> Params:
    return batched(gradients)(deferred)


def formed_where_small(deferred: Deferred) -> Deferred:
    """The same gradients, formed for each example where they are small and their norms need them.

    Then their weighted sum costs next to nothing, and norms and sum together what the gradients of
    the batch cost. They are kept where they take about the memory of the residuals and
    cotangents that they are made of, or less, as those of convolutions of large images.
    """

    def one(term: Deferred) -> Deferred:
        pullback, dy = term.parts["pullback"], term.parts["dy"]
        made, now = shapes_of(term)
        within_loop = len(now[0]) != len(made[0]) + 1
        one_position = made[0][:-1].numel() == 1
        if pullback.rule not in FACTORS or within_loop or one_position:
            return term
        found: dict[str, Factors] = _of_term(term, _same)
        products = [each for each in found.values() if isinstance(each, Products)]
        if not products or not all([each.is_formed() for each in products]):
            return term
        size = now[0][0] * sum([torch.Size(each.shape).numel() for each in products])
        if size > _MOST * sum([leaf.numel() for leaf in tree.leaves((pullback.residuals, dy))]):
            return term
        return Deferred(formed_rule, {name: each.formed() for name, each in found.items()})

    return map_terms(one, deferred)


_MOST = 1.5
"""Compiled, a GPT's step with 4 layers of 128 features takes 1.04 of the plain one's time with it,
1.13 without (private.py)."""


def formed_rule(parts: Mapping[str, Tensor]) -> Params:
    """The gradients that were formed."""
    return {**parts}


def weighted(deferred: Deferred, weights: Tensor | Mapping[str, Tensor]) -> Deferred:
    """The Deferred of ``sum_i weights_i g_i``, over the gradients of examples.

    ``gradients`` of it costs what the gradients of a batch cost, where the layer's rule takes the
    examples as a batch: of a linear layer it is one product of matrices.

    Args:
        deferred: of examples, as `defer_examples` gives it.
        weights: of shape (examples,); or a dict of such by the paths of
            ``example_norms(deferred, by="layer")``.

    Raises:
        TypeError: no Deferred, or weights that are no tensors.
        ValueError: a Deferred that was not made under vmap, weights of another shape, or paths that
            are not those of the layers.

    >>> import funcnet as fn
    >>> f = fn.defer_examples(fn.linear(1, bias=False), fn.mse())
    >>> x, target = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [1.0]])
    >>> _, deferred, _ = f({"weight": torch.ones(1, 1)}, (x, target))
    >>> fn.gradients(weighted(deferred, torch.tensor([10.0, 1.0])))
    {'weight': tensor([[32.]])}
    """
    examples = number_of_examples("weighted", deferred)
    for each in weights.values() if isinstance(weights, Mapping) else (weights,):
        if not isinstance(each, Tensor):
            raise TypeError(f"weighted: expects tensors as weights, got {tree.describe(each)}")
        if each.shape != (examples,):
            expected = f"weights of shape ({examples},), one for each example"
            raise ValueError(f"weighted: expects {expected}, got {tuple(each.shape)}")
    if isinstance(weights, Tensor):
        return _weighted(deferred, weights, 0)
    paths = [*dict(_layers(deferred))]
    if {*paths} != {*weights}:
        raise ValueError(f"weighted: expects weights of {paths}, got {[*weights]}")
    return _weighted_by_layer(deferred, weights, "")


def _weighted_by_layer(deferred: Deferred, weights: Mapping[str, Tensor], path: str) -> Deferred:
    if deferred.rule is not children_rule:
        return _weighted(deferred, weights[path], 0)
    parts = {
        name: _weighted_by_layer(part, weights, join_paths(path, "" if name[:1] == "." else name))
        if isinstance(part, Deferred)
        else part
        for name, part in deferred.parts.items()
    }
    return Deferred(children_rule, parts, deferred.static)


def _weighted(deferred: Deferred, weights: Tensor, axis: int) -> Deferred:
    """The same structure with weighted terms; ``axis`` is that of the examples in its tensors.

    It is not 0 in copies of a layer, of which there is a loop around what comes of it.
    """
    rule, parts, static = deferred.rule, deferred.parts, deferred.static
    if rule is stacked_rule:
        (n,) = static
        copies = tree.map(lambda leaf: leaf.movedim(axis + 1, axis), parts[""])
        weights = weights.unsqueeze(axis).expand(*weights.shape[:axis], n, weights.shape[-1])
        return Deferred(rule, {"": _weighted(copies, weights, axis + 1)}, static)
    if rule is mapped_rule:
        # They are of the params, and so the same for all examples.
        residuals = tree.map(lambda leaf: leaf.select(axis, 0), parts["residuals"])
        inner = _weighted(parts[""], weights, axis)
        return Deferred(rule, {"": inner, "residuals": residuals}, static)
    if rule in ARRANGING or rule is sum_rule:
        made = {
            name: _weighted(part, weights, axis) if isinstance(part, Deferred) else part
            for name, part in parts.items()
        }
        return Deferred(rule, made, static)
    return Deferred(weighted_rule, {"of": deferred, "weights": weights})


def weighted_rule(parts: Mapping[str, Any]) -> Tree:
    """``sum_i weights_i g_i``, by the layer's own rule for one batch, where it takes one."""
    deferred, weights = parts["of"], parts["weights"]
    if not is_term(deferred):
        formed = gradients(deferred) if deferred.rule is formed_rule else _formed(deferred)
        return tree.map(lambda leaf: _weighted_sum(leaf, weights), formed)
    pullback = deferred.parts["pullback"]
    dy = tree.map(lambda leaf: leaf * _beside(weights, leaf), deferred.parts["dy"])
    static = pullback.static
    residuals = with_absent(pullback, dy, *deferred.static[1:])
    merge = AS_ONE_BATCH.get(pullback.rule)
    if found := merge and merge(residuals, dy, *static):
        residuals, dy = found
        return pullback.rule({**residuals}, dy, *static, params=True, x=False)[0]
    scaled = Deferred(deferred.rule, {"pullback": pullback, "dy": dy}, deferred.static)
    return tree.map(lambda leaf: leaf.sum(0), _formed(scaled))


def _weighted_sum(leaf: Tensor, weights: Tensor) -> Tensor:
    return (weights.to(leaf.dtype) @ leaf.reshape(len(leaf), -1)).reshape(leaf.shape[1:])


def _beside(weights: Tensor, leaf: Tensor) -> Tensor:
    """Weights that broadcast against a leaf with the examples in front, in its dtype."""
    return weights.reshape(-1, *[1] * (leaf.dim() - 1)).to(leaf.dtype)


def number_of_examples(name: str, deferred: Any) -> int:
    """How many examples a Deferred is of; raises TypeError or ValueError, if of none."""
    if not isinstance(deferred, Deferred):
        raise TypeError(f"{name}: expects a Deferred, got {tree.describe(deferred)}")
    found = {*_examples(deferred, 0)}
    if len(found) == 1 and None not in found:
        return found.pop()
    hint = "make it under vmap over the batch, each example as a batch of one: defer_examples"
    if not found:
        raise ValueError(f"{name}: expects a Deferred of examples, got one of no layers")
    if None in found:
        raise ValueError(
            f"{name}: expects a Deferred of examples, got that of a whole batch; {hint}"
        )
    raise ValueError(f"{name}: expects as many examples at all layers, got {sorted(found)}; {hint}")


def _examples(deferred: Deferred, loops: int) -> Iterator[Any]:
    """Of each term the number of examples, None if its tensors have no such axis."""
    if deferred.rule is weighted_rule:
        yield None
        return
    if is_term(deferred):
        for made, now in zip(*shapes_of(deferred), strict=True):
            yield now[0] if len(now) == len(made) + loops + 1 else None
    if deferred.rule is formed_rule:
        yield from [len(leaf) for leaf in deferred.parts.values()]
    loops += deferred.rule is stacked_rule
    for part in deferred.parts.values():
        if isinstance(part, Deferred):
            yield from _examples(part, loops)
