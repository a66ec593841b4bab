"""The functions of ``torch.nn.functional``, by the layers of their names."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from funcnet.core import EMPTY, Forward, Grads, Key, Layer, Params, Pullback, Tree
from funcnet.errors import require
from funcnet.interop.operations.arithmetic import Call, cached
from funcnet.layers import (
    activations,
    attention,
    avg_pool,
    conv,
    distances,
    embedding as embeddings,
    fold as folds,
    gated,
    group_norm as group_norms,
    layer_norm as layer_norms,
    linear as linears,
    max_pool,
    padding,
    piecewise,
    pixels,
    prelu as prelus,
    resample,
    response_norm,
    softmax as softmaxes,
)
from funcnet.lift import stateful


def functional_rule(
    residuals: Any, dy: Tree, names: tuple[str, ...], *, params: bool, x: bool
) -> Grads:
    """The layer's dparams are cotangents of the operands that it has as params."""
    dparams, dx = residuals[""](dy)
    return {} if params else None, (dx, *[dparams[name] for name in names])


def with_params(layer: Layer, names: tuple[str, ...]) -> Layer:
    """A layer whose x is a tuple of the layer's x and of its params."""

    def forward(params: Params, x: Any, state: Params, key: Key, train: bool) -> Forward:
        own = dict(zip(names, x[1:], strict=True))
        y, pullback, _ = layer.forward(own, x[0], EMPTY, None, train)
        return y, Pullback(functional_rule, {"": pullback}, (names,)), state

    return stateful(lambda key, x: ({}, {}), forward, name=layer.name)


def _given(layer: Layer, x: Tensor, **params: Tensor | None) -> Call:
    """The layer of x, with the params that are there."""
    there = {name: leaf for name, leaf in params.items() if leaf is not None}
    if not there:
        return layer, x
    return with_params(layer, tuple(there)), (x, *there.values())


def _same_names(constructor: Callable[..., Layer], default: dict[str, Any] | None = None) -> Any:
    """A function whose options are those of the layer, by position and by name."""
    made = cached(constructor)

    def call(x: Any, *args: Any, inplace: bool = False, **options: Any) -> Call:
        hashable = [tuple(each) if isinstance(each, list) else each for each in args]
        named = {
            name: tuple(each) if isinstance(each, list) else each for name, each in options.items()
        }
        for ignored in ("_stacklevel", "dtype"):
            require(named.pop(ignored, None) in (None, 3), f"expects no {ignored}")
        return made(*hashable, **{**(default or {}), **named}), x

    return call


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call:
    """``F.linear``."""
    layer = linears.linear(weight.shape[0], bias is not None)
    return _given(layer, x, weight=weight, bias=bias)


def _convolution(constructor: Callable[..., Layer]) -> Callable[..., Call]:
    def call(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Call:
        sizes = tuple(weight.shape[2:])
        options = (stride, padding, dilation, groups, bias is not None)
        layer = constructor(weight.shape[0], sizes, *options)
        return _given(layer, x, weight=weight, bias=bias)

    return call


def layer_norm(
    x: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Call:
    """``F.layer_norm``."""
    require(weight is not None or bias is None, "layer_norm: expects a weight beside the bias")
    shape = tuple(normalized_shape)
    layer = layer_norms.layer_norm(shape, eps, weight is not None, bias is not None)
    return _given(layer, x, weight=weight, bias=bias)


def rms_norm(x: Tensor, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Call:
    """``F.rms_norm``."""
    layer = layer_norms.rms_norm(tuple(normalized_shape), eps, weight is not None)
    return _given(layer, x, weight=weight)


def group_norm(
    x: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Call:
    """``F.group_norm``."""
    require((weight is None) == (bias is None), "group_norm: expects both weight and bias, or none")
    layer = group_norms.group_norm(num_groups, eps, weight is not None)
    return _given(layer, x, weight=weight, bias=bias)


def embedding(
    x: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Call:
    """``F.embedding``; a sparse gradient has the same numbers."""
    options = (padding_idx, max_norm, norm_type, scale_grad_by_freq)
    layer = embeddings.embedding(len(weight), weight.shape[1], *options, dtype=weight.dtype)
    return _given(layer, x, weight=weight)


def prelu(x: Tensor, weight: Tensor) -> Call:
    """``F.prelu``."""
    return _given(prelus.prelu(weight.numel()), x, weight=weight)


def softmax(x: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: None = None) -> Call:
    """``F.softmax`` along a dimension."""
    require(dim is not None and dtype is None, "softmax: expects a dim, and no dtype")
    return softmaxes.softmax(dim), x  # type: ignore[arg-type]


def log_softmax(
    x: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: None = None
) -> Call:
    """``F.log_softmax`` along a dimension."""
    require(dim is not None and dtype is None, "log_softmax: expects a dim, and no dtype")
    return softmaxes.log_softmax(dim), x  # type: ignore[arg-type]


def pad(x: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> Call:
    """``F.pad`` of the last dimensions, up to three, in each of its modes."""
    sides, dims = tuple(pad), len(pad) // 2
    require(1 <= dims <= 3, f"pad: expects one to three dimensions, got {sides}")
    if mode == "constant":
        made = getattr(padding, f"constant_pad{dims}d")
        return made(sides, 0.0 if value is None else value), x
    kind = {"reflect": "reflection", "replicate": "replication", "circular": "circular"}[mode]
    return getattr(padding, f"{kind}_pad{dims}d")(sides), x


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Call:
    """``F.scaled_dot_product_attention`` without dropout."""
    require(dropout_p == 0, f"attention: expects dropout_p=0, got {dropout_p}")
    options = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    layer = attention.scaled_dot_product_attention(**options)  # type: ignore[arg-type]
    parts = (query, key, value)
    return layer, parts if attn_mask is None else (*parts, attn_mask)


def _pair(constructor: Callable[..., Layer]) -> Callable[..., Call]:
    return lambda x1, x2, *args, **options: (constructor(*args, **options), (x1, x2))


def _dims(name: str, module: Any) -> dict[str, Any]:
    return {f"{name}{d}d": _same_names(getattr(module, f"{name}{d}d")) for d in (1, 2, 3)}


FUNCTIONAL: dict[str, Callable[..., Call]] = {
    **{
        name: _same_names(getattr(activations, name))
        for name in ("celu", "elu", "gelu", "logsigmoid", "mish", "selu", "sigmoid", "silu")
    },
    **{
        name: _same_names(getattr(activations, name))
        for name in ("softplus", "softsign", "tanh", "tanhshrink")
    },
    **{
        name: _same_names(getattr(piecewise, name))
        for name in ("hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "relu")
    },
    **{
        name: _same_names(getattr(piecewise, name)) for name in ("relu6", "softshrink", "threshold")
    },
    **_dims("max_pool", max_pool),
    **_dims("adaptive_max_pool", max_pool),
    **_dims("avg_pool", avg_pool),
    **_dims("adaptive_avg_pool", avg_pool),
    **{f"conv{dims}d": _convolution(getattr(conv, f"conv{dims}d")) for dims in (1, 2, 3)},
    "glu": _same_names(gated.glu),
    "interpolate": _same_names(resample.interpolate),
    "upsample": _same_names(resample.upsample),
    "pixel_shuffle": _same_names(pixels.pixel_shuffle),
    "pixel_unshuffle": _same_names(pixels.pixel_unshuffle),
    "unfold": _same_names(folds.unfold),
    "fold": _same_names(folds.fold),
    "local_response_norm": _same_names(response_norm.local_response_norm),
    "cosine_similarity": _pair(distances.cosine_similarity),
    "pairwise_distance": _pair(distances.pairwise_distance),
    "linear": linear,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "group_norm": group_norm,
    "embedding": embedding,
    "prelu": prelu,
    "softmax": softmax,
    "log_softmax": log_softmax,
    "pad": pad,
    "scaled_dot_product_attention": scaled_dot_product_attention,
}
"""From the name of a function of torch to its layer and what that is applied to."""
