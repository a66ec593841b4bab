"""`dynamic_slice` and `dynamic_update_slice` are those of jax.lax."""

import itertools

import pytest
import torch

import funcnet as fn

X = torch.arange(12.0).reshape(3, 4)
# Start and size, and the start that jax.lax clamps it to.
BLOCKS = [
    ((1, 1), (2, 3), (1, 1)),
    ((1, 1), (2, 4), (1, 0)),
    ((5, -1), (2, 3), (1, 1)),
    ((-2, -100), (2, 3), (1, 0)),
    ((2, 3), (0, 1), (2, 3)),
    ((7, 7), (3, 4), (0, 0)),
]


def kinds(start):
    """The same start as integers, as 0-d tensors, as both, and as one tensor."""
    tensors = tuple(torch.tensor(each) for each in start)
    return [start, tensors, (start[0], tensors[1].int()), torch.tensor(start)]


@pytest.mark.parametrize(("start", "size", "clamped"), BLOCKS)
def test_a_block_begins_where_jax_has_it(start, size, clamped):
    i, j = clamped
    block = X[i : i + size[0], j : j + size[1]]
    written = X.clone()
    written[i : i + size[0], j : j + size[1]] = -1
    update = torch.full(size, -1.0)

    def function(x, update, *starts):
        return [
            (fn.dynamic_slice(x, each, size), fn.dynamic_update_slice(x, update, each))
            for each in starts
        ]

    for got, put in function(X, update, *kinds(start)):
        torch.testing.assert_close(got, block, rtol=0, atol=0)
        torch.testing.assert_close(put, written, rtol=0, atol=0)


def test_compiled_it_is_the_same():
    def function(x, starts):
        found = []
        for (_, size, _), kind in zip(BLOCKS, starts, strict=True):
            update = torch.full(size, -1.0)
            found.append(
                (fn.dynamic_slice(x, kind, size), fn.dynamic_update_slice(x, update, kind))
            )
        return found

    for kind in range(4):
        starts = [kinds(start)[kind] for start, _, _ in BLOCKS]
        got = fn.jit(function)(X, starts)
        torch.testing.assert_close(got, function(X, starts), rtol=0, atol=0)


def test_a_negative_start_may_be_clamped_instead():
    start = (torch.tensor(-1), -1)
    got = fn.dynamic_slice(X, start, (2, 2), allow_negative_indices=False)
    torch.testing.assert_close(got, X[:2, :2], rtol=0, atol=0)


def test_along_one_dimension():
    x = torch.arange(24).reshape(2, 3, 4)
    for dim, start in itertools.product((0, 1, -1), (0, torch.tensor(1), torch.tensor(9), -1)):
        extent = x.shape[dim]
        first = min(max(int(start) + (extent if int(start) < 0 else 0), 0), extent - 2)
        block = x.narrow(dim, first, 2)
        assert fn.dynamic_slice_in_dim(x, start, 2, dim).equal(block)
        assert fn.dynamic_update_slice_in_dim(x, -block, start, dim).equal(
            x.slice_scatter(-block, dim, first, first + 2)
        )


def test_the_result_is_new_memory():
    for start in ((0, 0), (torch.tensor(0), 0)):
        block = fn.dynamic_slice(X, start, (3, 4))
        whole = fn.dynamic_update_slice(X, X[:0], start)
        assert block.equal(X)
        assert whole.equal(X)
        assert X.data_ptr() not in (block.data_ptr(), whole.data_ptr())


@pytest.mark.parametrize("vmap", [torch.vmap, fn.vmap])
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (None, 0, 0), (0, None, 0), (0, 0, None)])
def test_members_of_a_map_have_starts_of_their_own(vmap, in_dims):
    x = torch.arange(36.0).reshape(3, 3, 4)
    updates, starts = -torch.ones(3, 2, 2), torch.tensor([0, 5, -2])

    def member(x, update, i):
        return fn.dynamic_slice(x, (i, 1), (2, 3)), fn.dynamic_update_slice(x, update, (i, i))

    given = [
        each if dim == 0 else each[1]
        for each, dim in zip((x, updates, starts), in_dims, strict=True)
    ]
    got = vmap(member, in_dims)(*given)
    members = [
        member(*[each[k] if dim == 0 else each for each, dim in zip(given, in_dims, strict=True)])
        for k in range(3)
    ]
    expected = tuple(torch.stack(each) for each in zip(*members, strict=True))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    if vmap is fn.vmap:
        compiled = fn.jit(fn.vmap(member, in_dims))(*given)
        torch.testing.assert_close(compiled, expected, rtol=0, atol=0)


@pytest.mark.parametrize("start", [(1, 2), (torch.tensor(1), torch.tensor(-2))], ids=["int", "0-d"])
def test_gradients(start):
    update = torch.ones(2, 2)

    def loss(x, update):
        read = fn.dynamic_slice(x, start, (2, 2)).square().sum()
        return read + (fn.dynamic_update_slice(x, update, start) ** 3).sum()

    dx, dupdate = torch.func.grad(loss, (0, 1))(X, update)
    expected = 3 * X**2
    expected[1:3, 2:4] = 2 * X[1:3, 2:4]
    torch.testing.assert_close(dx, expected)
    torch.testing.assert_close(dupdate, 3 * update**2)
    compiled = fn.jit(torch.func.grad(loss, (0, 1)))(X, update)
    torch.testing.assert_close(compiled, (dx, dupdate))


def test_it_runs_on_meta_tensors():
    x = X.to("meta")
    start = (torch.tensor(1, device="meta"), 0)
    assert fn.dynamic_slice(x, start, (2, 2)).shape == (2, 2)
    assert fn.dynamic_update_slice(x, x[:2], start).shape == (3, 4)


@pytest.mark.cpu_only
def test_a_block_of_a_carry_is_written_in_its_place():
    def cache(x, rows):
        def body(i, x):
            return fn.dynamic_update_slice(x, rows[i][None], (i, 0))

        return fn.fori(0, 1000, body, x)

    lowered = fn.jit(cache, donate=0).lower(torch.zeros(1000, 8), torch.ones(1000, 8))
    loop = lowered.code[lowered.code.index("for (int64_t i1") :]
    assert lowered.why_not_one is None
    assert "memcpy" not in loop
    assert "8000" not in lowered.code.split("funcnet_run")[0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fn.dynamic_slice(X, (0,), (1, 1)), ValueError, "a start for each dimension"),
        (lambda: fn.dynamic_slice(X, 0, (1, 1)), ValueError, "a start for each dimension"),
        (lambda: fn.dynamic_slice(X, (0, 0), (4, 1)), ValueError, "a block that fits into"),
        (lambda: fn.dynamic_slice(X, (0, 0), (1,)), ValueError, "a block that fits into"),
        (lambda: fn.dynamic_slice(X, (0.0, 0), (1, 1)), TypeError, "expects integers"),
        (lambda: fn.dynamic_slice(X, (True, 0), (1, 1)), TypeError, "expects integers"),
        (lambda: fn.dynamic_slice(X, (X[0, 0], 0), (1, 1)), TypeError, "expects integers"),
        (lambda: fn.dynamic_update_slice(X, X.double(), (0, 0)), TypeError, "x's dtype"),
        (lambda: fn.dynamic_update_slice(X, X[0], (0, 0)), ValueError, "a block that fits into"),
        (lambda: fn.dynamic_slice_in_dim(X, 0, 1, 2), ValueError, "expects a dim of"),
    ],
)
def test_what_does_not_fit_is_an_error(call, error, message):
    with pytest.raises(error, match=message):
        call()
