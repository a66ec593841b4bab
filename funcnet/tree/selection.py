"""Leaves chosen by path: taken out of a tree, and replaced in it."""

from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

import optree
from torch import Tensor

from funcnet.errors import located, require
from funcnet.tree.dotted import from_dotted, paths, to_dotted
from funcnet.tree.trees import describe, leaves

Where = str | Collection[str] | Callable[[str], bool]
"""Some leaves of a tree: dotted paths of leaves or of what is above them, in which ``*`` stands for
any characters, dots too; or a function of the path."""


def selector(where: Where) -> Callable[[str], bool]:
    """Whether a dotted path is that of a chosen leaf; see `Where`.

    >>> chosen = selector(["0", "head.weight", "*.scale"])
    >>> chosen("0.bias"), chosen("head.weight"), chosen("head.bias"), chosen("1.norm.scale")
    (True, True, False, True)
    """
    if callable(where):
        return where
    plain = tuple([each for each in named_paths(where) if "*" not in each])
    patterns = [each for each in named_paths(where) if "*" in each]
    below = tuple([f"{each}." for each in plain])

    def chosen(path: str) -> bool:
        if path in plain or path.startswith(below):
            return True
        return any([fnmatchcase(path, each) or fnmatchcase(path, f"{each}.*") for each in patterns])

    return chosen


def named_paths(where: Where) -> tuple[str, ...]:
    """The paths that ``where`` names; none for a function.

    >>> named_paths("0.weight"), named_paths(["0", "1.bias"]), named_paths(str.isupper)
    (('0.weight',), ('0', '1.bias'), ())
    """
    return () if callable(where) else (where,) if isinstance(where, str) else tuple(where)


def chosen_leaves(where: Where, tree: Any) -> list[str]:
    """The dotted paths of the chosen leaves; ValueError for a path that no leaf has.

    >>> params, _ = fn.linear(2).init(fn.key(0), torch.ones(1, 3))
    >>> chosen_leaves("w*", params)
    ['weight']
    """
    return _chosen(where, list(to_dotted(tree)))


def _chosen(where: Where, known: list[str]) -> list[str]:
    for each in named_paths(where):
        chosen = selector(each)
        require(any(map(chosen, known)), f"no leaf has the path {each!r}, only {_listed(known)}")
    found = [*filter(selector(where), known)]
    require(found, f"no leaf is chosen of {_listed(known)}")
    return found


def _listed(paths: list[str], most: int = 20) -> str:
    more = len(paths) - most
    return f"{paths[:most]} and {more} more" if more > 0 else str(paths)


def leaf_at(path: str, tree: Any) -> Tensor:
    """The leaf with a dotted path; ValueError where there is none, or a layer.

    >>> leaf_at("0.bias", {"0": {"weight": torch.ones(2), "bias": torch.zeros(1)}})
    tensor([0.])
    """
    found = chosen_leaves(path, tree)
    require(found == [path], f"expects the path of a leaf, and {path!r} has {found} in it")
    return to_dotted(tree)[path]


def select(tree: Any, where: Where) -> Any:
    """The chosen leaves of a tree, as nested dicts: a sparse tree, with the paths of the whole.

    Args:
        tree: any tree: params, gradients, a train state.
        where: which leaves: a path of a leaf or of what is above it, in which ``*`` stands for any
            characters, several paths, or a function of the path.

    Raises:
        ValueError: no leaf has one of the paths, or none is chosen.

    See `partition` for both halves of a parameter tree.

    >>> params = {"0": {"weight": torch.ones(1), "bias": torch.zeros(1)}, "1": torch.ones(1)}
    >>> select(params, "*.bias")
    {'0': {'bias': tensor([0.])}}
    >>> step = fn.TrainState(params, {}, {}, fn.key(0), torch.tensor(3))
    >>> select(step, ["params.0", "step"])
    {'params': {'0': {'weight': tensor([1.]), 'bias': tensor([0.])}}, 'step': tensor(3)}
    """
    flat = to_dotted(tree)
    with located("select:"):
        return from_dotted({path: flat[path] for path in _chosen(where, list(flat))})


def replace(
    tree: Any, what: Any, new: Callable[[Any], Any] | None = None, *, check: bool = True
) -> Any:
    """The tree with other leaves at some paths: ``replace(tree, leaves)`` or ``(tree, where, f)``.

    Args:
        tree: any tree: params, a train state. It stays as it is; the other leaves are shared.
        what: a dict from paths to leaves, flat or nested, such as `select` gives; or, with ``new``,
            which leaves, as for `select`.
        new: a function from each chosen leaf to that in its place.
        check: whether a leaf must have the shape and dtype of the one that it replaces.

    Raises:
        ValueError: no leaf has one of the paths; a shape or, for ``check``, a dtype differs.

    >>> params = {"0": {"weight": torch.ones(2), "bias": torch.zeros(1)}}
    >>> replace(params, {"0.bias": torch.ones(1)})
    {'0': {'weight': tensor([1., 1.]), 'bias': tensor([1.])}}
    >>> replace(params, "*.weight", lambda weight: 0.5 * weight)
    {'0': {'weight': tensor([0.5000, 0.5000]), 'bias': tensor([0.])}}
    >>> replace(params, {"0.bias": torch.ones(2)})
    Traceback (most recent call last):
    ...
    ValueError: replace: expects float32 (1,) at '0.bias', got float32 (2,)
    """
    flat = dict(zip(paths(tree), leaves(tree), strict=True))
    expected = "a dict from paths to leaves, or a choice of leaves and a function"
    with located("replace:"):
        if new is not None:
            changes = {path: new(flat[path]) for path in _chosen(what, list(flat))}
        else:
            is_dict = isinstance(what, Mapping)
            require(is_dict, f"expects {expected}, got {describe(what)}", TypeError)
            changes = to_dotted(what)
        for path, leaf in changes.items():
            require(path in flat, f"no leaf has the path {path!r}, only {_listed(list(flat))}")
            fits = not check or describe(leaf) == describe(flat[path])
            require(fits, f"expects {describe(flat[path])} at {path!r}, got {describe(leaf)}")
    return optree.tree_structure(tree).unflatten({**flat, **changes}.values())
