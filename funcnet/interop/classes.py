"""The classes of torch.nn that have a layer here, and how its options are read from a module."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from funcnet.core import Layer
from funcnet.errors import require
from funcnet.interop.program import frozen, refs_of, thawed


def _dims(*names: str) -> dict[str, str]:
    """``ConvTranspose2d`` is ``conv_transpose2d``, and so on for one and three dimensions."""
    pairs = [name.split("=") for name in names]
    return {f"{theirs}{d}d": f"{ours}{d}d" for theirs, ours in pairs for d in (1, 2, 3)}


NAMES: dict[str, str] = {
    "Identity": "identity",
    "Flatten": "flatten",
    "Unflatten": "unflatten",
    "Linear": "linear",
    "NonDynamicallyQuantizableLinear": "linear",
    "Bilinear": "bilinear",
    "Embedding": "embedding",
    "EmbeddingBag": "embedding_bag",
    **_dims("Conv=conv", "ConvTranspose=conv_transpose", "InstanceNorm=instance_norm"),
    **{f"BatchNorm{dims}d": "batch_norm" for dims in (1, 2, 3)},
    "GroupNorm": "group_norm",
    "LayerNorm": "layer_norm",
    "RMSNorm": "rms_norm",
    "LocalResponseNorm": "local_response_norm",
    "CrossMapLRN2d": "cross_map_lrn",
    **_dims("MaxPool=max_pool", "AvgPool=avg_pool", "LPPool=lp_pool", "MaxUnpool=max_unpool"),
    **_dims("AdaptiveAvgPool=adaptive_avg_pool", "AdaptiveMaxPool=adaptive_max_pool"),
    **{f"FractionalMaxPool{dims}d": f"fractional_max_pool{dims}d" for dims in (2, 3)},
    **_dims("ConstantPad=constant_pad", "ZeroPad=zero_pad", "CircularPad=circular_pad"),
    **_dims("ReflectionPad=reflection_pad", "ReplicationPad=replication_pad"),
    **dict.fromkeys(["Upsample", "UpsamplingNearest2d", "UpsamplingBilinear2d"], "upsample"),
    "PixelShuffle": "pixel_shuffle",
    "PixelUnshuffle": "pixel_unshuffle",
    "ChannelShuffle": "channel_shuffle",
    "Fold": "fold",
    "Unfold": "unfold",
    "CosineSimilarity": "cosine_similarity",
    "PairwiseDistance": "pairwise_distance",
    "ReLU": "relu",
    "ReLU6": "relu6",
    "LeakyReLU": "leaky_relu",
    "PReLU": "prelu",
    "RReLU": "rrelu",
    "ELU": "elu",
    "CELU": "celu",
    "SELU": "selu",
    "GELU": "gelu",
    "SiLU": "silu",
    "Mish": "mish",
    "Sigmoid": "sigmoid",
    "LogSigmoid": "logsigmoid",
    "Tanh": "tanh",
    "Tanhshrink": "tanhshrink",
    "Softsign": "softsign",
    "GLU": "glu",
    "Softplus": "softplus",
    "Softshrink": "softshrink",
    "Hardshrink": "hardshrink",
    "Hardsigmoid": "hardsigmoid",
    "Hardswish": "hardswish",
    "Hardtanh": "hardtanh",
    "Threshold": "threshold",
    "Softmax": "softmax",
    "Softmin": "softmin",
    "LogSoftmax": "log_softmax",
    "Softmax2d": "softmax2d",
    "Dropout": "dropout",
    "AlphaDropout": "alpha_dropout",
    "FeatureAlphaDropout": "feature_alpha_dropout",
    **_dims("Dropout=dropout"),
    "RNN": "rnn",
    "GRU": "gru",
    "LSTM": "lstm",
    "RNNCell": "rnn_cell",
    "GRUCell": "gru_cell",
    "LSTMCell": "lstm_cell",
    "MultiheadAttention": "multihead_attention",
    "TransformerEncoderLayer": "transformer_encoder_layer",
    "TransformerDecoderLayer": "transformer_decoder_layer",
    "TransformerEncoder": "transformer_encoder",
    "TransformerDecoder": "transformer_decoder",
    "Transformer": "transformer",
}
"""The name of the layer of each class of torch.nn."""

_OF_MODULE = {
    "PairwiseDistance": {"p": "norm"},
    "FractionalMaxPool2d": {"random_samples": "_random_samples"},
    "FractionalMaxPool3d": {"random_samples": "_random_samples"},
}
"""Where a module has an option under another name."""

_MASKS = ("src_key_padding_mask", "tgt_key_padding_mask", "memory_key_padding_mask")
PARTS: dict[str, tuple[str, ...]] = {
    "MultiheadAttention": ("query", "key", "value", "key_padding_mask", "attn_mask"),
    "TransformerEncoderLayer": ("src", "src_mask", _MASKS[0]),
    "TransformerEncoder": ("src", "mask", _MASKS[0]),
    **dict.fromkeys(
        ["TransformerDecoderLayer", "TransformerDecoder"],
        ("tgt", "memory", "tgt_mask", "memory_mask", *_MASKS[1:]),
    ),
    "Transformer": ("src", "tgt", "src_mask", "tgt_mask", "memory_mask", *_MASKS),
}
"""The arguments of forward that are parts of x, a dict. The others are options of the layer."""

_HINTS = {
    "TransformerEncoder": {"is_causal"},
    "TransformerDecoder": {"tgt_is_causal", "memory_is_causal"},
}
"""Options of forward that only tell what a mask, which is given, is."""

_FIRST = ("Identity", "Flatten", "Unflatten")
MAY_ALIAS = {*_FIRST, *(name for name in NAMES if "Dropout" in name or "Pad" in name)}
"""Classes whose output may share the memory of their input."""


def class_of(module: nn.Module) -> str | None:
    """The name of the class of torch.nn that a module is, by its forward; None for others."""
    classes: Any = type(module).__mro__
    kinds = [kind for kind in classes if kind.__module__.startswith("torch.nn.modules")]
    name = kinds[0].__name__ if kinds else ""
    same = bool(kinds) and classes[0].forward is kinds[0].forward
    return name if same and name in NAMES else None


def layer_for(module: nn.Module, options: Mapping[str, Any]) -> Layer:
    """The layer of a module of a known class.

    Args:
        module: where its options are.
        options: of the call, such as ``need_weights``.

    Raises:
        ValueError: an option that the layer does not have.
    """
    import funcnet

    kind = str(class_of(module))
    constructor = getattr(funcnet, NAMES[kind])
    hints = _HINTS.get(kind, ())
    called = {name: value for name, value in options.items() if name not in hints}
    if kind == "MultiheadAttention":
        called = {"need_weights": True, **called}
    if kind in _READERS:
        return _READERS[kind](constructor, module, called)
    if called.get("output_size") is not None:
        called["output_size"] = tuple(called["output_size"])[-int(kind[-2]) :]
    own = _options(kind, constructor, module)
    known = inspect.signature(constructor).parameters
    unknown = [name for name in called if name not in known]
    require(not unknown, f"has no layer with the option {', '.join(unknown)} of forward")
    return constructor(**own, **called)


def _options(kind: str, constructor: Callable[..., Layer], module: nn.Module) -> dict[str, Any]:
    """The constructor's options, by their names."""
    renamed = _OF_MODULE.get(kind, {})
    found: dict[str, Any] = {}
    for name in inspect.signature(constructor).parameters:
        attribute = renamed.get(name, name)
        if hasattr(module, attribute) and name != "dtype":
            found[name] = getattr(module, attribute)
    bias = found.get("bias", False)
    if bias is None or isinstance(bias, Tensor):
        affine = getattr(module, "affine", getattr(module, "elementwise_affine", True))
        found["bias"] = bias is not None or not affine
    if "sparse" in found:
        found["sparse"] = False  # the same numbers, as a dense tensor
    if kind in ("Embedding", "EmbeddingBag"):
        found["dtype"] = module.weight.dtype
    if kind == "PReLU":
        found.pop("init", None)
    if kind in ("Softmax", "Softmin", "LogSoftmax"):
        require(found["dim"] is not None, "dim=None depends on the rank of x; give it a number")
    return found


def _attention(constructor: Callable[..., Layer], module: Any, called: Any) -> Layer:
    has_sizes = module.in_proj_weight is None
    return constructor(
        module.num_heads,
        module.dropout,
        module.in_proj_bias is not None,
        module.bias_k is not None,
        module.add_zero_attn,
        module.kdim if has_sizes else None,
        module.vdim if has_sizes else None,
        module.batch_first,
        **called,
    )


def _block_options(module: Any) -> dict[str, Any]:
    """The options of a layer of the Transformer."""
    return {
        "nhead": module.self_attn.num_heads,
        "dim_feedforward": module.linear1.out_features,
        "dropout": module.dropout.p,
        "activation": _activation(module.activation),
        "layer_norm_eps": module.norm1.eps,
        "batch_first": module.self_attn.batch_first,
        "norm_first": module.norm_first,
        "bias": module.linear1.bias is not None,
    }


def _activation(function: Any) -> Any:
    """A name or a layer for the function between the linear layers."""
    import funcnet

    if isinstance(function, nn.Module):
        known = class_of(function) is not None
        require(known, f"activation is a {type(function).__name__}, which has no layer")
        return layer_for(function, {})
    options = {}
    if isinstance(function, partial):
        require(not function.args, f"activation is {function}, which has no layer")
        function, options = function.func, function.keywords
    named = {F.relu: "relu", F.gelu: "gelu", F.silu: "silu", F.tanh: "tanh", F.mish: "mish"}
    require(function in named, f"activation is {function}, which has no layer")
    return getattr(funcnet, named[function])(**options)


def _block(constructor: Callable[..., Layer], module: Any, called: Any) -> Layer:
    return constructor(**_block_options(module), **called)


def _norm(module: Any) -> Layer | None:
    return None if module is None else layer_for(module, {})


def _stack(constructor: Callable[..., Layer], module: Any, called: Any) -> Layer:
    require(not called, f"has no layer with the option {', '.join(called)} of forward")
    blocks = list(module.layers)
    described = [repr(block) + repr(_plain(block)) for block in blocks]
    require(len(set(described)) == 1, "its layers have different options")
    known = [class_of(block) for block in blocks]
    require(None not in known, f"its layers are {type(blocks[0]).__name__}, which has no layer")
    return constructor(layer_for(blocks[0], {}), len(blocks), _norm(module.norm))


def _plain(block: Any) -> dict[str, Any]:
    return {name: value for name, value in _block_options(block).items() if name != "activation"}


def _transformer(constructor: Callable[..., Layer], module: Any, called: Any) -> Layer:
    """Whose stacks get the options of forward."""
    import funcnet

    options: dict[str, dict[str, Any]] = {"src": {}, "tgt": {}}
    for name, value in called.items():
        side = "src" if name == "src_is_causal" else "tgt"
        options[side]["is_causal" if side == "src" else name] = value
    stacks = {"src": module.encoder, "tgt": module.decoder}
    made = {}
    for side, stack in stacks.items():
        _stack(getattr(funcnet, NAMES[type(stack).__name__]), stack, {})
        block = layer_for(next(iter(stack.layers)), options[side])
        stacked = getattr(funcnet, NAMES[type(stack).__name__])
        made[side] = stacked(block, len(stack.layers), _norm(stack.norm))
    return constructor(custom_encoder=made["src"], custom_decoder=made["tgt"])


_READERS: dict[str, Callable[[Callable[..., Layer], Any, Any], Layer]] = {
    "MultiheadAttention": _attention,
    "TransformerEncoderLayer": _block,
    "TransformerDecoderLayer": _block,
    "TransformerEncoder": _stack,
    "TransformerDecoder": _stack,
    "Transformer": _transformer,
}
"""Classes whose options are not attributes of the layer's names."""


def split_call(module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """A call of a module of a known class as x and options.

    Args:
        module: of a known class.
        args, kwargs: of the call, with `Ref` in the places of values.
    """
    kind = str(class_of(module))
    signature = inspect.signature(type(module).forward)
    given = dict(list(signature.bind(module, *args, **kwargs).arguments.items())[1:])
    held = {name: any(True for _ in refs_of(frozen(value))) for name, value in given.items()}
    if kind in PARTS:
        x = {name: value for name, value in given.items() if held[name]}
        unknown = [name for name in x if name not in PARTS[kind]]
        require(not unknown, f"{', '.join(unknown)} depends on values")
        return x, _constants(given, held, ())
    names = list(given)
    last = max([place for place, name in enumerate(names) if held[name]], default=-1)
    require(last >= 0, "is called without a value")
    inputs = tuple([given[name] for name in names[: last + 1]])
    rest = _constants(given, held, names[: last + 1])
    return inputs[0] if last == 0 else inputs, rest


def _constants(given: Any, held: Mapping[str, bool], inputs: Any) -> dict[str, Any]:
    return {
        name: thawed(value, lambda ref: ref)
        for name, value in given.items()
        if not held[name] and name not in inputs and value is not None
    }
