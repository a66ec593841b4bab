"""Checkpoints of several ranks: of any parts to any others, whole at any moment, clear errors."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import funcnet as fn
from funcnet.collectives import Split
from funcnet.parted_params import own_part

SHAPES = {
    "params.a": (7, 5),
    "params.b": (3,),
    "opt.m.a": (7, 5),
    "empty": (0, 4),
    "params.c": (6,),
}
DTYPES = {"params.b": torch.bfloat16, "opt.m.a": torch.complex128, "params.c": torch.bool}


def single():
    """What a single process has."""
    leaves = {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        count = torch.Size(shape).numel()
        values = torch.arange(1.0, count + 1, dtype=torch.float64) * (number + 1) + 0.25
        dtype = DTYPES.get(name, torch.float32)
        leaves[name] = (values % 2 < 1 if dtype == torch.bool else values.to(dtype)).reshape(shape)
    tree = fn.tree.from_dotted(leaves)
    return {**tree, "step": torch.tensor(41), "epoch": 3, "none": None, "pair": (torch.ones(2), 1)}


# For each layout, by leaf, the (axis, dim) of each split.
LAYOUTS = {
    "whole": {},
    "rows": {"params.a": [("all", 0)], "params.b": [("all", 0)], "opt.m.a": [("all", 1)]},
    "flat": {name: [("all", None)] for name in SHAPES},
    "both": {
        "params.a": [("model", 1), ("data", None)],
        "params.b": [("model", 0), ("data", None)],
        "opt.m.a": [("model", -2)],
        "params.c": [("data", 0)],
    },
}


def meshes(layout):
    """The mesh of a layout over all ranks, and its placements."""
    world = torch.distributed.get_world_size()
    sizes = {"model": 2 if layout == "both" and world > 1 else 1}
    mesh = fn.distributed.mesh(**sizes)
    placed = {}
    for name, splits in LAYOUTS[layout].items():
        shape, made = SHAPES[name], []
        for axis, dim in splits:
            axis = fn.distributed.axis_of(mesh, "data" if axis == "all" else axis)
            made.append(Split(axis, shape, dim))
            shape = made[-1].part_shape
        placed[name] = tuple(made)
    return mesh, placed


def parts(placed, tree):
    leaves = {name: own_part(leaf, placed.get(name, ())) for name, leaf in named(tree).items()}
    return fn.tree.flatten(tree)[1].unflatten(leaves.values())


def named(tree):
    return dict(zip(fn.tree.paths(tree), fn.tree.leaves(tree), strict=True))


def same(a, b):
    assert fn.tree.flatten(a)[1] == fn.tree.flatten(b)[1]
    for (name, one), other in zip(named(a).items(), fn.tree.leaves(b), strict=True):
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype, name
            assert torch.equal(one, other), name
        else:
            assert one == other, name


def save_as(path, layout, change=0):
    mesh, placed = meshes(layout)
    tree = fn.tree.map(lambda leaf: leaf + change if change else leaf, single())
    fn.distributed.save(path, parts(placed, tree), mesh, placed)
    return sorted(os.listdir(Path(path).parent))


def load_as(path, layout):
    mesh, placed = meshes(layout)
    expected = parts(placed, single())
    like = fn.tree.map(
        lambda leaf: torch.full_like(leaf, 1) if isinstance(leaf, torch.Tensor) else leaf, expected
    )
    found = fn.distributed.load(path, like, mesh, placed)
    same(found, expected)
    for leaf in fn.tree.leaves(found):  # aligned as torch's own
        assert not isinstance(leaf, torch.Tensor) or leaf.data_ptr() % 64 == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_parts_on_any_number_of_ranks(layout, two_ranks, four_ranks, tmp_path):
    path = tmp_path / "run.safetensors"
    for writers in (two_ranks, four_ranks):
        (names, *_) = writers(save_as, path, layout)
        assert len(names) == writers.size + 1  # those of the save before are gone
        for readers in (two_ranks, four_ranks):
            for each in LAYOUTS:
                readers(load_as, path, each)
        same(fn.load(path), single())
        same(fn.load(path, single()), single())
        fn.distributed.export(path, tmp_path / "one")
        same(fn.load(tmp_path / "one"), single())
        assert torch.equal(load_file(tmp_path / "one")["params.a"], single()["params"]["a"])
        (tmp_path / "one").unlink()


def test_a_checkpoint_of_a_single_process(two_ranks, tmp_path):
    fn.save(tmp_path / "run", single())
    fn.save(tmp_path / "shards", single(), max_shard_bytes=100)
    for each in LAYOUTS:
        two_ranks(load_as, tmp_path / "run", each)
        two_ranks(load_as, tmp_path / "shards", each)
    two_ranks(save_as, tmp_path / "run", "rows")
    assert not (tmp_path / "run").exists()
    two_ranks(load_as, tmp_path / "run", "flat")
    fn.save(tmp_path / "run", single())
    assert not [name for name in os.listdir(tmp_path) if name.startswith("run") and name != "run"]
