"""`weight_norm` and `spectral_norm`: a layer whose weight is kept at a norm.

The names of params and state are those of ``torch.nn.utils.parametrizations``.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet import random, tree
from funcnet.combinators.reparametrize import reparametrize
from funcnet.core import EMPTY, Layer, Params
from funcnet.errors import require
from funcnet.tree import leaf_at


def _inside(path: str) -> str:
    """``0.parametrizations.weight`` for ``0.weight``."""
    *parents, leaf = path.split(".")
    return ".".join([*parents, "parametrizations", leaf])


def _replaced(params: Params, path: str, others: Mapping[str, Tensor] = EMPTY) -> Params:
    """The params without the leaves that the path is about, and with others."""
    flat = tree.to_dotted(params)
    own = (path, f"{_inside(path)}.")
    kept = {name: leaf for name, leaf in flat.items() if not name.startswith(own)}
    return tree.from_dotted({**kept, **others})


def weight_norm(layer: Layer, name: str = "weight", dim: int | None = 0) -> Layer:
    """A layer whose weight is ``g v / |v|``: its direction and its length are learned apart.

    Args:
        layer: any layer.
        name: the dotted path of the weight.
        dim: the dimension of which each slice has a norm; None for one norm of the whole.

    Learned params:
        those of the layer, with ``parametrizations.weight.original0`` (g, of size 1 but for
        ``dim``) and ``original1`` (v) in the place of the weight. They start so that the weight is
        that of the layer's init.
    VJP:
        with ``u = v / |v|``, ``dg = sum dweight u``, ``dv = g / |v| (dweight - u sum dweight u)``.
    Raises:
        ValueError: a path that no leaf has.

    Source: ``torch.nn.utils.parametrizations.weight_norm``; Salimans and Kingma 2016.

    >>> layer = weight_norm(fn.linear(3))
    >>> params, _ = layer.init(fn.key(0), torch.ones(4, 2))
    >>> {path: tuple(leaf.shape) for path, leaf in fn.tree.to_dotted(params).items()}
    {'bias': (3,), 'parametrizations.weight.original0': (3, 1),
     'parametrizations.weight.original1': (3, 2)}
    """
    g_path, v_path = f"{_inside(name)}.original0", f"{_inside(name)}.original1"

    def start(key: Tensor, params: Params, state: Params) -> tuple[Params, Params]:
        weight = leaf_at(name, params)
        fits = dim is None or -1 <= dim < weight.dim()
        require(fits, f"dim must be a dimension of the weight {tuple(weight.shape)}, got {dim}")
        return _replaced(params, name, {g_path: _norm(weight, dim), v_path: weight}), state

    def inside(params: Params, state: Params, train: bool) -> Any:
        flat = tree.to_dotted(params)
        g, v = flat[g_path], flat[v_path]
        length = _norm(v, dim)
        weight = v * (g / length)
        return _replaced(params, name, {name: weight}), state, {"g": g, "v": v, "n": length}, {}

    def again(layer: Layer) -> Layer:
        return weight_norm(layer, name, dim)

    static = (name, g_path, v_path)
    return reparametrize(
        "weight_norm", layer, start, inside, weight_norm_backward, *static, rebuild=again
    )


def _norm(v: Tensor, dim: int | None) -> Tensor:
    """The norm of each slice of a dimension, of the size 1 elsewhere; of the whole as a scalar."""
    if dim is None or dim == -1:
        return torch.linalg.vector_norm(v)
    others = [each for each in range(v.dim()) if each != dim]
    return torch.linalg.vector_norm(v, dim=others, keepdim=True) if others else v.abs()


def weight_norm_backward(
    dparams: Params, residuals: Any, name: str, g_path: str, v_path: str
) -> Params:
    """``dg = sum dw u``, ``dv = g / |v| (dw - u sum dw u)`` with ``u = v / |v|``."""
    g, v, length = residuals["g"], residuals["v"], residuals["n"]
    dweight, u = tree.to_dotted(dparams).get(name), v / length
    if dweight is None:  # it is frozen
        return dparams
    dg = (dweight * u).sum_to_size(g.shape)
    return _replaced(dparams, name, {g_path: dg, v_path: g / length * (dweight - u * dg)})


def spectral_norm(
    layer: Layer,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
) -> Layer:
    """A layer whose weight is divided by its largest singular value.

    The value is estimated by power iteration, which goes on from call to call: its vectors are
    state, and change with ``train=True`` alone.

    Args:
        layer: any layer.
        name: the dotted path of the weight.
        n_power_iterations: how many a call makes.
        eps: the least norm that a vector is divided by.
        dim: the dimension of the outputs in the weight, whose rest is flattened; default 0, and 1
            for a transposed convolution.

    Learned params:
        those of the layer, with ``parametrizations.weight.original`` in the place of the weight.
    State:
        ``parametrizations.weight.0._u`` and ``_v``, the estimates of the singular vectors.
    VJP:
        with ``s = u^T W v``, ``dW = (dweight - <dweight, W / s> u v^T) / s``; u and v are
        constants.
    Raises:
        ValueError: a path that no leaf has.

    Source: ``torch.nn.utils.parametrizations.spectral_norm``; Miyato et al. 2018.

    >>> layer = spectral_norm(fn.linear(3, bias=False))
    >>> params, state = layer.init(fn.key(0), torch.eye(2))
    >>> y, _ = layer.apply(params, torch.eye(2), state)
    >>> torch.linalg.matrix_norm(y, 2)
    tensor(1.0000)
    """
    require(
        n_power_iterations >= 1,
        f"spectral_norm: n_power_iterations must be at least 1, got {n_power_iterations}",
    )
    rows = (1 if layer.name.startswith("conv_transpose") else 0) if dim is None else dim
    path, kept = f"{_inside(name)}.original", f"{_inside(name)}.0"

    def start(key: Tensor, params: Params, state: Params) -> tuple[Params, Params]:
        weight = leaf_at(name, params)
        vectors: dict[str, Tensor] = {}
        if weight.dim() > 1:
            fits = -weight.dim() <= rows < weight.dim()
            require(fits, f"dim must be a dimension of the weight {tuple(weight.shape)}, got {dim}")
            matrix = _as_matrix(weight, rows)
            kind: Any = {"dtype": matrix.dtype, "device": matrix.device}
            u, v = [
                _unit(random.normal(random.fold_in(key, f"{kept}.{side}"), (size,), **kind), eps)
                for side, size in zip(("_u", "_v"), matrix.shape, strict=True)
            ]
            u, v = _iterated(matrix, u, v, 15, eps)
            vectors = {f"{kept}._u": u, f"{kept}._v": v}
        return _replaced(params, name, {path: weight}), tree.merge(state, tree.from_dotted(vectors))

    def inside(params: Params, state: Params, train: bool) -> Any:
        weight = tree.to_dotted(params)[path]
        if weight.dim() == 1:
            length = torch.linalg.vector_norm(weight).clamp(min=eps)
            residuals = {"weight": weight / length, "scale": length}
            residuals["outer"] = residuals["weight"]
            return _replaced(params, name, {name: residuals["weight"]}), state, residuals, {}
        flat, matrix = tree.to_dotted(state), _as_matrix(weight, rows)
        u, v = flat[f"{kept}._u"], flat[f"{kept}._v"]
        if train:
            u, v = _iterated(matrix, u, v, n_power_iterations, eps)
        scale = torch.dot(u, matrix.mv(v))
        outer = torch.outer(u, v).reshape(weight.movedim(rows, 0).shape).movedim(0, rows)
        residuals = {"weight": weight / scale, "scale": scale, "outer": outer}
        own = tree.from_dotted({f"{kept}._u": u, f"{kept}._v": v})
        inner = _replaced(params, name, {name: residuals["weight"]})
        return inner, _replaced(state, name), residuals, own

    def again(layer: Layer) -> Layer:
        return spectral_norm(layer, name, n_power_iterations, eps, dim)

    # The rule takes u and v for constants, as torch does, though they depend on the weight.
    told: Any = {"rebuild": again, "breaks": ("derivative",)}
    return reparametrize(
        "spectral_norm", layer, start, inside, spectral_norm_backward, name, path, **told
    )


def spectral_norm_backward(dparams: Params, residuals: Any, name: str, path: str) -> Params:
    """``dW = (dw - <dw, W / s> u v^T) / s``."""
    dweight = tree.to_dotted(dparams).get(name)
    if dweight is None:  # it is frozen
        return dparams
    along = (dweight * residuals["weight"]).sum() * residuals["outer"]
    return _replaced(dparams, name, {path: (dweight - along) / residuals["scale"]})


def _as_matrix(weight: Tensor, rows: int) -> Tensor:
    return weight.movedim(rows, 0).flatten(1)


def _unit(vector: Tensor, eps: float) -> Tensor:
    return F.normalize(vector, dim=0, eps=eps)


def _iterated(
    matrix: Tensor, u: Tensor, v: Tensor, steps: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Power iteration: ``u = W v / |W v|``, ``v = W^T u / |W^T u|``, which are constants."""
    matrix = matrix.detach()
    for _ in range(steps):
        u = _unit(matrix.mv(v), eps)
        v = _unit(matrix.t().mv(u), eps)
    return u, v
