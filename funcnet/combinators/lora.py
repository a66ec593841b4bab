"""`lora`: a layer of which only low-rank changes of its weights are learned."""

from typing import Any

from torch import Tensor

from funcnet import random, tree
from funcnet.combinators.freeze import split_frozen, with_frozen
from funcnet.combinators.reparametrize import (
    learn_only,
    reparametrize,
)
from funcnet.core import Layer, Params, join_paths
from funcnet.errors import require
from funcnet.initializers import torch_default
from funcnet.tree import Where, chosen_leaves, named_paths, selector


def lora(layer: Layer, rank: int = 8, alpha: float = 16.0, where: Where | None = None) -> Layer:
    """The same layer with weights ``W + alpha / rank B A``: W is frozen, B and A are learned.

    All other parameters are frozen too, as by `freeze`. B starts as zeros, so that the layer starts
    as the one inside.

    Args:
        layer: any layer.
        rank: the number of columns of B, and of rows of A.
        alpha: scales the change by ``alpha / rank``.
        where: which weights: dotted paths of leaves or layers, or a function of the path; default
            the weights of all `linear` layers. A weight of more than two dimensions, such as that
            of a convolution, counts as a matrix of (outputs, all else).

    Learned params:
        for each weight, in its place, ``lora_A`` (rank, in) and ``lora_B`` (out, rank).
    State:
        the layer's, and ``frozen``, a tree of all its parameters.
    VJP:
        ``dB = alpha / rank dW A^T``, ``dA = alpha / rank B^T dW``. No other gradient is computed.
    Raises:
        ValueError: a path that no leaf has, or a leaf that is not a matrix.

    Source: Hu et al. 2021; the names are those of the package peft.

    >>> net = fn.serial(fn.linear(64), fn.relu(), fn.linear(10))
    >>> params, state = lora(net, rank=2).init(fn.key(0), torch.ones(4, 32))
    >>> {path: tuple(leaf.shape) for path, leaf in fn.tree.to_dotted(params).items()}
    {'0.weight.lora_A': (2, 32), '0.weight.lora_B': (64, 2),
     '2.weight.lora_A': (2, 64), '2.weight.lora_B': (10, 2)}
    """
    require(rank >= 1, f"lora: rank must be at least 1, got {rank}")
    chosen = _linear_weights("", layer) if where is None else where
    scale = alpha / rank

    def start(key: Tensor, params: Params, state: Params) -> tuple[Params, Params]:
        flat, own = tree.to_dotted(params), {}
        for path in _matrices(chosen, params):
            weight = flat[path]
            out, width = weight.shape[0], weight[0].numel()
            draw = random.fold_in(key, f"{path}.lora_A")
            kind = (weight.dtype, weight.device)
            own[f"{path}.lora_A"] = torch_default(width)(draw, (rank, width), *kind)
            own[f"{path}.lora_B"] = weight.new_zeros(out, rank)
        return tree.from_dotted(own), with_frozen(state, params)

    def inside(params: Params, state: Params, train: bool) -> Any:
        frozen, rest = split_frozen(state)
        weights, own = tree.to_dotted(frozen), tree.to_dotted(params)
        for path in _adapted(own):
            change = own[f"{path}.lora_B"] @ own[f"{path}.lora_A"]
            weights[path] = weights[path] + scale * change.reshape(weights[path].shape)
        return tree.from_dotted(weights), rest, {"own": params}, {"frozen": frozen}

    def again(layer: Layer) -> Layer:
        return lora(layer, rank, alpha, where)

    inner = learn_only(layer, selector(chosen))
    return reparametrize("lora", inner, start, inside, lora_backward, scale, rebuild=again)


def lora_backward(dparams: Params, residuals: Any, scale: float) -> Params:
    """``dB = scale dW A^T``, ``dA = scale B^T dW``."""
    gradients, own = tree.to_dotted(dparams), tree.to_dotted(residuals["own"])
    found: dict[str, Tensor] = {}
    for path in _adapted(own):
        dweight = scale * gradients[path].flatten(1)
        found[f"{path}.lora_A"] = own[f"{path}.lora_B"].t() @ dweight
        found[f"{path}.lora_B"] = dweight @ own[f"{path}.lora_A"].t()
    return tree.from_dotted(found)


def _adapted(own: dict[str, Tensor]) -> list[str]:
    """The paths of the weights that are changed, of the names of the own params."""
    return [path.removesuffix(".lora_A") for path in own if path.endswith(".lora_A")]


def _linear_weights(path: str, layer: Layer) -> list[str]:
    """The paths of the weights of all linear layers."""
    own = [join_paths(path, "weight")] if layer.name == "linear" else []
    below = [_linear_weights(join_paths(path, name), each) for name, each in layer.children.items()]
    return sum(below, own)


def _matrices(where: Where, params: Params) -> list[str]:
    """The chosen leaves that are matrices, or more; there must be some."""
    flat = tree.to_dotted(params)
    for path in named_paths(where):
        fits = path not in flat or flat[path].dim() >= 2
        require(fits, f"{path!r} is not a matrix, but {tree.describe(flat.get(path))}")
    paths = [path for path in chosen_leaves(where, params) if flat[path].dim() >= 2]
    require(paths, f"no chosen leaf is a matrix, of {list(flat)}")
    return paths
