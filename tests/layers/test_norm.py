import copy

import pytest
import torch
from layers.oracle import (
    assert_near,
    check_against,
    check_module,
    cotangent,
    params_of,
    randn,
    randomize,
    state_of,
    strided,
    transposed,
)
from torch import nn
from torch._decomp import decomposition_table

import funcnet as fn
from funcnet import runtime
from funcnet.layers import layer_norm

# name: (funcnet's arguments, torch's normalized_shape, the other options, input shape)
LAYER_NORMS = {
    "last": ((), 6, {}, (5, 6)),
    "int": ((6,), 6, {}, (5, 6)),
    "list": (([6],), [6], {}, (4, 5, 6)),
    "two dimensions": (((5, 6),), (5, 6), {}, (4, 5, 6)),
    "all dimensions": (((4, 5, 6),), (4, 5, 6), {}, (4, 5, 6)),
    "size": ((torch.Size([5, 6]),), torch.Size([5, 6]), {}, (2, 3, 5, 6)),
    "one vector": ((), 6, {}, (6,)),
    "eps": ((), 6, {"eps": 0.5}, (5, 6)),
    "no eps": ((), 6, {"eps": 0.0}, (5, 6)),
    "not affine": ((), 6, {"elementwise_affine": False}, (5, 6)),
    "not affine, bias": ((), 6, {"elementwise_affine": False, "bias": True}, (5, 6)),
    "not affine, shape": (((5, 6),), (5, 6), {"elementwise_affine": False}, (3, 5, 6)),
    "no bias": ((), 6, {"bias": False}, (5, 6)),
    "no bias, shape": (((5, 6),), (5, 6), {"bias": False}, (3, 5, 6)),
    "leading dimensions": ((), 6, {}, (2, 3, 4, 5, 6)),
    "empty batch": ((), 6, {}, (0, 6)),
    "empty batch within": ((), 6, {"bias": False}, (3, 0, 6)),
    "one feature": ((), 1, {}, (5, 1)),
}


@pytest.mark.parametrize("name", LAYER_NORMS)
def test_layer_norm_is_torchs(name):
    arguments, shape, options, x = LAYER_NORMS[name]
    check_module(fn.layer_norm(*arguments, **options), nn.LayerNorm(shape, **options), randn(*x))


@pytest.mark.parametrize("name", ["last", "no bias", "not affine", "two dimensions"])
def test_layer_norm_is_its_formula(name):
    arguments, shape, options, x = LAYER_NORMS[name]
    dims = tuple(range(-len((shape,) if isinstance(shape, int) else shape), 0))

    def formula(params, x):
        centred = x - x.mean(dims, keepdim=True)
        n = centred / (centred.square().mean(dims, keepdim=True) + 1e-5).sqrt()
        return n * params.get("weight", 1) + params.get("bias", 0)

    params = params_of(randomize(nn.LayerNorm(shape, **options).double()))
    check_against(formula, fn.layer_norm(*arguments, **options), params, 2 * randn(*x) + 3)


def test_layer_norm_pullback_is_the_written_formula():
    x, weight = randn(5, 6), randn(6, seed=1)
    layer = fn.layer_norm(bias=False)
    y, pullback, _ = layer.vjp({"weight": weight}, x)
    dy = cotangent(y)
    rstd = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
    n = (x - x.mean(-1, keepdim=True)) * rstd
    g = dy * weight
    dx = rstd * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))
    assert_near(pullback(dy), ({"weight": (dy * n).sum(0)}, dx))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["last", "two dimensions", "no bias", "not affine"])
def test_layer_norm_computes_in_the_dtype_of_its_input(name, dtype):
    arguments, shape, options, x = LAYER_NORMS[name]
    module = nn.LayerNorm(shape, **options)
    check_module(fn.layer_norm(*arguments, **options), module, randn(*x, dtype=dtype))


@pytest.mark.parametrize("rearrange", [transposed, strided, lambda x: x[:1].expand(x.shape)])
@pytest.mark.parametrize("name", ["last", "no bias", "not affine"])
def test_layer_norm_takes_inputs_and_cotangents_that_are_not_contiguous(name, rearrange):
    arguments, shape, options, _ = LAYER_NORMS[name]
    x, dy = rearrange(randn(4, 5, 6)), rearrange(randn(4, 5, 6, seed=2))
    module = nn.LayerNorm(shape, **options)
    check_module(fn.layer_norm(*arguments, **options), module, x, dy=dy)


def test_layer_norm_of_one_value_far_from_zero_keeps_its_accuracy():
    check_module(fn.layer_norm(), nn.LayerNorm(6), randn(5, 6) + 1e4, tolerance=1e-8)


def test_layer_norm_takes_float32_params_for_bfloat16_inputs_as_torch_does():
    layer, module = fn.layer_norm(dtype=torch.float32), randomize(nn.LayerNorm(6))
    x = randn(5, 6, dtype=torch.bfloat16)
    assert {leaf.dtype for leaf in layer.init(fn.key(0), x)[0].values()} == {torch.float32}
    check_against(
        lambda params, x: torch.func.functional_call(module, params, (x,)),
        layer, params_of(module), x, tolerance=3e-2,
    )  # fmt: skip


def test_layer_norm_starts_as_the_identity_on_normalized_values():
    params, state = fn.layer_norm((2, 3), dtype=torch.float64).init(fn.key(0), torch.ones(4, 2, 3))
    ones = torch.ones(2, 3, dtype=torch.float64)
    assert_near(params, {"weight": ones, "bias": ones - 1})
    assert state == {}


NORM6 = {"weight": randn(6), "bias": randn(6)}


@pytest.mark.parametrize(
    ("layer", "params", "x", "kind", "message"),
    [
        (fn.layer_norm(6), NORM6, randn(5, 7), ValueError,
         "layer_norm: expects last dimensions (6,), got (5, 7)"),
        (fn.layer_norm((5, 6)), NORM6, randn(6), ValueError,
         "layer_norm: expects last dimensions (5, 6), got (6,)"),
        (fn.layer_norm(), NORM6, randn(5, 7), ValueError,
         "layer_norm: weight expects last dimensions (6,), got (5, 7)"),
        (fn.layer_norm(), NORM6, randn(), ValueError,
         "layer_norm: expects last dimensions (n,), got ()"),
        (fn.layer_norm(), NORM6, torch.ones(5, 6, dtype=torch.int32), TypeError,
         "layer_norm: expects a floating-point tensor, got int32 (5, 6)"),
        (fn.layer_norm(bias=False), NORM6, randn(5, 6), ValueError,
         "layer_norm: expects params ['weight'], got ['bias', 'weight']"),
        (fn.layer_norm(elementwise_affine=False), NORM6, randn(5, 6), ValueError,
         "layer_norm: expects params [], got ['bias', 'weight']"),
        (fn.layer_norm(), {**NORM6, "bias": randn(7)}, randn(5, 6), ValueError,
         "layer_norm: bias expects last dimensions (7,), got (5, 6)"),
    ],
)  # fmt: skip
def test_layer_norm_refuses(layer, params, x, kind, message):
    for call in (layer.apply, layer.vjp):
        with pytest.raises(kind) as raised:
            call(params, x)
        assert str(raised.value) == message


def test_layer_norm_refuses_params_of_another_dtype_than_x():
    with pytest.raises((ValueError, TypeError), match=r"^layer_norm: "):
        fn.layer_norm().apply(NORM6, randn(5, 6, dtype=torch.float32))


@pytest.mark.parametrize("dy", [(6,), (1, 6), (5, 1), (5, 7), ()])
def test_layer_norm_refuses_a_cotangent_of_another_shape_than_y(dy):
    _, pullback, _ = fn.layer_norm().vjp(NORM6, randn(5, 6))
    with pytest.raises(
        ValueError, match=r"^layer_norm: pullback expects dy of shape \(5, 6\), got"
    ):
        pullback(randn(*dy))


MODULES = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}

SHAPES = [(8, 3), (1, 3, 5), (4, 3, 5), (4, 3, 2, 5), (1, 3, 1, 2), (2, 3, 2, 3, 2), (8, 1)]

OPTIONS = {
    "defaults": {},
    "eps": {"eps": 0.3},
    "small eps": {"eps": 1e-12},
    "large eps": {"eps": 100.0},
    "momentum": {"momentum": 0.7},
    "momentum 0": {"momentum": 0.0},
    "momentum 1": {"momentum": 1.0},
    "cumulative": {"momentum": None},
    "not affine": {"affine": False},
    "not tracked": {"track_running_stats": False},
    "not tracked, not affine": {"track_running_stats": False, "affine": False},
    "cumulative, not affine": {"momentum": None, "affine": False, "eps": 1e-3},
    "no bias": {"bias": False},
    "no bias, not tracked": {"bias": False, "track_running_stats": False},
}


def batch_norms(shape, options):
    return fn.batch_norm(**options), MODULES[len(shape)](shape[1], **options)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_batch_norm_is_torchs(name, shape, train):
    x = 2 * randn(*shape) + 1
    check_module(*batch_norms(shape, OPTIONS[name]), x, train=train)


@pytest.mark.parametrize("name", OPTIONS)
def test_batch_norm_tracks_statistics_over_batches_and_uses_them_in_eval_as_torch_does(name):
    layer, module = batch_norms((6, 3, 4), OPTIONS[name])
    module = randomize(module.double())
    params, state = params_of(module), state_of(module)
    for batch in range(5):
        x = randn(6 + batch, 3, 4, seed=batch) * (batch + 1) + batch
        # In between, a batch in eval mode must leave no trace.
        for train in (False, True):
            module.train(train)
            y, state = layer.apply(params, x, state, train=train)
            assert_near(y, module(x).detach())
            assert_near(fn.tree.to_dotted(state), dict(module.named_buffers()))


def test_batch_norm_starts_with_torchs_state():
    layer, module = batch_norms((4, 3), {})
    params, state = layer.init(fn.key(0), randn(4, 3))
    assert_near(params, params_of(module.double()))
    assert_near(state, state_of(module.double()))


@pytest.mark.parametrize("name", ["defaults", "not affine", "cumulative", "not tracked"])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0), (0, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_batch_norm_of_no_values_is_torchs(name, shape, train):
    check_module(*batch_norms(shape, OPTIONS[name]), randn(*shape), train=train)


def formula_of(train):
    def formula(params, x, state):
        dims = [dim for dim in range(x.dim()) if dim != 1]
        along = [1, -1] + [1] * (x.dim() - 2)
        if train:
            mean = x.mean(dims, keepdim=True)
            var = (x - mean).square().mean(dims, keepdim=True)
        else:
            mean, var = (state[name].reshape(along) for name in ("running_mean", "running_var"))
        n = (x - mean) / (var + 1e-5).sqrt()
        return n * params["weight"].reshape(along) + params["bias"].reshape(along)

    return formula


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_norm_is_its_formula(shape, train):
    layer, module = batch_norms(shape, {})
    randomize(module.double())
    state = state_of(module)
    check_against(
        lambda params, x: formula_of(train)(params, x, state),
        layer, params_of(module), 2 * randn(*shape) + 3, state, train=train,
    )  # fmt: skip


def test_batch_norm_running_variance_is_the_unbiased_one():
    x = randn(5, 3, 4)
    layer = fn.batch_norm(momentum=0.25)
    params, state = layer.init(fn.key(0), x)
    _, new = layer.apply(params, x, state, train=True)
    by_channel = x.transpose(0, 1).flatten(1)
    assert_near(new["running_mean"], 0.25 * by_channel.mean(1))
    assert_near(new["running_var"], 0.75 + 0.25 * by_channel.var(1, unbiased=True))
    assert_near(new["num_batches_tracked"], torch.tensor(1))


def test_batch_norm_cumulative_average_is_the_mean_over_all_batches():
    layer = fn.batch_norm(momentum=None)
    batches = [randn(6, 3, seed=seed) for seed in range(7)]
    params, state = layer.init(fn.key(0), batches[0])
    for x in batches:
        _, state = layer.apply(params, x, state, train=True)
    assert_near(state["running_mean"], torch.stack([x.mean(0) for x in batches]).mean(0))
    assert_near(state["running_var"], torch.stack([x.var(0) for x in batches]).mean(0))


@pytest.mark.parametrize("spread", [1e-7, 1e-3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_batch_norm_tracks_small_and_large_variances_accurately(spread, dtype):
    x = (randn(64, 3) * spread).to(dtype)
    layer = fn.batch_norm(momentum=1.0)
    params, state = layer.init(fn.key(0), x)
    _, new = layer.apply(params, x, state, train=True)
    # Evaluation sees the variance only as var + eps, so that is what must be accurate.
    seen, expected = new["running_var"].double() + 1e-5, x.double().var(0) + 1e-5
    assert_near(seen, expected, {torch.float64: 1e-10, torch.float32: 1e-5}[dtype])
    assert new["running_var"].min() >= 0


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_batch_norm_of_constant_channels_is_torchs(train):
    x = torch.full((6, 3), 2.5, dtype=torch.float64)
    check_module(*batch_norms((6, 3), {}), x, train=train)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["defaults", "cumulative", "not affine", "not tracked"])
def test_batch_norm_computes_in_the_dtype_of_its_input(name, dtype, train):
    x = randn(8, 3, 4, dtype=dtype)
    check_module(*batch_norms(x.shape, OPTIONS[name]), x, train=train)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_batch_norm_takes_float32_params_and_state_for_bfloat16_inputs_as_torch_does(train):
    module = randomize(nn.BatchNorm1d(3)).train(train)
    layer, x = fn.batch_norm(dtype=torch.float32), randn(32, 3, 4, dtype=torch.bfloat16)
    state = state_of(module)
    working = copy.deepcopy(module)
    new_state = check_against(
        lambda params, x: torch.func.functional_call(working, params, (x,)),
        layer, params_of(module), x, state, train=train, tolerance=3e-2,
    )  # fmt: skip
    # The statistics are in float32, so they are accurate though x is not.
    assert_near(new_state, state_of(working), 1e-5)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "rearrange",
    [
        transposed,
        strided,
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x[:, :, :1].expand(x.shape),
    ],
    ids=["transposed", "strided", "channels_last", "expanded"],
)
@pytest.mark.parametrize("name", ["defaults", "not affine", "not tracked"])
def test_batch_norm_takes_inputs_and_cotangents_that_are_not_contiguous(name, rearrange, train):
    x, dy = rearrange(randn(4, 3, 5, 6)), rearrange(randn(4, 3, 5, 6, seed=2))
    check_module(*batch_norms(x.shape, OPTIONS[name]), x, train=train, dy=dy)


def test_batch_norm_within_a_net_keeps_its_state_under_its_name():
    net = fn.serial(fn.linear(4), fn.batch_norm(), fn.relu(), fn.linear(2))
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    for train in (True, False):
        state = check_module(net, module, randn(8, 3), train=train)
        assert list(fn.tree.to_dotted(state)) == [
            "1.running_mean", "1.running_var", "1.num_batches_tracked",
        ]  # fmt: skip


def test_batch_norm_does_not_change_the_state_it_is_given():
    layer, x = fn.batch_norm(), randn(5, 3)
    params, state = layer.init(fn.key(0), x)
    before = fn.tree.map(torch.clone, state)
    layer.apply(params, x, state, train=True)
    layer.vjp(params, x, state)
    assert_near(state, before, 0.0)


@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1)])
def test_batch_norm_refuses_one_value_a_channel_where_torch_does(shape, tracked):
    layer, module = batch_norms(shape, {"track_running_stats": tracked})
    x = randn(*shape)
    params, state = layer.init(fn.key(0), x)
    for train in (True, False):
        if train or not tracked:
            with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
                module.double().train(train)(x)
            with pytest.raises(
                ValueError, match=r"^batch_norm: needs more than one value per chan"
            ):
                layer.apply(params, x, state, train=train)
        else:
            assert layer.apply(params, x, state, train=train)[0].shape == shape


BATCH3, STATE3 = fn.batch_norm().init(fn.key(0), randn(4, 3))


@pytest.mark.parametrize(
    ("options", "params", "x", "state", "kind", "message"),
    [
        ({}, BATCH3, randn(4, 5), STATE3, ValueError,
         "batch_norm: weight expects 3 channels in dimension 1, got (4, 5)"),
        ({}, {**BATCH3, "bias": randn(4)}, randn(4, 3), STATE3, ValueError,
         "batch_norm: bias expects 4 channels in dimension 1, got (4, 3)"),
        ({"affine": False}, {}, randn(4, 5), STATE3, ValueError,
         "batch_norm: running_mean expects 3 channels in dimension 1, got (4, 5)"),
        ({}, BATCH3, randn(3), STATE3, ValueError,
         "batch_norm: expects (batch, channels, *), got (3,)"),
        ({}, BATCH3, torch.ones(4, 3, dtype=torch.int64), STATE3, TypeError,
         "batch_norm: expects a floating-point tensor, got int64 (4, 3)"),
        ({}, BATCH3, randn(4, 3), {}, ValueError,
         "batch_norm: expects state "
         "['num_batches_tracked', 'running_mean', 'running_var'], got []"),
        ({"track_running_stats": False}, BATCH3, randn(4, 3), STATE3, ValueError,
         "batch_norm: has no state, "
         "got state with ['num_batches_tracked', 'running_mean', 'running_var']"),
        ({"affine": False}, BATCH3, randn(4, 3), STATE3, ValueError,
         "batch_norm: expects params [], got ['bias', 'weight']"),
        ({}, {}, randn(4, 3), STATE3, ValueError,
         "batch_norm: expects params ['bias', 'weight'], got []"),
    ],
)  # fmt: skip
def test_batch_norm_refuses(options, params, x, state, kind, message):
    layer = fn.batch_norm(**options)
    for call in (layer.apply, layer.vjp):
        for train in (True, False):
            with pytest.raises(kind) as raised:
                call(params, x, state, train=train)
            assert str(raised.value) == message


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_batch_norm_refuses_params_of_another_dtype_than_x(train):
    with pytest.raises((ValueError, TypeError), match=r"^batch_norm: "):
        fn.batch_norm().apply(BATCH3, randn(4, 3, dtype=torch.float32), STATE3, train=train)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dy", [(3,), (1, 3), (4, 1), (4, 4), ()])
def test_batch_norm_refuses_a_cotangent_of_another_shape_than_y(dy, train):
    _, pullback, _ = fn.batch_norm().vjp(BATCH3, randn(4, 3), STATE3, train=train)
    with pytest.raises(
        ValueError, match=r"^batch_norm: pullback expects dy of shape \(4, 3\), got"
    ):
        pullback(randn(*dy))


def test_batch_norm_takes_its_options_by_position_in_torchs_order():
    x = randn(6, 3, 4)
    for options in [(1e-3,), (1e-3, None), (1e-3, 0.3, False), (1e-3, 0.3, True, False)]:
        check_module(fn.batch_norm(*options), nn.BatchNorm1d(3, *options), x)
        check_module(fn.batch_norm(*options), nn.BatchNorm1d(3, *options), x, train=False)


HINT = "the size of the input is found by init, there is no argument for it"


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: fn.batch_norm(16), "batch_norm"),
        (lambda: fn.group_norm(2, 16), "group_norm"),
        (lambda: fn.instance_norm(16), "instance_norm"),
        (lambda: fn.instance_norm2d(16), "instance_norm2d"),
        (lambda: fn.layer_norm(6, 16), "layer_norm"),
        (lambda: fn.rms_norm(6, 16), "rms_norm"),
    ],
)
def test_a_norm_called_with_the_number_of_channels_as_torchs_is_refused(make, name):
    with pytest.raises(TypeError) as raised:
        make()
    assert str(raised.value) == f"{name}: eps must be a float, got 16; {HINT}"


@pytest.mark.parametrize(
    "make", [fn.batch_norm, fn.instance_norm, lambda eps: fn.group_norm(2, eps)]
)
def test_a_norm_refuses_a_negative_eps(make):
    with pytest.raises(ValueError, match=r"_norm: eps must be >= 0, got -0.1$"):
        make(-0.1)


HALF, WIDE = torch.bfloat16, torch.float32


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("of_state", [HALF, WIDE])
@pytest.mark.parametrize("of_params", [None, HALF, WIDE])
@pytest.mark.parametrize("make", [fn.batch_norm, fn.instance_norm])
def test_params_and_state_may_each_be_of_half_precision_or_wide(make, of_params, of_state, train):
    layer = make(affine=of_params is not None, track_running_stats=True)
    x = randn(4, 3, 8, dtype=HALF)
    wide_params, wide_state = layer.init(fn.key(0), x.float())
    params = {name: leaf.to(of_params) for name, leaf in wide_params.items()}
    state = {
        name: leaf.to(of_state) if leaf.is_floating_point() else leaf
        for name, leaf in wide_state.items()
    }
    y, pullback, after = layer.vjp(params, x, state, train=train)
    dparams, dx = pullback(cotangent(y))
    expected_y, pullback, expected = layer.vjp(wide_params, x.float(), wide_state, train=train)
    expected_dparams, expected_dx = pullback(cotangent(y).float())
    assert y.dtype == dx.dtype == HALF
    assert all(leaf.dtype == of_params for leaf in dparams.values())
    assert [leaf.dtype for leaf in after.values()] == [leaf.dtype for leaf in state.values()]
    widened = fn.tree.map(
        lambda leaf: leaf.float() if leaf.is_floating_point() else leaf, (y, dparams, dx, after)
    )
    assert_near(widened, (expected_y, expected_dparams, expected_dx, expected), 3e-2)


RMS_NORMS = {
    "last": ((), 6, (), (5, 6)),
    "int": ((6,), 6, (), (5, 6)),
    "two dimensions": (([5, 6],), [5, 6], (), (4, 5, 6)),
    "one vector": ((), 6, (), (6,)),
    "eps": ((6, 0.5), 6, (0.5,), (5, 6)),
    "no eps": ((6, 0.0), 6, (0.0,), (5, 6)),
    "not affine": ((6, None, False), 6, (None, False), (5, 6)),
    "not affine, eps": (((5, 6), 0.1, False), (5, 6), (0.1, False), (2, 5, 6)),
    "empty batch": ((), 6, (), (0, 6)),
    "one feature": ((1, 0.1), 1, (0.1,), (5, 1)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RMS_NORMS)
def test_rms_norm_is_torchs(name, dtype):
    arguments, shape, options, x = RMS_NORMS[name]
    x = randn(*x, dtype=dtype)
    check_module(fn.rms_norm(*arguments), nn.RMSNorm(shape, *options), x)
    if x.dim() > 1:
        x, dy = transposed(x), strided(x.flip(0))
        check_module(fn.rms_norm(*arguments), nn.RMSNorm(shape, *options), x, dy=dy)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_rms_norm_takes_a_float32_weight_for_half_precision_as_torch_does(half):
    module = randomize(nn.RMSNorm(6))
    check_against(
        lambda params, x: torch.func.functional_call(module, params, (x,)),
        fn.rms_norm(dtype=torch.float32), params_of(module), randn(5, 6).to(half), tolerance=3e-2,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["last", "two dimensions", "not affine"])
def test_rms_norm_calls_the_kernels_of_cuda_as_torch_defines_them(name, monkeypatch):
    aten = torch.ops.aten
    monkeypatch.setattr(layer_norm, "_is_fused", lambda x, weight: True)
    backward = decomposition_table[aten._fused_rms_norm_backward.default]
    monkeypatch.setattr(runtime, "rms_norm_backward", backward)
    arguments, shape, options, x = RMS_NORMS[name]
    check_module(fn.rms_norm(*arguments), nn.RMSNorm(shape, *options), randn(*x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_rms_norms_eps_is_by_default_the_machines_as_torchs(dtype):
    x = torch.full((1, 2), 1e-7, dtype=torch.float64).to(dtype)
    check_module(fn.rms_norm(), nn.RMSNorm(2), x, tolerance=1e-3 if dtype.itemsize == 2 else None)


@pytest.mark.parametrize(
    ("layer", "params", "x", "kind", "message"),
    [
        (fn.rms_norm(6), {"weight": randn(6)}, randn(5, 7), ValueError,
         "rms_norm: expects last dimensions (6,), got (5, 7)"),
        (fn.rms_norm(), {"weight": randn(6)}, randn(5, 7), ValueError,
         "rms_norm: weight expects last dimensions (6,), got (5, 7)"),
        (fn.rms_norm(), {"weight": randn(6)}, randn(), ValueError,
         "rms_norm: expects last dimensions (n,), got ()"),
        (fn.rms_norm(), {"weight": randn(6)}, torch.ones(5, 6, dtype=torch.int32), TypeError,
         "rms_norm: expects a floating-point tensor, got int32 (5, 6)"),
        (fn.rms_norm(), NORM6, randn(5, 6), ValueError,
         "rms_norm: expects params ['weight'], got ['bias', 'weight']"),
    ],
)  # fmt: skip
def test_rms_norm_refuses(layer, params, x, kind, message):
    for call in (layer.apply, layer.vjp):
        with pytest.raises(kind) as raised:
            call(params, x)
        assert str(raised.value) == message
