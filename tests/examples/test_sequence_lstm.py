"""The walks: where they go, what a batch is, and that an LSTM follows them."""

import argparse

import pytest
import sequence_lstm as example
import torch

import funcnet as fn

pytestmark = pytest.mark.cpu_only


def test_a_walk_goes_round_the_ring_and_home():
    forward, back, stay, home = example.COMMANDS
    commands = torch.tensor(
        [[forward, forward, forward, stay, back], [back, back, home, back, stay]]
    )
    assert example.walk(commands, 3).tolist() == [[1, 2, 0, 0, 2], [2, 1, 0, 2, 2]]


def test_a_batch_has_walks_of_all_lengths_and_no_class_behind_them():
    walks, target = example.draw(fn.key(0), 500, 6, 4)
    assert walks["lengths"].unique().tolist() == [1, 2, 3, 4, 5, 6]
    assert walks["input"].unique().tolist() == [0, 1, 2, 3]
    assert torch.equal((target != example.NO_PLACE).sum(1), walks["lengths"])
    places = example.walk(walks["input"], 4)
    inside = target != example.NO_PLACE
    assert torch.equal(target[inside], places[inside])
    (seen, _) = example.counts((walks, target))
    assert seen[..., :4].sum(-1).eq(1).all()
    assert torch.equal(seen[..., 4:].sum(-1), torch.arange(1.0, 7).expand(500, 6))


def test_an_lstm_learns_to_follow_walks():
    options = argparse.Namespace(seed=0, steps=300, places=3, longest=8, hidden=16)
    net = example.lstm(3, 16)
    state = example.train(net, lambda batch: batch, options, "LSTM")
    assert example.accuracy(net, state, example.draw(fn.key(5), 300, 8, 3)) > 0.95
