"""The params and state of a combinator by child, and of the children as its own."""

from collections.abc import Mapping
from typing import Any

from funcnet import tree
from funcnet.core import Params

Name = str | tuple[str, ...]
"""What a child is called: a string, whose entry of the params it has; "" for a child that has all
of the params; or several strings, for a child that has their entries, such as a `serial` of some
children of another."""


def has_entry(child: Name) -> bool:
    """Whether a child has one entry of its parent's params, and not several or all of them."""
    return isinstance(child, str) and child != ""


def parts_of(
    parent: str, children: tuple[Name, ...], what: str, whole: Params
) -> Mapping[Any, Any]:
    """The params or state of each child that has any, from those of its parent."""
    if not isinstance(whole, Mapping):
        raise TypeError(f"{parent}: expects a dict of {what}, got {tree.describe(whole)}")
    parts: dict[Any, Any] = {}
    left: dict[Any, Any] = dict(whole)
    for child in children:
        if isinstance(child, str) and "." in child:
            if found := _taken(left, child):
                parts[child] = found
            continue
        names = (child,) if has_entry(child) else child or tuple(whole)
        if found := {name: left.pop(name) for name in names if name in left}:
            parts[child] = found[child] if has_entry(child) else found
    if left:
        layers = list(children)
        raise ValueError(f"{parent}: {what} has {sorted(left)}, but the layers are {layers}")
    return parts


def _taken(left: dict[str, Any], path: str) -> Any:
    """What is at a dotted path, and no longer in ``left``; None if nothing is."""
    name, _, rest = path.partition(".")
    if not rest:
        return left.pop(name, None)
    if not isinstance(left.get(name), Mapping):
        return None
    inner = dict(left.pop(name))
    found = _taken(inner, rest)
    left.update({name: inner} if inner else {})
    return found


def whole_of(parts: dict[Any, Any]) -> dict[str, Any]:
    """The params or state of a parent, from those of its children."""
    whole: dict[str, Any] = {}
    for child, part in parts.items():
        node, name = whole, child
        while isinstance(name, str) and "." in name:
            first, _, name = name.partition(".")
            node = node.setdefault(first, {})
        node.update({name: part} if has_entry(name) else part)
    return whole
