"""Trees of tensors: the helpers on top of optree that the rest of funcnet needs.

A tree is any optree pytree; a *parameter tree* is a nested dict with string keys and tensor
leaves. Functions here never change a tree, they return new ones. The *path* of a leaf is dotted:
the keys of dicts, fields of NamedTuples and indices of tuples that lead to it.
"""

from funcnet import reference as _reference
from funcnet.tree import selection as _selection
from funcnet.tree.comparison import (
    compare as compare,
)
from funcnet.tree.dotted import (
    from_dotted as from_dotted,
    merge as merge,
    partition as partition,
    path_string as path_string,
    paths as paths,
    to_dotted as to_dotted,
)
from funcnet.tree.measures import (
    bytes as bytes,
    count as count,
    global_norm as global_norm,
    norms as norms,
)
from funcnet.tree.selection import (
    chosen_leaves as chosen_leaves,
    leaf_at as leaf_at,
    named_paths as named_paths,
    replace as replace,
    select as select,
    selector as selector,
)
from funcnet.tree.structure import (
    Flattener as Flattener,
    check_same_structure as check_same_structure,
    leaves_like as leaves_like,
)
from funcnet.tree.trees import (
    alike as alike,
    describe as describe,
    device_of as device_of,
    flatten as flatten,
    leaves as leaves,
    map as map,
    placeholder as placeholder,
    to_meta as to_meta,
)

Where = _selection.Where
"""Some leaves: dotted paths of leaves or of what is above them, in which ``*`` stands for any
characters, dots too; or a function of the path."""

__docformat__ = "google"
__doc__ = _reference.described(__name__, __doc__)
__all__ = _reference.names(__name__)
