"""Small linear systems in a program: what PyTorch gives, and the errors that it raises."""

import pytest
import torch
from torch import linalg

import funcnet as fn

aten = torch.ops.aten
EYE = torch.eye(64, dtype=torch.float64)


def tensor(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def regular(n, *batch):
    """Matrices that are far from singular, and not symmetric."""
    return tensor(*batch, n, n) + n * EYE[:n, :n]


def positive(n, *batch):
    root = tensor(*batch, n, n)
    return root @ root.mT + n * EYE[:n, :n]


def triangular(**options):
    return lambda a, b: linalg.solve_triangular(a, b, **options)


def triangular_of_transpose(**options):
    return lambda a, b: linalg.solve_triangular(a.mT, b, **options)


def old_triangular(**options):
    return lambda a, b: torch.triangular_solve(b, a, **options)[0]


def by_factors(**options):
    return lambda a, b: linalg.lu_solve(*linalg.lu_factor(a), b, **options)


def by_cholesky(upper):
    def solve(a, b):
        factor = linalg.cholesky(a, upper=upper)
        return torch.cholesky_solve(b, factor, upper=upper), factor

    return solve


A, B, VECTORS = tensor(3, 4, 4), tensor(3, 4, 2), tensor(3, 4)
SINGULAR = torch.tensor([[0.0, 2.0], [0.0, 4.0]], dtype=torch.float64)
INDEFINITE = torch.tensor([[1.0, 2, 3], [2, 1, 5], [3, 5, 1]], dtype=torch.float64)
FLAGS = [(first, second) for first in (False, True) for second in (False, True)]
# Functions and what they are given.
CASES = [
    *[(linalg.solve, tensor(n, n), tensor(n, k)) for n, k in ((1, 1), (5, 3), (17, 20))],
    (linalg.solve, tensor(32, 32).mT.contiguous().mT, tensor(32, 1)),
    *[(linalg.solve, A, b) for b in (B, VECTORS, tensor(3, 4, 0))],
    (linalg.solve, tensor(2, 3, 4, 4), tensor(2, 3, 4)),
    (linalg.solve, A, tensor(4, 2)),
    (linalg.solve, tensor(4, 4), B),
    (lambda a, b: linalg.solve(a, b, left=False), A, B.mT.contiguous()),
    (lambda a, b: linalg.solve(a.mT, b, left=False), A, B.mT.contiguous()),
    (lambda a, b: linalg.solve(a[::2], b[:, ::2]), tensor(6, 4, 4), tensor(3, 8, 2)),
    (lambda a, b: tuple(aten._linalg_solve_ex(a, b)), A, B),
    (lambda a, b: tuple(aten._linalg_solve_ex(a.mT, b)), A, B),
    (lambda a, b: tuple(aten._linalg_solve_ex(a, b, left=False)), A, B.mT.contiguous()),
    (linalg.solve, tensor(0, 4, 4), tensor(0, 4, 2)),
    (linalg.solve, tensor(0, 0), tensor(0, 2)),
    (linalg.inv, tensor(9, 9)),
    (linalg.inv_ex, tensor(2, 3, 4, 4)),
    (linalg.inv, tensor(2, 0, 0)),
    (lambda a: linalg.matrix_power(a, -2), regular(4)),
    (lambda a: tuple(aten._linalg_det(a)), tensor(2, 3, 4, 4)),
    (lambda a: tuple(aten._linalg_slogdet(a)), tensor(2, 3, 4, 4)),
    (lambda a: linalg.det(a.mT), A),
    (linalg.det, tensor(17, 17)),
    (linalg.det, SINGULAR),
    (linalg.det, tensor(2, 0, 0)),
    (linalg.slogdet, SINGULAR),
    (linalg.slogdet, tensor(0, 0)),
    (torch.logdet, positive(4, 3)),
    *[(linalg.lu_factor_ex, a) for a in (tensor(3, 4, 6), tensor(3, 6, 4), SINGULAR)],
    *[(linalg.lu, a) for a in (tensor(3, 4, 6), tensor(3, 6, 4), SINGULAR, tensor(2, 3, 0))],
    (linalg.lu_factor, tensor(4, 4)),
    (by_factors(), A, B),
    (by_factors(adjoint=True), A, B),
    (by_factors(left=False), A, B.mT.contiguous()),
    (by_factors(left=False, adjoint=True), A, B.mT.contiguous()),
    (by_factors(), tensor(3, 1, 4, 4), tensor(2, 4, 2)),
    *[(by_cholesky(upper), positive(4, 3), B) for upper in (False, True)],
    *[(by_cholesky(upper), positive(4), B) for upper in (False, True)],
    (by_cholesky(False), positive(20), tensor(20, 3)),
    (lambda a: linalg.cholesky(a.tril()), positive(4, 3)),
    (lambda a: tuple(linalg.cholesky_ex(a.triu(), upper=True)), positive(4, 2, 3)),
    (lambda a: tuple(linalg.cholesky_ex(a)), INDEFINITE),
    (lambda a: tuple(linalg.cholesky_ex(a, upper=True)), INDEFINITE),
    (linalg.cholesky, tensor(2, 0, 0)),
    (lambda a: torch.cholesky_inverse(linalg.cholesky(a)), positive(4, 3)),
    *[(triangular(upper=u, unitriangular=v), regular(4, 3), B) for u, v in FLAGS],
    *[(triangular_of_transpose(upper=u, unitriangular=v), regular(4), B) for u, v in FLAGS],
    *[
        (triangular(upper=u, unitriangular=v, left=False), regular(4, 3), B.mT.contiguous())
        for u, v in FLAGS
    ],
    *[(old_triangular(upper=u, transpose=v), regular(4, 3), B) for u, v in FLAGS],
    (triangular(upper=True), regular(0), tensor(0, 2)),
    (lambda a, b: fn.vmap(linalg.solve)(a, b), A, VECTORS),
    (lambda a, b: fn.vmap(lambda b: linalg.solve(a, b))(b), tensor(4, 4), VECTORS),
    (lambda a: fn.vmap(lambda a: (linalg.cholesky(a), linalg.det(a)))(a), positive(4, 3)),
    (lambda a, b: torch.vmap(linalg.solve)(a, b), A, VECTORS),
    (lambda a, b: fn.scan(lambda x, a: (linalg.solve(a, x), x), b, a), A, tensor(4, 1)),
    (lambda a, b, d: torch.func.vjp(linalg.solve, a, b)[1](d), A, B, B + 1),
    (torch.func.grad(lambda a: linalg.cholesky(a).sum()), positive(4, 3)),
    (torch.func.grad(lambda a: linalg.slogdet(a)[1].sum()), A),
    (torch.func.grad(lambda a: linalg.inv(a).sum()), A),
]


@pytest.mark.cpu_only
@pytest.mark.filterwarnings("ignore:torch.triangular_solve")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_small_systems_are_torchs(dtype):
    functions = [function for function, *_ in CASES]
    inputs = [[each.to(dtype) for each in given] for _, *given in CASES]

    def run(inputs):
        return [function(*each) for function, each in zip(functions, inputs, strict=True)]

    compiled = fn.jit(run)
    lowered = compiled.lower(inputs)
    assert lowered.why_not_one is None
    # One matrix with a stack of right-hand sides is factored once, by LAPACK.
    names = {line.partition(",")[0] for line in lowered.called}
    assert names == {"aten::_linalg_solve_ex", "aten::cholesky_inverse"}
    assert len([line for line in lowered.called if "_linalg_solve_ex" in line]) == 1
    tolerance = 1e-9 if dtype == torch.float64 else 2e-3
    found, expected = fn.tree.leaves(compiled(inputs)), fn.tree.leaves(run(inputs))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.cpu_only
def test_larger_systems_are_lapacks():
    a, b = regular(40), tensor(40, 3)
    compiled = fn.jit(linalg.solve)
    assert compiled.lower(a, b).called[0].startswith("aten::_linalg_solve_ex")
    torch.testing.assert_close(compiled(a, b), linalg.solve(a, b))


FAILURES = {
    "solve": (linalg.solve, SINGULAR, SINGULAR),
    "inv": (linalg.inv, SINGULAR),
    "inv of a stack": (linalg.inv, torch.stack([EYE[:2, :2], SINGULAR])),
    "lu_factor": (linalg.lu_factor, SINGULAR),
    "cholesky": (linalg.cholesky, INDEFINITE),
    "not read": (lambda a: (linalg.inv(a), a + 1)[1], SINGULAR),
    "in a scan": (
        lambda a, b: fn.scan(lambda c, b: (linalg.solve(a + c, b), c), b[0], b),
        SINGULAR * 0,
        torch.zeros(3, 2, 1, dtype=torch.float64).double(),
    ),
    "in a map": (lambda a: fn.vmap(linalg.cholesky)(a), INDEFINITE.expand(2, 3, 3).clone()),
}


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", FAILURES)
def test_a_matrix_without_factors_raises_what_torch_raises(name):
    function, *given = FAILURES[name]
    compiled = fn.jit(function)
    with pytest.raises(RuntimeError) as expected:
        function(*given)
    for _ in range(2):
        with pytest.raises(RuntimeError) as raised:
            compiled(*given)
        assert type(raised.value) is type(expected.value)
        # In a map, a program looks at one member at a time.
        assert str(raised.value) == str(expected.value).replace("(Batch element 0): ", "") or (
            str(raised.value) == str(expected.value)
        )
    # What has factors goes through.
    compiled(*[each * 0 + EYE[: each.shape[-2], : each.shape[-1]] for each in given])
