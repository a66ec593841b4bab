"""What ranks tell one another in words: whether all have done their part, and what each has."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch.distributed.device_mesh import DeviceMesh

from funcnet.checkpoint.safetensors import with_bytes
from funcnet.collectives import Axis
from funcnet.distributed.processes.start import Mesh, axis_of

Own = TypeVar("Own")

_KINDS = {kind.__name__: kind for kind in (ValueError, TypeError, RuntimeError)}


class Everyone(NamedTuple):
    """All ranks of a mesh."""

    axes: tuple[Axis, ...]
    """Of the mesh, the slowest first."""

    device: torch.device
    """That the ranks' collectives take tensors of."""

    @property
    def place(self) -> int:
        """This process's place among them."""
        place = 0
        for axis in self.axes:
            place = place * axis.size + axis.index
        return place

    def gather(self, value: Any) -> list[Any]:
        """What each rank tells, in their order; of JSON's types."""
        found = [value]
        for axis in reversed(self.axes):
            if axis.size == 1:
                continue
            text = torch.frombuffer(bytearray(json.dumps(found).encode()), dtype=torch.uint8)
            own = torch.tensor([len(text)], device=self.device)
            sizes = axis.gather(own).tolist()
            padded = torch.zeros(max(sizes), dtype=torch.uint8)
            padded[: len(text)] = text
            rows = axis.gather(padded.to(self.device)).view(axis.size, -1).cpu()
            texts = [with_bytes(row[:size], bytes) for row, size in zip(rows, sizes, strict=True)]
            found = [each for text in texts for each in json.loads(text)]
        return found

    def agree(
        self,
        name: str,
        function: Callable[[], tuple[Own, Any]],
        undo: Callable[[], None] | None = None,
    ) -> tuple[Own, list[Any]]:
        """What a function gives here, and tells of it on each rank; an error of one is all ranks'.

        Args:
            name: of the user's function, for the message.
            function: ``() -> (own, told)``, of which ``told`` is of JSON's types. It must not
                communicate.
            undo: called on each rank, before the error is raised.
        """
        own, cause, told = None, None, {}
        try:
            own, told["value"] = function()
        except Exception as error:
            cause = error
            told["error"] = _described(error)
        found = self.gather(told)
        failures = {rank: each["error"] for rank, each in enumerate(found) if "error" in each}
        if failures:
            if undo is not None:
                undo()
            raise _error(name, failures, len(found)) from cause
        return cast(Own, own), [each["value"] for each in found]


def everyone(mesh: Mesh) -> Everyone:
    """All ranks of a mesh."""
    names: Iterable[str] = ()
    device = torch.device("cpu")
    if isinstance(mesh, DeviceMesh):
        names, device = mesh.mesh_dim_names or (), torch.device(mesh.device_type)
    elif isinstance(mesh, Mapping):
        names = mesh
    return Everyone(tuple([axis_of(mesh, name) for name in names]) or (axis_of(mesh, ""),), device)


def _described(error: Exception) -> dict[str, Any]:
    if isinstance(error, OSError) and error.errno is not None:
        where = f": {error.filename}" if error.filename else ""
        return {"errno": error.errno, "text": f"{error.strerror}{where}"}
    kinds = [name for name, kind in _KINDS.items() if isinstance(error, kind)]
    text = str(error) if kinds else f"{type(error).__name__}: {error}"
    return {"kind": kinds[0] if kinds else "RuntimeError", "text": text}


def _error(name: str, failures: dict[int, dict[str, Any]], ranks: int) -> Exception:
    """The error of the first rank that failed, the same on all of them."""
    rank, first = min(failures.items())
    text = first["text"].removeprefix(f"{name}:").strip()
    alike = len(failures) == ranks and all([each == first for each in failures.values()])
    others = f" (and on {len(failures) - 1} more)" if len(failures) > 1 else ""
    message = f"{name}: {text}" if alike else f"{name}: rank {rank}{others}: {text}"
    if "errno" in first:
        return OSError(first["errno"], message)
    return _KINDS[first["kind"]](message)
