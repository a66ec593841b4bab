"""Mixed precision: bfloat16 by fn.cast, and float16 with torch.amp.GradScaler's loss scale."""

import math

import pytest
import torch
from torch import nn

import funcnet as fn
from funcnet.optimizers import dynamic_loss_scale, params_ema

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def numbers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu").to(torch.get_default_device())


def equal(found, expected):
    for path, leaf in fn.tree.to_dotted(expected).items():
        assert torch.equal(fn.tree.to_dotted(found)[path], leaf), path


def run(optimizer, params, gradients):
    """The params and state after each update."""
    opt_state = optimizer.init_state(params)
    for grads in gradients:
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = fn.apply_updates(params, updates)
        yield params, opt_state


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"initial": 8.0, "interval": 2},
        {"initial": 8.0, "growth": 3.0, "backoff": 0.25, "interval": 1},
        {"initial": 2.0**126, "interval": 1},  # grows no further than float32 goes
    ],
)
def test_params_and_scale_are_those_of_gradscaler(options):
    names = {"initial": "init_scale", "growth": "growth_factor", "backoff": "backoff_factor"}
    names["interval"] = "growth_interval"
    scaler = torch.amp.GradScaler("cpu", **{names[name]: each for name, each in options.items()})
    theirs = nn.Parameter(numbers(3))
    peer = torch.optim.Adam([theirs], 0.1)
    optimizer = dynamic_loss_scale(fn.adam(0.1), **options)
    params = {"w": theirs.detach().clone()}
    opt_state = optimizer.init_state(params)
    for step in range(12):
        gradient = numbers(3, seed=step) * (math.inf if step in (0, 4, 5, 9) else 1.0)
        assert opt_state.scale == scaler.get_scale()
        scaled = gradient * opt_state.scale
        scaler.scale(theirs.sum())  # makes its scale
        theirs.grad = scaled.clone()
        updates, opt_state = optimizer.update({"w": scaled}, opt_state, params)
        params = fn.apply_updates(params, updates)
        scaler.step(peer)
        scaler.update()
        torch.testing.assert_close(params["w"], theirs.detach(), rtol=1e-6, atol=1e-7)
    assert opt_state.scale == scaler.get_scale()


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_skipped_step_leaves_params_and_inner_state_bit_for_bit(bad, donate):
    optimizer = dynamic_loss_scale(fn.adamw(lambda step: 0.1 * 0.5**step, amsgrad=True), 8.0)
    params = {"w": torch.tensor([1.5, -0.0, 0.0, math.pi]), "0-d": torch.tensor(-0.0)}
    grads = [{"w": numbers(4, seed=i), "0-d": numbers(seed=i)} for i in range(3)]
    grads[2]["w"][1] = bad
    *_, (params, before) = run(optimizer, params, grads[:2])
    params["w"][1] = -0.0
    updates, after = optimizer.update(grads[2], before, params)
    kept = fn.apply_updates(params, updates)
    equal(kept, params)
    equal(
        [p.signbit() for p in fn.tree.leaves(kept)], [p.signbit() for p in fn.tree.leaves(params)]
    )
    equal(after.inner, before.inner)
    assert (float(after.scale), int(after.good_steps)) == (4.0, 0)
    assert int(before.good_steps) == 2


def test_a_donating_step_skips_too():
    def infinite(prediction, target):
        return (prediction - target).square().mean()

    net, optimizer = fn.linear(3), dynamic_loss_scale(fn.adam(0.1))
    step = fn.train_step(net, fn.mse(), optimizer, donate=True)
    x = numbers(4, 5)
    state = fn.init_train_state(net, optimizer, fn.key(0), x)
    state, _ = step(state, (x, numbers(4, 3)))
    before = fn.tree.map(torch.clone, state)
    state, _ = step(state, (x * math.inf, numbers(4, 3)))
    equal(state.params, before.params)
    equal(state.opt_state.inner, before.opt_state.inner)
    assert state.opt_state.scale == before.opt_state.scale / 2


NET = fn.serial(fn.linear(16), fn.tanh(), fn.linear(3))


def trained(net, optimizer, steps, jit=False, **options):
    x, target = numbers(32, 5), numbers(32, 3, seed=1)
    step = fn.train_step(net, fn.mse(), optimizer, **options)
    step = fn.jit(step) if jit else step
    state = fn.init_train_state(net, optimizer, fn.key(0), x)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, (x, target))
        losses.append(metrics["loss"])
    return state, torch.stack(losses)


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_a_net_in_half_precision_trains_with_params_in_float32(dtype, micro_batches):
    make = {BF16: lambda: fn.adam(0.01), F16: lambda: dynamic_loss_scale(fn.adam(0.01))}[dtype]
    state, losses = trained(fn.cast(NET, dtype), make(), 30, micro_batches=micro_batches)
    _, expected = trained(NET, fn.adam(0.01), 30)
    assert {leaf.dtype for leaf in fn.tree.leaves(state.params)} == {F32}
    assert losses.dtype == F32
    torch.testing.assert_close(losses, expected, rtol=0.02, atol=0)
    assert losses[-1] < 0.8 * losses[0]


def test_bfloat16_is_what_autocast_computes():
    ours = fn.cast(fn.serial(fn.linear(16), fn.relu(), fn.linear(3)), BF16)
    theirs = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = fn.sgd(0.1)
    x, target = numbers(32, 5), numbers(32, 3, seed=1)
    state = fn.init_train_state(ours, optimizer, fn.key(0), x)
    theirs.load_state_dict(fn.tree.to_dotted(state.params))
    peer = torch.optim.SGD(theirs.parameters(), 0.1)
    step = fn.train_step(ours, fn.mse(), optimizer)
    for _ in range(5):
        state, metrics = step(state, (x, target))
        peer.zero_grad()
        with torch.autocast("cpu", BF16):
            loss = nn.functional.mse_loss(theirs(x).float(), target)
        loss.backward()
        peer.step()
        torch.testing.assert_close(metrics["loss"], loss.detach(), rtol=1e-5, atol=0)


def test_gradients_that_float16_rounds_to_zero_come_through_with_a_scale():
    smaller = fn.elementwise(small, small_derivative, name="small")
    tiny = fn.serial(fn.linear(3), smaller, smaller)
    plain, _ = trained(fn.cast(tiny, F16), fn.sgd(1e7), 1)
    scaled, _ = trained(fn.cast(tiny, F16), dynamic_loss_scale(fn.sgd(1e7)), 1)
    exact, _ = trained(tiny, fn.sgd(1e7), 1)
    start = fn.init_train_state(tiny, fn.sgd(1e7), fn.key(0), numbers(32, 5))
    assert torch.equal(plain.params["0"]["weight"], start.params["0"]["weight"])
    moved = exact.params["0"]["weight"] - start.params["0"]["weight"]
    found = scaled.params["0"]["weight"] - start.params["0"]["weight"]
    torch.testing.assert_close(found, moved, rtol=0.02, atol=0.02 * float(moved.abs().max()))


def small(x):
    return x * 1e-4


def small_derivative(x):
    return torch.full_like(x, 1e-4)


def test_the_scale_finds_its_size():
    # The first scale makes infinite gradients; the scale halves until they are finite.
    state, _ = trained(fn.cast(NET, F16), dynamic_loss_scale(fn.sgd(0.01), 2.0**24), 12)
    assert 1 < state.opt_state.scale < 2.0**24
    assert state.opt_state.good_steps > 0


def test_compiled_it_skips_the_same_steps():
    optimizer = dynamic_loss_scale(fn.adam(0.1), 8.0, interval=2)
    gradients = [{"w": torch.tensor([1.0, g])} for g in (1.0, math.inf, 2.0, 3.0, math.nan)]
    compiled = optimizer._replace(update=fn.jit(optimizer.update))
    params = {"w": torch.tensor([-0.0, 2.0])}
    eagerly = run(optimizer, params, gradients)
    for (found, state), (expected, other) in zip(
        run(compiled, params, gradients), eagerly, strict=True
    ):
        torch.testing.assert_close(found["w"], expected["w"])
        equal(state[:2], other[:2])


def test_members_of_a_population_have_scales_of_their_own():
    optimizer = dynamic_loss_scale(fn.adam(0.1), 8.0)
    params = {"w": numbers(2, 3)}
    states = fn.vmap(optimizer.init_state)(params)
    grads = {"w": torch.tensor([[1.0, 2.0, 3.0], [1.0, math.inf, 3.0]])}
    updates, after = fn.vmap(optimizer.update)(grads, states, params)
    assert after.scale.tolist() == [8.0, 4.0]
    assert updates["w"][1].tolist() == [0, 0, 0]
    assert updates["w"][0].abs().min() > 0
    assert after.inner["scale_by_adam"].step.tolist() == [1, 0]


def test_around_an_average_it_leaves_the_average_too():
    optimizer = dynamic_loss_scale(params_ema(fn.sgd(1.0), 0.5), 2.0)
    params = {"w": torch.zeros(1)}
    found = list(run(optimizer, params, [{"w": torch.tensor([g])} for g in (2.0, math.inf, 2.0)]))
    averages = [fn.optimizers.eval_params(state, params)["w"].item() for params, state in found]
    assert [params["w"].item() for params, _ in found] == [-1.0, -1.0, -3.0]
    assert averages == [-1.0, -1.0, -2.0]


def test_with_replaced_functions_it_keeps_its_scale():
    optimizer = dynamic_loss_scale(fn.sgd(0.1))
    assert optimizer._replace(update=optimizer.update).loss_scale is optimizer.loss_scale
    assert fn.sgd(0.1).loss_scale is None


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (
            TypeError,
            "expects an Optimizer, got the function adam; call it",
            lambda: dynamic_loss_scale(fn.adam),
        ),
        (ValueError, "initial must be > 0, got 0", lambda: dynamic_loss_scale(fn.sgd(), 0.0)),
        (
            ValueError,
            "initial must be >= 0, got nan",
            lambda: dynamic_loss_scale(fn.sgd(), math.nan),
        ),
        (ValueError, "growth must be > 1, got 1", lambda: dynamic_loss_scale(fn.sgd(), growth=1.0)),
        (ValueError, "backoff must be below 1", lambda: dynamic_loss_scale(fn.sgd(), backoff=1.0)),
        (
            ValueError,
            "interval must be an integer",
            lambda: dynamic_loss_scale(fn.sgd(), interval=0),
        ),
        (
            ValueError,
            "dynamic_loss_scale has a loss scale already",
            lambda: dynamic_loss_scale(dynamic_loss_scale(fn.sgd())),
        ),
        (
            ValueError,
            "check_finite does not go with a loss scale",
            lambda: fn.train_step(NET, fn.mse(), dynamic_loss_scale(fn.sgd()), check_finite=True),
        ),
        (
            ValueError,
            "dynamic_loss_scale must be around all other optimizers, not inside of params_ema",
            lambda: trained(NET, params_ema(dynamic_loss_scale(fn.sgd())), 1),
        ),
        (
            ValueError,
            "must be around all other optimizers, not inside of chain",
            lambda: trained(NET, fn.chain(dynamic_loss_scale(fn.sgd())), 1),
        ),
        (
            ValueError,
            "expects params in float32, got float16 at 'w'; compute in float16 by fn.cast",
            lambda: dynamic_loss_scale(fn.sgd()).init_state({"w": torch.ones(1, dtype=F16)}),
        ),
        (
            TypeError,
            "expects the state LossScaleState",
            lambda: dynamic_loss_scale(fn.sgd()).update({}, {}, {}),
        ),
    ],
)
def test_what_does_not_fit_is_told(error, message, make):
    with pytest.raises(error, match=message):
        make()


def test_value_and_grad_takes_the_scale():
    x, target = numbers(4, 5), numbers(4, 3)
    params, _ = NET.init(fn.key(0), x)
    f = fn.value_and_grad(NET, fn.mse())
    value, grads, _ = f(params, (x, target))
    same, scaled, _ = f(params, (x, target), dvalue=torch.tensor(8.0))
    assert torch.equal(same, value)
    equal(scaled, fn.tree.map(lambda g: 8 * g, grads))
