"""Images in programs: channels last where there are convolutions, and nobody can tell."""

import pytest
import torch
from torch.nn import functional as F

import funcnet as fn

X = fn.random.normal(fn.key(0), (3, 2, 11, 10))
WEIGHT = fn.random.normal(fn.key(1), (5, 2, 3, 3))
WINDOWS = {
    "halves": {"kernel_size": 2},
    "overlapping": {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
    "dilated": {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": 2},
    "uneven": {"kernel_size": (2, 3), "stride": (1, 2), "padding": (1, 1), "dilation": (2, 1)},
}
PROGRAMS = {
    "image": lambda x, w: F.conv2d(x, w, padding=1),
    "flattened": lambda x, w: F.conv2d(x, w, padding=1).flatten(1),
    "viewed": lambda x, w: F.conv2d(x, w, padding=1).relu().view(3, -1, 10),
    "summed": lambda x, w: F.conv2d(x, w, padding=1).sum((0, 2, 3)),
    "pooled": lambda x, w: F.max_pool2d(F.conv2d(x, w), 2, return_indices=True),
    "transposed": lambda x, w: F.conv2d(x, w).transpose(1, 3),
    "one channel": lambda x, w: F.conv2d(x[:, :1], w[:, :1]),
    "one pixel": lambda x, w: F.conv2d(x[:, :, :3, :3], w).flatten(1) * 2,
    "grouped": lambda x, w: F.conv2d(x, w[:4, :1], groups=2),
    "strided": lambda x, w: torch.as_strided(F.conv2d(x, w), (3, 4), (5, 1)),
    "single": lambda x, w: F.conv2d(x[0], w),
    "into the weight": lambda x, w: w - 0.1 * torch.func.grad(
        lambda w: F.conv2d(x, w).square().sum()
    )(w),
}  # fmt: skip


def mixed(x):
    """Images whose channels are mixed by operators that have no kernel."""
    return torch.fft.irfft(torch.fft.rfft(x, dim=1).conj(), n=x.shape[1], dim=1)


CALLING = {
    "forward": lambda x, w: F.max_pool2d(mixed(F.conv2d(x, w).relu()), 2).flatten(1),
    "backward": lambda x, w: torch.func.grad(
        lambda w: F.max_pool2d(mixed(F.conv2d(x, w)), 3, 2).square().sum()
    )(w),
}  # fmt: skip


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for leaf in fn.tree.leaves(found):
        assert leaf.is_contiguous()


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_of_images_gives_what_the_function_gives(name):
    compiled = fn.jit(PROGRAMS[name])
    same(compiled(X, WEIGHT), PROGRAMS[name](X, WEIGHT))
    assert compiled.lower(X, WEIGHT).why_not_one is None


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", CALLING)
def test_a_program_of_images_that_calls_operators_gives_what_the_function_gives(name):
    compiled = fn.jit(CALLING[name])
    same(compiled(X, WEIGHT), CALLING[name](X, WEIGHT))
    assert "fft" in compiled.lower(X, WEIGHT).called[0]
    xs = torch.stack([X, 2 * X])
    several = fn.vmap(CALLING[name], in_axes=(0, None))
    same(fn.jit(several)(xs, WEIGHT), several(xs, WEIGHT))


@pytest.mark.cpu_only
@pytest.mark.parametrize("options", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("convolved", [False, True], ids=["alone", "between convolutions"])
def test_pooling_is_that_of_torch_with_its_first_maxima_and_nan(options, dtype, convolved):
    x = fn.random.normal(fn.key(2), (3, 4, 9, 8)).to(dtype)
    x[:, :, 2] = -torch.inf
    x[0, 0, 0, 0] = torch.nan
    pool = fn.max_pool2d(**options)
    # A convolution that changes nothing has the images come with their channels last.
    one = torch.eye(4, dtype=dtype)[:, :, None, None]

    def both(x):
        x = torch.where(x.isfinite(), F.conv2d(x.nan_to_num(0, 0, 0), one), x) if convolved else x
        y, pullback, _ = pool.vjp({}, x)
        return y, pullback(torch.cos(y.nan_to_num(0, 0, 0)))[1]

    y, dx = fn.jit(both)(x)
    x = x.requires_grad_()
    expected = F.max_pool2d(x, **options)
    (dx_expected,) = torch.autograd.grad(expected, x, torch.cos(expected.nan_to_num(0, 0, 0)))
    torch.testing.assert_close(y, expected.detach(), equal_nan=True)
    torch.testing.assert_close(dx, dx_expected, equal_nan=True)


@pytest.mark.cpu_only
def test_a_loop_of_convolutions_carries_contiguous_images():
    net = fn.serial(fn.conv2d(2, 3, padding=1), fn.relu(), fn.max_pool2d(3, 1, 1))
    params, _ = net.init(fn.key(3), X)

    def repeated(params, x):
        return fn.scan(lambda x, _: (net.apply(params, x)[0], x.sum()), x, torch.zeros(3))

    same(fn.jit(repeated)(params, X), repeated(params, X))
    several = fn.vmap(net.apply, in_axes=(None, 0))
    xs = torch.stack([X, 2 * X])
    same(fn.jit(several)(params, xs)[0], several(params, xs)[0])
