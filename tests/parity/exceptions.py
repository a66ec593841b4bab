"""What of torch.nn has no counterpart, and why: the only place where a case may be left out."""

import torch
from torch import nn

_CONTAINER = "a container computes nothing: serial, parallel and dicts of params are its place"

CLASSES = {
    **dict.fromkeys(
        ["Sequential", "ModuleDict", "ModuleList", "ParameterDict", "ParameterList", "Container"],
        _CONTAINER,
    ),
    "Module": "the base class: a layer is a triple of functions",
    "RNNBase": "the base class of RNN, LSTM and GRU, not a layer of its own",
    "RNNCellBase": "the base class of the recurrent cells, not a layer of its own",
    "SyncBatchNorm": "batch_norm over the ranks of a process group; it is not defined on a CPU",
    "LinearCrossEntropyOptions": "linear_cross_entropy takes torch's own",
}
"""Classes without a layer or a loss."""

OPTIONS = {
    "sparse": "gradients are dense tensors, as updates and jit need them; the numbers are the same",
}
"""Options that have one value alone, whatever the class."""

_FAST_PATH = "an option of torch's inference on nested tensors, which changes no number"

ABSENT = {
    "size_average": "deprecated by torch for reduction",
    "reduce": "deprecated by torch for reduction",
    "min_value": "deprecated by torch for min_val",
    "max_value": "deprecated by torch for max_val",
    "enable_nested_tensor": _FAST_PATH,
    "mask_check": _FAST_PATH,
}
"""Options that are not there, whatever the class."""

DEFAULTS = {
    "activation": "torch's default, a function, is called by its name",
    "dim": "torch's default, None, is deprecated: the dimension then depends on the rank",
}
"""Options whose default differs."""

INEXACT = {
    "CELU": 1e-6,  # torch's backward rounds 1 / alpha to float32
    "Hardsigmoid": 1e-6,  # its eager backward rounds 1 / 6 to float32, its compiled one does not
}
"""The relative error of torch's own numbers in float64, where it is above the tolerance."""

ROUNDING = {
    ("MultiheadAttention", torch.bfloat16): 0.1,
    # Errors grow from step to step, in torch's loop too.
    ("RNN", torch.bfloat16): 0.2,
    ("GRU", torch.bfloat16): 0.15,
    ("LSTM", torch.bfloat16): 0.15,
    ("LSTM", torch.float32): 5e-5,
}
"""The relative error that rounding may explain, where that is above the tolerance of the dtype."""

DEEP = {f"Transformer{part}" for part in ("", "Encoder", "EncoderLayer", "Decoder", "DecoderLayer")}
"""Their layers' rounding adds up: below float64 a gradient may have no right digit in torch. The
error of ours, of all tensors together, is then at most four times that of torch."""

CANCELLING = {
    # Torch's samples have scores of 100; the gradient of a key is a difference of large numbers.
    ("MultiheadAttention", torch.bfloat16): "dx",
}
"""What of torch's samples has no digit that is right, neither in torch nor in funcnet."""

WRONG_GRADIENTS = {
    # It is that by the input of a log_softmax, which it supposes to be before the loss.
    ("CTCLoss", ""),
    # `torch.autograd.gradcheck` refuses it: its backward pass sums over a window that is shifted.
    ("CrossMapLRN2d", ""),
    # Of the bag [4, 4, 3], [], [0, 3, 4], [2] torch divides row 4 by 2, which occurs 3 times.
    ("EmbeddingBag", "scale_grad_by_freq"),
}
"""Classes, and options, whose gradient in torch is wrong: ours is held to the laws alone."""

NOT_DERIVATIVES = {
    ("Embedding", "padding_idx"),
    ("Embedding", "scale_grad_by_freq"),
    ("Embedding", "max_norm"),
    ("EmbeddingBag", "padding_idx"),
    ("EmbeddingBag", "scale_grad_by_freq"),
    ("EmbeddingBag", "max_norm"),
    # Where windows overlap, an output has the gradient of each of the inputs that it was given.
    *[(f"MaxUnpool{dims}d", "stride") for dims in (1, 2, 3)],
    # Where a norm or a variance is below it, it has the gradient of what it replaces.
    ("CosineSimilarity", "eps"),
    ("GaussianNLLLoss", "eps"),
}
"""Options with which torch's gradient is by definition not the derivative of the output."""


SEES_NOTHING = "a query that sees no key: torch gives NaN, and funcnet as if it saw a value of 0"
"""Where masks hide all keys from a query; what is not NaN in torch's output is compared."""


def computes(name: str) -> bool:
    """Whether a name in ``torch.nn.modules`` is a class that a layer or a loss may stand for."""
    return isinstance(getattr(nn.modules, name), type) and name not in CLASSES


def torch_has_no(error: Exception, dtype: torch.dtype) -> bool:
    """Whether torch refused a case for its dtype alone: then there is nothing to compare with."""
    name = {torch.bfloat16: "BFloat16", torch.float32: "Float", torch.float64: "Double"}[dtype]
    return f"not implemented for '{name}'" in str(error)
