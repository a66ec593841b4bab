"""A mixture of experts: each token is worked on by the few layers that a router chooses for it."""

from collections.abc import Mapping
from math import ceil
from typing import Any

import torch
from torch import Tensor

from funcnet import runtime, tree
from funcnet.batch_axis import BatchAxis
from funcnet.combinators.combine import Pull, Run, combine
from funcnet.combinators.parallel import by_position, gathered, parallel, pieces_of
from funcnet.combinators.repeat import stacked
from funcnet.core import Layer, Tree, sum_cotangents
from funcnet.errors import require
from funcnet.global_forms import all_in_global_form

_NAME = "experts"


def dispatched(
    choices: Tensor,
    n: int,
    size: int | Tensor | None,
    axis: BatchAxis | None = None,
) -> dict[str, Tensor]:
    """Where each token goes: a row of an expert's batch for each of its choices.

    All first choices come before the second ones, and tokens in their order; those for which there
    is no row left are dropped.

    Args:
        choices: the experts of each token, (tokens, top_k).
        n: the number of experts.
        size: the rows of an expert's batch. With None there are enough: as many as there are
            tokens or, where values can be read, as the most that one expert has.
        axis: that of a batch of which the tokens are a part. The size is then that for the tokens
            of all ranks, whose first choices come before the second ones, in the ranks' order.

    Returns:
        ``load``, the tokens that chose each expert, (n,), on all ranks; ``slot``, the row of each
        choice, (tokens, top_k), which is the number of rows of all experts where the choice is
        dropped; ``token`` of each row, (n, size), which is the number of tokens where it is empty.
    """
    tokens, top_k = choices.shape
    in_order = choices.t().reshape(-1)
    chosen = in_order[:, None] == torch.arange(n, device=choices.device)
    load = chosen.long().sum(0)
    rows = min(size, tokens) if isinstance(size, int) else tokens
    readable = choices.is_cpu and not runtime.is_transformed(choices)
    if (size is None or axis is not None) and readable:
        most = runtime.read(load)
        rows = rows if most is None else min(rows, max(most))
    # In the order of the experts, a choice is as far from its expert's first one as its place. By
    # a sort, which programs have, where a running sum would be an operator outside of them.
    experts = torch.arange(n, device=choices.device)
    first = torch.where(experts[:, None] > experts, load, 0).sum(1)
    by_expert, order = torch.sort(in_order, stable=True)
    place = torch.arange(len(in_order), device=choices.device) - first[by_expert]
    place = torch.empty_like(place).scatter(0, order, place)
    kept = place < rows
    if axis is not None:
        load, others = _of_other_ranks(chosen.reshape(top_k, tokens, n).long().sum(1), axis)
        if size is not None:
            # Those that are kept are the first of an expert's, here as among all.
            others = others[:, None].expand(top_k, tokens, n).reshape(-1, n)
            kept = place + others.gather(1, in_order[:, None])[:, 0] < size
    slot = torch.where(kept, in_order * rows + place, n * rows)
    which = torch.arange(tokens, device=choices.device).repeat(top_k)
    token = torch.full((n * rows + 1,), tokens, device=choices.device)
    token = token.scatter(0, slot, which)[:-1]
    slot = slot.reshape(top_k, tokens).t()
    return {"load": load, "slot": slot, "token": token.reshape(n, rows)}


def _of_other_ranks(load: Tensor, axis: BatchAxis) -> tuple[Tensor, Tensor]:
    """The load of all ranks, and how many choices of others come before the own.

    Args:
        load: how often each expert is a first choice, a second one and so on, (top_k, n).

    Returns:
        ``(n,)``, and ``(top_k, n)``.
    """
    loads = axis.gather(load.unsqueeze(0))
    before = torch.arange(axis.size, device=load.device) < axis.rank(load.device)
    same = torch.where(before[:, None, None], loads, 0).sum(0)
    earlier = (loads.sum(0) - load).cumsum(0) - (loads.sum(0) - load)
    return loads.sum((0, 1)), same + earlier


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """The rows at an index, and zeros where it is the number of rows."""
    empty = values.new_zeros(1, *values.shape[1:])
    return torch.cat([values, empty])[index]


def experts_forward(
    run: Run,
    x: Tensor,
    names: tuple[str, ...],
    n: int,
    top_k: int,
    capacity: float | None,
    axis: BatchAxis | None = None,
) -> tuple[Tree, Mapping[str, Tree]]:
    """The sum of the chosen experts' outputs, each times its gate, and the balance."""
    floating = isinstance(x, Tensor) and x.is_floating_point() and x.dim() >= 1
    words = "expects a floating-point tensor (*, features)"
    require(floating, f"{_NAME}: {words}, got {tree.describe(x)}")
    rows = x.reshape(-1, x.shape[-1])
    tokens = len(rows)
    logits = run("router", rows)
    got = tree.describe(logits)
    fits = isinstance(logits, Tensor) and tuple(logits.shape) == (tokens, n)
    require(fits, f"{_NAME}: expects a router with {n} logits for a token, got {got}")
    p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    # Of a few experts a sort takes no longer than topk, which is no part of programs.
    ranked = logits.sort(dim=-1, descending=True, stable=True)
    best, choices = (each[:, :top_k] for each in ranked)
    gates = best.softmax(-1)
    total: Any = tokens if axis is None else axis.total(tokens, x.device)
    size = None if capacity is None else _size(capacity, total, top_k, n)
    where = dispatched(choices, n, size, axis)
    batches = _rows(rows, where["token"])
    if names:
        pieces = list(batches.unbind(0))
        outputs = pieces_of(names, run("experts", gathered(names, pieces, by_position(names))))
        alike = len({tree.describe(each) for each in outputs}) == 1
        require(alike, f"{_NAME}: expects outputs of one shape, got {tree.describe(outputs)}")
        y = torch.stack(outputs)
    else:
        y = run("experts", batches)
    each = _rows(y.flatten(0, 1), where["slot"])
    output = (gates[..., None] * each).sum(1)
    total = total.clamp(min=1) if isinstance(total, Tensor) else max(total, 1)
    share = where["load"].to(p.dtype) * (n / (total * top_k))
    balance = (share * (p.sum(0) if axis is None else axis.sum(p.sum(0)))).sum() / total
    residuals = {
        "p": p,
        "gates": gates,
        "choices": choices,
        "each": each,
        "share": share / total,
        "token": where["token"],
        "slot": where["slot"],
    }
    return (
        output.reshape(*x.shape[:-1], output.shape[-1]),
        {"balance": balance.to(x.dtype)},
    ), residuals


def experts_backward(
    pull: Pull,
    dy: Tree,
    residuals: Mapping[str, Tensor],
    names: tuple[str, ...],
    n: int,
    top_k: int,
    capacity: float | None,
    axis: BatchAxis | None = None,
) -> Tree:
    """Through the gates to the router, beside the balance's, and through each chosen expert."""
    doutput, dbalance = dy[0], dy[1]["balance"]
    p, gates, each = residuals["p"], residuals["gates"], residuals["each"]
    token, slot = residuals["token"], residuals["slot"].reshape(-1)
    tokens = len(p)
    d = doutput.reshape(tokens, 1, doutput.shape[-1])
    dbatch = d.new_zeros(token.numel() + 1, d.shape[-1])
    dbatch = dbatch.index_add(0, slot, (gates[..., None] * d).flatten(0, 1))[:-1]
    dbatch = dbatch.unflatten(0, tuple(token.shape))
    if names:
        dpieces = gathered(names, list(dbatch.unbind(0)), by_position(names))
        dx = pull("experts", dpieces, needed=pull.x)
        dx = torch.stack(pieces_of(names, dx)) if pull.x else None
    else:
        dx = pull("experts", dbatch, needed=pull.x)
    dgates = (d * each).sum(-1)
    dchosen = gates * (dgates - (gates * dgates).sum(-1, keepdim=True))
    # All ranks have the balance, and each says what it makes of it.
    of_share = residuals["share"] * (dbalance if axis is None else axis.sum(dbalance))
    dlogits = (p * (of_share - (p * of_share).sum(-1, keepdim=True))).to(dchosen.dtype)
    dlogits = dlogits.scatter_add(1, residuals["choices"], dchosen)
    drows = pull("router", dlogits, needed=pull.x)
    if not pull.x:
        return None
    into = drows.new_zeros(tokens + 1, drows.shape[-1])
    into = into.index_add(0, token.reshape(-1), dx.flatten(0, 1))[:-1]
    return sum_cotangents(drows, into).reshape(*doutput.shape[:-1], drows.shape[-1])


def experts(
    router: Layer,
    layers: Layer | tuple[Layer, ...] | Mapping[str, Layer],
    top_k: int = 2,
    capacity: float | None = None,
    *,
    n: int | None = None,
) -> Layer:
    """``y = sum of gate_i expert_i(x)`` over the ``top_k`` experts with the largest logits.

    The gates of a token are the softmax over its chosen logits, so that they sum to 1 (Mixtral);
    with ``top_k=1`` the gate is 1, and the router learns from the balance alone. Beside the output
    is the balance ``n sum_i f_i P_i``, with f_i the share of the choices that are expert i and P_i
    the mean probability of it: it is 1 where all experts are chosen as often, and more where not.
    It is a metric, ``lambda prediction, target: prediction[1]["balance"]``, and
    `funcnet.losses.auxiliary` adds it to a loss.

    Each expert works on a batch of tokens of one size, so that shapes depend on no value. With a
    capacity that is ``ceil(capacity tokens top_k / n)``. Without one nothing is dropped, so it is
    the number of tokens, and the work that of all experts for all tokens; in eager mode on the CPU
    it is the largest number of tokens that one expert has. Rows without a token are 0, so an expert
    must treat each row by itself, as `batch_norm` does not.

    Args:
        router: of (tokens, features); its output has a logit for each expert.
        layers: the experts, in a tuple or a dict by name; or one layer, of which there are ``n``
            copies with stacked params, as `stacked` has it.
        top_k: how many experts work on a token.
        capacity: how many times its even share of the tokens an expert can take; the choices above
            that add nothing to y. First choices come before second ones, and tokens in their order.
        n: the number of copies, where ``layers`` is one layer.

    Inputs:
        x of shape ``(*, features)``, floating.
    Returns:
        y = (output, {"balance": balance}) of shapes ``(*, out_features)`` and ().
    Learned params:
        ``router``; ``experts``, by position or name, or stacked.
    VJP:
        of the output through the experts, ``gate_i dy``, and through the gates,
        ``dgate_i = dy . expert_i(x)``; of the balance ``dP_i = n f_i``. Choices are constants.
    Raises:
        ValueError: more choices than experts, and another number of logits.

    Source: Shazeer et al. 2017; Fedus et al. 2022 (Switch) for capacity and balance; Jiang et al.
    2024 (Mixtral) for the gates.

    >>> import funcnet as fn
    >>> layer = fn.experts(fn.linear(4), fn.linear(3), top_k=2, n=4)
    >>> x = torch.ones(5, 2)
    >>> params, _ = layer.init(fn.key(0), x)
    >>> {path: tuple(leaf.shape) for path, leaf in fn.tree.to_dotted(params["experts"]).items()}
    {'weight': (4, 3, 2), 'bias': (4, 3)}
    >>> (output, metrics), _ = layer.apply(params, x)
    >>> output.shape, list(metrics)
    (torch.Size([5, 3]), ['balance'])
    """
    if isinstance(layers, Layer):
        require(n is not None, f"{_NAME}: expects n, the number of copies of one layer")
        child, number = stacked(layers, n or 0), n or 0
    else:
        require(n is None, f"{_NAME}: n is the number of copies of one layer, got several and {n}")
        several = isinstance(layers, (tuple, Mapping)) and len(layers) > 0
        words = "expects a layer, or a tuple or dict of some"
        require(several, f"{_NAME}: {words}, got {type(layers).__name__}", TypeError)
        child = parallel(**layers) if isinstance(layers, Mapping) else parallel(*layers)
        number = len(child.children)
    some = isinstance(top_k, int) and 1 <= top_k <= number
    require(some, f"{_NAME}: top_k must be from 1 to {number}, the experts, got {top_k}")
    room = capacity is None or capacity > 0
    require(room, f"{_NAME}: capacity must be > 0, got {capacity}")
    children = {"router": router, "experts": child}
    names = () if isinstance(layers, Layer) else tuple(child.children)
    static: tuple[Any, ...] = (names, number, top_k, capacity)

    def made(children: Mapping[Any, Layer], axis: BatchAxis | None = None) -> Layer:
        told = static
        if axis is not None:
            in_order = capacity is None or axis.dim == 0
            require(in_order, f"{_NAME}: a capacity needs the batch in dimension 0, got {axis.dim}")
            children, told = all_in_global_form(children, axis), (*static, axis)
        passes = experts_forward, experts_backward
        return combine(_NAME, children, *passes, *told, mixes_examples=True, global_form=made)

    return made(children)


def _size(capacity: float, tokens: Any, top_k: int, n: int) -> Any:
    """``ceil(capacity tokens top_k / n)``, at most the tokens: a number, or a tensor of it."""
    if isinstance(tokens, Tensor):
        return torch.minimum((capacity * tokens.double() * top_k / n).ceil().long(), tokens)
    return min(ceil(capacity * tokens * top_k / n), tokens)
