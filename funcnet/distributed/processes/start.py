"""The start of a program of several processes, and the mesh that its ranks make."""

import atexit
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from funcnet.collectives import Axis, Group, forget, register
from funcnet.distributed.processes import environment
from funcnet.distributed.processes.faults import Named, PeerError, Watch
from funcnet.distributed.processes.rendezvous import store_of
from funcnet.errors import require

AXES = ("pipe", "data", "model")
"""The axes of a mesh, the slowest first: neighbours on the last talk most."""


Mesh = DeviceMesh | Mapping[str, int]
"""A mesh, or the sizes of its axes by name."""

AxisName = str | tuple[str, ...]
"""The name of an axis, or those of several as one."""

# Groups of processes are made by all ranks together, once for a mesh.
_MESHES: dict[tuple[int, ...], DeviceMesh] = {}
_JOINT: dict[tuple[Any, ...], Any] = {}
_TIMEOUTS: list[timedelta] = []
_WATCHES: list[Watch] = []


def initialize(
    *, device: str | torch.device | None = None, timeout: float = 300.0, check: bool = False
) -> torch.device:
    """Join the processes of the program, and return this one's device.

    Under torchrun, or with the variables that it sets (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``,
    ``MASTER_ADDR``, ``MASTER_PORT``), and under Slurm's srun each process calls it once. Without
    them the program is one process, and all of this package is the identity. Where torchrun starts
    the processes again, after one has died, they find each other anew. `finalize` is called when
    the program ends.

    Under Slurm rank 0 is on the first machine of the step, and listens on a port that is made from
    the job's number; ``MASTER_ADDR`` and ``MASTER_PORT`` say otherwise.

    Args:
        device: "cuda" or "cpu", which picks NCCL or gloo; default "cuda" where there is one.
        timeout: how long a collective waits for other ranks, in seconds, before it is a
            `PeerError`.
        check: compare kind, shape and dtype of each collective over the ranks before it, which
            takes a millisecond; else only of those that are new to a rank.

    Raises:
        ValueError: variables are missing, or are not numbers that fit; processes that mpirun
            started, which have other ones.
        PeerError: not all ranks came within the timeout.

    >>> import funcnet as fn
    >>> fn.distributed.initialize(device="cpu")
    device(type='cpu')
    >>> fn.distributed.mesh().mesh_dim_names
    ('pipe', 'data', 'model')
    >>> fn.distributed.finalize()
    """
    given = isinstance(timeout, (int, float)) and timeout > 0
    require(given, f"initialize: timeout must be a number of seconds > 0, got {timeout!r}")
    place = environment.place()
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    where = torch.device(kind)
    if kind == "cuda":
        count = torch.cuda.device_count()
        require(
            place.local_rank < count,
            f"initialize: expects a GPU for each process of a machine, got {count} GPUs for the "
            f"process of local rank {place.local_rank}",
        )
        where = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(where)
    if dist.is_initialized():
        return where
    limit = timedelta(seconds=timeout)
    store: dist.Store = dist.HashStore()
    if place.world > 1:
        store = store_of(place, timeout)
        store.set_timeout(limit)
    try:
        dist.init_process_group(
            "nccl" if kind == "cuda" else "gloo",
            store=store,
            rank=place.rank,
            world_size=place.world,
            timeout=limit,
        )
    except RuntimeError as error:
        raise PeerError(f"initialize: the ranks do not reach each other: {error}") from error
    _TIMEOUTS.append(limit)
    if place.world > 1:
        holder = None if place.has_agent else 0
        watched = dist.PrefixStore("watch", store)
        _WATCHES.append(Watch(watched, place.rank, place.world, holder, timeout, check))
    atexit.register(_end, os.getpid())
    return where


def finalize() -> None:
    """Leave the processes of the program, as is done when it ends; see `initialize`.

    >>> finalize()
    """
    forget()
    _MESHES.clear()
    _JOINT.clear()
    _TIMEOUTS.clear()
    for watch in _WATCHES:
        watch.ending = True
    if dist.is_initialized():
        dist.destroy_process_group()
    while _WATCHES:
        _WATCHES.pop().close()
    atexit.unregister(_end)


def _end(process: int) -> None:
    # A process that this one was forked to has its functions, but is no rank.
    if os.getpid() == process:
        finalize()


def mesh(*, data: int | None = None, model: int = 1, pipe: int = 1) -> DeviceMesh:
    """A DeviceMesh of all ranks, with the axes "pipe", "data" and "model".

    Args:
        data: how many ranks have parts of the batch; default all that the others leave.
        model: how many have parts of each layer.
        pipe: how many have some of the layers each.

    Raises:
        RuntimeError: `initialize` was not called.
        ValueError: the sizes are not those of the world.

    >>> initialize(device="cpu")
    device(type='cpu')
    >>> mesh(data=2)
    Traceback (most recent call last):
    ...
    ValueError: mesh: expects a mesh of 1 ranks, got 2: pipe=1 x data=2 x model=1
    >>> finalize()
    """
    require(
        dist.is_initialized(),
        "mesh: call fn.distributed.initialize() first",
        RuntimeError,
    )
    world = dist.get_world_size()
    for name, size in {"data": data, "model": model, "pipe": pipe}.items():
        fits = size is None or (isinstance(size, int) and size >= 1)
        require(fits, f"mesh: {name} must be an integer of at least 1, got {size!r}")
    if data is None:
        require(
            world % (model * pipe) == 0,
            f"mesh: model={model} times pipe={pipe} does not divide {world} ranks",
        )
        data = world // (model * pipe)
    got = pipe * data * model
    require(
        got == world,
        f"mesh: expects a mesh of {world} ranks, got {got}: pipe={pipe} x data={data} x "
        f"model={model}",
    )
    sizes = (pipe, data, model)
    if sizes not in _MESHES:
        _MESHES[sizes] = _made(sizes)
    return _MESHES[sizes]


def _made(sizes: tuple[int, ...]) -> DeviceMesh:
    """A mesh whose groups have the timeout of `initialize`; those of torch's own do not."""
    world = dist.get_world_size()
    ranks = torch.arange(world, dtype=torch.int32).reshape(sizes)
    groups: list[Any] = [
        dist.group.WORLD if size == world else subgroup(ranks, [dim])
        for dim, size in enumerate(sizes)
    ]
    kind = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return DeviceMesh.from_group(groups, kind, ranks, mesh_dim_names=AXES)


def axis_of(mesh: Mesh, name: AxisName) -> Axis:
    """An axis of a mesh, by name; one of a single rank, if the mesh has no such axis.

    A mesh whose axes have names of one's own, such as "dp", has no others.

    Several names are one axis, of all their ranks, those of the last name next to each other. All
    ranks ask for it together, the first time.

    Args:
        mesh: a DeviceMesh with named axes; or a dict of their sizes, for a mesh without processes,
            of which shapes and plans are computed on meta tensors.
        name: such as "data", or ("data", "model").

    >>> axis_of({"data": 8, "model": 2}, "data")
    Axis(name='data', size=8, key='data of (data=8, model=2)')
    """
    if isinstance(mesh, DeviceMesh):
        # No mesh of its own for an axis, since torch makes tensors for that: this may be traced.
        named = mesh.mesh_dim_names or ()
        require(named, "expects a DeviceMesh whose axes have names, as mesh_dim_names=('data',)")
        sizes = dict(zip(named, mesh.shape, strict=True))
    elif isinstance(mesh, Mapping):
        sizes = {**mesh}
    else:
        raise TypeError(f"expects a mesh, such as fn.distributed.mesh(), got {type(mesh).__name__}")
    asked = (name,) if isinstance(name, str) else name
    # Where axes are called otherwise, one that is not there is not one of a single rank.
    known = {"", *sizes, *(AXES if {*sizes} <= {*AXES} else ())}
    unknown = [each for each in asked if each not in known]
    if unknown:
        hint = "; its name is the argument `axis`" if sizes else ""
        raise ValueError(f"the mesh has no axis {unknown[0]!r}, only {[*sizes]}{hint}")
    names = [each for each in sizes if each in asked and sizes[each] > 1]
    size, called = prod([sizes[each] for each in names]), " x ".join(names or asked[:1])
    if size == 1:
        return Axis(called, 1, "")
    shape = ", ".join([f"{each}={extent}" for each, extent in sizes.items()])
    axis = Axis(called, size, f"{called} of ({shape})")
    if isinstance(mesh, DeviceMesh):
        group = mesh.get_group(names[0]) if len(names) == 1 else _joint(mesh, names)
        register(axis.key, _group(mesh, group))
    return axis


def _joint(mesh: DeviceMesh, names: list[str]) -> Any:
    """The group of all ranks of several axes; made by all ranks together, once."""
    all_names = list(mesh.mesh_dim_names or ())
    key = (mesh.shape, *names)
    if key not in _JOINT:
        _JOINT[key] = subgroup(mesh.mesh, [all_names.index(each) for each in names])
    return _JOINT[key]


def subgroup(ranks: Tensor, dims: Sequence[int]) -> Any:
    """This process's group of those whose places differ along these dimensions alone.

    All ranks make it together. It has the timeout of `initialize`, which torch forgets.

    Args:
        ranks: of the mesh, at their places.
        dims: the dimensions; of several the last one's ranks are next to each other.
    """
    last = [*range(ranks.dim() - len(dims), ranks.dim())]
    rows = ranks.movedim([*dims], last).reshape(-1, prod([ranks.shape[dim] for dim in dims]))
    limit = _TIMEOUTS[-1] if _TIMEOUTS else None
    try:
        group, _ = dist.new_subgroups_by_enumeration(rows.tolist(), timeout=limit)
    except RuntimeError as error:
        raise _failed(_rank_name, "mesh", error) from error
    return group


def rank_name(mesh: DeviceMesh, rank: int) -> str:
    """What errors call a rank: its number, and its place on the mesh."""
    found = (mesh.mesh == rank).nonzero()
    if not len(found) or mesh.mesh_dim_names is None:
        return _rank_name(rank)
    places = zip(mesh.mesh_dim_names, found[0].tolist(), mesh.mesh.shape, strict=True)
    told = ", ".join([f"{name} {place}" for name, place, size in places if size > 1])
    return f"{_rank_name(rank)} ({told})"


def _rank_name(rank: int) -> str:
    return f"rank {rank}"


def _group(mesh: DeviceMesh, process_group: Any) -> Group:
    """The ranks of an axis of a mesh, watched if `initialize` has made the processes' group."""
    called = partial(rank_name, mesh)
    group = Group(
        process_group,
        process_group.rank(),
        partial(_failed, called),
        tuple(dist.get_process_group_ranks(process_group)),
    )
    if not _WATCHES:
        return group
    watch = _WATCHES[-1]
    return replace(group, enters=partial(watch.enters, called), leaves=watch.leaves)


def _failed(name: Named, what: str, error: Exception) -> Exception:
    if _WATCHES:
        return _WATCHES[-1].failed(name, what, error)
    return error if isinstance(error, PeerError) else PeerError(f"{what} failed: {error}")
