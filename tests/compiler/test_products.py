"""Products of matrices in a program: every dtype, with factors, in every order of memory."""

import pytest
import torch

import funcnet as fn

FLOATS = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 0.008, torch.float16: 0.001}
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def scaled(operator, alpha=2, beta=3):
    return lambda *tensors: operator(*tensors, alpha=alpha, beta=beta)


def turned(operator):
    return lambda a, b: operator(a.mT, b.mT)


# Functions, and the shapes of what they are given.
CASES = [
    (torch.mm, (5, 7), (7, 4)),
    (turned(torch.mm), (7, 5), (4, 7)),
    (lambda a, b: a[::2] @ b[:, ::3], (6, 7), (7, 9)),
    (torch.mm, (40, 70), (70, 50)),
    (torch.mm, (150, 131), (131, 70)),
    (turned(torch.mm), (130, 150), (70, 130)),
    (torch.mm, (29, 600), (600, 64)),
    (lambda a, b: a @ b.mT, (3, 300), (200, 300)),
    (lambda a, b: a.mT @ b, (300, 2), (300, 201)),
    (torch.mm, (5, 0), (0, 4)),
    (torch.mm, (0, 3), (3, 4)),
    (torch.bmm, (3, 5, 7), (3, 7, 4)),
    (torch.bmm, (0, 5, 7), (0, 7, 4)),
    (torch.addmm, (5, 1), (5, 7), (7, 4)),
    (scaled(torch.addmm), (4,), (5, 7), (7, 4)),
    (scaled(torch.addmm), (200,), (3, 100), (100, 200)),
    (scaled(torch.addmm), (160,), (100, 100), (100, 160)),
    (scaled(torch.addmm), (4,), (5, 0), (0, 4)),
    (scaled(torch.baddbmm), (2, 1, 4), (2, 5, 7), (2, 7, 4)),
    (torch.baddbmm, (2, 1, 4), (2, 5, 0), (2, 0, 4)),
    (scaled(torch.addbmm), (5, 4), (3, 5, 7), (3, 7, 4)),
    (torch.addbmm, (4,), (3, 5, 7), (3, 7, 4)),
    (scaled(torch.addbmm), (5, 4), (0, 5, 7), (0, 7, 4)),
    (scaled(torch.addmv), (5,), (5, 7), (7,)),
    (torch.mv, (5, 7), (7,)),
    (torch.dot, (7,), (7,)),
    (torch.outer, (7,), (3,)),
    (torch.matmul, (2, 1, 3, 4), (5, 4, 2)),
    (torch.matmul, (4,), (5, 4, 2)),
    (lambda a, b: torch.tensordot(a, b, 2), (2, 3, 4), (3, 4, 5)),
    (lambda a, b: torch.einsum("bij,bjk->bki", a, b), (2, 3, 4), (2, 4, 5)),
    (lambda a, b: fn.vmap(lambda a: a @ b)(a), (3, 4, 5), (5, 2)),
    (lambda a, b: fn.scan(lambda c, x: (c @ x, c.sum()), a, b)[1], (3, 3), (4, 3, 3)),
]


def tensor(dtype, shape, index):
    generator = torch.Generator().manual_seed(index)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    # Large ones, so that the sums wrap around.
    return torch.randint(-(2**40), 2**40, shape, generator=generator).to(dtype)


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS], ids=str)
def test_products_are_torchs(dtype):
    inputs = [[tensor(dtype, shape, 7) for shape in shapes] for _, *shapes in CASES]
    functions = [function for function, *_ in CASES]

    def run(inputs):
        return [function(*each) for function, each in zip(functions, inputs, strict=True)]

    compiled = fn.jit(run)
    lowered = compiled.lower(inputs)
    assert lowered.why_not_one is None
    assert "called aten" not in lowered.blocks
    for found, expected, given in zip(compiled(inputs), run(inputs), inputs, strict=True):
        assert found.dtype == expected.dtype
        if dtype in FLOATS:
            # Sums in another order differ by what their terms were rounded by.
            scale = 1 + expected.abs().max().item() if expected.numel() else 1
            tolerance = FLOATS[dtype] * scale
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
        else:
            assert torch.equal(found, expected), [*map(torch.Tensor.size, given)]


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_bias_times_nothing_is_not_read(dtype):
    a, b = tensor(dtype, (2, 5, 7), 0), tensor(dtype, (2, 7, 4), 1)
    bias = torch.full((4,), float("nan"), dtype=dtype)

    def run(bias, a, b):
        return (
            torch.addmm(bias, a[0], b[0], beta=0),
            torch.baddbmm(bias, a, b, beta=0, alpha=0.5),
            torch.addbmm(bias, a, b, beta=0),
        )

    for found, expected in zip(fn.jit(run)(bias, a, b), run(bias, a, b), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05)
        assert not found.isnan().any()


@pytest.mark.cpu_only
def test_sums_of_16_bits_are_rounded_once():
    # 4096 ones: in bfloat16, a sum of ones stays at 256.
    ones = torch.ones(8, 4096, dtype=torch.bfloat16)
    assert torch.equal(fn.jit(torch.mm)(ones, ones.mT), torch.full((8, 8), 4096).bfloat16())


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_nan_and_infinity_go_through(dtype):
    a, b = tensor(dtype, (70, 90), 0), tensor(dtype, (90, 80), 1)
    a[3, 5], a[4, 6] = float("inf"), float("nan")
    found, expected = fn.jit(torch.mm)(a, b), a @ b
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())
