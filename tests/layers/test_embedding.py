import pytest
import torch
from layers.oracle import assert_near, check_module, randn, samples_of, transposed
from torch import nn

import funcnet as fn

OPTIONS = {
    "defaults": {},
    "padding_idx": {"padding_idx": 2},
    "padding_idx 0": {"padding_idx": 0},
    "last padding_idx": {"padding_idx": -1},
    "scale_grad_by_freq": {"scale_grad_by_freq": True},
    "both": {"padding_idx": -3, "scale_grad_by_freq": True},
    "max_norm": {"max_norm": 1.0},
    "max_norm of p 1": {"max_norm": 2.0, "norm_type": 1.0},
    "max_norm of p inf": {"max_norm": 0.5, "norm_type": torch.inf},
    "all": {"padding_idx": 2, "max_norm": 1.5, "scale_grad_by_freq": True},
}


def indices(*shape, seed=0, dtype=torch.int64):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 7, shape, generator=generator, dtype=dtype, device="cpu")
    return drawn.to(torch.get_default_device())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(9,), (4, 5), (2, 3, 4), (), (0,), (3, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_embedding_is_torchs(name, shape, dtype):
    options = OPTIONS[name]
    layer = fn.embedding(7, 3, **options)
    check_module(layer, nn.Embedding(7, 3, **options), indices(*shape, dtype=dtype))


@pytest.mark.parametrize("dim", [0, 1])
def test_embedding_may_have_no_or_one_column(dim):
    check_module(fn.embedding(7, dim), nn.Embedding(7, dim), indices(4, 5))


def test_embedding_sums_the_gradients_of_a_row_that_occurs_often():
    x = torch.zeros(1000, dtype=torch.int64)
    check_module(fn.embedding(7, 3), nn.Embedding(7, 3), x)


@pytest.mark.parametrize("name", OPTIONS)
def test_embedding_is_its_formula(name):
    options, x = OPTIONS[name], indices(6, 4)
    layer = fn.embedding(7, 3, dtype=torch.float64, **options)
    weight = randn(7, 3)
    y, pullback, _ = layer.vjp({"weight": weight}, x)
    one_hot = (x[..., None] == torch.arange(7)).double()
    if options.get("max_norm"):
        norm = torch.linalg.vector_norm(weight, options.get("norm_type", 2.0), 1, keepdim=True)
        weight = weight * (options["max_norm"] / (norm + 1e-7)).clamp(max=1.0)
    assert_near(y, one_hot @ weight)
    dy = randn(6, 4, 3, seed=5)
    expected = torch.einsum("abi,abd->id", one_hot, dy)
    if options.get("scale_grad_by_freq"):
        expected /= one_hot.sum((0, 1)).clamp(min=1)[:, None]
    if "padding_idx" in options:
        expected[options["padding_idx"]] = 0
    assert_near(pullback(dy), ({"weight": expected}, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_embedding_computes_in_the_dtype_of_its_weight(name, dtype):
    options, x = OPTIONS[name], indices(6, 4)
    layer = fn.embedding(7, 3, dtype=dtype, **options)
    module = nn.Embedding(7, 3, **options, dtype=dtype)
    params, _ = layer.init(fn.key(0), x)
    assert params["weight"].dtype == dtype
    y, pullback, _ = layer.vjp(params, x)
    with torch.no_grad():
        module.weight.copy_(params["weight"])
    expected = module(x)
    dy = randn(*y.shape, dtype=dtype)
    expected.backward(dy)
    assert_near((y, pullback(dy)[0]["weight"]), (expected.detach(), module.weight.grad))


@pytest.mark.parametrize("name", ["defaults", "scale_grad_by_freq"])
def test_embedding_takes_indices_and_cotangents_that_are_not_contiguous(name):
    options = OPTIONS[name]
    x, dy = transposed(indices(6, 4)), transposed(randn(6, 4, 3))
    check_module(fn.embedding(7, 3, **options), nn.Embedding(7, 3, **options), x, dy=dy)
    expanded = torch.ones((), dtype=torch.float64).expand(6, 4, 3)
    check_module(fn.embedding(7, 3, **options), nn.Embedding(7, 3, **options), x, dy=expanded)


def test_embedding_starts_as_torchs():
    layer = fn.embedding(500, 40, padding_idx=-2)
    params, state = layer.init(fn.key(0), torch.zeros(1, dtype=torch.int64))
    weight = params["weight"]
    assert weight.dtype == torch.float32
    assert state == {}
    assert torch.equal(weight[498], torch.zeros(40))
    rest = weight[torch.arange(500) != 498]
    assert abs(float(rest.mean())) < 4 / 20_000**0.5
    assert abs(float(rest.std()) - 1) < 4 / 40_000**0.5


def test_embedding_uses_the_initializer_and_dtype_it_is_given():
    layer = fn.embedding(
        3, 2, padding_idx=1, weight_init=fn.initializers.constant(5.0), dtype=torch.float64
    )
    params, _ = layer.init(fn.key(0), torch.zeros(1, dtype=torch.int64))
    expected = torch.tensor([[5.0, 5.0], [0.0, 0.0], [5.0, 5.0]], dtype=torch.float64)
    assert torch.equal(params["weight"], expected)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bool, torch.uint8, torch.int8, torch.int16, torch.complex64]
)
def test_embedding_refuses_what_are_no_indices(dtype):
    layer, x = fn.embedding(7, 3), torch.ones(2, dtype=dtype)
    message = rf"^embedding: expects int32 or int64 indices, got {str(dtype)[6:]} \(2,\)$"
    with pytest.raises(TypeError, match=message):
        layer.init(fn.key(0), x)
    for call in (layer.apply, layer.vjp):
        with pytest.raises(TypeError, match=message):
            call({"weight": torch.ones(7, 3)}, x)


# Elsewhere the kernel itself fails, and with it all that the process does there later.
@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("x", "low", "high"), [([0, 7], 0, 7), ([-1, 3], -1, 3), ([[9]], 9, 9)], ids=str
)
def test_embedding_refuses_an_index_out_of_range(x, low, high):
    message = rf"^embedding: expects indices in \[0, 7\), got indices from {low} to {high}$"
    layer = fn.embedding(7, 3)
    for call in (layer.apply, layer.vjp):
        with pytest.raises(ValueError, match=message):
            call({"weight": torch.ones(7, 3)}, torch.tensor(x))


@pytest.mark.parametrize("shape", [(6, 3), (7, 4), (7,), (7, 3, 1)])
def test_embedding_refuses_a_weight_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"^embedding: expects a weight of shape \(7, 3\), got \("):
        fn.embedding(7, 3).apply({"weight": torch.ones(shape)}, indices(2))


def test_embedding_refuses_other_params():
    with pytest.raises(ValueError, match=r"^embedding: expects params \['weight'\], got \[\]$"):
        fn.embedding(7, 3).apply({}, indices(2))


@pytest.mark.parametrize("padding_idx", [7, -8])
def test_embedding_refuses_a_padding_row_that_it_has_not(padding_idx):
    with pytest.raises(ValueError, match=r"^embedding: padding_idx must be within 7 rows, got "):
        fn.embedding(7, 3, padding_idx)


def test_embedding_leaves_a_weight_that_is_too_long_as_it_is():
    weight = randn(7, 3)
    before = weight.clone()
    y, _ = fn.embedding(7, 3, max_norm=0.5).apply({"weight": weight}, indices(4))
    assert torch.equal(weight, before)
    assert float(torch.linalg.vector_norm(y, dim=-1).max()) <= 0.5


def test_embedding_takes_its_options_in_torchs_order():
    options = (2, 1.0, 1.0, True, False)
    check_module(fn.embedding(7, 3, *options), nn.Embedding(7, 3, *options), indices(9))


def test_embedding_passes_pytorchs_own_samples():
    samples = samples_of("Embedding")
    assert len(samples) == 2
    for options, (x,) in samples:
        check_module(fn.embedding(**options), nn.Embedding(**options), x)


def test_embedding_refuses_sparse_gradients():
    message = r"^embedding: sparse must be False, got True; gradients have the structure of the par"
    with pytest.raises(ValueError, match=message):
        fn.embedding(7, 3, sparse=True)


@pytest.mark.parametrize(
    ("sizes", "name"), [((-1, 3), "num_embeddings"), ((7, -1), "embedding_dim")]
)
def test_embedding_refuses_a_negative_size(sizes, name):
    with pytest.raises(ValueError, match=rf"^embedding: {name} must be >= 0, got -1$"):
        fn.embedding(*sizes)


@pytest.mark.parametrize("dy", [(4, 3), (5, 4, 1), (4, 5, 1), (4, 5, 2), (4, 5, 4), (20, 3), ()])
def test_embedding_refuses_a_cotangent_of_another_shape_than_y(dy):
    layer = fn.embedding(7, 3, dtype=torch.float64)
    _, pullback, _ = layer.vjp({"weight": randn(7, 3)}, indices(4, 5))
    with pytest.raises(ValueError, match=r"^embedding: pullback expects dy of shape \(4, 5, "):
        pullback(randn(*dy))
