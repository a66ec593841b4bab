"""The start of a program of several processes, and the mesh that its ranks make."""

import os
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from funcnet.collectives import Axis, Group, forget, register
from funcnet.distributed.faults import failed
from funcnet.errors import require

AXES = ("pipe", "data", "model")
"""The axes of a mesh, the slowest first: neighbours on the last talk most."""


Mesh = DeviceMesh | Mapping[str, int]
"""A mesh, or the sizes of its axes by name."""

# Groups of processes are made by all ranks together, once for a mesh.
_MESHES: dict[tuple[int, ...], DeviceMesh] = {}


def initialize(*, device: str | torch.device | None = None, timeout: float = 300.0) -> torch.device:
    """Join the processes of the program, and return this one's device.

    Under torchrun, or with the variables that it sets (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``,
    ``MASTER_ADDR``, ``MASTER_PORT``), each process calls it once. Without them the program is one
    process, and all of this package is the identity.

    Args:
        device: "cuda" or "cpu", which picks NCCL or gloo; default "cuda" where there is one.
        timeout: how long a collective waits for other ranks, in seconds, before it is an error.

    >>> import funcnet as fn
    >>> fn.distributed.initialize(device="cpu")
    device(type='cpu')
    >>> fn.distributed.mesh().mesh_dim_names
    ('pipe', 'data', 'model')
    >>> fn.distributed.finalize()
    """
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    where = torch.device(kind)
    if kind == "cuda":
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(where)
    if dist.is_initialized():
        return where
    backend = "nccl" if kind == "cuda" else "gloo"
    limit = timedelta(seconds=timeout)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=limit)
    else:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=limit)
    return where


def finalize() -> None:
    """Leave the processes of the program; see `initialize`.

    >>> finalize()
    """
    forget()
    _MESHES.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


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
        kind = "cuda" if dist.get_backend() == "nccl" else "cpu"
        _MESHES[sizes] = init_device_mesh(kind, sizes, mesh_dim_names=AXES)
    return _MESHES[sizes]


def axis_of(mesh: Mesh, name: str) -> Axis:
    """An axis of a mesh, by name; one of a single rank, if the mesh has no such axis.

    Args:
        mesh: a DeviceMesh with named axes; or a dict of their sizes, for a mesh without processes,
            of which shapes and plans are computed on meta tensors.
        name: such as "data".

    >>> axis_of({"data": 8, "model": 2}, "data")
    Axis(name='data', size=8, key='data of (data=8, model=2)')
    """
    if isinstance(mesh, DeviceMesh):
        # Not by the mesh's parts, which are made by tensors' values: it may be called under jit.
        sizes = dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=False))
    elif isinstance(mesh, Mapping):
        sizes = {**mesh}
    else:
        raise TypeError(f"expects a mesh, such as fn.distributed.mesh(), got {type(mesh).__name__}")
    if sizes.get(name, 1) == 1:
        return Axis(name, 1, "")
    shape = ", ".join([f"{each}={size}" for each, size in sizes.items()])
    axis = Axis(name, sizes[name], f"{name} of ({shape})")
    if isinstance(mesh, DeviceMesh):
        group = mesh.get_group(name)
        register(axis.key, Group(group, group.rank(), failed))
    return axis
