import pytest
import torch
from layers.oracle import assert_near, check_against, check_module, randn, strided, transposed
from torch import nn

import funcnet as fn

OPTIONS = {
    "defaults": (3,),
    "one": (1, 0.3),
    "even": (2, 0.3),
    "four": (4, 0.5, 0.4, 2.0),
    "wider than the channels": (9, 0.5),
    "by half": (3, 1.0, 0.5, 0.5),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 5, 3, 4), (1, 5, 2, 3, 2), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_local_response_norm_is_torchs(name, shape, dtype):
    options, x = OPTIONS[name], 2 * randn(*shape, dtype=dtype)
    check_module(fn.local_response_norm(*options), nn.LocalResponseNorm(*options), x)
    keywords = dict(zip(("size", "alpha", "beta", "k"), options, strict=False))
    check_module(fn.local_response_norm(**keywords), nn.LocalResponseNorm(**keywords), x)


@pytest.mark.parametrize("name", OPTIONS)
def test_local_response_norm_is_torchs_in_half_precision(name):
    # Of rank 3: torch's avg_pool3d, by which the module takes others, has no bfloat16.
    options, x = OPTIONS[name], randn(2, 5, 4, dtype=torch.bfloat16)
    check_module(fn.local_response_norm(*options), nn.LocalResponseNorm(*options), x)


@pytest.mark.parametrize("rearrange", [transposed, strided])
def test_local_response_norm_takes_inputs_and_cotangents_that_are_not_contiguous(rearrange):
    x, dy = rearrange(randn(2, 5, 4)), rearrange(randn(2, 5, 4, seed=2))
    check_module(fn.local_response_norm(2, 0.5), nn.LocalResponseNorm(2, 0.5), x, dy=dy)


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 5, 0), (2, 5, 0, 3)])
def test_local_response_norm_of_no_values_is_empty(shape):
    check_module(fn.local_response_norm(3), nn.LocalResponseNorm(3), randn(*shape))


def cross_map_formula(size, alpha=1e-4, beta=0.75, k=1.0):
    def formula(params, x):
        squares, channels = x.square(), range(x.shape[1])
        reach = (size - 1) // 2
        sums = [
            sum(squares[:, j] for j in channels if abs(c - j) <= reach or j == 0) for c in channels
        ]
        return x / (k + alpha / size * torch.stack(sums, 1)) ** beta

    return formula


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("channels", [1, 3, 8])
@pytest.mark.parametrize("name", OPTIONS)
def test_cross_map_lrn_has_the_values_of_torchs_and_the_derivative_of_its_formula(
    name, channels, dtype
):
    options, x = OPTIONS[name], randn(2, channels, 3, 4, dtype=dtype)
    layer = fn.cross_map_lrn(*options)
    assert_near(layer.apply({}, x)[0], nn.CrossMapLRN2d(*options)(x))
    check_against(cross_map_formula(*options), layer, {}, x)
    check_against(cross_map_formula(*options), layer, {}, transposed(x), dy=strided(x))


def test_the_backward_pass_of_torchs_cross_map_lrn_is_not_its_derivative():
    x = randn(1, 4, 1, 1)
    module = nn.CrossMapLRN2d(3, 1.0)
    with pytest.raises(Exception, match="Jacobian mismatch"):
        torch.autograd.gradcheck(module, x.requires_grad_())


@pytest.mark.parametrize("shape", [(0, 5, 4, 2), (2, 5, 0, 3)])
def test_cross_map_lrn_of_no_values_is_empty(shape):
    y, pullback, _ = fn.cross_map_lrn(3).vjp({}, randn(*shape))
    assert y.shape == pullback(y)[1].shape == shape


@pytest.mark.parametrize("make", [fn.local_response_norm, fn.cross_map_lrn])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_responses_are_normalized_in_half_precision(make, half):
    layer, x = make(3, 0.5), randn(2, 5, 3, 4).to(half)
    y, pullback, _ = layer.vjp({}, x)
    expected, expected_pullback, _ = layer.vjp({}, x.double())
    assert y.dtype == pullback(y)[1].dtype == half
    assert_near(y.double(), expected, 2e-2)
    assert_near(pullback(y)[1].double(), expected_pullback(y.double())[1], 3e-2)


@pytest.mark.parametrize(
    ("layer", "x", "message"),
    [
        (fn.local_response_norm(2), randn(4, 5),
         "local_response_norm: expects (batch, channels, *) of at least 3 dimensions, got (4, 5)"),
        (fn.cross_map_lrn(2), randn(4, 5, 6),
         "cross_map_lrn: expects (batch, channels, H, W), got (4, 5, 6)"),
    ],
)  # fmt: skip
def test_response_norms_refuse_another_rank(layer, x, message):
    for call in (layer.apply, layer.vjp):
        with pytest.raises(ValueError) as raised:  # noqa: PT011 - the whole message is compared
            call({}, x)
        assert str(raised.value) == message


@pytest.mark.parametrize("size", [0, -1, 1.5])
@pytest.mark.parametrize("make", [fn.local_response_norm, fn.cross_map_lrn])
def test_response_norms_refuse_a_size_that_is_none(make, size):
    with pytest.raises(ValueError, match=rf"size must be an integer > 0, got {size}$"):
        make(size)


@pytest.mark.parametrize("make", [fn.local_response_norm, fn.cross_map_lrn])
def test_response_norms_refuse_integers(make):
    with pytest.raises(TypeError, match=rf"^{make.__name__}: expects a floating-point tensor, got"):
        make(3).apply({}, torch.ones(2, 3, 4, 5, dtype=torch.int64))
