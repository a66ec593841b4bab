"""Deferred gradients: the half of a backward pass that makes dparams, kept for later as a value."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from funcnet import tree
from funcnet.compiler.signature import register_node

Tree = Any


class Deferred:
    """Gradients of params that are still to be computed: `gradients` computes them.

    A backward pass has two halves. The one that makes cotangents of inputs must go through the
    layers one by one; the gradients of a layer's params need only its residuals and the
    cotangent that it got. `defer` does the first half, and a `Deferred` is what the second one
    needs. It is a pytree, so it can be returned by a compiled function, mapped over, moved, stored.

    Its terms, of which ``terms()`` gives each with its path, are a leaf layer's pullback and its
    cotangent. Where several are of the same params, as of tied weights or of a layer that is used
    twice, they are kept side by side: two linear maps cannot be added without computing them.
    ``deferred * factor`` scales the cotangents, and so the gradients.

    Args:
        rule: a module-level function ``(parts, *static) -> dparams``, linear in the cotangents.
        parts: what it needs: a dict of trees, in which other Deferreds may be.
        static: hashable arguments of the rule.

    >>> import funcnet as fn
    >>> net = fn.serial(fn.linear(3), fn.tanh())
    >>> params, _ = net.init(fn.key(0), torch.ones(4, 2))
    >>> y, pullback, _ = net.vjp(params, torch.ones(4, 2))
    >>> deferred, dx = fn.defer(pullback)(torch.ones_like(y))
    >>> deferred
    Deferred(['0'])
    >>> plain, _ = pullback(torch.ones_like(y))
    >>> torch.equal(fn.gradients(deferred)["0"]["weight"], plain["0"]["weight"])
    True
    """

    __slots__ = ("parts", "rule", "static")

    def __init__(
        self,
        rule: Callable[..., Any],
        parts: Mapping[str, Tree],
        static: tuple[Hashable, ...] = (),
    ) -> None:
        self.rule, self.parts = rule, parts
        self.static: Any = static

    def __mul__(self, factor: float | Tensor) -> "Deferred":
        """The Deferred of ``factor`` times the gradients; a number or a 0-d tensor."""
        if isinstance(factor, Tensor) and factor.dim():
            shape = tuple(factor.shape)
            raise ValueError(f"Deferred: expects a number or a 0-d tensor as factor, got {shape}")
        if not isinstance(factor, (int, float, Tensor)):
            return NotImplemented
        return scaled(self, lambda dy: dy * factor)

    __rmul__ = __mul__

    def __add__(self, other: "Deferred") -> "Deferred":
        """The Deferred of the sum of both gradients."""
        return side_by_side(self, other) if isinstance(other, Deferred) else NotImplemented

    def terms(self, path: str = "") -> Iterator[tuple[str, "Deferred"]]:
        """Each leaf layer's term with the dotted path of its params, in the order of the params.

        ``term.parts["pullback"]`` is the layer's pullback, ``term.parts["dy"]`` its cotangent.
        """
        if is_term(self):
            yield path, self
        for name, part in self.parts.items():
            if isinstance(part, Deferred):
                inside = name if self.rule in _OF_CHILDREN and name[:1] != "." else ""
                yield from part.terms(".".join([each for each in (path, inside) if each]))

    def places(self, path: str = "") -> Iterator[tuple[str, "Deferred"]]:
        """The parts that can be finished one by one, each with the dotted path of its params.

        Together they are the whole, and no two have the same params. A place is one layer, or
        several where their gradients depend on each other, as of tied weights.
        """
        if self.rule not in _OF_CHILDREN:
            yield path, self
            return
        for name, part in self.parts.items():
            inside = name if name[:1] != "." else ""
            yield from part.places(".".join([each for each in (path, inside) if each]))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({[path for path, _ in self.terms()]})"


def _flatten(deferred: Any) -> tuple[Any, Any, Any]:
    return (deferred.parts,), (deferred.rule, deferred.static), ("parts",)


def _unflatten(metadata: Any, children: Any) -> Any:
    (rule, static), (parts,) = metadata, children
    return Deferred(rule, parts, static)


register_node(Deferred, _flatten, _unflatten, ("parts",), ("rule", "static"))


class Defer:
    """What a rule gets for ``params`` where gradients are deferred; see `pull`."""

    __slots__ = ()


DEFER = Defer()


def defers(rule: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a rule that takes ``DEFER`` for ``params``, and gives a `Deferred` as dparams.

    One that calls other pullbacks by `pull` and hands their dparams on needs nothing else. Without
    it the layer is a leaf: its own pullback and the cotangent are the term.

    >>> import funcnet as fn
    >>> @defers
    ... def halved_rule(residuals, dy, *, params, x):
    ...     return fn.pull(residuals, "layer", dy / 2, params=params, x=x)
    """
    _DEFERRING.add(rule)
    return rule


def takes_deferral(rule: Callable[..., Any]) -> bool:
    """Whether a rule is decorated with `defers`."""
    return rule in _DEFERRING


_DEFERRING: set[Callable[..., Any]] = set()


def for_dx(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a rule, with the residuals whose values it reads for dx alone, such as weights.

    A deferred gradient does not keep them: so the params of that step do not stay in memory with
    it, and are not copied for each member under vmap. When the rule is called for dparams, zeros of
    the same shapes and dtypes, which take no memory, stand in their place.

    >>> @for_dx("scale")
    ... def scale_rule(residuals, dy, *, params, x):
    ...     dparams = {"scale": (dy * residuals["x"]).sum()} if params else None
    ...     return dparams, dy * residuals["scale"] if x else None
    """

    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        _FOR_DX[rule] = frozenset(names)
        return rule

    return register


_FOR_DX: dict[Callable[..., Any], frozenset[str]] = {}


class _Absent(NamedTuple):
    """A residual that was left out: its structure, and the shapes and dtypes of its tensors."""

    name: str
    treedef: Any
    kinds: tuple[tuple[Any, Any], ...]

    @classmethod
    def of(cls, name: str, residual: Tree) -> "_Absent":
        leaves, treedef = tree.flatten(residual)
        return cls(name, treedef, tuple([(tuple(leaf.shape), leaf.dtype) for leaf in leaves]))

    def zeros(self, device: torch.device) -> Tree:
        leaves = [torch.zeros((), dtype=d, device=device).expand(shape) for shape, d in self.kinds]
        return self.treedef.unflatten(leaves)


def term(
    make: Callable[..., Any], rule: Any, residuals: Mapping[str, Tree], static: Any, dy: Tree
) -> Deferred:
    """The deferred gradient of one leaf layer: its pullback, without what dx alone needs, and dy.

    ``make`` makes a pullback of a rule, residuals and static arguments.
    """
    absent = _FOR_DX.get(rule, frozenset())
    kept = {name: each for name, each in residuals.items() if name not in absent}
    left_out = [_Absent.of(name, residuals[name]) for name in sorted(absent & residuals.keys())]
    parts = {"pullback": make(rule, kept, static), "dy": dy}
    return Deferred(term_rule, parts, (_shapes(dy), tuple(left_out)))


def term_rule(
    parts: Mapping[str, Any], shapes: tuple[Any, ...], left_out: tuple[_Absent, ...]
) -> Tree:
    """``dparams`` of a leaf layer's pullback."""
    pullback, dy = parts["pullback"], parts["dy"]
    if (found := _shapes(dy)) != shapes:
        name = getattr(pullback.rule, "__name__", "").removesuffix("_rule")
        expected, got = [*map(tuple, shapes)], [*map(tuple, found)]
        raise ValueError(
            f"{name}: its deferred gradient was made for dy of {expected}, and dy is now {got}; "
            "one that was made under vmap is finished by vmap(gradients), or with weighted"
        )
    residuals = with_absent(pullback, dy, left_out)
    return pullback.rule(residuals, dy, *pullback.static, params=True, x=False)[0]


def with_absent(pullback: Any, dy: Tree, left_out: tuple[_Absent, ...]) -> dict[str, Tree]:
    """The residuals of a term, with zeros in the place of those that were left out."""
    residuals = dict(pullback.residuals)
    for absent in left_out:
        residuals[absent.name] = absent.zeros(tree.device_of(dy))
    return residuals


def shapes_of(term: Deferred) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The shapes of a term's cotangents when it was made, and as they are now.

    These have more dimensions in front for each vmap and each loop that the term came out of.
    """
    return term.static[0], _shapes(term.parts["dy"])


def _shapes(dy: Tree) -> tuple[Any, ...]:
    return (dy.shape,) if type(dy) is Tensor else tuple([each.shape for each in tree.leaves(dy)])


def side_by_side(*deferred: Deferred) -> Deferred:
    """The Deferred of a sum, in this order."""
    parts: list[Deferred] = []
    for each in deferred:
        parts += each.parts.values() if each.rule is sum_rule else [each]
    return Deferred(sum_rule, {f"{index:04}": part for index, part in enumerate(parts)})


def sum_rule(parts: Mapping[str, Deferred]) -> Tree:
    """The sum of the gradients of all parts, which are of the same params."""
    first, *others = [gradients(part) for _, part in sorted(parts.items())]
    for each in others:
        if _kinds(first) != _kinds(each):
            expected, got = _kinds(first), _kinds(each)
            raise ValueError(f"Deferred: a sum is of the same params, got {expected} and {got}")
        first = tree.map(torch.add, first, each)
    return first


def _kinds(grads: Tree) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in tree.to_dotted(grads).items()}


def mapped(
    function: Callable[..., Tree], dparams: Tree, residuals: Tree = None, *static: Hashable
) -> Tree:
    """``function(dparams, residuals, *static)``; of a `Deferred` the Deferred of it.

    For the rule of a layer whose params are made of others, such as `tie`. The function is linear
    in the gradients.
    """
    if not isinstance(dparams, Deferred):
        return function(dparams, residuals, *static)
    return Deferred(mapped_rule, {"": dparams, "residuals": residuals}, (function, *static))


def mapped_rule(parts: Mapping[str, Any], function: Callable[..., Tree], *static: Any) -> Tree:
    """``function(gradients, residuals, *static)``."""
    return function(gradients(parts[""]), parts["residuals"], *static)


def gradients(deferred: Tree) -> Tree:
    """The gradients of a `Deferred`: the half of the backward pass that `defer` left out.

    Args:
        deferred: what `defer` gave, or a tree of such.

    Returns:
        dparams: bit for bit what the pullback gives at once.
    Raises:
        TypeError: there is no Deferred.
        ValueError: it was made under `vmap`, and is finished outside of it, or the other way.

    >>> import funcnet as fn
    >>> _, pullback, _ = fn.linear(1).vjp({"weight": torch.ones(1, 2), "bias": torch.zeros(1)},
    ...                                   torch.ones(3, 2))
    >>> deferred, dx = fn.defer(pullback)(torch.ones(3, 1))
    >>> gradients(deferred), gradients(deferred * 2.0)["bias"]
    ({'weight': tensor([[3., 3.]]), 'bias': tensor([3.])}, tensor([6.]))
    """
    if isinstance(deferred, Deferred):
        return deferred.rule(deferred.parts, *deferred.static)
    found = optree.tree_leaves(deferred, is_leaf=_is_deferred)
    if not found or not all(map(_is_deferred, found)):
        raise TypeError(
            f"gradients: expects a Deferred, as of defer, got {tree.describe(deferred)}"
        )
    return optree.tree_map(gradients, deferred, is_leaf=_is_deferred)


def _is_deferred(node: Any) -> bool:
    return isinstance(node, Deferred)


def is_term(node: Any) -> bool:
    """Whether a node is the deferred gradient of one leaf layer, and has no other in it."""
    return isinstance(node, Deferred) and node.rule is term_rule


_OF_CHILDREN: set[Callable[..., Any]] = set()


def of_children(rule: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the rule of a Deferred whose parts are those of child layers, by name.

    A name that begins with a dot is that of a child that has its parent's path.
    """
    _OF_CHILDREN.add(rule)
    return rule


def map_terms(function: Callable[[Deferred], Deferred], deferred: Deferred) -> Deferred:
    """The Deferred with ``function(term)`` in the place of each term."""
    whole: Any = deferred
    mapped_tree: Any = optree.tree_map(
        lambda node: function(node) if is_term(node) else node, whole, is_leaf=is_term
    )
    return mapped_tree


def scaled(deferred: Deferred, scale: Callable[[Tensor], Tensor]) -> Deferred:
    """The Deferred with ``scale(dy)`` in the place of each cotangent, of the same shape."""

    def one(each: Deferred) -> Deferred:
        parts = {**each.parts, "dy": tree.map(scale, each.parts["dy"])}
        return Deferred(each.rule, parts, each.static)

    return map_terms(one, deferred)
