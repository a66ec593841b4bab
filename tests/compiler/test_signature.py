"""What a program depends on: two calls that differ in it do not share a program."""

import contextlib
import copy
import functools
import gc
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import funcnet as fn

X = torch.linspace(-1, 1, 6).reshape(2, 3)


class Options(NamedTuple):
    rate: float


@dataclass(frozen=True)
class Frozen:
    rate: float


@contextlib.contextmanager
def set_for_a_while(write, before, value):
    write(value)
    try:
        yield
    finally:
        write(before)


def setting(write, read, value):
    """A context in which one of torch's global settings is another."""
    return lambda: set_for_a_while(write, read(), value)


def keys(tree):
    """The names in a tree, in their order, and the dtypes of its leaves."""
    if isinstance(tree, dict):
        return [(name, keys(child)) for name, child in tree.items()]
    return getattr(tree, "dtype", type(tree))


def doubled(tree):
    return {name: 2 * leaf for name, leaf in tree.items()}


def in_order(d):
    return torch.stack([leaf.sum() for leaf in d.values()])


plain = contextlib.nullcontext
# Name: function, arguments of one call, arguments of another, options of jit.
ARGUMENTS = {
    "the order of a dict": (in_order, ({"a": X, "b": 2 * X},), ({"b": 2 * X, "a": X},), {}),
    "the order of a dict in a tuple": (
        lambda t: in_order(t[1]["c"]),
        ((X, {"c": {"a": X, "b": 2 * X}}),),
        ((X, {"c": {"b": 2 * X, "a": X}}),),
        {},
    ),
    "the order of an OrderedDict": (
        in_order,
        (OrderedDict(a=X, b=2 * X),),
        (OrderedDict(b=2 * X, a=X),),
        {},
    ),
    "the order of the result": (doubled, ({"a": X, "b": X},), ({"b": X, "a": X},), {}),
    "the type of a dict's name": (
        lambda d: X * next(iter(d)) / 2 if type(next(iter(d))) is float else X * next(iter(d)),
        ({1: X},),
        ({1.0: X},),
        {},
    ),
    "a list and a tuple": (lambda t: X * (1 + isinstance(t, list)), ((X,),), ([X],), {}),
    "a Parameter": (
        lambda x: x * (1 + isinstance(x, torch.nn.Parameter)),
        (X,),
        (torch.nn.Parameter(X.clone()),),
        {},
    ),
    "requires_grad": (
        lambda x: x * (1 + x.requires_grad),
        (X,),
        (X.clone().requires_grad_(),),
        {},
    ),
    "the shape": (lambda x: x * x.shape[0], (X,), (X[:1],), {}),
    "the dtype": (lambda x: x * x.dtype.itemsize, (X,), (X.double(),), {}),
    "the type of a number": (lambda x, n: x.long() * n, (X, 2), (X, 2.0), {}),
    "a bool and an int": (lambda x, n: x.bool() * n, (X, True), (X, 1), {}),
    "an int and a float that are static": (
        lambda x, n: x.long() * n,
        (X, 2),
        (X, 2.0),
        {"static": 1},
    ),
    "numbers in a static tuple": (
        lambda x, n: x.long() * n[0],
        (X, (2,)),
        (X, (2.0,)),
        {"static": 1},
    ),
    "numbers in a static NamedTuple": (
        lambda x, n: x.long() * n.rate,
        (X, Options(1)),
        (X, Options(True)),
        {"static": 1},
    ),
    "numbers in a static dataclass": (
        lambda x, n: x.long() * n.rate,
        (X, Frozen(2)),
        (X, Frozen(2.0)),
        {"static": 1},
    ),
    "numbers in a static frozenset": (
        lambda x, n: x.long() * next(iter(n)),
        (X, frozenset([2])),
        (X, frozenset([2.0])),
        {"static": 1},
    ),
    "the sign of a static zero": (
        lambda x, n: torch.copysign(x, n),
        (X, 0.0),
        (X, -0.0),
        {"static": 1},
    ),
    "the end of a static range": (
        lambda x, n: x * n.stop,
        (X, range(0, 3, 2)),
        (X, range(0, 4, 2)),
        {"static": 1},
    ),
    "a static Decimal": (
        lambda x, n: x * len(str(n)),
        (X, Decimal("1.0")),
        (X, Decimal(1)),
        {"static": 1},
    ),
    "metadata of a node": (
        lambda pullback: X * (2 if type(pullback.static[1]) is float else 3),
        (fn.Pullback(print, {"x": X}, ("print", 2)),),
        (fn.Pullback(print, {"x": X}, ("print", 2.0)),),
        {},
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_calls_with_other_arguments_share_no_program(name):
    function, first, second, options = ARGUMENTS[name]
    for one, other in ((first, second), (second, first)):
        compiled = fn.jit(function, **options)
        # Twice each: the second time by the fast path.
        for arguments in (one, one, other, other, one):
            found, expected = compiled(*arguments), function(*arguments)
            assert keys(found) == keys(expected)
            for a, b in zip(fn.tree.leaves(found), fn.tree.leaves(expected), strict=True):
                torch.testing.assert_close(a, b)


def product(x):
    return x @ x.T, torch.ones(2) * 1.5, x.sum()


SETTINGS = {
    "autocast": (lambda: torch.autocast("cpu", dtype=torch.bfloat16), product),
    "autocast's dtype": (
        lambda: torch.autocast("cpu", dtype=torch.float16),
        lambda x: torch.mm(x, x.T) * (1 if torch.get_autocast_dtype("cpu") is torch.float16 else 2),
    ),
    "default dtype": (
        setting(torch.set_default_dtype, torch.get_default_dtype, torch.float64),
        product,
    ),
    "default device": (
        lambda: torch.device("meta"),
        lambda x: x * (2 if torch.empty(0).is_meta else 3),
    ),
    "grad mode": (torch.no_grad, lambda x: x * (2 if torch.is_grad_enabled() else 3)),
    "deterministic algorithms": (
        setting(
            torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled, True
        ),
        lambda x: x * (2 if torch.are_deterministic_algorithms_enabled() else 3),
    ),
    "precision of products": (
        setting(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision, "medium"),
        lambda x: x * (2 if torch.get_float32_matmul_precision() == "medium" else 3),
    ),
    "number of threads": (
        setting(torch.set_num_threads, torch.get_num_threads, 3),
        lambda x: x * torch.get_num_threads(),
    ),
    "mkldnn": (
        setting(torch._C._set_mkldnn_enabled, torch._C._get_mkldnn_enabled, False),
        lambda x: x * (2 if torch.backends.mkldnn.enabled else 3),
    ),
    "kernels of attention": (
        lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        lambda x: x * (2 if torch.backends.cuda.flash_sdp_enabled() else 3),
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("first", [False, True], ids=["then set", "then unset"])
def test_calls_under_other_settings_share_no_program(name, first):
    change, function = SETTINGS[name]
    compiled = fn.jit(function)
    for changed in (first, first, not first, not first, first):
        with change() if changed else plain():
            found, expected = compiled(X), function(X)
        for a, b in zip(fn.tree.leaves(found), fn.tree.leaves(expected), strict=True):
            torch.testing.assert_close(a, b)


def test_autocast_keeps_no_fake_tensors_and_no_values_of_the_trace():
    weight = torch.nn.Parameter(torch.ones(3, 4))
    compiled = fn.jit(lambda x: x @ weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = torch.ones(2, 3) @ weight
        torch.testing.assert_close(compiled(torch.ones(2, 3)), first.detach())
        after = torch.ones(2, 3) @ weight
        assert type(after) is torch.Tensor
        torch.testing.assert_close(after, first)
    with torch.no_grad():
        weight.mul_(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(torch.ones(2, 3)), 2 * first.detach())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_program_is_not_made_anew_where_nothing_is_different(mode):
    calls = []

    def run(x):
        calls.append(None)
        return x + 1

    compiled = fn.jit(run)
    for _ in range(3):
        compiled(X)
        compiled(X.T.contiguous().T)  # other strides
        with mode():
            compiled(X)
    assert len(calls) == 2  # one for each grad mode


class Odd(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("message", "tensor"),
    [
        (r"plain tensors, got argument 0 as a Odd", X.as_subclass(Odd)),
        (r"dense tensors, got argument 0 in the layout torch.sparse_coo", X.to_sparse()),
    ],
    ids=["subclass", "sparse"],
)
def test_tensors_that_programs_do_not_know_are_refused(message, tensor):
    compiled = fn.jit(lambda x: x + 1)
    compiled(X)
    with pytest.raises(TypeError, match=message):
        compiled(tensor)


def test_a_fake_tensor_runs_the_function_itself():
    compiled = fn.jit(lambda x: x + 1)
    compiled(X)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(X)
    assert compiled(fake).shape == X.shape
    assert type(compiled(fake)) is type(fake)


def test_under_a_mode_that_watches_operators_the_function_itself_runs():
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    compiled = fn.jit(lambda x: torch.sin(x))
    compiled(X)
    with Watch():
        torch.testing.assert_close(compiled(X), X.sin())
    assert torch.sin in seen


@pytest.mark.parametrize("kept", [0, 1])
def test_a_negated_view_keeps_its_sign(kept):
    negated = torch.view_as_complex(torch.arange(6.0).reshape(3, 2)).conj().imag
    assert negated.is_neg()
    fixed = negated.expand(2, 3)
    for other in (negated, fixed):
        compiled = fn.jit(lambda x, other=other: x * other)
        torch.testing.assert_close(compiled(torch.ones(3)), torch.ones(3) * other)
        torch.testing.assert_close(fn.jit(lambda x: x * 2)(other), other * 2)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.as_strided((3,), (1,)),
        lambda x: torch.as_strided(x, (2, 2), (1, 1)),
        lambda x: x * x.stride(0),
        lambda x: x * (1 + x.storage_offset()),
        lambda x: x * 2 if x.is_contiguous() else x,
    ],
    ids=["as_strided", "torch.as_strided", "stride", "storage_offset", "is_contiguous"],
)
def test_where_strides_matter_a_view_is_refused(function):
    compiled = fn.jit(function)
    wide = torch.arange(12.0).reshape(3, 4)
    torch.testing.assert_close(compiled(wide), function(wide))
    for view in (wide.T, wide[:, 1:3].T):
        other = fn.jit(function)
        with pytest.raises(TypeError, match="asks how tensors lie in memory"):
            other(view)
        with pytest.raises(TypeError, match=r"asks how tensors lie in memory .* argument 0"):
            compiled(view)


def test_as_strided_of_a_slice_is_refused():
    compiled = fn.jit(lambda x: x.as_strided((2,), (1,), 0))
    with pytest.raises(TypeError, match="asks how tensors lie in memory"):
        compiled(torch.arange(6.0)[2:4])


def test_what_a_tensor_keeps_beside_its_values_is_refused():
    x = X.clone().requires_grad_()
    (x * 2).sum().backward()
    with pytest.raises(TypeError, match=r"reads or sets Tensor.grad"):
        fn.jit(lambda x: x - x.grad)(x)


class Net:
    def __init__(self, scale):
        self.weight = torch.ones(3)
        self.scale = scale
        self.traced = 0

    @fn.jit
    def apply(self, x):
        return x * self.weight * self.scale

    @functools.partial(fn.jit, static="power", donate=1)
    def power(self, x, power):
        return x**power * self.scale


class Slots:
    __slots__ = ("scale",)

    @fn.jit
    def apply(self, x):
        return x * self.scale


class Nested(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(3, 3)
        self.options = Net(2.0)

    @fn.jit
    def forward(self, x):
        return x @ self.inner.weight.T * self.options.scale


class Model(NamedTuple):
    weight: torch.Tensor

    @fn.jit
    def apply(self, x):
        return x * self.weight


def test_a_method_is_bound():
    one, two = Net(2.0), Net(3.0)
    for scale, net in ((2.0, one), (3.0, two), (2.0, one)):
        torch.testing.assert_close(net.apply(X), X * scale)
    del net
    one.weight.mul_(2)
    torch.testing.assert_close(one.apply(X), X * 4)
    one.weight = torch.full((3,), 7.0)
    torch.testing.assert_close(one.apply(X), X * 14)
    one.scale = 5.0
    torch.testing.assert_close(one.apply(X), X * 35)
    assert Net.apply.lower is not None
    assert "mul" in one.apply.lower(X).graph
    given = X.clone()
    torch.testing.assert_close(two.power(given, 2), X**2 * 3)
    with pytest.raises(RuntimeError, match="donated"):
        _ = given + 1
    # A method keeps its instance, and programs do not.
    torch.testing.assert_close(Net(9.0).apply(X), X * 9)
    gone = weakref.ref(two)
    del two
    gc.collect()
    assert gone() is None
    assert len(Net.__dict__["apply"]._methods) == 1
    model = Model(torch.full((3,), 2.0))
    torch.testing.assert_close(model.apply(X), X * 2)
    torch.testing.assert_close(Model(torch.ones(3)).apply(X), X)


def test_what_a_methods_instance_holds_is_part_of_the_program():
    slots = Slots()
    for scale in (2.0, 3.0, 2):
        slots.scale = scale
        torch.testing.assert_close(slots.apply(X), X * scale)
    net = Nested()

    def check():
        expected = X @ net.inner.weight.T * net.options.scale
        torch.testing.assert_close(net(X), expected.detach())

    check()
    net.options.scale = 5.0
    check()
    net.inner.weight = torch.nn.Parameter(torch.ones(3, 3))
    check()
    with torch.no_grad():
        net.inner.weight.mul_(3)
    check()


def test_shapes_of_tensors_that_went_are_not_taken_for_those_that_came():
    class Holder:
        @fn.jit
        def apply(self, x):
            return x * self.weight.shape[0]

    holder = Holder()
    for size in range(1, 9):
        holder.weight = torch.ones(size)
        torch.testing.assert_close(holder.apply(X), X * size)


@fn.jit
def at_the_top(x):
    return x + 1


def test_a_jitted_function_is_copied_and_pickled_as_a_function():
    assert copy.deepcopy({"f": at_the_top})["f"] is at_the_top
    assert copy.deepcopy(Net(2.0)).scale == 2.0
