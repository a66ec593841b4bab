"""`evaluate`: the loss and the metrics of a model over a data set."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from funcnet import tree
from funcnet.checks import check_kind
from funcnet.core import Layer, Loss, Params, TrainState, Tree
from funcnet.data import on_device_of, pair
from funcnet.errors import located
from funcnet.metrics.core import Metric, batch_function, summed
from funcnet.metrics.means import MEAN, examples_of, mean_value, sum_and_count
from funcnet.optimizers.averaging import eval_params
from funcnet.transforms.jit import jit as compiled

Evaluation = Callable[[TrainState], dict[str, Tensor]]
"""From a train state to the loss and the metrics over a data set."""


def evaluate(
    model: Layer,
    loss: Loss,
    metrics: Mapping[str, Metric | Loss | Callable[[Tree, Tree], Tensor]] | None,
    batches: Iterable[Any],
    *,
    averaged: bool = False,
    jit: bool = False,
) -> Evaluation:
    """The evaluation ``evaluation(train_state) -> {"loss": ..., name: ...}``.

    The model is applied with ``train=False``. The values are those of all examples at once, also
    where the last batch is short: metrics of `funcnet.metrics` add up their counts, and the values
    of losses and functions are weighted by the number of examples of their batch, the extent of the
    first dimension of x. That is exact for what is a mean over the examples of a batch. It is not
    for a loss that divides by something else, as with class weights or ``ignore_index``, unless all
    is in one batch; and of ``reduction="sum"`` it is the mean of the batches' sums. Losses with
    ``reduction="none"`` are the mean over all their elements, those that are ignored as well.
    `funcnet.metrics.perplexity` has ``ignore_index``; and `funcnet.distributed.total` of a loss is
    that of all that counts, whatever it divides by. For a model whose layers are on several ranks
    there is `funcnet.distributed.pipeline_evaluate`.

    Args:
        model, loss: as for `train_step`.
        metrics: metrics of `funcnet.metrics`, losses, or functions
            ``(prediction, target) -> tensor``, by name; None for the loss alone.
        batches: pairs ``(x, target)`` of tensors or numpy arrays: a list, a ``DataLoader``, or
            anything else that can be gone over again and again. They are moved to the device of
            the params.
        averaged: whether to evaluate the params that the optimizer keeps for it, such as those of
            ``params_ema``; see `funcnet.optimizers.eval_params`.
        jit: whether to compile what is done for a batch, once for each size of batch.

    Returns:
        A function of a train state, that gives a dict of tensors. It waits for no device, and
        works under `vmap` over a population of train states.

    Raises:
        TypeError: the batches can be gone over only once.
        ValueError: there are no batches, or one is no pair.

    >>> import funcnet as fn
    >>> net = fn.linear(1)
    >>> x, target = torch.ones(5, 2), torch.zeros(5, 1)
    >>> batches = [(x[:3], target[:3]), (x[3:], target[3:])]
    >>> evaluation = evaluate(net, fn.mse(), {"r2": fn.metrics.r2()}, batches)
    >>> state = fn.init_train_state(net, fn.sgd(0.1), fn.key(0), x)
    >>> state = state._replace(params={"weight": torch.ones(1, 2), "bias": torch.ones(1)})
    >>> evaluation(state)
    {'loss': tensor(9., dtype=torch.float64), 'r2': tensor(0., dtype=torch.float64)}
    """
    parts = measured_over_batches("evaluate", model, loss, metrics, batches)

    def add(accs: Any, params: Params, state: Params, x: Tree, target: Tree) -> Any:
        prediction, _ = model.apply(params, x, state, train=False)
        examples = examples_of(x)
        return {
            name: part.update(accs[name], prediction, target, examples)
            for name, part in parts.items()
        }

    run = compiled(add) if jit else add

    def evaluation(train_state: TrainState) -> dict[str, Tensor]:
        params = evaluated_params("evaluate", train_state, averaged)
        accs = None
        for x, target in pairs_on("evaluate", on_device_of(params), batches):
            if accs is None:
                device = tree.device_of(x)
                accs = {name: part.init(device) for name, part in parts.items()}
            accs = run(accs, params, train_state.state, x, target)
        if accs is None:
            raise ValueError("evaluate: expects at least one batch, got none")
        return {name: part.value(accs[name]) for name, part in parts.items()}

    return evaluation


def measured_over_batches(
    caller: str, model: Layer, loss: Loss, metrics: Any, batches: Any
) -> dict[str, Metric]:
    """The loss and the metrics, each as a metric of several batches; see `_weighted`.

    Raises TypeError or ValueError, with the caller's name, for what `evaluate` does not take.
    """
    check_kind(caller, model, Layer, "model")
    check_kind(caller, loss, Loss, "loss")
    if metrics is not None and not isinstance(metrics, Mapping):
        raise TypeError(f"{caller}: expects a dict of metrics, got {type(metrics).__name__}")
    if metrics and "loss" in metrics:
        raise ValueError(f"{caller}: the metric 'loss' is there already, pick another name")
    if hasattr(batches, "__next__"):
        raise TypeError(
            f"{caller}: expects batches that can be gone over again, such as a list or a "
            f"DataLoader, got {type(batches).__name__}, whose end is its end"
        )
    iterable = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
    if not iterable or isinstance(batches, (Tensor, Mapping, str)):
        got = tree.describe(batches)
        raise TypeError(f"{caller}: expects a list of batches or the like, got {got}")
    measured = {"loss": loss, **(metrics or {})}
    return {name: _weighted(caller, name, part) for name, part in measured.items()}


def evaluated_params(caller: str, train_state: Any, averaged: bool) -> Params:
    """The params of a train state, or those that its optimizer keeps for evaluation."""
    if not isinstance(train_state, TrainState):
        raise TypeError(f"{caller}: expects a TrainState, got {tree.describe(train_state)}")
    params = train_state.params
    return eval_params(train_state.opt_state, params) if averaged else params


def _weighted(caller: str, name: str, part: Any) -> Metric:
    """A metric whose update also takes the number of examples, for what has no counts itself."""
    if isinstance(part, Loss) and part.over_batches is not None:
        part = part.over_batches
    if isinstance(part, Metric):
        add = part.update
        return part._replace(update=lambda acc, y, target, examples: add(acc, y, target))
    function = batch_function(part, f"{caller}: metric {name!r}:")
    mean = summed(name, lambda prediction, target, keep: prediction, mean_value, **MEAN)

    def update(acc: Any, prediction: Tree, target: Tree, examples: int) -> Any:
        value = function(prediction, target)
        if not isinstance(value, Tensor):
            got = type(value).__name__
            raise TypeError(f"{caller}: metric {name!r}: expects a tensor, got {got}")
        return mean.update(acc, sum_and_count(value, examples), None)

    return mean._replace(update=update)


def pairs_on(
    caller: str, move: Callable[[Any], Tree], batches: Iterable[Any]
) -> Iterator[tuple[Tree, Tree]]:
    """The batches as pairs of trees of tensors, each where ``move`` takes it."""
    for batch in batches:
        x, target = pair(caller, batch)
        with located(f"{caller}:"):
            x, target = move((x, target))
        yield x, target
