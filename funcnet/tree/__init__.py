"""Trees of tensors: the helpers on top of optree that the rest of funcnet needs.

A tree is any optree pytree; a *parameter tree* is a nested dict with string keys and tensor
leaves. Functions here never change a tree, they return new ones. The *path* of a leaf is dotted:
the keys of dicts, fields of NamedTuples and indices of tuples that lead to it.
"""

from funcnet.tree.comparison import (
    compare as compare,
)
from funcnet.tree.measures import (
    bytes as bytes,
    count as count,
    global_norm as global_norm,
    norms as norms,
)
from funcnet.tree.paths import (
    from_dotted as from_dotted,
    merge as merge,
    partition as partition,
    path_string as path_string,
    paths as paths,
    to_dotted as to_dotted,
)
from funcnet.tree.selection import (
    Where as Where,
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
