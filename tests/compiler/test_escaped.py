"""What a traced function keeps outside itself: an error at its first use that names its line."""

import functools

import pytest
import torch

import funcnet as fn

X = torch.ones(3)


def escape(function, *args):
    """What a function appends to a list while it is traced."""
    kept = []
    fn.jit(lambda *given: function(kept, *given))(*args)
    return kept


def many(kept, x, n):
    kept.append(x)
    kept.append(x * 2)  # made
    torch.func.grad(lambda y: (kept.append(y * 3), (y * y).sum())[1])(x)
    fn.scan(lambda c, y: (kept.append(c + y) or c + y, None), x[0], x)
    fn.vmap(lambda y: kept.append(y * 3) or y)(x)
    kept.append(n)
    kept.append(n * 2)
    return x + 1


@pytest.fixture(scope="module")
def kept():
    return escape(many, X, 0.5)


USES = [
    *(torch.sin, torch.sum, lambda x: x + 1, lambda x: x + X, lambda x: X @ x, torch.clone),
    *(
        lambda x: torch.stack([X[0], x]),
        lambda x: x.tolist(),
        lambda x: bool(x.sum()),
        lambda x: x.clone().add_(1),
    ),
]


@pytest.mark.parametrize("which", range(5), ids=["input", "made", "grad", "scan", "map"])
@pytest.mark.parametrize("use", USES, ids=range(len(USES)))
def test_a_tensor_that_escapes_is_an_error_when_used(kept, which, use):
    with pytest.raises(RuntimeError, match=r"made while jit\(.*<lambda>\) was traced.*\n?.*value"):
        use(kept[which])


@pytest.mark.parametrize("use", [lambda n: n + 1, bool, lambda n: X * n, lambda n: -n])
def test_a_number_that_escapes_is_an_error_when_used(kept, use):
    for number in kept[5:]:
        with pytest.raises(RuntimeError, match=r"this number was made while jit"):
            use(number)


def test_the_line_is_shown_and_the_tensor_can_be_printed(kept):
    with pytest.raises(RuntimeError, match=r"test_escaped.py:\d+: kept.append\(x \* 2\)  # made"):
        _ = kept[1].shape
    assert "without a value" in f"{kept[1]} {kept[:1]}"


def test_it_is_an_error_in_another_function_too(kept):
    for function in (lambda x: x + kept[1], lambda x: torch.stack([kept[1], x])):
        with pytest.raises(RuntimeError, match="has no value"):
            fn.jit(function)(X)
    with pytest.raises(RuntimeError, match="has no value"):
        fn.jit(lambda x: x + 1)(kept[1])


def test_a_cache_of_a_traced_tensor_is_found():
    @functools.cache
    def mask(n):
        return torch.ones(n)

    compiled = fn.jit(lambda x: x + mask(len(x)))
    torch.testing.assert_close(compiled(X), X + 1)
    torch.testing.assert_close(compiled(X), X + 1)
    with pytest.raises(RuntimeError, match=r"return torch.ones\(n\)"):
        mask(3) + 1
    with pytest.raises(RuntimeError, match=r"return torch.ones\(n\)"):
        compiled(X.double())


def test_what_is_left_of_a_function_that_failed_can_be_looked_at():
    kept = []

    def run(x):
        kept.append(x * 2)
        raise KeyError("first")

    with pytest.raises(KeyError):
        fn.jit(run)(X)
    assert kept[0].shape == X.shape


def test_jitted_functions_in_jitted_functions_and_real_tensors_in_closures_work():
    inner = fn.jit(lambda x: x * 2)
    seen = []

    def run(x):
        seen.append(X)
        return inner(x) + inner(x + 1)

    compiled = fn.jit(run)
    for _ in range(2):
        torch.testing.assert_close(compiled(X), X * 4 + 2)
        torch.testing.assert_close(inner(X), X * 2)
    assert seen[0].sum() == 3
