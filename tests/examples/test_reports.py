"""Compiled populations of the reports' nets: each member is trained as it would be alone."""

import argparse

import disk
import pytest
import report_tables
import reports
import torch
from torch import nn

import funcnet as fn

pytestmark = pytest.mark.cpu_only

OBJECTIVE = disk.Objective(fn.mse(), 1, disk.column, disk.first_output)


def recipe(optimizer=fn.sgd, batch_size=100):
    model = fn.serial(fn.linear(5), fn.tanh(), fn.linear(1))
    return reports.Recipe(model, OBJECTIVE, optimizer, batch_size)


def plain_loop(model, optimizer, train, key, epochs):
    x, target = train.points, OBJECTIVE.target(train.labels)
    state = fn.init_train_state(model, optimizer, fn.fold_in(key, "model"), x)
    step = fn.train_step(model, OBJECTIVE.loss, optimizer)
    for epoch in range(epochs):
        for batch in disk.shuffled(fn.fold_in(fn.fold_in(key, "shuffle"), epoch), x, target, 100):
            state, _ = step(state, batch)
    return state


def test_a_member_is_a_run_of_the_plain_loop():
    runs = reports.train(recipe(), (0.1, 0.5), seeds=2, epochs=3)
    assert runs.history.loss.shape == (3, 2, 2, 3)
    train, *others = disk.standardized(*reports.data_sets(fn.key(1)))
    state = plain_loop(recipe().model, fn.sgd(0.5), train, fn.key(1), epochs=3)
    params = fn.tree.map(lambda leaf: leaf[1, 1, -1], runs.params)
    fn.tree.map(torch.testing.assert_close, params, state.params)
    for data_set, data in enumerate((train, *others)):
        measured = disk.measure(recipe().model, OBJECTIVE, state.params, data)
        loss, error = (each[data_set, 1, 1, -1] for each in runs.history)
        torch.testing.assert_close(loss, measured.loss)
        torch.testing.assert_close(error, measured.error, atol=2e-3, rtol=0)


def test_pytorch_starts_from_the_same_parameters_and_sees_the_same_batches():
    module = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))
    options = argparse.Namespace(seeds=2, epochs=2)
    constant = recipe(lambda rate: fn.sgd(rate[0]))
    rates = torch.tensor([[0.5, 0.5]])
    ours = reports.train(constant, rates, options.seeds, options.epochs)
    params, losses = report_tables.train_pytorch(module, constant, rates[0], options)
    fn.tree.map(lambda a, b: torch.testing.assert_close(a[0], b), ours.params, params)
    torch.testing.assert_close(ours.history.loss[reports.TEST, 0], losses)


def test_the_best_rate_is_never_one_that_ended_in_nan():
    assert reports.best(torch.tensor([[1.0, 1.0], [0.0, torch.nan], [0.5, 0.7]])) == 2
