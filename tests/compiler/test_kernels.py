"""Kernels of programs give the bits that eager PyTorch gives: all dtypes, NaN, ties, odd shapes."""

import math

import pytest
import torch

import funcnet as fn

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.filterwarnings("ignore:index_reduce.* is in beta"),
    pytest.mark.filterwarnings("ignore:The reduce argument of torch.scatter"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool)
# A shape and an axis for each dtype: the last axis and others, short and long, one and many lines.
LINES = (
    ((5, 9), 1),
    ((3, 40, 4), 1),
    ((200, 3), 0),
    ((2, 133), -1),
    ((2, 5, 530), 1),
    ((17,), 0),
    ((300,), 0),
    ((4, 9), 1),
)


def numbers(dtype, shape, seed, special=True):
    """Small numbers with ties, and among floats NaN, infinities and -0."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(-3, 5, shape, generator=generator)
    if dtype == torch.uint8:
        whole = whole.abs()
    if not dtype.is_floating_point:
        return whole.to(dtype)
    x = (whole / 2 + torch.rand(shape, generator=generator).round(decimals=1)).to(dtype)
    if special and x.numel() > 8:
        values = torch.tensor([-0.0, math.inf, math.nan, -math.inf, math.nan])
        x.view(-1)[[0, 1, 3, 5, 8]] = values.to(dtype)
    return x


def gives_the_same_bits(function, *args):
    expected = function(*args)
    compiled = fn.jit(function)
    assert compiled.lower(*args).called == ()
    torch.testing.assert_close(compiled(*args), expected, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def tensors():
    return [numbers(dtype, LINES[i][0], i) for i, dtype in enumerate(DTYPES)]


def test_cumulative_operators(tensors):
    def function(tensors):
        results = []
        for x, (_, dim) in zip(tensors, LINES, strict=True):
            results += [x.cumsum(dim), x.cumprod(dim), x.cummax(dim), x.cummin(dim)]
            if x.is_floating_point():
                results.append(x.logcumsumexp(dim))
        x = tensors[0]
        zero = x[0, 0].clone()
        results += [zero.cumsum(0), zero.cumprod(-1), zero.logcumsumexp(0), zero.cummax(0)]
        results += [x[:0].cumsum(0), x[:0].cummin(1), x[:, :0].logcumsumexp(1)]
        results += [x.T.cumsum(0), x[:, ::2].cumsum(1), torch.vmap(lambda row: row.cumsum(0))(x)]
        results += [torch.vmap(lambda row: row.cummin(0))(x)]
        results += [fn.scan(lambda carry, row: (carry, row.cumprod(0)), zero, x)[1]]
        y = tensors[4][0, :, :9]
        dtypes = (torch.float64, torch.bfloat16, torch.int32, torch.uint8)
        return results + [y.cumsum(0, dtype=dtype) for dtype in dtypes]

    gives_the_same_bits(function, tensors)


def test_selections(tensors):
    # Eager topk and mode sort by a comparison that NaN breaks: with the same steps as here.
    def function(tensors):
        results = []
        for x, (_, dim) in zip(tensors, LINES, strict=True):
            results.append(x.mode(dim))
            if x.dtype == torch.bool:
                continue
            size = x.shape[dim]
            results += [x.topk(1, dim), x.topk(3, dim, largest=False), x.topk(size // 2, dim)]
            results += [x.topk(size // 2, dim, sorted=False), x.kthvalue(size // 2, dim)]
            results += [x.median(dim), x.nanmedian(dim, keepdim=True), x.median(), x.nanmedian()]
        x = tensors[0]
        zero = x[0, 4].clone()
        results += [zero.topk(1), zero.kthvalue(1), zero.median(), zero.median(0), zero.mode()]
        results += [x[:0].topk(2, 1), x[:0].median(1), x.topk(0), x.T.topk(2)]
        results += [torch.vmap(lambda row: row.topk(2))(x), torch.vmap(torch.median)(x)]
        results += [fn.scan(lambda carry, row: (carry, row.kthvalue(2)), zero, x)[1]]
        return results

    gives_the_same_bits(function, tensors)


def test_a_stable_sort(tensors):
    def function(tensors):
        results = []
        for x, (_, dim) in zip(tensors, LINES, strict=True):
            for descending in (False, True):
                results.append(x.sort(dim=dim, descending=descending, stable=True))
        x = tensors[0]
        return [*results, x.msort(), x.argsort(dim=0, stable=True), x[:0].sort(0), x[0, 0].sort()]

    gives_the_same_bits(function, tensors)


# Eager PyTorch says so of each transposed input.
@pytest.mark.filterwarnings("ignore:.*input value tensor is non-contiguous")
def test_searches():
    sequence = torch.tensor([-2.0, -1, -1, 0, 0.5, 0.5, 2])
    x = torch.tensor([[-3.0, -1, 0.5], [math.nan, math.inf, 0.2]])
    rows, values = torch.rand(3, 9), torch.rand(3, 2)
    whole = torch.tensor([0, 1, 2, 2, 3])

    def function(sequence, x, rows, values, whole):
        search, place = torch.searchsorted, torch.bucketize
        options = ({}, {"right": True}, {"side": "right"}, {"side": "left"}, {"out_int32": True})
        results = [search(sequence, x, **each) for each in options]
        backwards = sequence.flip(0)
        results += [search(backwards, x, sorter=backwards.argsort(stable=True))]
        results += [search(rows.sort().values, values), search(rows, values, sorter=rows.argsort())]
        results += [search(sequence, 0.5), search(sequence, math.inf), search(sequence, x[0, 1])]
        results += [search(sequence, whole), search(sequence.double(), x), search(whole, 2)]
        results += [search(whole, whole, right=True), search(whole, 1.5)]
        results += [search(sequence.bfloat16(), x.half().bfloat16())]
        results += [place(x, sequence), place(x, sequence, right=True), place(0.5, sequence)]
        results += [place(x.T, sequence, out_int32=True), place(whole, sequence)]
        results += [search(sequence[:0], x), search(sequence, x[:0])]
        results += [torch.vmap(search)(rows.sort().values, values)]
        results += [fn.scan(lambda carry, row: (carry, place(row, sequence)), x[0, 0], x)[1]]
        return results

    gives_the_same_bits(function, sequence, x, rows, values, whole)


# Of what is scattered into: its dtype and shape, those of the index and of the source, the axis.
SCATTERED = (
    (torch.float32, (5, 7), (5, 7), (5, 7), 0),
    (torch.float64, (5, 7), (4, 9), (4, 9), 1),
    (torch.bfloat16, (3, 5, 4), (3, 6, 4), (3, 6, 4), 1),
    (torch.float16, (5, 7), (3, 4), (9, 6), 0),
    (torch.int64, (3, 5, 4), (2, 6, 3), (3, 6, 4), -2),
    (torch.int32, (6,), (9,), (9,), 0),
    (torch.bool, (4, 5), (4, 5), (4, 5), 0),
    (torch.float32, (), (), (), 0),
    (torch.float32, (4, 5), (0, 5), (0, 5), 0),
)
REDUCTIONS = ("sum", "prod", "mean", "amax", "amin")


def test_reductions_at_indices():
    given = []
    for seed, (dtype, shape, of_index, of_source, dim) in enumerate(SCATTERED):
        index = torch.randint(shape[dim] if shape else 1, of_index)
        x, source = (numbers(dtype, each, seed, seed < 2) for each in (shape, of_source))
        given.append((x, index, source))

    def function(given):
        results = []
        for (x, index, source), (*_, dim) in zip(given, SCATTERED, strict=True):
            for turn, reduction in enumerate(REDUCTIONS):
                if x.dtype == torch.bool and reduction == "mean":
                    continue
                options = {"reduce": reduction, "include_self": turn % 2 == 0}
                results.append(x.scatter_reduce(dim, index, source, **options))
                if x.dim() == 2 and x.dtype.itemsize == 4:
                    options["include_self"] = turn % 2 == 1
                    results.append(x.scatter_reduce(dim, index, source, **options))
            if x.dtype != torch.bool:
                results.append(x.scatter(dim, index, source, reduce="multiply"))
                results.append(x.scatter(dim, index, source, reduce="add"))
        for x, index, source in given[:3]:
            indices = index.flatten()[:4].int()
            for reduction in REDUCTIONS[1:]:
                options = {"reduce": reduction, "include_self": reduction < "b"}
                slices = source.narrow(1, 0, 4)
                narrow = x.narrow(0, 0, slices.shape[0])
                results.append(narrow.index_reduce(1, indices, slices, **options))
        x, _, source = given[0]
        results += [x.masked_scatter(x > 0, source)]
        results += [torch.vmap(lambda x, y: x.masked_scatter(y > 0, y))(x, source)]
        return results

    gives_the_same_bits(function, given)


def test_sums_of_integers_at_indices():
    x, source = numbers(torch.int64, (5, 7), 0), numbers(torch.int64, (4, 7), 1)
    index, places = torch.tensor([3, 1, 3, 0]), torch.randint(0, 5, (4, 7))

    def function(x, source, index, places):
        results = [x.index_add(0, index, source, alpha=-2), x.scatter_add(0, places, source)]
        results += [x.index_put((index,), source, accumulate=True)]
        results += [torch.zeros_like(x[0]).scatter_add(0, index, source[:, 0])]

        def counted(count, at):
            return count.index_add(0, at[None], torch.ones_like(at[None])), at

        return [*results, fn.scan(counted, torch.zeros_like(x[:, 0]), index)[0]]

    gives_the_same_bits(function, x, source, index, places)


@pytest.mark.parametrize("reduce", ["amax", "prod"])
def test_an_index_out_of_range_is_an_error(reduce):
    x, index = torch.ones(5, 2), torch.tensor([3, 5])
    with pytest.raises(RuntimeError, match="index 5 is out of bounds for dimension 0 with size 5"):
        fn.jit(lambda x, i: x.index_reduce(0, i, x[:2], reduce))(x, index)
    with pytest.raises(RuntimeError, match="index -1 is out of bounds for dimension 1 with size 2"):
        fn.jit(lambda x, i: x.scatter_reduce(1, i, x, reduce))(x, torch.full((5, 1), -1))


def test_a_mask_that_wants_more_than_there_is_is_an_error():
    with pytest.raises(RuntimeError, match="as many elements in source"):
        fn.jit(lambda x, y: x.masked_scatter(x > 0, y))(torch.ones(5), torch.ones(4))


def test_distances_and_histograms_are_those_of_torch():
    a, b, s, t = torch.rand(6, 5), torch.rand(4, 5), torch.rand(3, 2, 5), torch.rand(3, 3, 5)
    a[1, 1] = math.nan

    def function(a, b, s, t):
        results = [torch.cdist(s, t), torch.cdist(b, s), torch.vmap(torch.cdist)(s, t)]
        # With NaN, eager's maximum depends on where it lies.
        results += [torch.cdist(b, b, math.inf), torch.pdist(b, math.inf)]
        for p in (0.0, 1.0, 2.0, 3.0, 0.5):
            results += [torch.cdist(a, b, p), torch.pdist(a, p)]
        results += [torch.cdist(a[:0], b), torch.cdist(a[:, :0], b[:, :0]), torch.pdist(b[:1])]
        results += [b.histc(), a.histc(5, -1, 1), b.double().histc(3), (b * 0).histc(4)]
        return [*results, b[:0].histc(3)]

    expected = function(a, b, s, t)
    compiled = fn.jit(function)
    assert compiled.lower(a, b, s, t).called == ()
    torch.testing.assert_close(compiled(a, b, s, t), expected, equal_nan=True)
