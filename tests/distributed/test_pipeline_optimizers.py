"""Optimizers in a pipeline that choose leaves by path: among those of all stages."""

import pytest
import torch

import funcnet as fn
from distributed.test_mistakes import batch
from funcnet.distributed import pipeline_state, pipeline_step


def chosen(which):
    """Optimizers of leaves of which some stages have none."""
    opt, momentum = fn.optimizers, fn.sgd(0.1, 0.9)
    decay = opt.add_decayed_weights(0.1)
    return {
        "function": lambda: fn.chain(
            opt.masked(decay, lambda path: path.startswith("a")), fn.adam(0.01)
        ),
        "path": lambda: fn.chain(opt.masked(opt.trace(0.9), "a"), fn.sgd(0.1)),
        "partition": lambda: opt.partition(
            {"first": momentum, "others": fn.adam(0.01)}, {"first": "a", "others": ["c", "d"]}
        ),
        "nested": lambda: opt.masked(
            opt.partition({"a": momentum, "c": fn.adam(0.01)}, {"a": "a.bias", "c": "c.bias"}),
            ["a.bias", "c.bias"],
        ),
        "nowhere": lambda: fn.chain(opt.masked(decay, lambda path: path == "e"), fn.sgd(0.1)),
        "no path": lambda: fn.chain(opt.masked(decay, ["a", "e"]), fn.sgd(0.1)),
        "half": lambda: opt.partition({"first": momentum}, {"first": "a"}),
    }[which]()


def lettered():
    return fn.serial(a=fn.linear(5), b=fn.tanh(), c=fn.linear(5), d=fn.linear(2, bias=False))


def staged_choice(which, jit=False):
    mesh = fn.distributed.mesh(data=1, pipe=torch.distributed.get_world_size())
    net, optimizer = lettered(), chosen(which)
    state = pipeline_state(net, optimizer, fn.key(0), batch()[0], mesh)
    step = pipeline_step(net, fn.mse(), optimizer, mesh, micro_batches=2, jit=jit)
    for _ in range(3):
        state, _ = step(state, batch())
    return state


@pytest.mark.parametrize(
    ("which", "jit"),
    [("function", False), ("path", False), ("partition", False), ("nested", False), ("path", True)],
)
def test_leaves_are_chosen_among_those_of_all_stages(four_ranks, which, jit):
    net, optimizer = lettered(), chosen(which)
    state = fn.init_train_state(net, optimizer, fn.key(0), batch()[0])
    step = fn.train_step(net, fn.mse(), optimizer, micro_batches=2)
    for _ in range(3):
        state, _ = step(state, batch())
    expected, seen = fn.tree.to_dotted((state.params, state.opt_state)), set()
    for own in four_ranks(staged_choice, which, jit):
        for path, leaf in fn.tree.to_dotted((own.params, own.opt_state)).items():
            torch.testing.assert_close(leaf, expected[path], rtol=1e-10, atol=1e-12, msg=path)
            seen.add(path)
    assert seen == expected.keys()


def choice_error(which):
    with pytest.raises(ValueError, match=r"masked|partition") as told:
        staged_choice(which)
    return str(told.value)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("nowhere", r"masked: no leaf is chosen of ['a.weight', 'a.bias', 'c.weight'"),
        ("no path", "masked: no leaf has the path 'e', only"),
        ("half", "no rule of ['first'] matches the leaf 'c.weight'"),
    ],
)
def test_a_choice_of_no_leaf_of_any_stage_is_the_same_error_on_all(two_ranks, which, message):
    told = two_ranks(choice_error, which)
    assert told[0] == told[1]
    assert message in told[0]
