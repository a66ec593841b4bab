"""0-d tensors as indices under jit: what eager PyTorch gives, and in loops nothing is copied."""

import pytest
import torch

import funcnet as fn

X = torch.arange(60.0).reshape(3, 4, 5)
INDEX, OTHER, SEVERAL = torch.tensor(1), torch.tensor(-2), torch.tensor([0, 2, 1])

READS = {
    "x[i]": lambda x, i, j, t: x[i],
    "x[i, :, j]": lambda x, i, j, t: x[i, :, j],
    "x[i, None, ..., 2:]": lambda x, i, j, t: x[i, None, ..., 2:],
    "x[..., i]": lambda x, i, j, t: x[..., i],
    "x[1, i, j]": lambda x, i, j, t: x[1, i, j],
    "x[i, t]": lambda x, i, j, t: x[i, t],
    "x[i, :, t]": lambda x, i, j, t: x[i, :, t],
    "x[t, :, i]": lambda x, i, j, t: x[t, :, i],
    "x[t, i, t]": lambda x, i, j, t: x[t, i, t],
    "x[:, i, t]": lambda x, i, j, t: x[:, i, t],
    "x[i, [0, 1], None, 1:3]": lambda x, i, j, t: x[i, [0, 1], None, 1:3],
    "x[i, True]": lambda x, i, j, t: x[i, True],
    "x[True, i]": lambda x, i, j, t: x[True, i],
    "x[i32, i8]": lambda x, i, j, t: x[i.int(), j.to(torch.int8)],
    "select": lambda x, i, j, t: torch.select(x, 1, j) + x.select(dim=1, index=i),
    "narrow": lambda x, i, j, t: x.narrow(1, j, 2) + torch.narrow(x, 1, i, length=2),
    "select_scatter": lambda x, i, j, t: torch.select_scatter(x, torch.zeros(3, 5), 1, j),
    "index_select": lambda x, i, j, t: x.index_select(0, i),
    "gather": lambda x, i, j, t: x[0, 0].gather(0, i),
    "where": lambda x, i, j, t: torch.where(torch.arange(3) == i, x[0, 0, 0], 7.0),
    "scatter": lambda x, i, j, t: torch.zeros(4).scatter(0, i, 5.0),
    "index_put": lambda x, i, j, t: x.index_put((i, j), torch.ones(5)),
}
# The index, and what is written there.
WRITES = {
    "[i] = 3": (lambda i, j, t: i, lambda x, i: 3),
    "[i, j] = row": (lambda i, j, t: (i, j), lambda x, i: x[0, 0]),
    "[i, :, j] = column": (lambda i, j, t: (i, slice(None), j), lambda x, i: x[0, :, 0]),
    "[..., i, 1:3] = (1, 1, 3, 2)": (
        lambda i, j, t: (..., i, slice(1, 3)),
        lambda x, i: torch.ones(1, 1, 3, 2),
    ),
    "[1, i, ::2] = row": (lambda i, j, t: (1, i, slice(None, None, 2)), lambda x, i: x[0, 0, :3]),
    "[i, t] = rows": (lambda i, j, t: (i, t), lambda x, i: x[0, :3] * 100),
    "[i, :, t] = columns": (lambda i, j, t: (i, slice(None), t), lambda x, i: x[0, :, :3] * 9),
    "[i, None, j] = row": (lambda i, j, t: (i, None, j), lambda x, i: x[0, :1] * 100),
    "[:, None, i] = rows": (
        lambda i, j, t: (slice(None), None, i),
        lambda x, i: x[:, :1] * 100,
    ),
    "[i] = double": (lambda i, j, t: i, lambda x, i: x[0].double()),
    "[i] = i": (lambda i, j, t: i, lambda x, i: i),
}


def augmented(x, i, j, t):
    y = x.clone()
    y[i] += 2
    y[i, j] *= 3
    y[1:][j] = 0
    return y


def written(index, value):
    def function(x, i, j, t):
        y = x.clone()
        y[index(i, j, t)] = value(x, i)
        return y

    return function


CASES = READS | {name: written(*case) for name, case in WRITES.items()} | {"+=": augmented}


@pytest.fixture(scope="module")
def results():
    """All cases in one program."""
    compiled = fn.jit(lambda *given: {name: case(*given) for name, case in CASES.items()})
    return compiled(X, INDEX, OTHER, SEVERAL)


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", CASES)
def test_an_index_that_is_a_tensor_gives_what_it_gives_eagerly(results, name):
    torch.testing.assert_close(results[name], CASES[name](X, INDEX, OTHER, SEVERAL), rtol=0, atol=0)


def test_a_number_that_is_an_argument_is_an_index():
    compiled = fn.jit(lambda x, n: x[n, ..., n - 1])
    for n in (0, 2, -1):
        torch.testing.assert_close(compiled(X, n), X[n, ..., n - 1], rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="index out of bounds: expected 0 <= index < 3"):
        compiled(X, 3)


@pytest.mark.parametrize("i", [3, -4])
def test_an_index_out_of_range_is_an_error_when_the_program_runs(i):
    with pytest.raises(RuntimeError, match="index out of bounds: expected 0 <= index < 3"):
        fn.jit(lambda x, i: (x[i], x.clone().index_put((i,), x[0])))(X, torch.tensor(i))


@pytest.mark.parametrize("start", [2, -4])
def test_a_start_of_narrow_out_of_range_is_an_error_when_the_program_runs(start):
    with pytest.raises(RuntimeError, match="index out of bounds"):
        fn.jit(lambda x, i: x.narrow(0, i, 2))(X, torch.tensor(start))


def test_too_many_indices_are_an_error_while_it_is_traced():
    with pytest.raises(IndexError, match="too many indices for tensor of dimension 3"):
        fn.jit(lambda x, i: x[i, i, i, i])(X, INDEX)


def test_writing_to_what_an_index_gave_is_refused():
    def in_place(x, i):
        x[i].mul_(2)
        return x

    def through_a_view(x, i):
        x = x.clone()
        row = x[i]
        row[0] = 1
        return x

    for function in (in_place, through_a_view):
        with pytest.raises(ValueError, match=r"writes in place to x\[i\]"):
            fn.jit(function)(X, INDEX)


def test_writing_to_an_argument_is_refused():
    def write(x, i):
        x[i] = 0
        return x

    with pytest.raises(ValueError, match="writes in place to argument 0"):
        fn.jit(write)(X, INDEX)


def test_members_of_a_map_have_indices_of_their_own():
    indices = torch.tensor([0, 2, -1])

    def write(x, i):
        x = x.clone()
        x[i] = 7
        return x

    def function(x, indices):
        return (
            fn.vmap(lambda i: x[i, ..., 1])(indices),
            fn.vmap(lambda x, i: x[i])(x, indices),
            fn.vmap(write)(x, indices),
            torch.vmap(lambda i: x[i, 1])(indices),
            torch.vmap(write)(x, indices),
        )

    written = torch.stack([write(X[k], indices[k]) for k in range(3)])
    rows = torch.stack([X[k][indices[k]] for k in range(3)])
    expected = (X[indices, ..., 1], rows, written, X[indices, 1], written)
    torch.testing.assert_close(fn.jit(function)(X, indices), expected, rtol=0, atol=0)
    eager = (
        fn.vmap(lambda i: X[i, ..., 1])(indices),
        fn.vmap(lambda x, i: x[i])(X, indices),
        fn.vmap(write)(X, indices),
    )
    torch.testing.assert_close(eager, expected[:3], rtol=0, atol=0)


def test_a_gradient_goes_through_an_index():
    def loss(x, i):
        return x[i, 2:].square().sum()

    got = fn.jit(torch.func.grad(loss))(X, INDEX)
    torch.testing.assert_close(got, torch.func.grad(lambda x: loss(x, 1))(X), rtol=0, atol=0)


def doubled_rows(n):
    return lambda x: fn.fori(0, n, lambda i, c: c.index_put((i,), c[i] * 2 + i), x)


def shifted(n):
    def body(i, c):
        c = c.clone()
        c[i, 2:6] = c[i, 1:5] + 1
        c[i, 0] += 5
        return c

    return lambda x: fn.fori(0, n, body, x)


def swapped(n):
    # Reads rows of the old carry that are written.
    order = torch.tensor([1, 0])
    return lambda x: fn.fori(0, n, lambda i, c: c.index_put((order,), c[order.flip(0)]), x)


def read_later(n):
    def body(carry, i):
        new = carry.index_put((i,), carry[i] + 1)
        return new, carry.sum() + new[0, 0]

    return lambda x: fn.scan(body, x, torch.arange(n))


def chosen_by_itself(n):
    def body(i, c):
        return c.index_put((c[:3, 0].long() % n,), c[i] + torch.arange(3.0)[:, None])

    return lambda x: fn.fori(0, n, body, x)


@pytest.mark.cpu_only
@pytest.mark.parametrize("make", [doubled_rows, shifted, swapped, read_later, chosen_by_itself])
def test_a_carry_that_is_written_in_part_is_what_it_is_eagerly(make):
    x = torch.arange(48.0).reshape(6, 8)
    torch.testing.assert_close(fn.jit(make(6))(x), make(6)(x), rtol=0, atol=0)


@pytest.mark.cpu_only
@pytest.mark.parametrize("make", [doubled_rows, shifted])
def test_an_iteration_that_writes_a_row_neither_reads_nor_writes_the_others(make):
    lowered = fn.jit(make(1000), donate=0).lower(torch.zeros(1000, 8))
    assert lowered.why_not_one is None
    code = lowered.code
    loop = code[code.index("for (int64_t i1") :]
    (kernel,) = {line.split("(")[0] for line in loop.splitlines() if line.startswith("kernel_")}
    text = code[code.index(f"{kernel}(") : code.index("\n\n", code.index(f"{kernel}("))]
    assert "memcpy" not in loop
    # The longest of the kernel's loops is one row.
    assert "8000" not in text
    assert "<static_cast<int64_t>(1000L)" not in text
