import pytest
import torch
from layers.oracle import assert_near, check_module, randn, samples_of, strided, transposed
from torch import nn

import funcnet as fn

SHAPES = [(), (8,), (2, 3), (0,), (3, 0), (1,)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bilinear_is_torchs(shape, bias, dtype):
    x = (randn(*shape, 2, dtype=dtype), randn(*shape, 3, seed=1, dtype=dtype))
    for train in (True, False):
        check_module(fn.bilinear(4, bias), nn.Bilinear(2, 3, 4, bias), x, train=train)


@pytest.mark.parametrize("rearrange", [transposed, strided])
def test_bilinear_takes_what_is_not_contiguous(rearrange):
    x = (rearrange(randn(5, 2, 6)), rearrange(randn(5, 2, 3, seed=1)))
    dy = rearrange(randn(5, 2, 4, seed=2))
    check_module(fn.bilinear(4), nn.Bilinear(6, 3, 4), x, dy=dy)


def test_bilinear_passes_pytorchs_own_samples():
    samples = samples_of("Bilinear")
    assert len(samples) == 3
    for options, x in samples:
        options = dict(options)
        in1, in2 = options.pop("in1_features"), options.pop("in2_features")
        check_module(fn.bilinear(**options), nn.Bilinear(in1, in2, **options), tuple(x))


def test_bilinear_starts_as_torchs():
    params, _ = fn.bilinear(50).init(fn.key(0), (randn(16), randn(40)))
    assert {name: tuple(leaf.shape) for name, leaf in params.items()} == {
        "weight": (50, 16, 40),
        "bias": (50,),
    }
    for leaf in params.values():
        assert leaf.dtype == torch.float64
        assert float(leaf.abs().max()) <= 1 / 4
        assert abs(float(leaf.std()) - 1 / 4 / 3**0.5) < 0.05


def test_bilinear_uses_the_initializers_and_dtype_it_is_given():
    ones, zeros = fn.initializers.ones(), fn.initializers.zeros()
    layer = fn.bilinear(2, weight_init=ones, bias_init=zeros, dtype=torch.float32)
    params, _ = layer.init(fn.key(0), (randn(3), randn(4)))
    assert_near(params, {"weight": torch.ones(2, 3, 4), "bias": torch.zeros(2)})


@pytest.mark.cpu_only
def test_bilinear_under_jit_is_the_eager_one():
    layer, x = fn.bilinear(4), (randn(5, 2), randn(5, 3, seed=1))

    def run(key, x):
        params, _ = layer.init(key, x)
        y, pullback, _ = layer.vjp(params, x)
        return y, pullback(y)

    assert_near(fn.jit(run)(fn.key(0), x), run(fn.key(0), x))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (randn(3), ValueError, r"expects a tuple \(x1, x2\) of tensors, got float64 \(3,\)"),
        ((randn(3),), ValueError, r"expects a tuple \(x1, x2\) of tensors, got \(float64 \(3,\)\)"),
        ((randn(3), None), ValueError, r"expects a tuple \(x1, x2\) of tensors, got \(float64 \(3"),
        (
            (randn(3), randn(3).float()),
            TypeError,
            r"expects floating-point tensors of one dtype, got \(float64 \(3,\), float32 \(3,\)\)",
        ),
        (
            (torch.ones(3, dtype=torch.int64),) * 2,
            TypeError,
            r"expects floating-point tensors of one dtype, got \(int64 \(3,\), int64 \(3,\)\)",
        ),
        (
            (randn(2, 3), randn(1, 3)),
            ValueError,
            r"expects x1 and x2 of the same shape but for the last dimension, got \(2, 3\) and \(1",
        ),
        ((randn(), randn()), ValueError, r"expects x1 and x2 of the same shape but for the last d"),
        ((randn(2, 0), randn(2, 3)), ValueError, r"expects features in both, got \(float64 \(2, 0"),
    ],
)
def test_bilinear_refuses_what_is_no_pair_of_rows(x, error, message):
    layer = fn.bilinear(4)
    with pytest.raises(error, match=f"^bilinear: {message}"):
        layer.init(fn.key(0), x)
    params, _ = layer.init(fn.key(0), (randn(2, 3), randn(2, 3)))
    with pytest.raises(error, match=f"^serial\\['pair'\\] bilinear: {message}"):
        fn.serial(pair=layer).apply({"pair": params}, x)


def test_bilinear_refuses_a_weight_for_other_features():
    layer = fn.bilinear(4)
    params, _ = layer.init(fn.key(0), (randn(2, 3), randn(2, 3)))
    message = r"^bilinear: expects a weight of shape \(4, 3, 5\), got \(4, 3, 3\)$"
    with pytest.raises(ValueError, match=message):
        layer.apply(params, (randn(2, 3), randn(2, 5)))


def test_bilinear_refuses_the_sizes_of_its_inputs_and_no_output():
    with pytest.raises(
        TypeError, match=r"^bilinear: bias must be True or False, got 3; the sizes "
    ):
        fn.bilinear(2, 3)
    with pytest.raises(ValueError, match=r"^bilinear: out_features must be > 0, got 0$"):
        fn.bilinear(0)
