"""`freeze` and `lora` around layers whose params are made of others: `tie`, `weight_norm`."""

import pytest
import torch

import funcnet as fn

X = torch.tensor([0, 6, 2])
TARGET = torch.tensor([1, 3, 5])


def tied(bias=True):
    net = fn.serial(embed=fn.embedding(7, 4), hidden=fn.linear(4), head=fn.linear(7, bias=bias))
    return fn.tie(net, {"head.weight": "embed.weight"})


def after_a_step(net, jit=False):
    """The train state before a step and after it."""
    optimizer = fn.sgd(0.1)
    start = fn.init_train_state(net, optimizer, fn.key(0), X)
    step = fn.train_step(net, fn.cross_entropy(), optimizer)
    return start, (fn.jit(step) if jit else step)(start, (X, TARGET))[0]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    "frozen",
    [
        "embed",
        lambda path: path.startswith("embed"),
        lambda path: path.startswith("head"),
        ["hidden", "head.bias"],
    ],
)
def test_what_is_frozen_of_a_tied_net_is_frozen_at_all_places_and_the_rest_learns(frozen, jit):
    start, state = after_a_step(fn.freeze(tied(), frozen), jit)
    _, plain = after_a_step(tied(), jit)
    learned, frozen = fn.tree.to_dotted(state.params), state.state["frozen"]
    assert (
        fn.tree.to_dotted(frozen).keys() | learned.keys() == fn.tree.to_dotted(plain.params).keys()
    )
    for path, leaf in fn.tree.to_dotted(start.state["frozen"]).items():
        assert torch.equal(fn.tree.to_dotted(frozen)[path], leaf)
    for path, leaf in learned.items():
        torch.testing.assert_close(leaf, fn.tree.to_dotted(plain.params)[path])


def test_a_tied_net_may_be_frozen_whole():
    net = fn.tie(
        fn.serial(embed=fn.embedding(7, 8), head=fn.linear(7, bias=False)),
        {"head.weight": "embed.weight"},
    )
    start, state = after_a_step(fn.freeze(net, lambda path: path.startswith("embed")))
    before, after = [each.state["frozen"]["embed"]["weight"] for each in (start, state)]
    assert not state.params
    assert torch.equal(before, after)


def test_a_tied_weight_learns_changes_of_low_rank_at_both_places():
    """For B alone, as A's gradient is zero at first: ``dB = scale dW A^T``."""
    start, state = after_a_step(fn.lora(tied(), 2, where="embed.weight"))
    _, plain = after_a_step(tied())
    own, frozen = start.params["embed"]["weight"], start.state["frozen"]["embed"]["weight"]
    change = (plain.params["embed"]["weight"] - frozen) @ own["lora_A"].t() * 8
    torch.testing.assert_close(state.params["embed"]["weight"]["lora_B"], change)


@pytest.mark.parametrize("norm", [fn.weight_norm, fn.spectral_norm])
def test_a_normalized_layer_may_be_frozen(norm):
    net = fn.serial(fn.embedding(7, 4), norm(fn.linear(7)))
    _, state = after_a_step(fn.freeze(net, "1"))
    _, plain = after_a_step(net)
    torch.testing.assert_close(state.params["0"]["weight"], plain.params["0"]["weight"])
