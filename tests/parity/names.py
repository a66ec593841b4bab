"""From a class of torch.nn and its arguments to the constructor of funcnet and its own."""

import inspect
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

import funcnet as fn
from tests.parity.draws import Nested
from tests.parity.exceptions import ABSENT, DEFAULTS, OPTIONS

# Where the snake case of the name is not the name.
NAMES = {
    "AdaptiveLogSoftmaxWithLoss": "adaptive_log_softmax",
    "CELU": "celu",
    "CrossMapLRN2d": "cross_map_lrn",
    "LogSigmoid": "logsigmoid",
    "L1Loss": "mae",
    "NLLLoss2d": "nll",
    "UpsamplingBilinear2d": "upsample",
    "UpsamplingNearest2d": "upsample",
    "RNNCell": "rnn_cell",
    "LSTMCell": "lstm_cell",
    "GRUCell": "gru_cell",
}
# Options of torch that are private there.
RENAMED = {"_random_samples": "random_samples"}
# What those classes fix, whose funcnet name has more options, or has other defaults.
FIXED: dict[str, dict[str, Any]] = {
    "UpsamplingBilinear2d": {"mode": "bilinear", "align_corners": True},
    "UpsamplingNearest2d": {"mode": "nearest"},
    **{
        f"LazyInstanceNorm{dims}d": {"affine": True, "track_running_stats": True}
        for dims in (1, 2, 3)
    },
}
# Init finds these sizes; there is no argument for them.
INPUT_SIZES = {
    "in_features",
    "input_size",
    "in1_features",
    "in2_features",
    "in_channels",
    "num_features",
    "num_channels",
    "embed_dim",
    "d_model",
}
NOT_OPTIONS = INPUT_SIZES | {"inplace", "device", "dtype"} | set(ABSENT)
# The arguments of these classes' forward that are parts of x, by name. The others are options.
_MASKS = ("src_key_padding_mask", "tgt_key_padding_mask", "memory_key_padding_mask")
PARTS = {
    "MultiheadAttention": ("query", "key", "value", "key_padding_mask", "attn_mask"),
    "TransformerEncoderLayer": ("src", "src_mask", _MASKS[0]),
    "TransformerEncoder": ("src", "mask", _MASKS[0]),
    **dict.fromkeys(
        ["TransformerDecoderLayer", "TransformerDecoder"],
        ("tgt", "memory", "tgt_mask", "memory_mask", *_MASKS[1:]),
    ),
    "Transformer": ("src", "tgt", "src_mask", "tgt_mask", "memory_mask", *_MASKS),
}
# Defaults of torch's forward that are not those of the constructor.
FORWARD = {"MultiheadAttention": {"need_weights": True}}
# A stack's layers are told, and torch's stack itself has this for a hint about the mask.
HINTS = {
    "TransformerEncoder": {"is_causal"},
    "TransformerDecoder": {"tgt_is_causal", "memory_is_causal"},
}


class Unsupported(Exception):  # noqa: N818
    """There is nothing to compare, for a reason that a user may read."""


def is_loss(cls: type) -> bool:
    """Whether the class is a loss here: with parameters it is a layer."""
    return issubclass(cls, nn.modules.loss._Loss) and cls is not nn.LinearCrossEntropyLoss


def snake_case(name: str) -> str:
    """The name of the layer or the loss of a class.

    >>> [snake_case(name) for name in ("LazyConv2d", "LPPool2d", "LeakyReLU", "BCEWithLogitsLoss")]
    ['conv2d', 'lp_pool2d', 'leaky_relu', 'bce_with_logits']
    """
    if name in NAMES:
        return NAMES[name]
    name = re.sub(r"^Lazy|Loss$|(?<=BatchNorm)[123]d$", "", name)
    for acronym in ("LeakyReLU", "ReLU", "SiLU", "MultiLabel"):
        name = name.replace(acronym, acronym.capitalize().replace("kyr", "kyR"))
    name = re.sub(r"^(P|R)Relu", r"\1relu", name)
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def constructor(cls: type) -> Callable[..., Any]:
    """The constructor of a class's layer or loss."""
    made = getattr(fn, snake_case(cls.__name__), None)
    if made is None:
        raise Unsupported(f"no {'loss' if is_loss(cls) else 'layer'} {snake_case(cls.__name__)}")
    return made


def parameters(cls: type) -> dict[str, inspect.Parameter]:
    """The arguments of a class by name, but for ``*args`` and ``**kwargs``."""
    # A class whose arguments are hidden in *args names them in an overload.
    made = next(iter(typing.get_overloads(cls.__init__)), cls.__init__)
    found = inspect.signature(made).parameters
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: each for name, each in found.items() if each.kind not in kinds and name != "self"}


def options(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name, but for those that say nothing: None and False."""
    given = {**dict(zip(parameters(cls), args, strict=False)), **kwargs}
    return {
        name: value for name, value in given.items() if value is not None and value is not False
    }


def translate(
    cls: type, args: tuple[Any, ...], kwargs: dict[str, Any], forward: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The constructor, and its arguments: by position what was, less the sizes of the input.

    ``forward`` are keyword arguments of torch's forward, which are options of the constructor.
    """
    made, hints = constructor(cls), HINTS.get(cls.__name__, ())
    forward = FORWARD.get(cls.__name__, {}) | forward
    forward = {name: value for name, value in forward.items() if name not in hints}
    if forward.get("output_size") is not None:
        # A layer's option has the sizes of the space alone, whatever the batch.
        forward = forward | {"output_size": forward["output_size"][-int(cls.__name__[-2]) :]}
    for name in options(cls, args, kwargs):
        if name in OPTIONS or name in ABSENT:
            raise Unsupported(f"{name}: {OPTIONS.get(name) or ABSENT[name]}")
    given = dict(zip(parameters(cls), args, strict=False))
    fixed = {k: v for k, v in FIXED.get(cls.__name__, {}).items() if k not in given}
    named = fixed | {RENAMED.get(name, name): value for name, value in kwargs.items()} | forward
    by_position = [_ours(value) for name, value in given.items() if name not in NOT_OPTIONS]
    by_name = {name: _ours(value) for name, value in named.items() if name not in NOT_OPTIONS}
    return made, tuple(by_position), by_name


def _ours(value: Any) -> Any:
    """What stands for an argument of torch's class: a layer for a module or a function."""
    if isinstance(value, Nested) and value.name == "PairwiseDistance":
        return constructor(getattr(nn, value.name))(*value.args)
    if isinstance(value, Nested):
        return layer_of(value.theirs())
    if isinstance(value, nn.Module):
        return layer_of(value)
    return {F.relu: "relu", F.gelu: fn.gelu()}.get(value, value) if callable(value) else value


def layer_of(module: nn.Module) -> fn.Layer:
    """The layer of a module that is an argument of a stack of the Transformer."""
    if isinstance(module, nn.LayerNorm):
        return fn.layer_norm(None, module.eps, bias=module.bias is not None)
    if isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)):
        first, norm = next(iter(module.layers)), module.norm
        made = constructor(type(module))
        return made(layer_of(first), len(module.layers), norm and layer_of(norm))
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return constructor(type(module))(
            module.self_attn.num_heads,
            module.linear1.out_features,
            module.dropout.p,
            _ours(module.activation),
            module.norm1.eps,
            module.self_attn.batch_first,
            module.norm_first,
            module.linear1.bias is not None,
        )
    return constructor(type(module))()


def check_signature(cls: type) -> None:
    """The options have torch's names, order and defaults."""
    made, fixed = constructor(cls), FIXED.get(cls.__name__, {})
    theirs = {
        name: each
        for name, each in parameters(cls).items()
        if name not in NOT_OPTIONS and not name.startswith("_")
    }
    ours = inspect.signature(made).parameters
    missing = [name for name in theirs if name not in ours]
    assert not missing, f"no option {', '.join(missing)}"
    order = _by_position(theirs)
    positions = _by_position(ours)[: len(order)]
    assert positions == order, f"options by position are {positions}, torch's {order}"
    for name, each in theirs.items():
        default = ours[name].default
        if each.default is each.empty or name in DEFAULTS or name in fixed:
            continue
        assert default == each.default, f"{name} is {default} by default, torch's {each.default}"


def _by_position(options: Mapping[str, inspect.Parameter]) -> list[str]:
    return [name for name, each in options.items() if each.kind is each.POSITIONAL_OR_KEYWORD]


def takes(made: Callable[..., Any], option: str) -> bool:
    return option in inspect.signature(made).parameters


def floating(leaves: Any) -> bool:
    """Whether a tensor among the leaves of a tree has a floating-point dtype."""
    return any(
        isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in fn.tree.leaves(leaves)
    )
