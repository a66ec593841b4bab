"""The types of what a layer is trained with: losses, optimizers and the state of a run."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from funcnet.constructors import Call, Constructed, call_of, function_name
from funcnet.pullbacks import LossPullback, Tree

Params = Mapping[str, Any]
"""A nested dict with string keys and tensor leaves. State is one too."""


Fraction = tuple[Tensor, Tensor | float | None, LossPullback]
"""Of a loss: a numerator, a denominator, and the pullback of the numerator; see `Loss`."""


class _LossFunctions(NamedTuple):
    apply: Callable[[Tree, Tree], Tensor]
    vjp: Callable[[Tree, Tree], tuple[Tensor, LossPullback]]


class Loss(Constructed, _LossFunctions):
    """Two pure functions, ``(apply, vjp)``, of a prediction and a target.

    The value is a scalar, which one can train on, or has one number per element. ``name`` is what
    errors call the loss; by default the name of the constructor that defines ``apply``.

    >>> import funcnet as fn
    >>> value, pullback = fn.mse().vjp(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
    >>> value, pullback()
    (tensor(2.), tensor([0., 2.]))
    """

    apply: Callable[[Tree, Tree], Tensor]
    """``apply(prediction, target) -> value``."""

    vjp: Callable[[Tree, Tree], tuple[Tensor, LossPullback]]
    """``vjp(prediction, target) -> (value, pullback)``."""

    name: str
    """What errors call it."""

    fraction: Callable[[Tree, Tree], Fraction] | None
    """``(prediction, target) -> (numerator, denominator, pullback)``, or None. The value is their
    ratio, and both are sums over what is in the batch, so that those of its parts can be added up;
    the pullback is the numerator's. The denominator is a number, a 0-d tensor, or None for a value
    that is the numerator itself."""

    over_batches: Any
    """The `funcnet.metrics.Metric` that it is over several batches, or None: see `evaluate`."""

    call: Call | None
    """The call of the constructor that made it, which is its ``repr``, or None."""

    def __new__(
        cls,
        apply: Callable[[Tree, Tree], Tensor],
        vjp: Callable[[Tree, Tree], tuple[Tensor, LossPullback]],
        name: str | None = None,
        fraction: Callable[[Tree, Tree], Fraction] | None = None,
        over_batches: Any = None,
    ) -> "Loss":
        loss = super().__new__(cls, apply, vjp)
        loss.name, loss.fraction = name or function_name(apply), fraction
        loss.over_batches = over_batches
        loss.call = call_of(loss.name)
        return loss

    not_called = (
        "a loss is not called, its functions are: "
        "value = loss.apply(prediction, target), or value, pullback = loss.vjp(...)"
    )

    def _replace(self, **changes: Any) -> "Loss":
        loss = Loss(*super()._replace(**changes), name=self.name)
        loss.call = self.call
        return loss


class _OptimizerFunctions(NamedTuple):
    init_state: Callable[[Params], Tree]
    update: Callable[[Tree, Tree, Params], tuple[Tree, Tree]]


class Optimizer(Constructed, _OptimizerFunctions):
    """Two pure functions, ``(init_state, update)``: from gradients to what is added to params.

    Beside them it carries metadata, which a lift such as `funcnet.optimizers.stateful` gives.
    """

    init_state: Callable[[Params], Tree]
    """``init_state(params) -> opt_state``."""

    update: Callable[[Tree, Tree, Params], tuple[Tree, Tree]]
    """``update(grads, opt_state, params) -> (updates, opt_state)``."""

    name: str
    """What errors, and the state of a `chain`, call it; default the name of its constructor."""

    update_leaves: Callable[..., Any] | None
    """``update`` on flattened trees, or None: a chain flattens once for all its transforms."""

    loss_scale: Callable[[Tree], Tensor] | None
    """``opt_state -> scale``, or None. The gradients are to be those of the loss times this 0-d
    tensor, as `train_step` computes them."""

    needs_all_leaves: bool
    """Whether an update of some leaves depends on others, so that they cannot be updated alone."""

    elementwise: bool
    """Whether the update of an element depends on that element alone, or beside it on norms of all
    leaves, which know of parts: each rank can then update a part of a leaf, as by
    `funcnet.distributed.zero`."""

    reduces: tuple[tuple[str, Any], ...]
    """How it reduces gradients over ranks: "mean" or "sum", and the `Axis`, for each. What comes
    before that, or is around it, sees this rank's own gradients."""

    call: Call | None
    """The call of the constructor that made it, which is its ``repr``, or None."""

    def __new__(
        cls,
        init_state: Callable[[Params], Tree],
        update: Callable[[Tree, Tree, Params], tuple[Tree, Tree]],
        name: str | None = None,
        update_leaves: Callable[..., Any] | None = None,
        loss_scale: Callable[[Tree], Tensor] | None = None,
        needs_all_leaves: bool = False,
        elementwise: bool = False,
        reduces: tuple[tuple[str, Any], ...] = (),
    ) -> "Optimizer":
        optimizer = super().__new__(cls, init_state, update)
        optimizer.name, optimizer.update_leaves = name or function_name(update), update_leaves
        optimizer.loss_scale, optimizer.needs_all_leaves = loss_scale, needs_all_leaves
        optimizer.elementwise, optimizer.reduces = elementwise, reduces
        optimizer.call = call_of(optimizer.name)
        return optimizer

    not_called = (
        "an optimizer is not called, its functions are: "
        "updates, opt_state = optimizer.update(grads, opt_state, params)"
    )

    @property
    def metadata(self) -> dict[str, Any]:
        """``needs_all_leaves``, ``elementwise`` and ``reduces``, for an optimizer like this one."""
        names = "needs_all_leaves", "elementwise", "reduces"
        return {name: getattr(self, name) for name in names}

    def _replace(self, **changes: Any) -> "Optimizer":
        functions = super()._replace(**changes)
        optimizer = Optimizer(*functions, self.name, None, self.loss_scale, **self.metadata)
        optimizer.call = self.call
        return optimizer


class TrainState(NamedTuple):
    """All that a training run is: restore it, and the run goes on bit for bit.

    ``step`` is a 0-d int64 tensor: the number of steps that were taken. The key of a step is
    ``fold_in(key, step)``.
    """

    params: Params
    """What is learned: a nested dict of tensors."""

    state: Params
    """What layers keep besides, such as running statistics."""

    opt_state: Tree
    """What the optimizer keeps."""

    key: Tensor
    """The key of the run."""

    step: Tensor
    """How many steps were taken."""
