"""Pieces of tensors: of any splits from any others."""

import random
from itertools import product

import pytest
import torch

from funcnet.checkpoint.regions import Division, copies, part_shape, piece_of


def part(x, divisions, places):
    """What the splits are, as functions of tensors."""
    for (parts, dim, sections, front), place in zip(divisions, places, strict=True):
        if dim is None:
            x, dim = x.reshape(*x.shape[:front], x.shape[front:].numel()), front
        kept = []
        for section in x.split(sections or [x.shape[dim]], dim):
            extent = -(-section.shape[dim] // parts)
            missing = extent * parts - section.shape[dim]
            zeros = x.new_zeros((*x.shape[:dim], missing, *x.shape[dim + 1 :]))
            kept.append(torch.cat([section, zeros], dim).narrow(dim, place * extent, extent))
        x = torch.cat(kept, dim)
    return x


def splits(rng, shape):
    """Some splits of a tensor, one after another."""
    found, extents = [], [*shape]
    for _ in range(rng.randrange(4)):
        flat = any(each.dim is None for each in found)
        dims = [None, *range(len(extents))]
        parts, dim, sections = rng.randint(1, 4), rng.choice(dims), ()
        if not flat and dim is not None and extents[dim] % parts == 0 and rng.random() < 0.5:
            first = parts * rng.randint(0, extents[dim] // parts)
            sections = (first, extents[dim] - first)
        stack = len(extents) - 1 if flat else rng.randint(0, max(0, len(extents) - 1))
        front = rng.choice((0, stack)) if dim is None else 0
        found.append(Division(parts, dim, sections, front))
        extents = [*part_shape(extents, (found[-1],))]
    return tuple(found)


def places(divisions):
    return product(*[range(division.parts) for division in divisions])


@pytest.mark.parametrize("seed", range(30))
def test_each_piece_is_put_together_of_those_of_other_splits(seed):
    rng = random.Random(seed)
    for _ in range(20):
        shape = tuple(rng.choice((0, 1, 2, 3, 4, 6, 8)) for _ in range(rng.randrange(4)))
        x = 1.0 + torch.arange(float(torch.Size(shape).numel())).reshape(shape)
        old, new = splits(rng, shape), splits(rng, shape)
        for place in places(new):
            wanted, expected = piece_of(shape, new, place), part(x, new, place)
            assert part_shape(shape, new) == expected.shape
            made = torch.zeros(wanted.length)
            for other in places(old):
                piece, values = piece_of(shape, old, other), part(x, old, other).flatten()
                for shape_, source, target in copies(piece, wanted):
                    box = wanted.view(made, shape_, target)
                    assert not box.any()  # nothing twice
                    box.copy_(piece.view(values, shape_, source))
            assert torch.equal(made.view(expected.shape), expected)
