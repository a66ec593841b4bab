"""`fn.summary` tells what a model holds before anything is computed."""

import pytest
import torch

import funcnet as fn

NET = fn.serial(
    conv=fn.conv2d(8, 3, padding=1),
    norm=fn.batch_norm(),
    act=fn.relu(),
    noise=fn.dropout(0.5),
    flat=fn.flatten(),
    head=fn.serial(fn.linear(16), fn.tanh(), fn.linear(2)),
)
X = torch.ones(5, 3, 8, 8)


def rows():
    return {row.path: row for row in fn.summary(NET, X).rows}


def test_paths_are_those_of_the_parameters_and_in_the_order_of_the_run():
    assert list(rows()) == ["conv", "norm", "act", "noise", "flat", "head.0", "head.1", "head.2"]


def test_parameters_are_counted_as_torch_counts_them():
    peer = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Linear(512, 16),
        torch.nn.Linear(16, 2),
    )  # fmt: skip
    total = fn.summary(NET, X).total
    assert total.params == sum(leaf.numel() for leaf in peer.parameters())
    assert total.param_bytes == 4 * total.params
    assert total.state_bytes == sum(b.numel() * b.element_size() for b in peer.buffers())


def test_residual_bytes_count_each_storage_once():
    found = {path: row.residual_bytes for path, row in rows().items()}
    image = 5 * 8 * 8 * 8
    assert found == {
        "conv": 4 * 5 * 3 * 8 * 8,  # its input
        "norm": 4 * image + 2 * 4 * 8,  # its input, the mean and its spread
        "act": 4 * image,  # its output
        "noise": image,  # the mask, one byte each
        "flat": 0,
        "head.0": 4 * image,  # its input, which dropout made
        "head.1": 4 * 5 * 16,  # its output, which head.2 keeps too
        "head.2": 0,
    }


def test_in_evaluation_dropout_keeps_nothing():
    found = {row.path: row.residual_bytes for row in fn.summary(NET, X, train=False).rows}
    assert found["noise"] == 0


@pytest.mark.cpu_only
def test_the_total_is_what_a_step_really_holds():
    params, state = NET.init(fn.key(0), X)
    _, pullback, _ = NET.vjp(params, X, state, key=fn.key(1))
    own = {leaf.data_ptr() for leaf in fn.tree.leaves(params)}
    held = {
        leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes()
        for leaf in fn.tree.leaves(pullback)
        if leaf.data_ptr() not in own
    }
    assert fn.summary(NET, X).total.residual_bytes == sum(held.values())


def test_nothing_is_computed_for_an_example_without_data():
    huge = torch.empty(10**7, 10**4, device="meta")
    assert fn.summary(fn.serial(fn.linear(10**4), fn.dropout()), huge).total.params == 10**8 + 10**4


def test_a_shared_layer_is_one_row():
    pair = (torch.ones(5, 4), torch.ones(5, 4))
    (row,) = fn.summary(fn.shared(fn.linear(2)), pair).rows
    assert (row.params, row.residual_bytes) == (10, 2 * 4 * 5 * 4)


def test_a_model_that_does_not_fit_is_an_error_with_the_path():
    with pytest.raises(ValueError, match=r"serial\['1'\] conv2d: expects \(batch, channels"):
        fn.summary(fn.serial(fn.flatten(), fn.conv2d(2, 3)), X)


def test_the_table_has_a_line_for_each_row_and_the_total():
    lines = repr(fn.summary(NET, X)).splitlines()
    assert len(lines) == 8 + 4
    assert lines[-1].split()[0] == "total"


def held(net, x):
    """The bytes of the distinct storages of a pullback, less those of the params."""
    params, state = net.init(fn.key(0), x)
    _, pullback, _ = net.vjp(params, x, state, key=fn.key(1), train=True)
    owned = {leaf.untyped_storage()._cdata for leaf in fn.tree.leaves((params, state))}
    storages = {leaf.untyped_storage()._cdata: leaf for leaf in fn.tree.leaves(pullback)}
    return sum(
        leaf.untyped_storage().nbytes() for key, leaf in storages.items() if key not in owned
    )


def gated_forward(run, x):
    gate, value = run("gate", x), run("value", x)
    return gate * value, {"gate": gate, "value": value}


def gated_backward(pull, dy, residuals):
    dx_gate = pull("gate", dy * residuals["value"], needed=pull.x)
    dx_value = pull("value", dy * residuals["gate"], needed=pull.x)
    return fn.sum_cotangents(dx_gate, dx_value)


def gated(gate, value):
    return fn.combine("gated", {"gate": gate, "value": value}, gated_forward, gated_backward)


@pytest.mark.parametrize(
    "make",
    [
        lambda: gated(fn.linear(3), fn.linear(3)),
        lambda: fn.serial(gated(fn.serial(fn.linear(9), fn.tanh()), fn.linear(9)), fn.linear(2)),
        lambda: fn.remat(fn.serial(fn.linear(4), fn.batch_norm(), fn.tanh())),
        lambda: fn.serial(fn.remat(fn.serial(fn.linear(4), fn.tanh())), fn.linear(2)),
        lambda: fn.remat(fn.serial(fn.linear(4), fn.tanh(), fn.linear(2)), policy=["1"]),
        lambda: fn.remat(fn.serial(gated(fn.linear(4), fn.linear(4))), policy=["0.gate"]),
    ],
)
def test_the_total_is_what_a_combinator_or_a_remat_holds(make):
    net, x = make(), torch.ones(10, 3)
    params, _ = net.init(fn.key(0), x)
    total = fn.summary(net, x).total
    assert total.params == sum(leaf.numel() for leaf in fn.tree.leaves(params))
    assert total.residual_bytes == held(net, x)
