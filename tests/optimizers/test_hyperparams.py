"""`inject_hyperparams`: options as tensors in the state, set, scheduled and vmapped."""

import pytest
import torch

import funcnet as fn
from funcnet import optimizers as opt
from funcnet.compiler import compiled

F64 = torch.float64
PARAMS = {"a": {"w": torch.tensor([[1.0, -2.0]], dtype=F64)}, "b": torch.tensor(0.5, dtype=F64)}


def momentum(lr, decay=0.9, nesterov=False, weights=(1.0, 2.0), repeat=1, where=lambda path: True):
    transforms = {f"trace{index}": opt.trace(decay, nesterov=nesterov) for index in range(repeat)}
    return fn.chain(
        opt.masked(fn.chain(one=opt.scale(weights[0]), other=opt.scale(weights[1])), where),
        **transforms,
        rate=opt.scale_by_learning_rate(lr),
    )


injected = opt.inject_hyperparams(momentum, static_args="where")


def grads_at(step):
    return fn.tree.map(lambda leaf: (leaf + step).cos(), PARAMS)


def run(optimizer, steps=4, change=lambda step, state: state):
    state, params, after = optimizer.init_state(PARAMS), PARAMS, []
    for step in range(steps):
        updates, state = optimizer.update(grads_at(step), change(step, state), params)
        params = fn.apply_updates(params, updates)
        after.append(params)
    return after, state


def assert_close(found, expected):
    leaves, others = fn.tree.flatten(found), fn.tree.flatten(expected)
    assert leaves[1] == others[1]
    for one, other in zip(leaves[0], others[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-15)


def put(state, **values):
    return state._replace(hyperparams={**state.hyperparams, **values})


def test_an_injected_optimizer_is_the_optimizer():
    for options in ({"lr": 0.1}, {"lr": 0.1, "decay": 0.5, "weights": (0.5, 1.5), "repeat": 2}):
        found, state = run(injected(**options))
        expected, inner = run(momentum(**options))
        assert_close(found, expected)
        assert_close(state.inner, inner)
        assert state.step == 4


def test_numbers_that_are_given_are_tensors_in_the_state():
    state = injected(1, 0.5, True, weights=(0.5, 2), repeat=2).init_state(PARAMS)
    assert list(state.hyperparams) == ["lr", "decay", "weights"]
    leaves = fn.tree.leaves(state.hyperparams)
    assert sorted(float(leaf) for leaf in leaves) == [0.5, 0.5, 1.0, 2.0]
    assert {(leaf.dtype, leaf.shape) for leaf in leaves} == {(F64, ())}
    assert list(injected(torch.tensor(0.1)).init_state({}).hyperparams) == ["lr"]


def test_a_number_can_be_set_from_update_to_update():
    rates = (0.1, 0.2, 0.05, 0.4)
    optimizer = injected(0.1, 0.5)
    found, state = run(
        optimizer, change=lambda step, state: put(state, lr=torch.tensor(rates[step], dtype=F64))
    )
    expected, _ = run(momentum(lambda step: torch.tensor(rates, dtype=F64)[step], 0.5))
    assert_close(found, expected)
    assert state.hyperparams["lr"] == 0.4
    number, state = run(optimizer, change=lambda step, state: put(state, lr=rates[step]))
    assert_close(number, expected)
    assert isinstance(state.hyperparams["lr"], torch.Tensor)


def test_any_number_can_be_scheduled():
    decays = [0.5, 0.25, 0.125, 0.0625]
    optimizer = injected(lambda step: 0.1 / (step.double() + 1), lambda step: 0.5 ** (step + 1.0))
    found, state = run(optimizer)
    buffer, params = fn.tree.map(torch.zeros_like, PARAMS), PARAMS
    for step, decay in enumerate(decays):
        buffer = fn.tree.map(lambda b, g, d=decay: d * b + 2 * g, buffer, grads_at(step))
        params = fn.tree.map(lambda p, b, s=step: p - 0.1 / (s + 1) * b, params, buffer)
        assert_close(found[step], params)
    assert_close(
        [*state.hyperparams.values()], [torch.tensor(v, dtype=F64) for v in (0.025, 2**-4)]
    )


def test_the_step_of_a_schedule_is_a_tensor_that_counts():
    seen = []
    run(injected(lambda step: seen.append(step) or 0.1), 2)
    assert [int(step) for step in seen] == [0, 0, 0, 1]  # when it is made, at init, and then
    assert {(step.dtype, step.shape) for step in seen} == {(torch.int64, ())}


def test_a_population_can_have_a_rate_each():
    optimizer, rates = injected(0.1, 0.5), torch.tensor([0.1, 0.3, 0.01], dtype=F64)

    def two_steps(rate):
        return run(optimizer, 2, lambda step, state: put(state, lr=rate) if not step else state)

    together = fn.vmap(two_steps)(rates)
    alone = [two_steps(rate) for rate in rates]
    assert_close(together, fn.tree.map(lambda *leaves: torch.stack(leaves), *alone))


def test_another_number_needs_no_other_program(monkeypatch):
    made = []
    prepare = compiled.Compiled._prepare
    monkeypatch.setattr(
        compiled.Compiled, "_prepare", lambda self: made.append(self) or prepare(self)
    )
    optimizer = injected(0.1, lambda step: 0.5 ** (step + 1.0))
    update = fn.jit(optimizer.update)
    state = optimizer.init_state(PARAMS)
    for step in range(3):
        state = put(state, lr=torch.tensor(0.1 * (step + 1), dtype=F64))
        expected = optimizer.update(PARAMS, state, PARAMS)
        found = update(PARAMS, state, PARAMS)
        assert_close(found, expected)
        state = found[1]
    assert len(made) == 1


REFUSED = {
    "a negative number": (lambda: injected(-0.1), ValueError, "lr must be >= 0, got -0.1"),
    "NaN": (lambda: injected(torch.nan), ValueError, "lr must be >= 0, got nan"),
    "a negative number in the state": (
        lambda: injected(0.1).update(
            PARAMS, put(injected(0.1).init_state(PARAMS), lr=torch.tensor(-1.0)), PARAMS
        ),
        ValueError,
        "inject_hyperparams scale_by_learning_rate: lr must be >= 0, got -1.0",
    ),
    "a schedule that gives a vector": (
        lambda: injected(lambda step: torch.ones(2)),
        ValueError,
        r"inject_hyperparams: lr must be a number or a 0-d tensor, got \(2,\)",
    ),
    "a schedule that gives a vector, in a tuple": (
        lambda: injected(0.1, weights=(1.0, lambda step: torch.ones(2))),
        ValueError,
        r"inject_hyperparams: weights must be a number or a 0-d tensor, got \(2,\)",
    ),
    "an unknown static argument": (
        lambda: opt.inject_hyperparams(fn.adamw, static_args=["beta"]),
        ValueError,
        r"static_args has \['beta'\], which it does not take",
    ),
    "an unknown option": (lambda: injected(0.1, rate=0.1), TypeError, "rate"),
    "an optimizer": (lambda: opt.inject_hyperparams(fn.sgd(0.1)), TypeError, "a constructor such"),
    "another's state": (
        lambda: injected(0.1).update(PARAMS, fn.adam(0.1).init_state(PARAMS), PARAMS),
        TypeError,
        "inject_hyperparams: expects the state InjectHyperparamsState",
    ),
    "a state without an option": (
        lambda: injected(0.1, 0.5).update(PARAMS, injected(0.1).init_state(PARAMS), PARAMS),
        ValueError,
        r"inject_hyperparams: expects the hyperparams \['lr', 'decay'\], got \['lr'\]",
    ),
}


@pytest.mark.parametrize(("call", "error", "match"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()
