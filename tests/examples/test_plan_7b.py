"""The plan of a GPT of 7 billion parameters: its figures by hand."""

import argparse

import plan_7b as example
import pytest
import torch

import funcnet as fn

SMALL = example.Size(layers=4, width=64, heads=4, tokens=96)


def planned(size, mesh, sharding, batch=16, sequence=32, **told):
    options = {"sequences": 1, "schedule": "one_f_one_b", "overlap": [], "again": False, **told}
    made = example.layout(size, argparse.Namespace(batch=batch, **options), mesh, sharding)
    x = torch.zeros(batch, sequence, dtype=torch.int64, device="meta")
    return fn.distributed.plan(made.pop("model"), x, mesh, target=x, **made)


def count(size):
    """Attention and the small net have 12 width^2; embedding and head, one row a token each."""
    norms, biases = 4 * size.width, 9 * size.width
    block = 12 * size.width**2 + norms + biases
    return size.layers * block + 2 * size.tokens * size.width + 2 * size.width


def test_it_has_seven_billion_parameters():
    found = planned(example.Size(), {"pipe": 1, "data": 1, "model": 1}, "none")
    assert found.memory.params == 4 * count(example.Size())
    assert 6.5e9 < count(example.Size()) < 7e9
    # Two FLOPs a parameter and token forwards but for the embedding, and those of attention.
    tokens, attention = 32, 4 * 32 * 32 * 4096
    expected = 2 * tokens * (32 * 12 * 4096**2 + 32_000 * 4096) + 32 * attention
    assert found.stages[0].forward_flops == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("sharding", ["none", "zero", "sharded"])
def test_ranks_share_what_they_hold(sharding):
    found = planned(SMALL, {"pipe": 2, "data": 2, "model": 2}, sharding)
    params = sum(stage.memory.params for stage in found.stages)
    shared = 4 if sharding == "sharded" else 2
    assert params == pytest.approx(4 * count(SMALL) / shared, rel=0.05)
    states = sum(stage.memory.optimizer for stage in found.stages)
    assert states == pytest.approx(8 * count(SMALL) / (2 if sharding == "none" else 4), rel=0.05)
    assert {each.axis for each in found.traffic} == {"pipe", "data", "model"}


def test_more_ranks_than_heads_or_layers_are_refused():
    for mesh in ({"pipe": 8, "data": 1, "model": 1}, {"pipe": 1, "data": 1, "model": 8}):
        with pytest.raises(ValueError, match="ranks do not divide"):
            planned(SMALL, mesh, "none")
