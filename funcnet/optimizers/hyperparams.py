"""`inject_hyperparams`: an optimizer's options as tensors in its state."""

import inspect
from collections.abc import Callable, Collection
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet.checks import check_kind
from funcnet.core import Optimizer, Params, Tree
from funcnet.errors import located, require
from funcnet.optimizers.leaves import Leaves
from funcnet.optimizers.lift import check_state, leaves_update, lifted, zero_step
from funcnet.optimizers.param_trees import Trees

_NAME = "inject_hyperparams"


class InjectHyperparamsState(NamedTuple):
    """The number of updates so far, the options by name, 0-d tensors, and the inner state."""

    step: Tensor
    hyperparams: dict[str, Any]
    inner: Tree


def inject_hyperparams(
    constructor: Callable[..., Optimizer], static_args: str | Collection[str] = ()
) -> Callable[..., Optimizer]:
    """A constructor of the same optimizers with options that are numbers in their state.

    There they are 0-d float64 tensors, which can be set from update to update, differ among the
    members of a population, and be scheduled, without compiling again. Of the options that are
    given, those are numbers that are floats, ints where the default is not an int, 0-d tensors,
    schedules, which are functions of the number of updates so far, and tuples of them.
    An option that is left out has its default.

    Args:
        constructor: of an optimizer, such as ``fn.adamw``.
        static_args: names of options to leave as they are.

    State:
        `InjectHyperparamsState`; of a schedule it has the value of the last update.
    Raises:
        ValueError: a value that is not 0-d, and the constructor's own errors.

    Source: ``optax.inject_hyperparams``.

    >>> optimizer = inject_hyperparams(fn.sgd)(lr=0.1, momentum=lambda step: 1 - 0.5**step)
    >>> params = {"w": torch.ones(1)}
    >>> state = optimizer.init_state(params)
    >>> state = state._replace(hyperparams={**state.hyperparams, "lr": torch.tensor(0.2)})
    >>> updates, state = optimizer.update(params, state, params)
    >>> updates, state.hyperparams
    ({'w': tensor([-0.2000])}, {'lr': tensor(0.2000), 'momentum': tensor(0., dtype=torch.float64)})
    """
    require(
        not isinstance(constructor, Optimizer) and callable(constructor),
        f"{_NAME}: expects a constructor such as adamw",
        TypeError,
    )
    signature = inspect.signature(constructor)
    fixed = {static_args} if isinstance(static_args, str) else {*static_args}
    unknown = sorted(fixed - signature.parameters.keys())
    require(not unknown, f"{_NAME}: static_args has {unknown}, which it does not take")

    @wraps(constructor)
    def make(*args: Any, **options: Any) -> Optimizer:
        bound = signature.bind(*args, **options)
        injected = {
            option: given
            for option, given in bound.arguments.items()
            if option not in fixed and _is_number(given, signature.parameters[option])
        }

        def made(hyperparams: dict[str, Any]) -> Optimizer:
            chosen = inspect.BoundArguments(signature, {**bound.arguments, **hyperparams})
            return constructor(*chosen.args, **chosen.kwargs)

        def start(step: Tensor) -> dict[str, Any]:
            return {option: _start(option, given, step) for option, given in injected.items()}

        example = made(start(torch.zeros((), dtype=torch.int64)))
        check_kind(_NAME, example, Optimizer)

        def init_state(params: Params) -> Tree:
            step = zero_step(Trees(params).params)  # type: ignore[arg-type]
            hyperparams = start(step)
            inner = made(hyperparams).init_state(params)
            return InjectHyperparamsState(step, hyperparams, inner)

        def update_leaves(g: Leaves, opt_state: Tree, trees: Trees) -> tuple[Leaves, Tree]:
            check_state(_NAME, InjectHyperparamsState, opt_state)
            step, kept, inner = opt_state
            if kept.keys() != injected.keys():
                expected = f"expects the hyperparams {list(injected)}, got {list(kept)}"
                raise ValueError(f"{_NAME}: {expected}")
            hyperparams = {o: _now(o, given, kept[o], step) for o, given in injected.items()}
            with located(_NAME):
                updates, inner = leaves_update(made(hyperparams))(g, inner, trees)
            return updates, InjectHyperparamsState(step + 1, hyperparams, inner)

        return lifted(_NAME, init_state, update_leaves, **example.metadata)

    return make


def _is_number(given: Any, parameter: Any) -> bool:
    """Whether what is given for a parameter is a number, a schedule, or a tuple of them."""
    if isinstance(given, Tensor):
        return given.dim() == 0 and given.is_floating_point()
    if isinstance(given, int):
        counts = parameter is not None and int in (parameter.annotation, type(parameter.default))
        return not isinstance(given, bool) and not counts
    if type(given) in (tuple, list):
        return bool(given) and all([_is_number(each, None) for each in given])
    return isinstance(given, float) or callable(given)


def _start(option: str, given: Any, step: Tensor) -> Any:
    """The first value of an option as a tensor."""
    if isinstance(given, (tuple, list)):
        return tuple([_start(option, each, step) for each in given])
    value = given(step) if callable(given) else given
    if isinstance(value, Tensor) and value.dim():
        shape = tuple(value.shape)
        raise ValueError(f"{_NAME}: {option} must be a number or a 0-d tensor, got {shape}")
    return torch.as_tensor(value, dtype=torch.float64, device=step.device)


def _now(option: str, given: Any, kept: Any, step: Tensor) -> Any:
    """The value of an option at a step: of its schedule, or what the state has."""
    if isinstance(given, (tuple, list)):
        return tuple([_now(option, *each, step) for each in zip(given, kept, strict=True)])
    return _start(option, given, step) if callable(given) else _as_tensor(kept, step)


def _as_tensor(kept: Any, step: Tensor) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    return torch.as_tensor(kept, dtype=torch.float64, device=step.device)
