"""Tensors that a jitted function closes over: read at each call, whatever has become of them."""

import copy

import pytest
import torch

import funcnet as fn


def linear(features=40):
    """A module whose parameters are the same for each test."""
    module = torch.nn.Linear(features, features)
    with torch.no_grad():
        module.weight.copy_(fn.random.normal(fn.key(0), (features, features)))
        module.bias.copy_(fn.random.normal(fn.key(1), (features,)))
    return module


def halve(module):
    module.half()


def double(module):
    module.double()


def shorten(module):
    module.weight.data = module.weight.data[:7].clone()
    module.bias.data = module.bias.data[:7].clone()


def lengthen(module):
    module.weight.data = torch.ones(90, 40)
    module.bias.data = torch.ones(90)


def transpose(module):
    module.weight.data = module.weight.data.T


def resize(module):
    module.requires_grad_(False)
    with torch.no_grad():
        module.weight.resize_(3, 40)
        module.bias.resize_(3)


def set_smaller(module):
    with torch.no_grad():
        module.weight.set_(torch.ones(2, 40))
        module.bias.set_(torch.ones(2))


def set_elsewhere(module):
    with torch.no_grad():
        module.weight.set_(torch.ones(41, 40)[1:])


def change_values(module):
    with torch.no_grad():
        module.weight.mul_(2)


def freeze(module):
    module.requires_grad_(False)


CHANGES = [
    *(halve, double, shorten, lengthen, transpose, resize, set_smaller, set_elsewhere),
    *(change_values, freeze),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("by", ["argument", "nothing"])
def test_a_captured_tensor_that_changes_is_read_as_it_is(change, by):
    module = linear()
    y = torch.ones(1, 40)

    def given(x):
        return x.to(module.weight.dtype) @ module.weight.T + module.bias

    def alone():
        return module.weight.T * 2 + module.bias.sum()

    function, arguments = (given, (y,)) if by == "argument" else (alone, ())
    compiled = fn.jit(function)
    for _ in range(2):
        torch.testing.assert_close(compiled(*arguments), function(*arguments).detach())
    before = copy.deepcopy(module)
    change(module)
    for _ in range(2):
        found, expected = compiled(*arguments), function(*arguments).detach()
        assert found.dtype == expected.dtype
        tolerance = {"rtol": 0.01, "atol": 0.02} if found.dtype == torch.float16 else {}
        torch.testing.assert_close(found, expected, **tolerance)
    # And back again.
    module.weight.data, module.bias.data = before.weight.data, before.bias.data
    torch.testing.assert_close(compiled(*arguments), function(*arguments).detach())


@pytest.mark.cpu_only
@pytest.mark.parametrize("size", [0, 8])
def test_memory_that_was_taken_away_is_an_error(size):
    held, empty = torch.ones(300), torch.ones(4)[4:]
    compiled = fn.jit(lambda x: x + held + empty.sum())
    x = torch.ones(300)
    compiled(x)
    compiled(x)
    held.untyped_storage().resize_(size)
    with pytest.raises(RuntimeError, match="memory of a tensor that the function closes over"):
        compiled(x)
    compiled = fn.jit(lambda x: x + 1)
    compiled(x)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="memory of argument 0 was taken away"):
        compiled(x)


def test_what_was_compiled_is_used_again():
    weight = torch.ones(3)
    calls = []

    def run(x):
        calls.append(None)
        return x * weight

    compiled = fn.jit(run)
    for _ in range(3):
        for dtype in (torch.float32, torch.float64):
            weight.data = weight.data.to(dtype)
            assert compiled(torch.ones(3)).dtype == dtype
    assert len(calls) == 2


def test_a_captured_tensor_that_is_no_plain_one_is_refused():
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(TypeError, match=r"dense tensors, got a tensor that the function closes"):
        fn.jit(lambda x: sparse @ x)(torch.ones(3, 2))


def test_in_a_loop_and_for_a_population():
    weight = torch.ones(3)
    compiled = fn.jit(
        lambda x: fn.vmap(lambda row: fn.scan(lambda c, r: (c + r * weight, None), row, x)[0])(x)
    )
    x = fn.random.normal(fn.key(0), (4, 3))
    first = compiled(x)
    weight.data = torch.full((3,), 2.0, dtype=torch.float64)
    with pytest.raises(ValueError, match="the carry must keep"):
        compiled(x)
    weight.data = torch.ones(3)
    assert torch.equal(compiled(x), first)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: x * w.item(),
        lambda x, w: x * float(w),
        lambda x, w: x * w.tolist(),
        lambda x, w: x * torch.tensor([w]),
        lambda x, w: torch.full((4,), w),
        lambda x, w: x if torch.equal(w, torch.tensor(2.0)) else -x,
        lambda x, w: x if torch.allclose(w, torch.tensor(2.0)) else -x,
        lambda x, w: x if w else -x,
    ],
    ids=["item", "float", "tolist", "tensor", "full", "equal", "allclose", "bool"],
)
def test_its_value_is_not_read_while_tracing(function):
    held = torch.tensor(2.0)
    with pytest.raises(TypeError, match="reads the value of a tensor"):
        fn.jit(lambda x: function(x, held))(torch.ones(4))


@pytest.mark.parametrize(
    ("function", "change"),
    [
        (lambda x, w: x * w.shape[0], lambda w: torch.ones(7)),
        (lambda x, w: x * len(w), lambda w: torch.ones(7)),
        (lambda x, w: x * w.numel(), lambda w: torch.ones(7)),
        (lambda x, w: x.to(w.dtype), lambda w: w.double()),
    ],
    ids=["shape", "len", "numel", "dtype"],
)
def test_a_tensor_of_which_only_the_shape_is_read(function, change):
    held = torch.ones(4)
    compiled, x = fn.jit(lambda x: function(x, held)), torch.ones(3)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), function(x, held))
    held.data = change(held)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), function(x, held))


def test_setting_data_is_refused():
    def run(x):
        y = x * 1
        y.data = x * 2
        return y

    with pytest.raises(TypeError, match=r"reads or sets Tensor.data"):
        fn.jit(run)(torch.ones(3))


def test_a_shape_that_depends_on_values_is_refused():
    with pytest.raises(TypeError, match=r"the shape of a result of .* depends on the values"):
        fn.jit(lambda x: x[x > 2])(torch.ones(3))
