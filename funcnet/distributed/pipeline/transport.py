"""What stages send each other: activations to the next one, cotangents to the one before."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from funcnet import tree
from funcnet.collectives import Axis, group_of, peer_errors, register
from funcnet.core import Tree
from funcnet.distributed.processes.start import Mesh, subgroup


def backwards(mesh: Mesh, axis: Axis) -> str:
    """The key of a second group of the same ranks, for what goes from the last to the first.

    All ranks of the mesh make it together, once. NCCL does what two ranks send each other in one
    group in the order in which each of them says it, so that there both could wait for the other.
    """
    name = f"{axis.key}, backwards"
    if axis.size == 1 or not isinstance(mesh, DeviceMesh):
        return name
    with suppress(RuntimeError):
        group_of(name)
        return name
    dim = (mesh.mesh_dim_names or ()).index(axis.name)
    made = subgroup(mesh.mesh, [dim])
    register(name, replace(group_of(axis.key), process_group=made))
    return name


class Inbox:
    """The trees that another stage sends, for each micro-batch one, in a known order.

    The next one is received while this rank computes, so that there is memory for one more than
    are in use.

    Args:
        key: of the group.
        source: the stage that sends.
        order: the micro-batches as it sends them.
        example: a tree on the meta device; where its leaves are no floating-point tensors,
            cotangents are None.
        cotangents: whether the trees are cotangents.
        device: where the tensors are to be.
    """

    def __init__(
        self,
        key: str,
        source: int,
        order: Iterable[int],
        example: Tree,
        cotangents: bool,
        device: torch.device,
    ) -> None:
        self.key, self.source, self.device = key, source, device
        self.example, self.cotangents = example, cotangents
        self.left = deque(order)
        self.coming: deque[tuple[int, list[Tensor], list[Any]]] = deque()
        self.here: dict[int, list[Tensor]] = {}
        self._post()

    def _post(self) -> None:
        if not self.left:
            return
        index = self.left.popleft()
        kinds = sent(self.example, self.cotangents)
        buffers = [torch.empty(each.shape, dtype=each.dtype, device=self.device) for each in kinds]
        works = [
            _call(self.key, "received from", self.source, dist.irecv, buffer, tag=tag)
            for tag, buffer in enumerate(buffers, index * len(buffers))
        ]
        self.coming.append((index, buffers, works))

    def take(self, micro_batch: int) -> Tree:
        """What was sent for a micro-batch."""
        while micro_batch not in self.here:
            index, buffers, works = self.coming.popleft()
            for work in works:
                _call(self.key, "received from", self.source, work.wait)
            self.here[index] = buffers
            self._post()
        leaves = iter(self.here.pop(micro_batch))
        if not self.cotangents:
            return tree.map(lambda each: next(leaves), self.example)
        return tree.map(
            lambda each: next(leaves) if each.is_floating_point() else None, self.example
        )


class Outbox:
    """What this stage sends to another one; the tensors are kept until they are there.

    Args:
        key: of the group.
        target: the stage that receives.
        read: for each micro-batch which of its actions reads what is sent.
    """

    def __init__(self, key: str, target: int, read: Mapping[int, int]) -> None:
        self.key, self.target, self.read = key, target, read
        self.going: deque[tuple[int, Any, Tensor]] = deque()

    def send(self, micro_batch: int, leaves: Sequence[Tensor]) -> None:
        """Send tensors; whoever receives them knows their shapes."""
        for tag, leaf in enumerate(leaves, micro_batch * len(leaves)):
            leaf = leaf.contiguous()
            work = _call(self.key, "sent to", self.target, dist.isend, leaf, tag=tag)
            self.going.append((micro_batch, work, leaf))

    def forget(self, action: int) -> None:
        """Let go what the target has read, which is known to have come to one of its actions.

        To wait for it takes no time. Gloo does not tell otherwise that a tensor is there.
        """
        while self.going and self.read[self.going[0][0]] < action:
            self._wait()

    def finish(self) -> None:
        """Wait until all of it is there."""
        while self.going:
            self._wait()

    def _wait(self) -> None:
        _, work, _ = self.going[0]
        _call(self.key, "sent to", self.target, work.wait)
        self.going.popleft()


def sent(values: Tree, cotangents: bool) -> list[Tensor]:
    """The tensors of a tree that are sent: of cotangents those of floating-point tensors."""
    leaves = tree.leaves(values)
    return [leaf for leaf in leaves if leaf.is_floating_point()] if cotangents else leaves


def summed(
    keys: tuple[str, str], own: int, stages: Sequence[int], tensors: Sequence[Tensor]
) -> list[Tensor]:
    """The sums of tensors that several stages have, on all of these, in the order of the stages.

    Args:
        keys: of the groups for what goes to a later and to an earlier stage.
        own: this rank's stage.
        stages: which have the tensors.
        tensors: this rank's.
    """
    others = [stage for stage in stages if stage != own]
    device = tensors[0].device
    inboxes = {
        other: Inbox(keys[other > own], other, [0], (*tensors,), False, device) for other in others
    }
    outboxes = [Outbox(keys[other < own], other, {}) for other in others]
    for outbox in outboxes:
        outbox.send(0, tensors)
    found = [tensors if stage == own else inboxes[stage].take(0) for stage in stages]
    for outbox in outboxes:
        outbox.finish()
    totals = [*found[0]]
    for each in found[1:]:
        totals = [a + b for a, b in zip(totals, each, strict=True)]
    return totals


def told_by_all(axis: Axis, value: Any) -> list[Any]:
    """What each rank says: small objects that can be pickled."""
    values = [value] * axis.size
    if axis.size > 1:
        group = group_of(axis.key).process_group
        _within(axis.key, dist.all_gather_object, values, value, group=group)
    return values


def told_by_last(axis: Axis, values: Tree, known: list[Any]) -> Tree:
    """On all ranks what the last one has: a tree of small tensors, in one message.

    Args:
        axis: the ranks.
        values: on the last rank the tree; not read on the others.
        known: its structure, shapes and dtypes, once they are known; written to in the first call.
    """
    if axis.size == 1:
        return values
    group, last = group_of(axis.key), axis.size - 1
    options = {"group_src": last, "group": group.process_group}
    leaves, treedef = tree.flatten(values)
    if not known:
        known.append((treedef, [(tuple(leaf.shape), leaf.dtype, leaf.device) for leaf in leaves]))
        _within(axis.key, dist.broadcast_object_list, known, **options)
    treedef, kinds = known[0]
    if axis.index == last:
        parts = [leaf.detach().reshape(-1).contiguous().view(torch.uint8) for leaf in leaves]
        _within(axis.key, dist.broadcast, torch.cat(parts), **options)
        return values
    sizes = [prod(shape) * dtype.itemsize for shape, dtype, _ in kinds]
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=own_device(kinds[0][2]))
    _within(axis.key, dist.broadcast, buffer, **options)
    # A view of another dtype must begin at a multiple of its size.
    parts = [part.clone() for part in buffer.split(sizes)]
    made = [
        part.view(dtype).reshape(shape)
        for part, (shape, dtype, _) in zip(parts, kinds, strict=True)
    ]
    return treedef.unflatten(made)


def own_device(device: torch.device) -> torch.device:
    """This rank's device of the kind of another rank's."""
    if device.type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _within(key: str, function: Any, *args: Any, **options: Any) -> None:
    with peer_errors(group_of(key), f"a message to all over {key}"):
        function(*args, **options)


def _call(key: str, what: str, other: int, function: Any, *args: Any, **options: Any) -> Any:
    group = group_of(key)
    if function is dist.irecv:
        options |= {"group": group.process_group, "group_src": other}
    elif function is dist.isend:
        options |= {"group": group.process_group, "group_dst": other}
    with peer_errors(group, f"a tensor {what} stage {other} over {key}"):
        return function(*args, **options)
