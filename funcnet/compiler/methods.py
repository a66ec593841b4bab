"""Methods: what a program depends on of the object that a jitted method closes over."""

import copyreg
import types
from collections.abc import Hashable
from typing import Any

from torch import Tensor

from funcnet import tree
from funcnet.compiler.signature import Same, exact, structure
from funcnet.compiler.specs import input_spec


def attributes_key(value: Any, seen: frozenset[int] = frozenset()) -> Hashable:
    """What an object has, and what the objects in it have, as a key.

    Tensors count by identity, shape and dtype; their values do not.
    """
    names = [*getattr(value, "__dict__", {}), *copyreg._slotnames(type(value))]  # type: ignore[attr-defined]
    own = {name: getattr(value, name) for name in names if hasattr(value, name)}
    leaves, treedef = tree.flatten(own)
    seen |= {id(value)}
    found: list[Hashable] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            found.append((Same(leaf), input_spec(leaf)))
        elif id(leaf) in seen or isinstance(leaf, (type, types.FunctionType, types.ModuleType)):
            found.append(Same(leaf))
        elif hasattr(leaf, "__dict__"):
            found.append((type(leaf), attributes_key(leaf, seen)))
        else:
            found.append(exact(leaf))
    return structure(treedef), tuple(found)
