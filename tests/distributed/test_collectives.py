"""Sums and gathers over ranks: eager, under jit, in scan, under vmap and torch.func."""

import pytest
import torch

import funcnet as fn
from funcnet.compiler.compiled import Compiled


def axis():
    return fn.distributed.axis_of(fn.distributed.mesh(), "data")


def apply_all(x):
    return all_of(axis())(x)


def all_of(data):
    return lambda x: {
        "sum": data.sum(x),
        "max": data.max(x),
        "mean": data.mean(x),
        "gather": data.gather(x, 1),
        "scatter": data.scatter_sum(x, -1),
        "part": data.part(x, 1),
        "rank": data.rank() + 0 * x.sum().long(),
    }


def own(shape=(3, 4)):
    return fn.random.normal(fn.random.fold_in(fn.key(0), axis().index), shape, torch.float64)


def on_rank(transform):
    transforms = {"eager": lambda f: f, "jit": fn.jit}
    found = transforms[transform](all_of(axis()))(own())
    return found, own()


def check(results):
    size = len(results)
    xs = [x for _, x in results]
    total = torch.stack(xs).sum(0)
    for rank, (found, _) in enumerate(results):
        torch.testing.assert_close(found["sum"], total)
        torch.testing.assert_close(found["max"], torch.stack(xs).amax(0))
        torch.testing.assert_close(found["mean"], total / size)
        assert torch.equal(found["gather"], torch.cat(xs, 1))
        torch.testing.assert_close(found["scatter"], total.chunk(size, 1)[rank])
        assert torch.equal(found["part"], xs[rank].chunk(size, 1)[rank])
        assert found["rank"] == rank


def test_eager(ranks):
    check(ranks(on_rank, "eager"))


def test_jit(ranks):
    check(ranks(on_rank, "jit"))


def scanned():
    data, x = axis(), own((5, 3))

    def body(carry, row):
        carry = carry + data.sum(row * carry)
        return carry, carry

    start = torch.ones(3, dtype=torch.float64)
    return fn.scan(body, start, x), fn.jit(lambda x: fn.scan(body, start, x))(x)


def test_in_a_loop(two_ranks):
    for (carry, ys), (jit_carry, jit_ys) in two_ranks(scanned):
        torch.testing.assert_close(carry, jit_carry)
        torch.testing.assert_close(ys, jit_ys)


def mapped():
    data, x = axis(), own((2, 3, 4))
    f = all_of(data)

    def total(x):
        return sum([v.sin().sum() for name, v in f(x).items() if name not in ("max", "rank")])

    def moved(direction):
        step = 1e-6 * direction
        return (data.sum(total(x[0] + step)) - data.sum(total(x[0] - step))) / 2e-6

    # All ranks move at once, so each gradient is that of the sum of all ranks' totals.

    leaf = x[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(total(leaf), leaf)
    direction = own((3, 4))
    derivative = data.sum((grad * direction).sum()), moved(direction)
    maps = fn.vmap(f)(x), torch.vmap(f)(x), fn.jit(fn.vmap(f))(x)
    return [f(each) for each in x], maps, derivative


def test_vmap_and_autograd(two_ranks):
    for loop, maps, (found, expected) in two_ranks(mapped):
        for each in maps:
            for member, alone in enumerate(loop):
                for name, value in alone.items():
                    torch.testing.assert_close(each[name][member], value)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def parallel_members():
    torch.set_num_threads(2)
    data = axis()
    f = fn.jit(fn.vmap(lambda x: data.sum((x * (1 + data.index)).exp()) / data.size))
    x = torch.linspace(-1, 1, 64 * 500, dtype=torch.float64).reshape(64, 500)
    found = [f(x) for _ in range(5)]
    torch.set_num_threads(1)
    return found, x


def test_members_of_a_map_do_not_overtake_each_other(two_ranks):
    for found, x in two_ranks(parallel_members):
        expected = (x.exp() + (2 * x).exp()) / 2
        for each in found:
            torch.testing.assert_close(each, expected)


def hoisted():
    data = axis()

    def f(x, factors):
        def body(carry, factor):
            once = data.sum(x.sin())  # does not depend on the iteration
            return carry + once * factor, data.max(carry)

        return fn.scan(body, x, factors)

    x, factors = own((4,)), torch.arange(3.0, dtype=torch.float64)
    return f(x, factors), fn.jit(f)(x, factors), fn.jit(f).lower(x, factors).called


def test_what_a_loop_computes_once_is_summed_once(two_ranks):
    for eager, jitted, called in two_ranks(hoisted):
        torch.testing.assert_close(eager, jitted)
        assert sorted([line.split(" a run")[0] for line in called]) == [
            "funcnet::all_reduce, 3 times",
            "funcnet::all_reduce, once",
        ]


def on_the_staged_path():
    data, x = axis(), own()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Compiled, "_make_one", lambda self: setattr(self, "why_not_one", "a test"))
        return all_of(data)(x), fn.jit(all_of(data))(x)


def test_stages(two_ranks):
    for eager, staged in two_ranks(on_the_staged_path):
        torch.testing.assert_close(eager, staged)


def fails_in_a_program():
    data = axis()

    def fail(*args, **options):
        raise RuntimeError("connection closed")

    f = fn.jit(lambda x: data.sum(x * 2) + 1)
    f(own())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_to_all_single", fail)
        with pytest.raises(fn.distributed.PeerError, match="data of") as found:
            f(own())
    return type(found.value.__cause__).__name__, f(own()).shape


def test_an_error_of_a_collective_in_a_program_is_the_users(two_ranks):
    assert two_ranks(fails_in_a_program) == 2 * [("RuntimeError", (3, 4))]


def without_a_mesh():
    data = fn.distributed.axis_of({"data": 3}, "data")
    with pytest.raises(RuntimeError, match="there is no mesh with the axis data of"):
        data.sum(torch.ones(2))
    return data.gather(torch.ones(2, device="meta")).shape


def test_an_axis_without_processes_has_shapes_only(two_ranks):
    assert two_ranks(without_a_mesh) == 2 * [(6,)]
