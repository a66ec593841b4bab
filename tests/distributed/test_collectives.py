"""Sums and gathers over ranks: eager, under jit, in scan, under vmap and torch.func."""

import torch

import funcnet as fn


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
