"""debug_print: what it prints eagerly, in programs, in loops, and for members."""

import pytest
import torch

import funcnet as fn

X = torch.arange(3.0)


def shown(capfd):
    return capfd.readouterr().out.splitlines()


def each_row(x):
    def body(carry, row):
        fn.debug_print("{carry} + {row}", carry=carry, row=row)
        return carry + row, None

    return fn.scan(body, torch.tensor(0.0), x)[0]


ROWS = ["0.0 + 0.0", "0.0 + 1.0", "1.0 + 2.0"]


@pytest.mark.parametrize("transform", [lambda f: f, fn.jit], ids=["eager", "jit"])
def test_a_loop_prints_in_each_iteration(transform, capfd):
    run = transform(each_row)
    for _ in range(2):
        run(X)
        assert shown(capfd) == ROWS


@pytest.mark.parametrize("transform", [lambda f: f, fn.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("mapped", [fn.vmap, torch.vmap], ids=["fn", "torch"])
def test_each_member_prints(transform, mapped, capfd):
    def member(x, scale):
        fn.debug_print("{x:.0f} of {scale}", x=x, scale=scale)
        return x * scale

    run = transform(lambda x, scale: mapped(member, (0, None))(x, scale))
    run(X, torch.tensor(2))
    assert shown(capfd) == ["0 of 2", "1 of 2", "2 of 2"]


def test_a_loop_prints_of_which_nothing_else_is_read(capfd):
    def run(x):
        fn.vmap(each_row)(x[None])
        fn.debug_print("done")
        return x + 1

    torch.testing.assert_close(fn.jit(run)(X), X + 1)
    assert shown(capfd) == [*ROWS, "done"]


def test_what_was_there_before_a_loop_is_printed_in_each_iteration(capfd):
    def body(carry, _):
        fn.debug_print("{x}", x=X[1])
        return carry, None

    fn.jit(lambda x: fn.scan(body, x, length=2)[0])(X)
    assert shown(capfd) == ["1.0", "1.0"]


def test_numbers_print_with_the_value_of_the_call(capfd):
    def run(x, n):
        fn.debug_print("{n} {flag}", n=n, flag=True)
        return x * n

    compiled = fn.jit(run)
    compiled(X, 2.0)
    compiled(X, 3.0)
    assert shown(capfd) == ["2.0 True", "3.0 True"]


def test_a_gradient_prints_once(capfd):
    def loss(x):
        fn.debug_print("{x}", x=x.sum())
        return x.square().sum()

    torch.testing.assert_close(fn.jit(torch.func.grad(loss))(X), 2 * X)
    assert shown(capfd) == ["3.0"]


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda: fn.debug_print("{y}", x=X), ValueError, "names 'y'"),
        (lambda: fn.debug_print(X), TypeError, "format string first"),
        (lambda: fn.debug_print("{x}", x="text"), TypeError, "tensors and numbers, got 'text'"),
    ],
)
def test_bad_input_is_refused(call, error, told):
    with pytest.raises(error, match=told):
        call()
