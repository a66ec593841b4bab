"""Law 6 and 7 under jit: a compiled function equals the eager one, alone and for a population.

Every second layer's first case is compiled, half of the others' as a population, and all of them
by ``pytest tests/laws/test_transformed.py --whole``.
"""

import re

import torch
from cases import COMBINATORS, EAGER_ONLY, LAYERS, LOSSES, OPTIMIZERS, PARAMS

import funcnet as fn

# A program for many cases takes little longer to compile than one for a single case.
TOGETHER = 12
NETS = {name: case for name, case in (LAYERS | COMBINATORS).items() if name not in EAGER_ONLY}


# A sum is a mean but for a factor.
REDUCED = [name for name in LOSSES if not name.endswith(" sum")]


def first_of_each(table, kind):
    """The first name in a table of each kind of its cases."""
    first = {}
    for name in table:
        first.setdefault(kind(name), name)
    return [*first.values()]


def constructor(name):
    """The name of a layer's constructor, whatever the number of dimensions; a combinator's own."""
    return name.split()[0] if name in COMBINATORS else re.sub(r"\d", "", LAYERS[name][0].name)


def pytest_generate_tests(metafunc):
    if "group" not in metafunc.fixturenames:
        return
    table = REDUCED if "loss" in metafunc.function.__name__ else list(NETS)
    if not metafunc.config.getoption("whole"):
        kind = constructor if table is not REDUCED else (lambda name: name.split()[0])
        chosen = first_of_each(table, kind)
        if table is not REDUCED:
            # A population compiles the same rules in a loop over its members.
            is_population = "population" in metafunc.function.__name__
            chosen = chosen[3::4] if is_population else chosen[::2]
        table = chosen
    groups = [table[start : start + TOGETHER] for start in range(0, len(table), TOGETHER)]
    metafunc.parametrize("group", groups, ids=[group[0] for group in groups])


def cotangent(y):
    return fn.tree.map(
        lambda leaf: torch.full_like(leaf, 0.7) if leaf.is_floating_point() else None, y
    )


def everything(layer, key, x):
    """Whatever a layer gives, in both modes."""
    params, state = layer.init(key, x)
    results = [params, state]
    for train in (True, False):
        y, pullback, after = layer.vjp(params, x, state, key=key, train=train)
        results += [y, after, pullback(cotangent(y))]
        results.append(layer.apply(params, x, state, key=key, train=train))
    return results


def assert_same(found, expected):
    assert fn.tree.flatten(found)[1] == fn.tree.flatten(expected)[1]
    for one, other in zip(fn.tree.leaves(found), fn.tree.leaves(expected), strict=True):
        # aten's hardsigmoid multiplies by 1/6 in float32, which Inductor's does not.
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
        if one.dtype == torch.float64:
            assert (one - other).abs().median() < 1e-8 if one.numel() else True


def test_a_jitted_layer_equals_the_eager_one(group):
    def run(key, xs):
        return {name: everything(NETS[name][0], key, xs[name]) for name in group}

    xs = {name: NETS[name][1] for name in group}
    assert_same(fn.jit(run)(fn.key(0), xs), run(fn.key(0), xs))


def test_a_member_of_a_jitted_population_equals_its_solo_run(group):
    def run(key, xs):
        return {name: everything(NETS[name][0], key, xs[name]) for name in group}

    xs = {name: NETS[name][1] for name in group}
    keys = fn.random.split(fn.key(1), 3)
    together = fn.jit(fn.vmap(run, in_axes=(0, None)))(keys, xs)
    alone = [run(key, xs) for key in keys]
    assert_same(together, fn.tree.map(lambda *leaves: torch.stack(leaves), *alone))


def test_a_jitted_loss_equals_the_eager_one(group):
    def run(predictions):
        results = {}
        for name, prediction in predictions.items():
            loss, _, target = LOSSES[name]
            value, pullback = loss.vjp(prediction, target)
            results[name] = value, pullback(), loss.apply(prediction, target)
        return results

    predictions = {name: LOSSES[name][1] for name in group}
    assert_same(fn.jit(run)(predictions), run(predictions))


def test_a_jitted_optimizer_equals_the_eager_one():
    def run(params):
        results = {}
        for name, (optimizer, _) in OPTIMIZERS.items():
            grads = fn.tree.map(torch.sin, params)
            updates, state = optimizer.update(grads, optimizer.init_state(params), params)
            results[name] = updates, optimizer.update(updates, state, params)
        return results

    assert_same(fn.jit(run)(PARAMS), run(PARAMS))
    assert_same(
        fn.jit(fn.vmap(run))(fn.tree.map(lambda leaf: torch.stack([leaf, 2 * leaf]), PARAMS)),
        fn.tree.map(
            lambda *leaves: torch.stack(leaves),
            run(PARAMS),
            run(fn.tree.map(lambda leaf: 2 * leaf, PARAMS)),
        ),
    )
