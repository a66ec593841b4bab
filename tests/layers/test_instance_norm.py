import copy

import pytest
import torch
from layers.oracle import (
    assert_near,
    check_against,
    check_module,
    params_of,
    randn,
    randomize,
    state_of,
    strided,
    transposed,
)
from torch import nn

import funcnet as fn

INSTANCE = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
RANKED = {1: fn.instance_norm1d, 2: fn.instance_norm2d, 3: fn.instance_norm3d}
SIZES = {1: (5,), 2: (3, 4), 3: (2, 3, 2)}
OPTIONS = {
    "defaults": ((), {}),
    "eps": ((0.3,), {}),
    "affine": ((1e-5, 0.1, True), {}),
    "no bias": ((), {"affine": True, "bias": False}),
    "tracked": ((1e-3, 0.3, False, True), {}),
    "all": ((1e-3, 0.7, True, True), {}),
    "no momentum": ((1e-3, None, True, True), {}),
    "tracked, no bias": ((), {"affine": True, "track_running_stats": True, "bias": False}),
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_instance_norm_is_torchs(name, rank, dtype, train):
    arguments, options = OPTIONS[name]
    x = 2 * randn(2, 3, *SIZES[rank], dtype=dtype) + 1
    for make in (fn.instance_norm, RANKED[rank]):
        module = INSTANCE[rank](3, *arguments, **options)
        check_module(make(*arguments, **options), module, x, train=train)
    module = INSTANCE[rank](3, *arguments, **options)
    check_module(RANKED[rank](*arguments, **options), module, x[0], train=train)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("rearrange", [transposed, strided, lambda x: x[:, :, :1].expand(x.shape)])
@pytest.mark.parametrize("name", ["defaults", "all"])
def test_instance_norm_takes_inputs_and_cotangents_that_are_not_contiguous(name, rearrange, train):
    arguments, options = OPTIONS[name]
    x, dy = rearrange(randn(2, 3, 4, 5)), rearrange(randn(2, 3, 4, 5, seed=2))
    module = nn.InstanceNorm2d(3, *arguments, **options)
    check_module(fn.instance_norm(*arguments, **options), module, x, train=train, dy=dy)


@pytest.mark.parametrize("name", ["tracked", "all", "no momentum"])
def test_instance_norm_tracks_statistics_over_batches_as_torch_does(name):
    arguments, options = OPTIONS[name]
    layer = fn.instance_norm(*arguments, **options)
    module = randomize(nn.InstanceNorm1d(3, *arguments, **options).double())
    params, state = params_of(module), state_of(module)
    for batch in range(4):
        x = randn(2 + batch, 3, 4, seed=batch) * (batch + 1) + batch
        for train in (False, True):
            module.train(train)
            y, state = layer.apply(params, x, state, train=train)
            assert_near(y, module(x).detach())
            assert_near(fn.tree.to_dotted(state), dict(module.named_buffers()))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_instance_norm_takes_float32_params_and_state_for_bfloat16_inputs(train):
    module = randomize(nn.InstanceNorm1d(3, affine=True, track_running_stats=True)).train(train)
    layer = fn.instance_norm(affine=True, track_running_stats=True, dtype=torch.float32)
    working = copy.deepcopy(module)
    new_state = check_against(
        lambda params, x: torch.func.functional_call(working, params, (x,)),
        layer, params_of(module), randn(8, 3, 4, dtype=torch.bfloat16), state_of(module),
        train=train, tolerance=3e-2,
    )  # fmt: skip
    assert_near(new_state, state_of(working), 1e-5)


@pytest.mark.parametrize("name", ["defaults", "affine", "all"])
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (1, 3, 0)])
def test_instance_norm_of_no_values_is_empty_and_keeps_its_state(name, shape):
    arguments, options = OPTIONS[name]
    layer, x = fn.instance_norm(*arguments, **options), randn(*shape)
    params, state = layer.init(fn.key(0), x)
    y, pullback, after = layer.vjp(params, x, state)
    dparams, dx = pullback(x)
    assert_near((y, dx, after), (x, x, state))
    assert all(not leaf.any() and leaf.shape == (3,) for leaf in dparams.values())


@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("shape", [(4, 3, 1), (4, 3, 1, 1), (1, 3, 1)])
def test_instance_norm_refuses_one_value_a_channel_where_torch_does(shape, tracked):
    layer = fn.instance_norm(track_running_stats=tracked)
    module = INSTANCE[len(shape) - 2](3, track_running_stats=tracked).double()
    x = randn(*shape)
    params, state = layer.init(fn.key(0), x)
    for train in (True, False):
        if train or not tracked:
            with pytest.raises(ValueError, match="Expected more than 1 spatial element"):
                module.train(train)(x)
            message = r"^instance_norm: needs more than one value per channel of an example, got"
            with pytest.raises(ValueError, match=message):
                layer.apply(params, x, state, train=train)
        else:
            assert layer.apply(params, x, state, train=train)[0].shape == shape


@pytest.mark.parametrize(
    ("layer", "x", "message"),
    [
        (fn.instance_norm(), randn(3, 5),
         "instance_norm: expects (batch, channels, *) of at least 3 dimensions, got (3, 5)"),
        (fn.instance_norm1d(), randn(5),
         "instance_norm1d: expects (batch, channels, length) or (channels, length), got (5,)"),
        (fn.instance_norm2d(), randn(3, 5),
         "instance_norm2d: expects (batch, channels, height, width) or (channels, height, width), "
         "got (3, 5)"),
        (fn.instance_norm3d(), randn(3, 5, 2),
         "instance_norm3d: expects (batch, channels, depth, height, width) or "
         "(channels, depth, height, width), "
         "got (3, 5, 2)"),
    ],
)  # fmt: skip
def test_instance_norm_refuses_another_rank(layer, x, message):
    for call in (layer.apply, layer.vjp):
        with pytest.raises(ValueError) as raised:  # noqa: PT011 - the whole message is compared
            call({}, x)
        assert str(raised.value) == message


@pytest.mark.parametrize(("shape", "dim"), [((2, 4, 5), 1), ((4, 5), 0)])
def test_instance_norm_names_the_dimension_of_the_channels(shape, dim):
    message = rf"^instance_norm1d: weight expects 3 channels in dimension {dim}, got"
    with pytest.raises(ValueError, match=message):
        fn.instance_norm1d(affine=True).apply({"weight": randn(3), "bias": randn(3)}, randn(*shape))
