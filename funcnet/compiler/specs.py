"""What is known of a tensor before a program runs."""

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter


class Spec(NamedTuple):
    """The shape, dtype and device of a tensor.

    >>> str(Spec((4, 2), torch.float32, torch.device("cpu")))
    'float32[4, 2]'
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        """How many bytes its values take."""
        return prod(self.shape) * self.dtype.itemsize

    def empty(self) -> Tensor:
        """A contiguous tensor like that, with any values."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)

    def __str__(self) -> str:
        where = "" if self.device.type == "cpu" else f" on {self.device}"
        return f"{str(self.dtype).removeprefix('torch.')}{[*self.shape]}{where}"


def spec_of(tensor: Tensor) -> Spec:
    """The shape, dtype and device of a tensor."""
    return Spec(tuple(tensor.shape), tensor.dtype, tensor.device)


class InputSpec(NamedTuple):
    """The properties of an argument or a captured tensor that a program is made for.

    Its strides are not among them: what is not contiguous is copied before the call.
    """

    is_parameter: bool
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    def example(self) -> Tensor:
        """A tensor like that, without values."""
        example = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        if self.is_parameter:
            return Parameter(example, requires_grad=self.requires_grad)
        return example.requires_grad_() if self.requires_grad else example


def input_spec(tensor: Tensor) -> InputSpec:
    """What a program is made for, of this tensor."""
    return InputSpec(
        isinstance(tensor, Parameter),
        tuple(tensor.shape),
        tensor.dtype,
        tensor.device,
        tensor.requires_grad,
    )
