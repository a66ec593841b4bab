"""PyTorch's private side: is a transformation at work, can values be read, operators on lists.

Outside the compiler, this is the one module that uses private names of PyTorch.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_functorch = torch._C._functorch
_interpreter = _functorch.peek_interpreter_stack
_interpreters = _functorch.get_interpreter_stack
_DERIVATIVES = (_functorch.TransformType.Grad, _functorch.TransformType.Jvp)
_forward_ad = torch.autograd.forward_ad
_dispatch_modes = torch._C._len_torch_dispatch_stack

_requires_grad = attrgetter("requires_grad")

FOREACH: dict[str, Callable[..., Any]] = {
    name: getattr(torch, f"_foreach_{name}")
    for name in (
        *("abs", "add", "addcdiv", "addcmul", "clone", "div", "exp", "lerp", "log", "maximum"),
        *("minimum", "mul", "neg", "pow", "reciprocal", "rsqrt", "sign", "sqrt", "sub"),
    )
}
"""Operators on lists of tensors, by the name of the function that they apply to each."""

foreach_add_: Callable[..., None] = torch._foreach_add_
"""Adds a list of tensors to another one, in place."""

foreach_norm: Callable[..., Any] = torch._foreach_norm
"""The norm of each of a list of tensors."""

flatten_dense: Callable[[list[Tensor]], Tensor] = torch._C._nn.flatten_dense_tensors
"""The numbers of tensors as one vector; of a single one perhaps in its own memory."""

unflatten_dense: Callable[[Tensor, list[Tensor]], list[Tensor]]
unflatten_dense = torch._C._nn.unflatten_dense_tensors
"""The parts of a vector, as views in the shapes of tensors."""

fused_adamw_: Callable[..., None] = partial(torch._fused_adamw_, maximize=False)
"""Adam's update in place, with decoupled weight decay, of lists of tensors, in one call."""


def is_tracing() -> bool:
    """Whether operators are being recorded, so that tensors have no values to read."""
    return bool(_dispatch_modes())


@contextmanager
def untraced() -> Iterator[None]:
    """A context in which no operator is recorded: for shapes, which are found on meta tensors."""
    with torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction():
        yield


def is_transformed(*tensors: Tensor) -> bool:
    """Whether torch.func or a tracer is at work, or one of the tensors needs a gradient.

    Fused kernels may have no rule for vmap or no derivative there, where a formula has both.
    """
    if _interpreter() is not None or _forward_ad._current_level >= 0 or _dispatch_modes():
        return True
    return any(map(_requires_grad, tensors))


def is_batched() -> bool:
    """Whether ``torch.vmap`` or another transformation of torch.func is at work."""
    return _interpreter() is not None


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor differs between the members of the innermost ``torch.vmap`` at work.

    >>> torch.vmap(lambda x: torch.tensor(is_mapped(x)))(torch.ones(2))
    tensor([True, True])
    """
    top = _interpreter()
    if top is None or not _functorch.is_batchedtensor(tensor):
        return False
    return _functorch.maybe_get_level(tensor) == top.level()


def is_differentiated(*tensors: Tensor) -> bool:
    """Whether a derivative is taken of what is computed with these tensors.

    By autograd, if one of them needs a gradient, or by torch.func.
    """
    if any(map(_requires_grad, tensors)) or _forward_ad._current_level >= 0:
        return True
    levels = _interpreters()
    return levels is not None and any([level.key() in _DERIVATIVES for level in levels])


def is_forward_mode() -> bool:
    """Whether a derivative is taken by forward mode, ``torch.func.jvp`` or ``jacfwd``."""
    if _forward_ad._current_level >= 0:
        return True
    jvp = _functorch.TransformType.Jvp
    return any([level.key() == jvp for level in _interpreters() or ()])


def left_alone_by_compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a function that ``torch.compile`` is to call as it is, with all that it calls.

    It is ``torch.compiler.disable`` without the import of the compiler, which takes 1.6 s.
    """
    frames = torch._C._dynamo.eval_frame
    skip = frames._FrameAction.SKIP
    frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function


def read(tensor: Tensor) -> Any:
    """``tensor.tolist()`` where the values can be had without waiting for a device, else None.

    >>> read(torch.tensor([1, 2])), read(torch.ones(2, device="meta"))
    ([1, 2], None)
    """
    if tensor.device.type != "cpu" or is_tracing():
        return None
    try:
        return tensor.tolist()
    except RuntimeError:  # under vmap a tensor stands for those of all members
        return None


def has_one_value(tensor: Tensor) -> bool:
    """Whether a tensor has a value that Python can read, if need be by waiting for its device.

    It has not while operators are traced, and under vmap, where it stands for those of all members.
    """
    if is_tracing() or tensor.is_meta:
        return False
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return False
        tensor = _functorch.get_unwrapped(tensor)
    return True


def holds_anywhere(flag: Tensor) -> bool:
    """Whether a bool is True, under vmap for any of the members."""
    while _functorch.is_functorch_wrapped_tensor(flag):
        flag = _functorch.get_unwrapped(flag)
    return bool(flag.any())


def storage_id(tensor: Tensor) -> int:
    """A number that tells a tensor's storage from all others that are there, on meta as well."""
    return tensor.untyped_storage()._cdata


class _Watch(TorchDispatchMode):
    def __init__(self, namespace: str, told: Callable[[str, dict[str, Any], Any], None]) -> None:
        super().__init__()
        self.namespace, self.told = namespace, told

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = operator(*args, **kwargs or {})
        if operator.namespace == self.namespace:
            names = [argument.name for argument in operator._schema.arguments]
            given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            self.told(operator._opname, given, result)
        return result


def watching(
    namespace: str, told: Callable[[str, dict[str, Any], Any], None]
) -> AbstractContextManager[Any]:
    """A block in which ``told(name, arguments, result)`` is called after a namespace's operators.

    >>> with watching("aten", lambda name, arguments, result: print(name, [*arguments])):
    ...     _ = torch.ones(2).sin()
    ones ['size', 'device', 'pin_memory']
    sin ['self']
    """
    return _Watch(namespace, told)


softmax_backward = torch.ops.aten._softmax_backward_data
log_softmax_backward = torch.ops.aten._log_softmax_backward_data
embedding_bag_backward = torch.ops.aten._embedding_bag_dense_backward
prelu_backward = torch.ops.aten._prelu_kernel_backward

# Flash attention on the CPU, Dao et al. 2022: no matrix of scores is ever in memory.
flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
ctc_loss = torch.ops.aten._ctc_loss.Tensor
ctc_loss_backward = torch.ops.aten._ctc_loss_backward.Tensor

# On CUDA alone the two are kernels.
rms_norm = torch.ops.aten._fused_rms_norm
rms_norm_backward = torch.ops.aten._fused_rms_norm_backward

adaptive_avg_pool_backward = {
    2: torch.ops.aten._adaptive_avg_pool2d_backward,
    3: torch.ops.aten._adaptive_avg_pool3d_backward,
}
"""By the number of spatial dimensions."""


def interpolate_backward(mode: str, dims: int, antialias: bool) -> Callable[..., Tensor]:
    """The backward pass of ``F.interpolate``."""
    exact = mode == "nearest-exact"
    name = f"_upsample_nearest_exact{dims}d" if exact else f"upsample_{mode}{dims}d"
    name = f"_{name}_aa" if antialias else name
    return getattr(torch.ops.aten, f"{name}_backward")
