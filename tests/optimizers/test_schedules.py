"""Schedules: torch's and optax's numbers, one program for all steps, sweeps, what is refused."""

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st
from torch.optim import lr_scheduler

import funcnet as fn
from funcnet import schedules

F64 = torch.float64
OPTAX = json.loads((Path(__file__).parent.parent / "data" / "optax_schedules.json").read_text())


def of_torch(make, steps, lr=0.7):
    """What a scheduler of torch sets at each step: the learning rate, and the momentum."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = make(optimizer)
        rates = []
        for _ in range(steps):
            group = optimizer.param_groups[0]
            rates.append((group["lr"], group["momentum"]))
            optimizer.step()
            scheduler.step()
    return torch.tensor(rates, dtype=F64, device="cpu").T


def assert_close(found, expected, **options):
    options = {"rtol": 1e-10, "atol": 1e-13, **options}
    torch.testing.assert_close(found.cpu(), expected.cpu(), **options)


def cycle_scale(x):
    return 0.5 * (1 + math.sin(x)) if isinstance(x, (int, float)) else 0.5 * (1 + torch.sin(x))


def product_of_factors(step):
    return 0.9 if step % 3 else 0.5


# By the name of torch's class: our schedule, and the rows of options; some go beyond the end.
SAME_OPTIONS = {
    "ConstantLR": ("constant", [{"factor": 1 / 3}, {"factor": 0.5, "total_iters": 1},
                                {"factor": 1.0}, {"factor": 0.2, "total_iters": 50}]),
    "LinearLR": ("linear", [{}, {"start_factor": 0.1, "total_iters": 7},
                            {"start_factor": 1.0, "end_factor": 0.0, "total_iters": 12},
                            {"start_factor": 0.25, "end_factor": 0.75, "total_iters": 1}]),
    "PolynomialLR": ("polynomial", [{}, {"total_iters": 12, "power": 2.0}, {"power": 0.5},
                                    {"total_iters": 1}, {"total_iters": 60, "power": 0.9}]),
    "ExponentialLR": ("exponential", [{"gamma": 0.9}, {"gamma": 1.0}, {"gamma": 1.1}]),
    "StepLR": ("step", [{"step_size": 3}, {"step_size": 1, "gamma": 0.5},
                        {"step_size": 100, "gamma": 0.5}, {"step_size": 4, "gamma": 2.0}]),
    "MultiStepLR": ("multistep", [{"milestones": [3, 8]}, {"milestones": [8, 3, 3], "gamma": 0.5},
                                  {"milestones": []}, {"milestones": [100]}]),
    "CosineAnnealingLR": ("cosine", [{"T_max": 10}, {"T_max": 7, "eta_min": 0.1}, {"T_max": 1},
                                     {"T_max": 100, "eta_min": 0.01}]),
    "CosineAnnealingWarmRestarts": (
        "cosine_restarts",
        [{"T_0": 5}, {"T_0": 3, "T_mult": 2}, {"T_0": 1, "T_mult": 3, "eta_min": 0.05},
         {"T_0": 1}, {"T_0": 100, "T_mult": 2}],
    ),
    "MultiplicativeLR": ("multiplicative", [{"lr_lambda": product_of_factors}]),
}  # fmt: skip


def label(options):
    """The options by name; without addresses, which differ between processes."""
    named = {k: getattr(value, "__name__", value) for k, value in options.items()}
    return ", ".join(f"{k}={value}" for k, value in named.items())


SAME_ROWS = [
    pytest.param(peer, ours, options, id=f"{peer} {label(options)}")
    for peer, (ours, rows) in SAME_OPTIONS.items()
    for options in rows
]


@pytest.mark.parametrize(("peer", "ours", "options"), SAME_ROWS)
def test_the_rates_are_those_of_torch_beyond_the_end_too(peer, ours, options):
    expected, _ = of_torch(lambda opt: getattr(lr_scheduler, peer)(opt, **options), 45)
    if ours == "multiplicative":
        options = {**options, "total_steps": 45}
    schedule = getattr(schedules, ours)(0.7, **options)
    assert_close(torch.stack([schedule(step) for step in range(45)]), expected)


CYCLES = [
    {"step_size_up": 5},
    {"step_size_up": 4, "step_size_down": 7, "mode": "triangular2"},
    {"step_size_up": 7, "step_size_down": 3, "mode": "exp_range", "gamma": 0.97},
    {"step_size_up": 4, "scale_fn": cycle_scale},
    {"step_size_up": 4, "scale_fn": cycle_scale, "scale_mode": "iterations"},
    {"step_size_up": 5, "step_size_down": 0},
]


@pytest.mark.parametrize("options", CYCLES, ids=label)
def test_cycles_and_their_momentum_are_those_of_torch(options):
    rates, momenta = of_torch(
        lambda opt: lr_scheduler.CyclicLR(
            opt, 0.01, 0.5, base_momentum=0.7, max_momentum=0.95, **options
        ),
        45,
    )
    steps = torch.arange(45)
    assert_close(schedules.cyclic(0.01, 0.5, **options)(steps), rates)
    assert_close(schedules.cyclic_momentum(0.7, 0.95, **options)(steps), momenta)


ONE_CYCLES = [
    {"total_steps": 30},
    {"epochs": 3, "steps_per_epoch": 9, "pct_start": 0.45},
    {"total_steps": 30, "anneal_strategy": "linear", "div_factor": 4.0, "final_div_factor": 10.0},
    {"total_steps": 31, "three_phase": True},
    {"total_steps": 20, "three_phase": True, "pct_start": 0.6, "anneal_strategy": "linear"},
    {"total_steps": 12, "pct_start": 0.0},
    {"total_steps": 12, "pct_start": 0.95},
    {"total_steps": 1},
]


@pytest.mark.parametrize("options", ONE_CYCLES, ids=label)
def test_one_cycle_and_its_momentum_are_those_of_torch_and_hold_their_end(options):
    total = options.get("total_steps") or options["epochs"] * options["steps_per_epoch"]
    rates, momenta = of_torch(
        lambda opt: lr_scheduler.OneCycleLR(
            opt, 0.5, base_momentum=0.8, max_momentum=0.9, **options
        ),
        total,
    )
    rate = schedules.one_cycle(0.5, **options)
    factors = ("div_factor", "final_div_factor")
    shape = {name: value for name, value in options.items() if name not in factors}
    momentum = schedules.one_cycle_momentum(base_momentum=0.8, max_momentum=0.9, **shape)
    steps = torch.arange(total)
    assert_close(rate(steps), rates)
    assert_close(momentum(steps), momenta)
    assert torch.equal(rate(torch.tensor([total, 10 * total])), rate(steps[-1:]).expand(2))


def test_join_is_torchs_sequential():
    def make(opt):
        parts = [
            lr_scheduler.ConstantLR(opt, factor=0.1, total_iters=4),
            lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
            lr_scheduler.ExponentialLR(opt, 0.9),
            lr_scheduler.CosineAnnealingLR(opt, 6),
        ]
        return lr_scheduler.SequentialLR(opt, parts, [6, 11, 20])

    ours = schedules.join(
        [
            schedules.constant(0.7, 0.1, 4),
            lambda step: 0.7 / (1 + step.double()),
            schedules.exponential(0.7, 0.9),
            schedules.cosine(0.7, 6),
        ],
        [6, 11, 20],
    )
    assert_close(ours(torch.arange(26)), of_torch(make, 26)[0])


def test_product_is_torchs_chained():
    def make(opt):
        parts = [
            lr_scheduler.LinearLR(opt, 0.1, total_iters=8),
            lr_scheduler.ExponentialLR(opt, 0.95),
            lr_scheduler.MultiStepLR(opt, [10, 20]),
        ]
        return lr_scheduler.ChainedScheduler(parts, opt)

    ours = schedules.product(
        schedules.linear(0.7, 0.1, total_iters=8),
        schedules.exponential(1.0, 0.95),
        schedules.multistep(1.0, [10, 20]),
    )
    assert_close(ours(torch.arange(30)), of_torch(make, 30)[0])


@pytest.mark.parametrize("row", OPTAX, ids=lambda row: f"{row['ours']} {row['options']}")
def test_the_values_are_those_of_optax(row):
    options = {
        name: {int(step): scale for step, scale in value.items()}
        if isinstance(value, dict)
        else value
        for name, value in row["options"].items()
    }
    found = getattr(schedules, row["ours"])(**options)(torch.arange(len(row["values"])))
    assert_close(found, torch.tensor(row["values"], dtype=F64))


def test_inverse_sqrt_is_the_rate_of_the_transformer():
    width, warmup = 512, 40
    schedule = schedules.inverse_sqrt((width * warmup) ** -0.5, warmup)
    steps = torch.arange(1, 200, dtype=F64)
    expected = width**-0.5 * torch.minimum(steps**-0.5, steps * warmup**-1.5)
    assert_close(schedule(steps), expected)
    shifted = schedules.inverse_sqrt(0.3, 10, timescale=50)
    assert_close(
        shifted(torch.tensor(60)), torch.tensor(0.3 / math.sqrt((60 + 40) / 50), dtype=F64)
    )
    assert_close(schedules.inverse_sqrt(0.3, 0)(30_000), torch.tensor(0.15, dtype=F64))


@pytest.mark.parametrize(
    ("decay", "shape"),
    [
        ("linear", lambda s: 1 - s),
        ("cosine", lambda s: (1 + math.cos(math.pi * s)) / 2),
        ("1-sqrt", lambda s: 1 - math.sqrt(s)),
    ],
)
@pytest.mark.parametrize("phases", [(4, 6, 8), (0, 6, 8), (4, 0, 8), (4, 6, 0), (0, 0, 8)], ids=str)
def test_warmup_stable_decay_has_three_phases(decay, shape, phases):
    warmup, stable, length = phases

    def expected(t):
        if t < warmup:
            return 0.1 + 0.9 * t / warmup
        s = (t - warmup - stable) / length if length else float(t >= warmup + stable)
        return 0.2 + 0.8 * shape(min(max(s, 0.0), 1.0))

    schedule = schedules.warmup_stable_decay(1.0, *phases, 0.1, 0.2, decay=decay)
    found = schedule(torch.arange(25))
    assert_close(found, torch.tensor([expected(t) for t in range(25)], dtype=F64), rtol=1e-9)


@given(
    st.dictionaries(st.integers(0, 40), st.floats(-2, 2), min_size=1, max_size=6),
    st.integers(0, 50),
)
def test_piecewise_goes_through_its_points_on_straight_lines(points, t):
    steps = sorted(points)
    if t <= steps[0]:
        expected = points[steps[0]]
    elif t >= steps[-1]:
        expected = points[steps[-1]]
    else:
        after = next(step for step in steps if step > t)
        before = max(step for step in steps if step <= t)
        expected = points[before] + (points[after] - points[before]) * (t - before) / (
            after - before
        )
    found = schedules.piecewise(points)(t)
    assert float(found) == pytest.approx(expected, abs=1e-12)
    held = schedules.piecewise(points, "constant")(t)
    before = max([step for step in steps if step <= t], default=steps[0])
    assert float(held) == points[before]


def test_restarts_come_at_their_very_steps_where_a_logarithm_would_be_rounded():
    schedule = schedules.cosine_restarts(1.0, 3, 3)
    starts = [3 * (3**n - 1) // 2 for n in range(30)]
    values = schedule(torch.tensor(starts))
    assert torch.equal(values, torch.ones_like(values))
    before = schedule(torch.tensor(starts[6:]) - 1)
    assert bool((before < 1e-3).all())


# One of each, with what is swept as an argument.
EACH = {
    "constant": lambda lr: schedules.constant(lr, 0.5, 3),
    "linear": lambda lr: schedules.linear(lr, 0.1, total_iters=4),
    "polynomial": lambda lr: schedules.polynomial(lr, 4, 2.0, end_value=0.1),
    "exponential": lambda lr: schedules.exponential(lr, 0.9, end_value=0.3),
    "step": lambda lr: schedules.step(lr, 2),
    "multistep": lambda lr: schedules.multistep(lr, [2, 4]),
    "multiplicative": lambda lr: schedules.multiplicative(lr, product_of_factors, 6),
    "cosine": lambda lr: schedules.cosine(lr, 5),
    "cosine_decay": lambda lr: schedules.cosine_decay(lr, 5, 0.1, 1.5),
    "cosine_restarts": lambda lr: schedules.cosine_restarts(lr, 2, 2),
    "cyclic": lambda lr: schedules.cyclic(0.0, lr, 3, mode="triangular2"),
    "cyclic_momentum": lambda lr: schedules.cyclic_momentum(0.0, lr, 3, mode="exp_range"),
    "one_cycle": lambda lr: schedules.one_cycle(lr, 7),
    "one_cycle_momentum": lambda lr: schedules.one_cycle_momentum(7, max_momentum=lr),
    "warmup_constant": lambda lr: schedules.warmup_constant(0.0, lr, 3),
    "warmup_cosine": lambda lr: schedules.warmup_cosine(0.0, lr, 2, 6),
    "warmup_exponential": lambda lr: schedules.warmup_exponential(0.0, lr, 2, 1, 0.9),
    "warmup_stable_decay": lambda lr: schedules.warmup_stable_decay(lr, 2, 2, 3),
    "inverse_sqrt": lambda lr: schedules.inverse_sqrt(lr, 3),
    "sgdr": lambda lr: schedules.sgdr(
        [{"init_value": 0.0, "peak_value": lr, "warmup_steps": 1, "decay_steps": 3}] * 2
    ),
    "piecewise": lambda lr: schedules.piecewise({0: 0.0, 3: lr, 6: 0.1}, "cosine"),
    "piecewise_constant": lambda lr: schedules.piecewise_constant(lr, {2: 0.5}),
    "piecewise_interpolate": lambda lr: schedules.piecewise_interpolate("linear", lr, {4: 0.5}),
    "join": lambda lr: schedules.join([schedules.constant(lr), lambda step: 0.25], [3]),
    "product": lambda lr: schedules.product(schedules.constant(lr), schedules.step(1.0, 2)),
}
each = pytest.mark.parametrize("make", EACH.values(), ids=EACH)


def test_each_schedule_is_in_the_table():
    public = {
        name for name in vars(schedules) if name.islower() and callable(vars(schedules)[name])
    }
    assert set(EACH) == public - {"reduce_on_plateau"}


@each
def test_a_step_is_an_int_or_a_tensor_and_a_value_is_a_0d_float64_tensor(make):
    schedule = make(0.5)
    curve = schedule(torch.arange(8))
    assert (curve.shape, curve.dtype) == ((8,), F64)
    for t in range(8):
        for step in (
            t,
            torch.tensor(t),
            torch.tensor(t, dtype=torch.int32),
            torch.tensor(float(t)),
        ):
            value = schedule(step)
            assert (value.shape, value.dtype, value.requires_grad) == ((), F64, False)
            assert torch.equal(value.cpu(), curve[t].cpu())


@each
def test_a_swept_option_gives_each_member_its_solo_run(make):
    rates = torch.tensor([0.25, 0.5, 1.0], dtype=F64)
    steps = torch.arange(8)
    together = fn.vmap(lambda lr: make(lr)(steps))(rates)
    alone = torch.stack([make(float(lr))(steps) for lr in rates])
    assert_close(together, alone, rtol=1e-14)
    members = fn.vmap(make(0.5))(steps)
    assert torch.equal(members, make(0.5)(steps))


@each
def test_no_value_is_read(make):
    # On meta there is none.
    value = make(0.5)(torch.zeros((), dtype=torch.int64, device="meta"))
    assert (value.shape, value.dtype, value.is_meta) == ((), F64, True)


# One of each kind of formula: compiling takes a second each.
COMPILED = ("exponential", "multistep", "multiplicative", "cosine_restarts", "cyclic", "one_cycle",
            "warmup_cosine", "inverse_sqrt", "piecewise", "join")  # fmt: skip


@pytest.mark.cpu_only
def test_under_jit_no_step_compiles_anything_anew():
    traces = []

    def values(step, lr):
        traces.append(None)
        return {name: EACH[name](lr)(step) for name in COMPILED}

    compiled = fn.jit(values)
    for t in range(8):
        lr = torch.tensor(0.5 + t / 16, dtype=F64)
        found = compiled(torch.tensor(t), lr)
        for name, value in found.items():
            assert_close(value, EACH[name](float(lr))(t), rtol=1e-12, msg=name)
    assert len(traces) == 1


@pytest.mark.cpu_only
def test_under_jit_a_step_may_be_a_number():
    schedule = schedules.join([schedules.step(0.5, 2), schedules.warmup_cosine(0, 1, 2, 6)], [3])
    traces = []
    compiled = fn.jit(lambda step: traces.append(None) or schedule(step))
    for t in range(7):
        assert_close(compiled(t), schedule(t), rtol=1e-14)
    assert len(traces) == 1


def test_counts_of_steps_may_be_swept_too():
    steps = torch.arange(12)

    def curves(n):
        return (
            schedules.linear(0.7, 0.1, total_iters=n)(steps),
            schedules.warmup_cosine(0.0, 0.7, n, n + 4)(steps),
            schedules.warmup_stable_decay(0.7, n, n, n)(steps),
            schedules.cyclic(0.0, 0.7, n)(steps),
            schedules.step(0.7, n)(steps),
        )

    together = fn.vmap(curves)(torch.tensor([1, 3, 5]))
    alone = [torch.stack(each) for each in zip(*map(curves, (1, 3, 5)), strict=True)]
    for one, other in zip(together, alone, strict=True):
        assert_close(one, other, rtol=1e-14)


def test_an_optimizer_takes_a_schedule():
    params = {"w": torch.ones(2, dtype=F64)}
    optimizer = fn.sgd(schedules.one_cycle(0.5, 5))
    state = optimizer.init_state(params)
    for t in range(7):
        updates, state = optimizer.update({"w": torch.ones(2, dtype=F64)}, state, params)
        assert_close(updates["w"], -schedules.one_cycle(0.5, 5)(t).expand(2))


@pytest.mark.parametrize("lr", [schedules.cosine(0.5, 7), schedules.one_cycle(0.5, 6)])
def test_inject_hyperparams_takes_a_schedule(lr):
    params = {"w": torch.ones(2, dtype=F64)}
    optimizer = fn.optimizers.inject_hyperparams(fn.sgd)(lr=lr)
    state = optimizer.init_state(params)
    for t in range(9):
        updates, state = optimizer.update(params, state, params)
        assert_close(updates["w"], -lr(t).expand(2))
        assert_close(state.hyperparams["lr"], lr(t))


NAN = float("nan")
REFUSED = [
    (lambda: schedules.constant("fast"), TypeError, "lr must be a number or a 0-d"),
    (lambda: schedules.constant(NAN), ValueError, "lr"),
    (lambda: schedules.constant(0.1, 1.5), ValueError, "factor must be in .0, 1., got 1.5"),
    (lambda: schedules.constant(torch.ones(2)), ValueError, "lr must be a 0-d tensor, got .2,."),
    (lambda: schedules.constant(torch.tensor(NAN)), ValueError, "lr"),
    (lambda: schedules.linear(0.1, -1.0), ValueError, "start_factor must be >= 0, got -1.0"),
    (lambda: schedules.linear(0.1, total_iters=0), ValueError, "total_iters must be >= 1, got 0"),
    (lambda: schedules.polynomial(0.1, "5"), TypeError, "total_iters"),
    (lambda: schedules.polynomial(0.1, power=-1.0), ValueError, "power"),
    (lambda: schedules.exponential(0.1, 0.0), ValueError, "gamma"),
    (lambda: schedules.exponential(0.1, 0.9, end_value=NAN), ValueError, "end_value"),
    (lambda: schedules.step(0.1, 0), ValueError, "step_size"),
    (lambda: schedules.multistep(0.1, [2.5]), ValueError, "milestones must be an int"),
    (lambda: schedules.multistep(0.1, [-1]), ValueError, "milestones"),
    (lambda: schedules.multiplicative(0.1, 0.9, 4), TypeError, "lr_lambda, got 0.9"),
    (lambda: schedules.multiplicative(0.1, math.sqrt, 1.5), ValueError, "total_steps"),
    (lambda: schedules.cosine(0.1, 0), ValueError, "T_max"),
    (lambda: schedules.cosine_restarts(0.1, 2.5), ValueError, "T_0"),
    (lambda: schedules.cosine_restarts(0.1, 2, 0), ValueError, "T_mult must be an integer"),
    (lambda: schedules.cyclic(0.0, 0.1, 0), ValueError, "step_size_up"),
    (lambda: schedules.cyclic(0.0, 0.1, 2, mode="round"), ValueError, "mode to be one of"),
    (lambda: schedules.cyclic(0.0, 0.1, 2, scale_fn=2.0), TypeError, "scale_fn"),
    (lambda: schedules.cyclic(0.0, 0.1, 2, scale_mode="batch"), ValueError, "scale_mode"),
    (lambda: schedules.one_cycle(0.1), ValueError, "total_steps, or epochs and"),
    (lambda: schedules.one_cycle(0.1, 0), ValueError, "total_steps must be"),
    (lambda: schedules.one_cycle(0.1, 5, pct_start=1.5), ValueError, "pct_start"),
    (lambda: schedules.one_cycle(0.1, 5, anneal_strategy="cosine"), ValueError, "'cos'"),
    (lambda: schedules.one_cycle(0.1, 5, div_factor=0), ValueError, "div_factor"),
    (lambda: schedules.warmup_cosine(0.0, 1.0, 5, 5), ValueError, "decay_steps above"),
    (lambda: schedules.warmup_constant(0.0, 1.0, -1), ValueError, "warmup_steps"),
    (lambda: schedules.inverse_sqrt(1.0, 4, timescale=0), ValueError, "timescale"),
    (lambda: schedules.warmup_stable_decay(1.0, 1, 1, 1, decay="exp"), ValueError, "decay"),
    (lambda: schedules.piecewise({}), ValueError, "at least one point"),
    (lambda: schedules.piecewise([0.1]), TypeError, "expects a dict of steps"),
    (lambda: schedules.piecewise({0.5: 1.0}), ValueError, "points"),
    (lambda: schedules.piecewise({0: 1.0}, "spline"), ValueError, "interpolation"),
    (lambda: schedules.piecewise_constant(1.0, {1: -1.0}), ValueError, "scale"),
    (lambda: schedules.piecewise_interpolate("none", 1.0), ValueError, "interpolate_type"),
    (lambda: schedules.join([], []), ValueError, "at least one"),
    (lambda: schedules.join([0.1, 0.2], [3]), TypeError, "functions of the step, got 0.1"),
    (lambda: schedules.join([math.sqrt] * 3, [3]), ValueError, "got 1"),
    (lambda: schedules.join([math.sqrt] * 3, [5, 3]), ValueError, "rising"),
    (lambda: schedules.product(), ValueError, "at least one"),
    (lambda: schedules.reduce_on_plateau(0.1, "least"), ValueError, "mode"),
    (lambda: schedules.reduce_on_plateau(0.1, factor=1.0), ValueError, "factor"),
    (lambda: schedules.reduce_on_plateau(0.1, patience=1.5), ValueError, "patience"),
    (lambda: schedules.reduce_on_plateau(0.1, threshold_mode="x"), ValueError, "threshold_mode"),
    (lambda: schedules.reduce_on_plateau(-0.1), ValueError, "lr"),
]  # fmt: skip


@pytest.mark.cpu_only
@pytest.mark.parametrize(("make", "error", "message"), REFUSED)
def test_bad_options_are_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


PLATEAUS = [
    {},
    {"mode": "max", "patience": 1},
    {"patience": 0, "factor": 0.5, "cooldown": 2},
    {"patience": 2, "cooldown": 1, "threshold": 0.3},
    {"patience": 1, "threshold_mode": "abs", "threshold": 0.2, "factor": 0.3},
    {"patience": 1, "mode": "max", "threshold_mode": "abs", "threshold": 0.2},
    {"patience": 0, "min_lr": 0.05},
    {"patience": 0, "eps": 0.02},
    {"patience": 0, "factor": 0.0},
    {"patience": 1, "threshold": 1.0},
]


def some_metrics(seed, steps=60):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(steps, generator=generator, dtype=F64, device="cpu")
    drawn = drawn + 3 * torch.exp(-torch.arange(steps, device="cpu") / 10)
    drawn[steps // 2] = NAN
    return drawn


@pytest.mark.parametrize("options", PLATEAUS, ids=label)
@pytest.mark.parametrize("seed", [0, 1])
def test_reduce_on_plateau_is_torchs(options, seed):
    metrics = some_metrics(seed)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.7)
    peer = lr_scheduler.ReduceLROnPlateau(optimizer, **options)
    plateau = schedules.reduce_on_plateau(0.7, **options)
    state = plateau.init()
    for metric in metrics:
        before = tuple(leaf._version for leaf in state)
        after = plateau.update(state, metric.to(state.lr.device))
        assert tuple(leaf._version for leaf in state) == before
        assert fn.tree.alike(state, after)
        state = after
        peer.step(float(metric))
        assert float(state.lr) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        assert int(state.bad) == peer.num_bad_epochs
        assert int(state.cooldown) == max(peer.cooldown_counter, 0)
        assert float(state.best) == peer.best


@pytest.mark.cpu_only
def test_reduce_on_plateau_is_the_same_under_scan_vmap_and_jit():
    metrics = torch.stack([some_metrics(seed) for seed in range(3)])

    def run(lr, metrics):
        plateau = schedules.reduce_on_plateau(lr, patience=1, cooldown=1, min_lr=0.01)
        return fn.scan(lambda s, m: (plateau.update(s, m), s.lr), plateau.init(), metrics)

    rates = torch.tensor([0.1, 0.2, 0.3], dtype=F64)
    alone = [run(lr, row) for lr, row in zip(rates, metrics, strict=True)]
    for together in (fn.vmap(run)(rates, metrics), fn.jit(fn.vmap(run))(rates, metrics)):
        for member, solo in enumerate(alone):
            expected = fn.tree.leaves(solo)
            for leaf, one in zip(fn.tree.leaves(together), expected, strict=True):
                assert_close(leaf[member], one, equal_nan=True)


def test_reduce_on_plateau_reads_no_value():
    plateau = schedules.reduce_on_plateau(0.1)
    state = plateau.update(plateau.init("meta"), torch.ones((), device="meta"))
    assert all(leaf.is_meta for leaf in state)


def test_a_metric_that_is_no_scalar_is_an_error():
    plateau = schedules.reduce_on_plateau(0.1)
    with pytest.raises(ValueError, match="0-d tensor as metric, got"):
        plateau.update(plateau.init(), torch.ones(2))
