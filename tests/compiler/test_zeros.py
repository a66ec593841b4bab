"""The zeros of forward mode are not multiplied in a program, and those of a user's are."""

import re

import torch

import funcnet as fn

DOUBLE = torch.float64
X = fn.random.normal(fn.key(1), (5, 3), DOUBLE)
IMAGES = fn.random.normal(fn.key(2), (2, 3, 6, 6), DOUBLE)


def nets():
    mlp = fn.serial(fn.linear(4), fn.tanh(), fn.linear(4), fn.tanh(), fn.linear(1))
    cnn = fn.serial(fn.conv2d(3, 3), fn.tanh(), fn.flatten(), fn.linear(1))
    for net, x in ((mlp, X), (cnn, IMAGES)):
        yield net, net.init(fn.key(0), x)[0], x


def second(net):
    """The gradient by x of the sum of the outputs, and its derivative in a direction."""

    def gradient(params, x):
        y, pullback, _ = net.vjp(params, x)
        return pullback(torch.ones_like(y), params=False)[1]

    def both(params, x):
        return torch.func.jvp(lambda x: gradient(params, x), (x,), (torch.sin(x),))

    return both


def squares(net):
    both = second(net)
    return lambda params, x: sum(each.square().mean() for each in both(params, x))


def test_a_gradient_and_its_derivative_have_no_product_with_zeros():
    net, params, x = next(nets())
    graph = fn.jit(second(net)).lower(params, x).graph
    # For each layer one forward and one back, and the tangents of both; none for the tangent of
    # the last y, which nothing reads, nor for that of the cotangent of ones.
    assert len(re.findall(r"= aten\.(?:add)?mm\b", graph)) == 10


def test_the_gradient_of_a_second_derivative_is_the_eager_one():
    cases = [(net, params, x) for net, params, x in nets()]

    def run(arguments):
        return [
            torch.func.grad(squares(net))(params, x)
            for (net, *_), (params, x) in zip(cases, arguments, strict=True)
        ]

    arguments = [(params, x) for _, params, x in cases]
    compiled = fn.jit(run)
    assert compiled.lower(arguments).why_not_one is None
    torch.testing.assert_close(compiled(arguments), run(arguments))


def test_zeros_of_the_users_times_infinity_are_nan():
    def run(x):
        zero = torch.zeros((), dtype=DOUBLE)
        return x @ zero.expand(3, 2), x * torch.zeros_like(x), x * zero, x + zero

    x = torch.full((2, 3), torch.inf, dtype=DOUBLE)
    torch.testing.assert_close(fn.jit(run)(x), run(x), equal_nan=True)
