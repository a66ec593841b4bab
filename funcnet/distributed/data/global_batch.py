"""A model that computes, of each rank's part of a batch, what it would of the whole batch."""

from funcnet.batch_axis import BatchAxis
from funcnet.checks import check_kind
from funcnet.core import Layer
from funcnet.distributed.processes.start import AxisName, Mesh, axis_of
from funcnet.errors import check_count, located, require
from funcnet.global_forms import in_global_form


def data_parallel(
    model: Layer, mesh: Mesh, equal: bool = True, *, dim: int = 0, axis: AxisName = "data"
) -> Layer:
    """The model, which computes of each rank's part of a batch what it would of the whole.

    Each example then has the same y, gradients and state on any number of ranks, and the state is
    the same on all ranks. Layers that treat each example by itself are as they were. Those that
    draw numbers, such as `funcnet.dropout`, draw their rows of the one draw for the whole batch,
    with the same key on all ranks. `funcnet.batch_norm` takes the mean and the variance of all
    ranks' examples, `funcnet.experts` their capacity and balance, and losses that are layers, such
    as `funcnet.linear_cross_entropy`, have the value of the whole batch. What other layers compute
    of them is a sum over ranks.

    In evaluation too, ranks must call layers that mix examples, or are losses, equally often. With
    ``train_step(micro_batches=k)``, `part` is to be told the k.

    The gradients are those of the rank's own loss, and for them the ranks must call the model
    together. For losses that are means over equal parts ``fn.distributed.mean(mesh)`` makes those
    of the whole batch of them; for others ``fn.distributed.total`` and ``fn.distributed.sum``.

    Args:
        model: any layer. `funcnet.jit`, `funcnet.remat`, `funcnet.cast`, `funcnet.freeze` and other
            functions of layers may be in it or around it; what replaces functions of layers goes
            around ``data_parallel(model)``.
        mesh: over whose axis the batch is parted, in the order of its ranks; see
            `funcnet.distributed.part`.
        equal: whether all ranks have as many examples. False: each layer that draws asks the other
            ranks how many they have, which takes a small gather.
        dim: the dimension of the batch in x of every layer that draws: 0, or one behind which x has
            others, counted from the front. Attention, transformers and recurrent layers know their
            own.
        axis: the name of the axis.

    Returns:
        a layer with the params and the state of the model.

    Raises:
        ValueError: a layer that draws or mixes examples and has no global form, by its path.

    >>> import funcnet as fn
    >>> net = fn.serial(fn.linear(8), fn.batch_norm(), fn.dropout(0.1))
    >>> data_parallel(net, {"data": 4})
    serial(linear(8), batch_norm(), dropout(p=0.1))
    >>> data_parallel(fn.serial(fn.linear(8), fn.clip_cotangent(1.0)), {"data": 4})
    Traceback (most recent call last):
    ...
    ValueError: data_parallel: clip_cotangent at '1' mixes the examples of a batch, and ...
    """
    check_kind("data_parallel", model, Layer)
    flag = f"data_parallel: equal must be a bool, got {equal!r}"
    require(isinstance(equal, bool), flag, TypeError)
    check_count("data_parallel", least=0, dim=dim)
    found = axis_of(mesh, axis)
    if found.size == 1:
        return model
    with located("data_parallel:"):
        batch = BatchAxis(found.name, found.size, found.key, equal, dim)
        return in_global_form(model, batch)
