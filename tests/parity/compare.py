"""One case held to torch: layout of params and state, outputs, gradients, new state, the laws."""

import copy
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import funcnet as fn
from funcnet.testing.assertions import alike, close
from tests.layers import oracle
from tests.parity import names
from tests.parity.draws import Nested
from tests.parity.exceptions import reason_for_class, torch_has_no
from tests.parity.names import Unsupported
from tests.parity.samples import REFUSED, Sample

# Their numbers are random when they are trained, or always: only shapes and laws are compared.
NOISE = {"Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout"}
NOISE |= {"RReLU"}
ALWAYS_NOISE = {"FractionalMaxPool2d", "FractionalMaxPool3d"}

# Which inputs of a loss are its prediction, where that is not the first alone.
PREDICTION = {
    "CosineEmbeddingLoss": (0, 1),
    "MarginRankingLoss": (0, 1),
    "GaussianNLLLoss": (0, 2),
    "TripletMarginLoss": (0, 1, 2),
    "TripletMarginWithDistanceLoss": (0, 1, 2),
}


def check(sample: Sample, jit: bool = False) -> None:
    """Raise unless funcnet gives what torch gives; `Unsupported` if there is nothing to compare."""
    reason = reason_for_class(sample.cls)
    if reason is not None:
        raise Unsupported(reason)
    made, args, kwargs = names.translate(sample.cls, sample.args, sample.kwargs, sample.options)
    floating = names.floating(sample.inputs)
    if not floating and names.takes(made, "dtype"):
        kwargs["dtype"] = sample.dtype
    held = _hold_loss if names.is_loss(sample.cls) else _hold_layer
    with _quiet():
        try:
            module = reference(sample)
            expected = forward(module, sample)
        except Exception as error:
            _hold_refusal(sample, error, lambda: held(sample, made(*args, **kwargs), None, jit))
            return
        if sample.source == REFUSED:
            raise Unsupported(f"torch takes it: {sample.what}")
        held(sample, made(*args, **kwargs), (module, expected), jit)


@contextmanager
def _quiet() -> Any:
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        yield


def reference(sample: Sample) -> nn.Module:
    """The module, with random parameters and running statistics."""
    args = [each.theirs() if isinstance(each, Nested) else each for each in sample.args]
    kwargs = {
        name: each.theirs() if isinstance(each, Nested) else each
        for name, each in sample.kwargs.items()
        if name not in ("inplace", "device", "dtype")
    }
    module = sample.cls(*args, **kwargs).to(sample.dtype)
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        with torch.no_grad():
            module(*sample.inputs, **sample.options)
    if not names.is_loss(sample.cls):
        oracle.randomize(module)
    return module.train(sample.train)


def forward(module: nn.Module, sample: Sample) -> Any:
    """What a copy of the module gives."""
    with torch.no_grad():
        return copy.deepcopy(module)(*sample.inputs, **sample.options)


def _hold_refusal(sample: Sample, error: Exception, ours: Callable[[], Any]) -> None:
    """What torch refuses, funcnet refuses by a ValueError or a TypeError."""
    told = str(error).splitlines()[0] if str(error) else type(error).__name__
    if torch_has_no(error, sample.dtype):
        raise Unsupported(f"torch: {told}") from None
    try:
        ours()
    except (ValueError, TypeError):
        return
    raise AssertionError(f"torch refuses it, funcnet does not: {told}")


def agree(what: str, expected: Any, got: Any, dtype: torch.dtype, beside: Any = ()) -> None:
    """The same structure, shapes and dtypes, and numbers up to rounding.

    The error is relative to the largest number of the tensor, or to a thousandth of the largest
    of all, those ``beside`` included. Where torch has infinity or NaN, so must we.
    """
    alike(what, expected, got)
    close(
        what,
        (_finite(expected, expected), beside),
        (_finite(got, expected), beside),
        oracle.TOLERANCE[dtype],
    )


def _finite(node: Any, expected: Any) -> Any:
    """The tree with 0 where the expected number is infinite or NaN, and the number is the same."""

    def each(leaf: Any, theirs: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        same = (leaf == theirs) | (leaf.isnan() & theirs.isnan())
        return torch.where(same & ~theirs.isfinite(), 0.0, leaf).double()

    return fn.tree.map(each, node, expected)


def _hold_layer(sample: Sample, layer: fn.Layer, theirs: Any, jit: bool) -> None:
    x = sample.inputs[0] if len(sample.inputs) == 1 else sample.inputs
    key = fn.key(0)
    own_params, own_state = layer.init(key, x)
    if theirs is None:
        layer.apply(own_params, x, own_state, key=key, train=sample.train)
        return
    module, expected = theirs
    params = oracle.params_of(module)
    state = _public(oracle.state_of(module))
    for what, mine, other in (("params", own_params, params), ("state", own_state, state)):
        flat, wanted = fn.tree.to_dotted(mine), fn.tree.to_dotted(other)
        assert list(flat) == list(wanted), f"{what} are {list(flat)}, torch's {list(wanted)}"
        alike(what, wanted, flat)

    y, pullback, new_state = layer.vjp(params, x, state, key=key, train=sample.train)
    dy = oracle.cotangent(y)
    if is_noise(sample):
        alike("y", expected, y)
        dparams, dx = pullback(dy)
        alike("dx", x, dx, floating_only=True)
        alike("dparams", params, dparams)
    else:
        agree("y", expected, y, sample.dtype)
        working = copy.deepcopy(module)

        def function(params: Any, inputs: Any) -> Any:
            return torch.func.functional_call(
                working, fn.tree.to_dotted(params), inputs, sample.options
            )

        gradients = oracle.autograd(function, params, sample.inputs, dy)[1:]
        dparams, dx = pullback(dy)
        dx = dx if isinstance(dx, tuple) or (dx is None and len(sample.inputs) > 1) else (dx,)
        _agree_on_gradients(("dparams", "dx"), gradients, (dparams, dx), sample.dtype, dy)
        agree("the new state", _public(oracle.state_of(working)), new_state, sample.dtype)
    if sample.dtype == torch.float64 and sample.contiguous and not jit:
        fn.testing.check_layer(layer, x, modes=(sample.train,))
    if jit:

        def run(arguments: Any) -> Any:
            params, x, state, key, dy = arguments
            y, pullback, state = layer.vjp(params, x, state, key=key, train=sample.train)
            return y, state, pullback(dy)

        _hold_jit(run, (params, x, state, key, dy), sample.dtype)


def _agree_on_gradients(
    what: tuple[str, ...], expected: Any, got: Any, dtype: torch.dtype, dy: Any
) -> None:
    beside = [leaf.double() for leaf in fn.tree.leaves(dy)]
    for name, theirs, mine in zip(what, expected, got, strict=True):
        agree(name, theirs, mine, dtype, beside)


def is_noise(sample: Sample) -> bool:
    name = sample.cls.__name__
    if name in ALWAYS_NOISE:
        return "_random_samples" not in sample.kwargs
    return name in NOISE and sample.train


def _public(state: dict[str, Any]) -> dict[str, Any]:
    """The state but for a module's private buffers."""
    return {name: leaf for name, leaf in state.items() if not name.startswith("_")}


def _hold_loss(sample: Sample, loss: fn.Loss, theirs: Any, jit: bool) -> None:
    places = PREDICTION.get(sample.cls.__name__, (0,))
    given = [sample.inputs[place] for place in places]
    prediction = given[0] if len(places) == 1 else tuple(given)
    rest = [each for place, each in enumerate(sample.inputs) if place not in places]
    target = rest[0] if rest else None
    if theirs is None:
        loss.apply(prediction, target)
        return
    module, expected = theirs

    value, pullback = loss.vjp(prediction, target)
    agree("the value", expected, value, sample.dtype)
    dvalue = oracle.cotangent(value)

    def function(params: Any, predicted: list[Tensor]) -> Any:
        inputs = list(sample.inputs)
        for place, each in zip(places, predicted, strict=True):
            inputs[place] = each
        return module(*inputs)

    _, _, gradient = oracle.autograd(function, {}, given, dvalue)
    own = pullback(dvalue)
    own = [own] if len(places) == 1 else list(own)
    _agree_on_gradients(("dprediction",), (gradient,), (own,), sample.dtype, dvalue)
    ones = torch.ones_like(value)
    agree("pullback()", pullback(ones), pullback(), sample.dtype)
    if sample.dtype == torch.float64 and sample.contiguous and sample.train and not jit:
        fn.testing.check_loss(loss, prediction, target)
    if jit:

        def run(arguments: Any) -> Any:
            value, pullback = loss.vjp(*arguments[:2])
            return value, pullback(arguments[2])

        _hold_jit(run, (prediction, target, dvalue), sample.dtype)


def _hold_jit(run: Callable[[Any], Any], arguments: Any, dtype: torch.dtype) -> None:
    expected = run(arguments)
    agree("under jit", expected, fn.jit(run)(arguments), dtype, arguments[-1])
