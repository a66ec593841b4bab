"""One case held to torch: layout of params and state, outputs, gradients, new state, the laws."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import funcnet as fn
from funcnet.testing.assertions import alike, by_path, close, magnitude
from tests.layers import oracle
from tests.parity import names, reference
from tests.parity.exceptions import (
    CANCELLING,
    CLASSES,
    DEEP,
    INEXACT,
    NOT_DERIVATIVES,
    ROUNDING,
    SEES_NOTHING,
    WRONG_GRADIENTS,
    torch_has_no,
)
from tests.parity.names import Unsupported
from tests.parity.samples import REFUSED, TORCH, Sample

# Their numbers are random when they are trained, or always: shapes and laws are what is compared.
NOISE = {"Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout"}
NOISE |= {"RReLU"}
ALWAYS_NOISE = {"FractionalMaxPool2d", "FractionalMaxPool3d"}

Run = Callable[[Any], Any]


def check(sample: Sample, jit: bool = False) -> None:
    """Raise unless funcnet gives what torch gives; `Unsupported` if there is nothing to compare."""
    if sample.cls.__name__ in CLASSES:
        raise Unsupported(CLASSES[sample.cls.__name__])
    with _quiet():
        made, args, kwargs = names.translate(sample.cls, sample.args, sample.kwargs, sample.options)
        if names.takes(made, "dtype") and not names.floating(sample.inputs):
            kwargs["dtype"] = sample.dtype
        module = None
        try:
            module = reference.module_of(sample)
            expected = reference.forward(copy.deepcopy(module), sample)
        except Exception as error:
            _check_refusal(sample, error, lambda: _call(sample, made(*args, **kwargs), module))
            return
        if sample.source == REFUSED:
            raise Unsupported(f"torch takes it: {sample.what}")
        held = _check_loss if names.is_loss(sample.cls) else _check_layer
        try:
            held(sample, made(*args, **kwargs), module, expected, jit)
        except ValueError as error:
            if _finite(expected):
                raise
            raise Unsupported(f"where torch gives NaN or infinity: {error}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings, and without a trace in torch's random generator.

    And without torch's fast path of attention, which gives 0 for tokens that are padded.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


def _check_refusal(sample: Sample, error: Exception, call: Callable[[], Any]) -> None:
    """What torch refuses, funcnet refuses by a ValueError or a TypeError."""
    told = str(error).splitlines()[0] if str(error) else type(error).__name__
    if torch_has_no(error, sample.dtype):
        raise Unsupported(f"torch: {told}") from None
    try:
        call()
    except (ValueError, TypeError):
        return
    raise AssertionError(f"torch refuses it, funcnet does not: {told}")


def _call(sample: Sample, subject: Any, module: nn.Module | None) -> None:
    if isinstance(subject, fn.Loss):
        subject.apply(*_prediction_and_target(sample))
    else:
        x = _x_of(sample)
        params, state = subject.init(fn.key(0), x)
        if module is not None:
            # The parameters have the sizes that torch is told.
            params, state = oracle.params_of(module), reference.state_of(module)
        subject.apply(params, x, state, key=fn.key(0), train=sample.train)


def _tree(inputs: Any) -> Any:
    """One input, or a tuple of them."""
    return inputs[0] if len(inputs) == 1 else tuple(inputs)


def _x_of(sample: Sample) -> Any:
    """The x of a layer: the inputs, or a dict of them."""
    if sample.names:
        return dict(zip(sample.names, sample.inputs, strict=True))
    return _tree(sample.inputs)


def _prediction_and_target(sample: Sample) -> tuple[Any, Any]:
    places = reference.differentiated(sample)
    target = [each for place, each in enumerate(sample.inputs) if place not in places]
    target = [torch.tensor(each) if isinstance(each, tuple) else each for each in target]
    return _tree([sample.inputs[place] for place in places]), _tree(target) if target else None


def _check_layer(
    sample: Sample, layer: fn.Layer, module: nn.Module, expected: Any, jit: bool
) -> None:
    x, key = _x_of(sample), fn.key(0)
    params, state = oracle.params_of(module), reference.state_of(module)
    for what, own, theirs in zip(
        ("params", "state"), layer.init(key, x), (params, state), strict=True
    ):
        own, theirs = fn.tree.to_dotted(own), fn.tree.to_dotted(theirs)
        assert list(own) == list(theirs), f"{what} are {list(own)}, torch's {list(theirs)}"
        alike(what, theirs, own)

    def run(arguments: Any) -> Any:
        params, x, state, key, dy = arguments
        y, pullback, state = layer.vjp(params, x, state, key=key, train=sample.train)
        return y, state, pullback(dy)

    y, pullback, new_state = layer.vjp(params, x, state, key=key, train=sample.train)
    alike("y", expected, y)
    dy = oracle.cotangent(y)
    dparams, dx = pullback(dy)
    if _sees_nothing(sample, expected):
        within = _tolerance(sample)
        by_part = zip(fn.tree.leaves(expected), fn.tree.leaves(y), strict=True)
        for theirs, ours in by_part:
            agree("y", *[each.where(~theirs.isnan(), 0.0) for each in (theirs, ours)], within)
        assert _finite((y, dparams, dx)), "a query that sees no key has NaN"
        raise Unsupported(SEES_NOTHING)
    if _is_noise(sample, module):
        alike("dparams", params, dparams)
        alike("dx", x, dx, floating_only=True)
    else:
        by_input = _by_input(sample, dx)
        own = {"y": y, "dparams": dparams, "dx": by_input, "state": new_state}
        if _has(sample, WRONG_GRADIENTS):
            del own["dx"], own["dparams"]
        if sample.source == TORCH:
            own.pop(CANCELLING.get((sample.cls.__name__, sample.dtype), ""), None)
        _check_numbers(sample, module, dy, own)
    if jit:
        _check_jit(run, (params, x, state, key, dy), _tolerance(sample))
    elif sample.dtype == torch.float64 and sample.contiguous and _finite((y, dparams, dx)):
        derivative = not _has(sample, NOT_DERIVATIVES)
        rtol = _tolerance(sample)
        fn.testing.check_layer(layer, x, modes=(sample.train,), derivative=derivative, rtol=rtol)


def _check_loss(sample: Sample, loss: fn.Loss, module: nn.Module, expected: Any, jit: bool) -> None:
    prediction, target = _prediction_and_target(sample)

    def run(arguments: Any) -> Any:
        prediction, target, dvalue = arguments
        value, pullback = loss.vjp(prediction, target)
        return value, pullback(dvalue)

    value, pullback = loss.vjp(prediction, target)
    alike("the value", expected, value)
    dvalue = oracle.cotangent(value)
    gradient = pullback(dvalue)
    single = isinstance(prediction, Tensor)
    own = {"y": value, "dx": (gradient,) if single else gradient}
    if _has(sample, WRONG_GRADIENTS):
        del own["dx"]
    _check_numbers(sample, module, dvalue, own)
    if jit:
        _check_jit(run, (prediction, target, dvalue), _tolerance(sample))
    elif sample.dtype == torch.float64 and sample.contiguous and _finite((value, gradient)):
        derivative = not _has(sample, NOT_DERIVATIVES)
        fn.testing.check_loss(loss, prediction, target, derivative=derivative)


def _by_input(sample: Sample, dx: Any) -> tuple[Any, ...]:
    """dx, which is like x, as a tuple like the inputs."""
    if sample.names:
        return tuple([dx[name] for name in sample.names])
    if len(sample.inputs) == 1:
        return (dx,)
    return dx or (None,) * len(sample.inputs)


def _sees_nothing(sample: Sample, expected: Any) -> bool:
    """Whether masks hide all keys from a query, by what torch gives."""
    return bool(sample.names) and any(leaf.isnan().any() for leaf in fn.tree.leaves(expected))


def _is_noise(sample: Sample, module: nn.Module) -> bool:
    name = sample.cls.__name__
    if name in ALWAYS_NOISE:
        return "_random_samples" not in sample.kwargs
    drops = [each.p for each in module.modules() if isinstance(each, nn.Dropout)]
    drops += [each.dropout for each in module.modules() if isinstance(each, nn.MultiheadAttention)]
    return sample.train and (name in NOISE or (bool(sample.names) and any(drops)))


def _has(sample: Sample, table: set[tuple[str, str]]) -> bool:
    """Whether the class, or one of its options that is given, is in a table of exceptions."""
    given = ["", *names.options(sample.cls, sample.args, sample.kwargs)]
    return not table.isdisjoint((sample.cls.__name__, name) for name in given)


def _finite(node: Any) -> bool:
    """Whether no number is infinite or NaN: the laws are about numbers."""
    return all(bool(leaf.isfinite().all()) for leaf in fn.tree.leaves(node))


def _tolerance(sample: Sample) -> float:
    """The relative error that rounding may explain."""
    name = sample.cls.__name__
    explained = INEXACT.get(name, 0.0), ROUNDING.get((name, sample.dtype), 0.0)
    return max(oracle.TOLERANCE[sample.dtype], *explained)


def _check_numbers(sample: Sample, module: nn.Module, dy: Any, own: dict[str, Any]) -> None:
    """The numbers are torch's up to rounding.

    Below float64 they may also differ from torch's by more than that, if they are nearer to the
    numbers of float64 than torch's are: a kernel of torch may add in half precision.
    """
    theirs, exact = reference.results(module, sample, dy), reference.exact(module, sample, dy)
    for name, got in own.items():
        expected = theirs[name]
        alike(name, expected, got)
        try:
            agree(name, expected, got, _tolerance(sample), dy)
        except AssertionError:
            if sample.dtype == torch.float64:
                raise
            if sample.cls.__name__ in DEEP:
                near = _distance(exact(), own) <= 4 * _distance(exact(), theirs)
            else:
                near = _nearer(exact()[name], got, expected)
            if not near:
                raise


def agree(what: str, expected: Any, got: Any, tolerance: float, beside: Any = ()) -> None:
    """The numbers are equal up to rounding; where torch has infinity or NaN, so must we.

    The error is relative to the largest number of the tensor, or to a thousandth of the largest of
    all, those ``beside`` included.
    """
    beside = [leaf.double() for leaf in fn.tree.leaves(beside) if leaf.is_floating_point()]
    pair = (_regular(expected, expected), beside), (_regular(got, expected), beside)
    close(what, *pair, tolerance)


def _regular(node: Any, expected: Any) -> Any:
    """The tree in float64, with 0 where the expected number is not finite and this is the same."""

    def each(leaf: Any, theirs: Any) -> Any:
        if not leaf.is_floating_point():
            return leaf
        same = (leaf == theirs) | (leaf.isnan() & theirs.isnan())
        return torch.where(same & ~theirs.isfinite(), 0.0, leaf).double()

    return fn.tree.map(each, node, expected)


def _nearer(exact: Any, own: Any, theirs: Any) -> bool:
    """Whether no leaf is further from the exact one than torch's is."""
    trees = [by_path(node) for node in (exact, own, theirs)]
    return all(
        magnitude(trees[1][path].double() - leaf) <= magnitude(trees[2][path].double() - leaf)
        for path, leaf in trees[0].items()
        if leaf is not None
    )


def _distance(exact: dict[str, Any], results: dict[str, Any]) -> float:
    """The mean error of all tensors, each relative to its largest number."""
    exact, found = by_path([exact[name] for name in results]), by_path([*results.values()])
    errors = [
        float(magnitude(found[path].double() - leaf) / magnitude(leaf))
        for path, leaf in exact.items()
        if leaf is not None and leaf.is_floating_point() and magnitude(leaf) > 0
    ]
    return sum(errors) / len(errors)


def _check_jit(run: Run, arguments: Any, tolerance: float) -> None:
    compiled = fn.jit(run)(arguments)
    expected = run(arguments)
    alike("under jit", expected, compiled)
    agree("under jit", expected, compiled, tolerance, arguments[-1])
