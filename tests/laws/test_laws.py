"""The laws of the protocol over tables of all that the library has."""

import pytest
import torch
from cases import (
    COMBINATORS,
    EAGER_ONLY,
    LAYERS,
    LOSSES,
    OPTIMIZERS,
    PAIR,
    PARAMS,
    ROWS,
)
from optimizers.tables import CASES

import funcnet as fn
from funcnet import runtime
from funcnet.core import EMPTY
from funcnet.testing import check_layer, check_loss, check_optimizer


@pytest.mark.parametrize("name", [*LAYERS, *COMBINATORS])
def test_a_layer_keeps_the_laws(name):
    layer, x = (LAYERS | COMBINATORS)[name]
    check_layer(layer, x, vmap=name not in EAGER_ONLY)


@pytest.mark.parametrize(
    "layer",
    [
        fn.embedding(5, 3, padding_idx=1),
        fn.embedding(5, 3, scale_grad_by_freq=True),
        fn.embedding(5, 3, max_norm=1.0),
        fn.embedding_bag(5, 3, scale_grad_by_freq=True),
        fn.embedding_bag(5, 3, mode="max", max_norm=1.0),
        fn.embedding_bag(5, 3, padding_idx=1, max_norm=1.0),
    ],
)
def test_an_embedding_whose_rule_is_not_the_derivative_keeps_the_others(layer):
    assert layer.breaks == {"derivative"}
    check_layer(layer, torch.tensor([[0, 1], [4, 4]]))


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_keeps_the_laws(name):
    check_loss(*LOSSES[name])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_keeps_the_laws(name):
    optimizer, reference = OPTIMIZERS[name]
    check_optimizer(optimizer, PARAMS, reference=reference, alone=True)


def public(kind):
    """The constructors of a kind that funcnet and funcnet.optimizers export, by name."""
    found = set()
    for name, constructor in [*vars(fn).items(), *vars(fn.optimizers).items()]:
        annotations = getattr(constructor, "__annotations__", {})
        if annotations.get("return") is kind and not name.startswith("_"):
            found.add(name)
    return found


def test_the_tables_have_every_layer():
    shown = " ".join(repr(layer) for layer, _ in (LAYERS | COMBINATORS).values())
    exempt = {"detect_nonfinite", "map_layers", "wrap", "combine", "with_pullbacks"}
    exempt |= {
        "stateless",
        "stateful",
        "parameterless",
        "elementwise",
        "reparametrize",
    }  # of those shown
    # Rewrites of a model, which is shown as before or with layers of other names.
    exempt |= {"feedback_alignment", "sign_symmetric", "guided_backprop", "deconvnet", "observe"}
    missing = {name for name in public(fn.Layer) - exempt if f"{name}(" not in shown}
    assert not missing


def test_the_tables_have_every_loss_and_optimizer():
    names = " ".join([*LOSSES, *OPTIMIZERS, *CASES])
    exempt = {
        "chain",
        "stateless",
        "stateful",
        "around",
        "add_decayed_weights",
        "scale_by_learning_rate",
    }
    exempt |= {"dynamic_loss_scale"}  # it refuses float16, and has tests of its own
    exempt |= {"kfac"}  # it takes gradients of its own kind, and has tests of its own
    # A transform of one named optimizer is held to the laws within that.
    exempt |= {"scale_by_factored_rms", "scale_by_rms", "scale_by_trust_ratio"}

    def is_there(name):
        return any(part in names for part in (name, name.partition("scale_by_")[2] or name))

    found = public(fn.Loss) | public(fn.Optimizer)
    missing = {name for name in found - exempt if not is_there(name.removeprefix("average_"))}
    assert not missing


@pytest.mark.parametrize("name", ["serial of all kinds", "residual", "shared", "siamese"])
def test_the_laws_hold_with_grad_mode_off(name):
    layer, x = COMBINATORS[name]
    with torch.no_grad():
        check_layer(layer, x)


@pytest.mark.parametrize("name", [*LAYERS, *COMBINATORS])
def test_apply_and_pullback_run_under_torch_func(name):
    layer, x = (LAYERS | COMBINATORS)[name]
    params, state = layer.init(fn.key(0), x)
    y, pullback, _ = layer.vjp(params, x, state, key=fn.key(1), train=False)
    floating = [leaf for leaf in fn.tree.leaves(y) if leaf.is_floating_point()]
    flat = [leaf for leaf in fn.tree.leaves((params, x)) if leaf.is_floating_point()]
    if name in EAGER_ONLY or not flat or layer.breaks:
        assert floating
        return

    def total(leaves):
        given = iter(leaves)
        p, x_ = fn.tree.map(
            lambda leaf: next(given) if leaf.is_floating_point() else leaf, (params, x)
        )
        y, _ = layer.apply(p, x_, state, key=fn.key(1), train=False)
        return sum(leaf.sum() for leaf in fn.tree.leaves(y) if leaf.is_floating_point())

    grads = torch.func.grad(total)(flat)
    ones = fn.tree.map(lambda leaf: torch.ones_like(leaf) if leaf.is_floating_point() else None, y)
    got = [leaf for leaf in fn.tree.leaves(pullback(ones)) if leaf is not None]
    assert len(got) == len(grads)
    for ours, theirs in zip(got, grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_check_layer_compiles_on_request():
    check_layer(*COMBINATORS["serial of all kinds"], jit=True)
    fooled = fn.stateless(
        lambda key, x: {},
        lambda params, x: x + (0.0 if runtime.is_tracing() else 1.0),
        lambda params, x: (
            x + (0.0 if runtime.is_tracing() else 1.0),
            fn.Pullback(identity_rule, {}),
        ),
    )
    check_layer(fooled, torch.ones(3))
    with pytest.raises(AssertionError, match="under jit the results are the eager ones"):
        check_layer(fooled, torch.ones(3), jit=True)


def identity_rule(residuals, dy, *, params, x):
    return ({} if params else None), dy if x else None


def echo():
    """A layer that returns the very state that it got, as a user's may."""

    def vjp(params, x, state=None, *, key=None, train=True):
        return x, fn.Pullback(identity_rule, {}), state

    return fn.Layer(
        lambda key, x: ({}, {}),
        lambda params, x, state=None, *, key=None, train=False: (x, state),
        vjp,
    )


ECHOES = {
    "serial": (fn.serial(echo()), ROWS),
    "residual": (fn.residual(echo()), ROWS),
    "shared": (fn.shared(echo()), PAIR),
    "remat": (fn.remat(echo()), ROWS),
    "detect_nonfinite": (fn.detect_nonfinite(echo()), ROWS),
    "parallel": (fn.parallel(echo(), echo()), PAIR),
}


@pytest.mark.parametrize("name", [*LAYERS, *COMBINATORS, *[f"echo in {each}" for each in ECHOES]])
def test_what_is_returned_is_the_callers_own(name):
    everything = LAYERS | COMBINATORS | {f"echo in {each}": case for each, case in ECHOES.items()}
    layer, x = everything[name]
    params, state = layer.init(fn.key(0), x)
    if state:
        return
    y, pullback, after = layer.vjp(params, x, train=False)
    dy = fn.tree.map(lambda leaf: torch.ones_like(leaf) if leaf.is_floating_point() else None, y)
    results = [state, layer.apply(params, x)[1], after, pullback, *pullback(dy)]
    seen = [id(node) for result in results for node in nodes(result)]
    assert id(EMPTY) not in seen


def nodes(tree):
    """All dicts in a tree, those in pullbacks too."""
    if isinstance(tree, fn.Pullback):
        tree = tree.residuals
    if isinstance(tree, dict):
        yield tree
        tree = [*tree.values()]
    if isinstance(tree, (tuple, list)):
        for child in tree:
            yield from nodes(child)
