"""From a ``state_dict()`` of torch to params and state, and back, by path."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from funcnet import tree
from funcnet.core import EMPTY, Params
from funcnet.errors import require

FROZEN = "frozen"
"""The entry of the state in which `freeze` keeps the params that are not learned."""


class Leaf(NamedTuple):
    """A tensor of a net: where torch has it, and where it is here.

    ``kind`` is "params", "frozen" or "state". ``path`` is that in the params or the state.
    """

    key: str
    kind: str
    path: tuple[str, ...]
    tensor: Tensor


def leaves_of(params: Params, state: Params) -> list[Leaf]:
    """All tensors of params and state, each with its key in a ``state_dict()``.

    What `freeze` keeps in ``state["frozen"]`` has the key of the parameter that it is.
    """
    found = [Leaf(".".join(path), "params", path, each) for path, each in _walk("params", params)]
    for path, each in _walk("state", state):
        entry = _frozen_at(path, params)
        kind = "state" if entry is None else "frozen"
        parts = path if entry is None else path[:entry] + path[entry + 1 :]
        found.append(Leaf(".".join(parts), kind, path, each))
    keys: dict[str, Leaf] = {}
    for leaf in found:
        other = keys.setdefault(leaf.key, leaf)
        what = f"{other.kind} {'.'.join(other.path)!r} and {leaf.kind} {'.'.join(leaf.path)!r}"
        require(other is leaf, f"params and state: {what} have one key, {leaf.key!r}")
    return found


def _walk(what: str, node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[Any, Tensor]]:
    """The leaves of a nested dict; TypeError for anything else in it."""
    if isinstance(node, Tensor):
        yield path, node
        return
    at = f" at {'.'.join(path)!r}" if path else ""
    wrong = f"{what}: expects a nested dict of tensors, got {tree.describe(node)}{at}"
    require(isinstance(node, Mapping), wrong, TypeError)
    for name, child in node.items():
        require(isinstance(name, str), f"{wrong} with the key {name!r}", TypeError)
        yield from _walk(what, child, (*path, name))


def _frozen_at(path: tuple[str, ...], params: Any) -> int | None:
    """The place of the entry of `freeze` in a path of the state; None where there is none.

    A child that is called "frozen" is told from it by its params.
    """
    for place, name in enumerate(path):
        if name == FROZEN and not (isinstance(params, Mapping) and FROZEN in params):
            return place
        params = params.get(name, EMPTY) if isinstance(params, Mapping) else EMPTY
    return None


def to_state_dict(params: Params, state: Params = EMPTY) -> dict[str, Tensor]:
    """Params and state as one flat dict, with the keys that torch's ``state_dict()`` has.

    Args:
        params: a nested dict of tensors.
        state: running statistics and such, which are torch's buffers. What `funcnet.freeze` keeps
            in ``state["frozen"]`` gets the keys of the parameters that they are.

    Returns:
        the very tensors, by dotted path: params, then state. A module that loads them copies them.
        Leaves that `funcnet.tie` made one have one key, where torch has one for each name.
    Raises:
        TypeError: what is not a nested dict of tensors.
        ValueError: two leaves have the same key.

    Source: ``torch.nn.Module.state_dict``.

    >>> import funcnet as fn
    >>> net = fn.serial(fn.linear(3), fn.batch_norm())
    >>> params, state = net.init(fn.key(0), torch.ones(4, 2))
    >>> list(fn.interop.to_state_dict(params, state))
    ['0.weight', '0.bias', '1.weight', '1.bias', '1.running_mean', '1.running_var',
     '1.num_batches_tracked']
    """
    return {leaf.key: leaf.tensor for leaf in leaves_of(params, state)}


def from_state_dict(
    state_dict: Mapping[str, Tensor], like: tuple[Params, Params], *, strict: bool = True
) -> tuple[Params, Params]:
    """Params and state with the values of a ``state_dict()``.

    Args:
        state_dict: tensors by dotted path.
        like: ``(params, state)`` as ``layer.init`` makes them: they tell which paths there are,
            with which shapes, which are learned and which are state, dtypes and devices. Tensors
            on the meta device give all but the device.
        strict: False keeps ``like``'s values at paths that are missing, and leaves out the ones
            that it does not have.

    Returns:
        ``(params, state)``, copies with the structure, dtypes and devices of ``like``, as
        ``load_state_dict`` gives a module. They share no memory with the module's tensors.
    Raises:
        ValueError: it names every path that is missing, not expected, or has another shape.
        TypeError: it names those that are not tensors.

    Source: ``torch.nn.Module.load_state_dict``.

    >>> import funcnet as fn
    >>> theirs = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
    >>> net = fn.serial(fn.linear(3), fn.relu())
    >>> like = net.init(fn.key(0), torch.ones(4, 2))
    >>> params, state = from_state_dict(theirs.state_dict(), like)
    >>> torch.equal(params["0"]["weight"], theirs[0].weight)
    True
    >>> from_state_dict({"0.weight": torch.ones(2, 2)}, like)
    Traceback (most recent call last):
    ...
    ValueError: from_state_dict: 2 faults:
      '0.weight': expects shape (3, 2), got float32 (2, 2)
      '0.bias': is missing, expects shape (3,)
    """
    where = "from_state_dict"
    wrong = f"{where}: expects a dict of tensors, got {type(state_dict).__name__}"
    require(isinstance(state_dict, Mapping), wrong, TypeError)
    pair = isinstance(like, tuple) and len(like) == 2
    require(pair, f"{where}: expects like=(params, state), got {tree.describe(like)}", TypeError)
    others = [key for key, leaf in state_dict.items() if not isinstance(leaf, Tensor)]
    require(not others, f"{where}: expects tensors, got others at {others}", TypeError)

    expected, faults = leaves_of(*like), []
    whole: dict[str, dict[str, Any]] = {"params": {}, "state": {}}
    for leaf in expected:
        given = state_dict.get(leaf.key)
        if given is None and strict:
            faults.append(f"{leaf.key!r}: is missing, expects shape {tuple(leaf.tensor.shape)}")
        elif given is not None and given.shape != leaf.tensor.shape:
            shape = f"expects shape {tuple(leaf.tensor.shape)}, got {tree.describe(given)}"
            faults.append(f"{leaf.key!r}: {shape}")
        else:
            _place(whole["state" if leaf.kind != "params" else "params"], leaf, given)
    known = {leaf.key for leaf in expected}
    unknown = [key for key in state_dict if key not in known] if strict else []
    faults += [f"{key!r}: is not expected, got {tree.describe(state_dict[key])}" for key in unknown]
    if faults:
        number = f"{len(faults)} faults" if len(faults) > 1 else "1 fault"
        lines = "".join(f"\n  {fault}" for fault in faults)
        raise ValueError(f"{where}: {number}:{lines}{_hint(known, state_dict)}")
    return whole["params"], whole["state"]


def _place(whole: dict[str, Any], leaf: Leaf, given: Tensor | None) -> None:
    """Put a copy of a tensor where the leaf is, with its dtype and device."""
    value = leaf.tensor if given is None else given.detach()
    device = value.device if leaf.tensor.device.type == "meta" else leaf.tensor.device
    node = whole
    for name in leaf.path[:-1]:
        node = node.setdefault(name, {})
    node[leaf.path[-1]] = value.to(device, leaf.tensor.dtype, copy=True)


def _hint(known: set[str], state_dict: Mapping[str, Tensor]) -> str:
    """A prefix that a wrapper such as DistributedDataParallel puts before all keys."""
    for prefix in ("module.", "_orig_mod."):
        if state_dict and all([key.startswith(prefix) for key in state_dict]):
            cut = {key.removeprefix(prefix) for key in state_dict}
            if cut & known:
                return (
                    f"\nall keys begin with {prefix!r}: take it away, then {len(cut & known)} fit"
                )
    return ""
