"""Functions of torch in a forward: each gives what it gives, with autograd's gradients."""

import math

import pytest
import torch
from interop.forwards import checked
from layers import oracle
from torch import nn
from torch.nn import functional as F

import funcnet as fn

X = oracle.randn(3, 4, 6, seed=1)
POSITIVE = X.abs() + 0.1
IMAGE = oracle.randn(2, 4, 6, 6, seed=2)
PAIR = (oracle.randn(3, 4, 6, seed=3), oracle.randn(4, 1, seed=4))
MATRICES = (oracle.randn(2, 3, 4, seed=5), oracle.randn(2, 4, 5, seed=6))
TOKENS = torch.arange(6).reshape(2, 3)
WEIGHT = oracle.randn(5, 6, seed=7)
KERNEL = oracle.randn(8, 2, 3, 3, seed=8)


class Of(nn.Module):
    """A module whose forward is a function of one x."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def assigned(x):
    y = x * 2
    y += x
    y -= 1
    y *= 3
    y /= 2
    return y.add_(x).relu_()


def loop(x):
    for part in x.chunk(2, dim=-1):
        x = x + part.sum()
    first, second = x.split([2, 4], -1)
    return torch.cat([second, first], dim=-1)


def heads(x):
    q, k, v = [each.unflatten(-1, (2, -1)).transpose(0, 1) for each in (x, x * 2, x + 1)]
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None, :2, :2])
    return y.transpose(0, 1).flatten(-2)


def best(x):
    values, indices = x.max(dim=1)
    return values, indices, x.min(-1).values, torch.max(x)


CASES = {
    "arithmetic with numbers": (lambda x: 2 - (3 * x + 1) / 4 - x / 2 + (x - 5), X),
    "powers": (lambda x: x**2 + 2**x + x**0.5 + 1 / x + torch.pow(x, 3), POSITIVE),
    "broadcast": (lambda x: x[0] * x[1] + x[0] - x[1] + x[0] / (x[1] + 9), PAIR),
    "alpha": (lambda x: torch.add(x[0], x[1], alpha=2) - torch.sub(x[0], x[1], alpha=3), PAIR),
    "power of tensors": (lambda x: x[0].abs() ** x[1], PAIR),
    "maximum": (lambda x: torch.maximum(x[0], x[1]) + torch.minimum(x[0], x[1]), PAIR),
    "elements": (lambda x: torch.exp(-x) + x.log() + x.sqrt().sin() + torch.cos(x), POSITIVE),
    "more elements": (lambda x: x.rsqrt() + x.log1p() + torch.erf(x) + x.expm1(), POSITIVE),
    "other elements": (lambda x: x.abs() + x.square() - x.reciprocal() + x.log2(), POSITIVE),
    "clamp": (lambda x: x.clamp(-0.5, 0.5) + x.clamp(min=0) + torch.clamp(x, max=1.0), X),
    "activations": (
        lambda x: F.relu(x) + F.gelu(x, approximate="tanh") + F.silu(x) + x.sigmoid() + x.tanh(),
        X,
    ),
    "more activations": (
        lambda x: F.leaky_relu(x, 0.2) + F.elu(x) + F.softplus(x) + F.hardtanh(x, -0.3, 0.4),
        X,
    ),
    "in place": (assigned, X),
    "inplace=True": (lambda x: F.relu(F.elu(x + 1, inplace=True) * 2, inplace=True), X),
    "softmax": (lambda x: x.softmax(-1) + F.log_softmax(x, dim=1) + torch.softmax(x, 0), X),
    "shapes": (lambda x: x.view(3, -1)[:, None].squeeze(1).unsqueeze(0).flatten(1), X),
    "sizes": (lambda x: x.reshape(x.shape[0], x.size(1) * x.shape[2]) * len(x), X),
    "assert": (checked, X),
    "order": (lambda x: x.permute(2, 0, 1).transpose(0, 1).mT.movedim(0, -1), X),
    "transposed": (lambda x: x[0].t() + x[1].T, X),
    "repeated": (lambda x: x[:, :1].expand(-1, 4, -1) + x[:, 1:2].repeat(1, 4, 1), X),
    "expand_as": (lambda x: x[1].expand_as(x[0]) * x[0], PAIR),
    "pieces": (loop, X),
    "stacked": (lambda x: torch.stack([x, x * 2], dim=1).unbind(1)[1], X),
    "indices": (lambda x: x[..., 1] + x[:, :, ::2].sum(-1) + x[:, :, -1] + x[0, :, 1:3].sum(), X),
    "index of tensors": (lambda x: x[:, torch.tensor([2, 0, 2])] + x[:, [1, 1, 3]], X),
    "select": (lambda x: x.select(1, 2) + x.narrow(1, 1, 2).sum(1) + x.flip(1)[:, 0], X),
    "gather": (lambda x: x.gather(1, torch.zeros(3, 2, 6, dtype=torch.int64)).roll(1, 0), X),
    "masks": (lambda x: x.masked_fill(x > 0, 0.0) + torch.where(x < 0.1, x * 2, 1.0), X),
    "triangle": (lambda x: x.tril() + torch.triu(x, diagonal=1), X),
    "dtype": (lambda x: x.to(torch.float64).type_as(x).double() + torch.arange(6), X),
    "sums": (
        lambda x: x.sum() + x.mean(1, keepdim=True) + x.sum((0, 1)) + x.mean(dim=(1, 2))[0],
        X,
    ),
    "extremes": (lambda x: x.amax(1) + x.amin(dim=(0, 1)) + torch.logsumexp(x, 1), X),
    "max and its index": (best, X),
    "variance": (lambda x: x.var(1) + x.var(-1, unbiased=False).sum() + torch.norm(x), X),
    "cumsum": (lambda x: x.cumsum(1) + F.normalize(x, dim=-1), X),
    "products": (
        lambda x: x[0] @ x[1] + torch.bmm(x[0], x[1]) + torch.matmul(x[0][0], x[1]),
        MATRICES,
    ),
    "vectors": (lambda x: x[0][0, 0] @ x[1] + (x[0] @ x[1][0, :, 0]).sum(), MATRICES),
    "einsum": (lambda x: torch.einsum("bij,bjk->bik", x[0], x[1]), MATRICES),
    "attention": (heads, X),
    "constants": (lambda x: x + torch.tensor(2.0) + torch.ones(3, 1, 1) * torch.eye(4, 6), X),
    "created": (lambda x: x + torch.arange(x.shape[-1]) + torch.zeros(len(x), 1, 1), X),
    "pooling": (
        lambda x: F.max_pool2d(x, 2) + F.avg_pool2d(x, 2) + F.adaptive_avg_pool2d(x, (3, 3)),
        IMAGE,
    ),
    "resampling": (lambda x: F.interpolate(F.pad(x, (1, 1, 0, 2)), scale_factor=2), IMAGE),
    "other pads": (lambda x: F.pad(x, [1, 2], mode="circular") + F.pad(x, (0, 3)), X),
    "functions of weights": (lambda x: F.linear(x, WEIGHT) + F.layer_norm(x, (6,)).sum(), X),
    "convolution": (lambda x: F.conv2d(x, KERNEL, None, 2, 1, groups=2), IMAGE),
    "embedding": (lambda x: F.embedding(x, WEIGHT[:, :2].repeat(2, 1)), TOKENS),
    "no gradient": (lambda x: x * (x > 0) + x.detach() + F.one_hot(x.argmax(-1), 6), X),
    "a tuple and a dict": (lambda x: (x * 2, {"a": x.sum(), "b": (x, x + 1)}), X),
    "x itself": (lambda x: (x, x), X),
}


@pytest.mark.parametrize("name", CASES)
def test_a_function_gives_what_it_gives_in_torch(name):
    function, x = CASES[name]
    layer, params, state = fn.interop.from_module(Of(function))
    assert (params, state) == ({}, {})
    dy = oracle.cotangent(function(x))
    if name == "max and its index":
        dy = (dy[0], None, *dy[2:])

    y, pullback, _ = layer.vjp({}, x)
    expected = oracle.autograd(lambda params, x: function(x), {}, x, dy)
    oracle.assert_near(y, expected[0])
    oracle.assert_near(pullback(dy)[1], expected[2])


def test_a_program_is_not_changed_by_what_it_ran_and_keeps_the_laws():
    layer, _, _ = fn.interop.from_module(Of(CASES["attention"][0]))
    fn.testing.check_layer(layer, X)


def test_sizes_are_those_of_the_call():
    layer, _, _ = fn.interop.from_module(Of(checked))
    assert layer.apply({}, X[:2])[0].shape == (8, 6)
    compiled = fn.jit(lambda x: layer.vjp({}, x)[1](torch.ones(12, 6, dtype=x.dtype))[1])
    oracle.assert_near(compiled(X), torch.full_like(X, 1 / math.sqrt(6)))


def raises(x):
    return torch.fft.fft(x).real


def by_value(x):
    return x if x.sum() > 0 else -x


def by_size(x):
    for row in range(x.shape[0]):
        x = x + x[row]
    return x


def writes(x):
    y = x * 1
    y[0] = 0
    return y


def writes_x(x):
    x += 1
    return x


def writes_through_a_view(x):
    y = x * 1
    row = y[0]
    row += 1
    return y


def reads_a_view_later(x):
    y = x * 1
    row = y[0]
    y.mul_(2)
    return row


BAD = {
    "a function without a layer": (raises, "calls fft_fft, which has no layer|fft"),
    "a branch on values": (by_value, "control flow depends on values"),
    "a loop over sizes": (by_size, "control flow depends on values"),
    "an assignment to elements": (writes, "assigns to elements of a tensor in place"),
    "an operation in place on x": (writes_x, "changes x in place"),
    "one on a view of x": (lambda x: x[0].add_(1), "changes .*x.* in place"),
    "one through a view": (writes_through_a_view, "uses mul after it was changed in place"),
    "one below a view": (reads_a_view_later, "uses getitem after it was changed in place"),
    "noise in eval mode, too": (lambda x: F.dropout(x, 0.5), "write training=self.training"),
    "a list as numbers": (lambda x: x.tolist(), "calls tolist, which has no layer"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_has_no_layer_is_named(name):
    function, told = BAD[name]
    with pytest.raises(ValueError, match=told) as caught:
        fn.interop.from_module(nn.Sequential(nn.Identity(), Of(function)))
    assert "'1' (Of)" in str(caught.value)
