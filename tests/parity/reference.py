"""Torch's side of a case: the module, what it gives, and the gradients by autograd."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import funcnet as fn
from funcnet.testing.samples import cast
from tests.layers import oracle
from tests.parity.draws import Nested
from tests.parity.names import is_loss
from tests.parity.samples import Sample

# Which inputs of a loss are its prediction, where that is not the first alone.
PREDICTION = {
    "CosineEmbeddingLoss": (0, 1),
    "MarginRankingLoss": (0, 1),
    "GaussianNLLLoss": (0, 2),
    "TripletMarginLoss": (0, 1, 2),
    "TripletMarginWithDistanceLoss": (0, 1, 2),
}


def differentiated(sample: Sample) -> tuple[int, ...]:
    """The places of the inputs that a gradient is taken of: a loss's prediction, or all."""
    if is_loss(sample.cls):
        return PREDICTION.get(sample.cls.__name__, (0,))
    return tuple(range(len(sample.inputs)))


def module_of(sample: Sample) -> nn.Module:
    """The module, with random parameters and running statistics."""
    args = [each.theirs() if isinstance(each, Nested) else each for each in sample.args]
    kwargs = {
        name: each.theirs() if isinstance(each, Nested) else each
        for name, each in sample.kwargs.items()
        if name not in ("inplace", "device", "dtype")
    }
    module = sample.cls(*args, **kwargs).to(sample.dtype)
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        forward(module, sample)
    if not is_loss(sample.cls):
        oracle.randomize(module)
    return module.train(sample.train)


def inputs_of(sample: Sample) -> list[Any]:
    """The inputs, contiguous: some of torch's kernels refuse others."""
    return fn.tree.map(
        lambda each: each.contiguous() if isinstance(each, Tensor) else each, [*sample.inputs]
    )


def given_to(sample: Sample, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of forward, by position and by name."""
    if sample.names:
        return (), dict(zip(sample.names, inputs, strict=True)) | sample.options
    return tuple(inputs), sample.options


def outputs(y: Any) -> Any:
    """What was given, without None in the place of an output that was not asked for.

    A plain tuple where torch gives a named one.
    """
    if isinstance(y, tuple) and y[-1] is None:
        (y,) = y[:-1]
    return tuple(y) if isinstance(y, tuple) else y


def forward(module: nn.Module, sample: Sample) -> Any:
    """What the module gives. It may write its running statistics."""
    args, kwargs = given_to(sample, inputs_of(sample))
    with torch.no_grad():
        return outputs(module(*args, **kwargs))


def state_of(module: nn.Module) -> dict[str, Any]:
    """The buffers but for private ones, such as the draws that a fractional pooling is given."""
    state = oracle.state_of(module)
    if isinstance(module, nn.LinearCrossEntropyLoss):
        state.pop("weight", None)  # an option of ours
    return {name: leaf for name, leaf in state.items() if not name.startswith("_")}


def results(module: nn.Module, sample: Sample, dy: Any) -> dict[str, Any]:
    """``y``, ``dparams``, ``dx``, a tuple, and the new ``state``."""
    working = copy.deepcopy(module)
    places = differentiated(sample)
    inputs = inputs_of(sample)

    def function(params: Any, chosen: Any) -> Any:
        given = list(inputs)
        for place, each in zip(places, chosen, strict=True):
            given[place] = each
        flat = fn.tree.to_dotted(params)
        return outputs(torch.func.functional_call(working, flat, *given_to(sample, given)))

    chosen = tuple(inputs[place] for place in places)
    y, dparams, dx = oracle.autograd(function, oracle.params_of(module), chosen, dy)
    return {"y": y, "dparams": dparams, "dx": dx, "state": state_of(working)}


def exact(module: nn.Module, sample: Sample, dy: Any) -> Callable[[], dict[str, Any]]:
    """The results of the same numbers in float64, computed when they are needed."""

    def compute() -> dict[str, Any]:
        def double(node: Any) -> Any:
            whole = all(isinstance(leaf, Tensor) for leaf in fn.tree.leaves(node))
            return cast(node, torch.float64) if whole else node

        inputs = tuple(map(double, sample.inputs))
        return results(copy.deepcopy(module).double(), sample._replace(inputs=inputs), double(dy))

    return compute
