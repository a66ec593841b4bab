"""What the layers over one, two and three spatial dimensions share: names, options, windows.

Such a layer is written once, as a function whose first argument is the number of dimensions, with
the docstring of its constructor for two. `spatial` makes the constructors of it.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, NamedTuple, ParamSpec

import torch
from torch import Tensor

from funcnet.core import EMPTY, Layer, Tree
from funcnet.errors import require
from funcnet.lift import require_floating
from funcnet.params import Param

P = ParamSpec("P")

Size = int | Sequence[int]
"""An option of each spatial dimension: one number for all, or one for each."""

NAMES = {1: "length", 2: "height, width", 3: "depth, height, width"}
"""The spatial dimensions, by their number."""


def spatial(make: Callable[Concatenate[int, P], Layer], dims: int) -> Callable[P, Layer]:
    """The constructor ``conv2d`` for 2 dimensions, made of a function ``_conv(dims, ...)``.

    Its docstring is the function's, with the number of dimensions in the place of 2; the example
    stays that of two.

    >>> def _crop(dims, margin):
    ...     '''``crop2d(1)`` leaves out the edges.'''
    ...     return fn.serial()
    >>> crop3d = spatial(_crop, 3)
    >>> crop3d.__name__, crop3d.__doc__
    ('crop3d', '``crop3d(1)`` leaves out the edges.')
    >>> crop3d()
    Traceback (most recent call last):
    ...
    TypeError: crop3d: missing a required argument: 'margin'
    """
    name = f"{make.__name__.lstrip('_')}{dims}d"
    signature = inspect.signature(make)
    signature = signature.replace(parameters=list(signature.parameters.values())[1:])

    def constructor(*args: P.args, **options: P.kwargs) -> Layer:
        try:
            signature.bind(*args, **options)
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from None
        return make(dims, *args, **options)

    constructor.__name__ = constructor.__qualname__ = name
    constructor.__code__ = constructor.__code__.replace(co_name=name, co_qualname=name)
    constructor.__module__ = make.__module__
    text, prompt, example = (make.__doc__ or "").partition(">>>")
    text = text.replace("2d", f"{dims}d").replace(NAMES[2], NAMES[dims])
    constructor.__doc__ = text + prompt + example
    constructor.__annotations__ = {**make.__annotations__}
    constructor.__signature__ = signature  # type: ignore[attr-defined]
    return constructor


def sizes(name: str, value: Size, dims: int, least: int) -> tuple[int, ...]:
    """An option of each spatial dimension, from one int or one for each.

    >>> sizes("conv2d: stride", 2, 2, least=1)
    (2, 2)
    """
    each = (value,) * dims if isinstance(value, int) else tuple(value)
    fits = len(each) == dims and min(each) >= least
    words = {1: "an int", 2: "one or two ints", 3: "one or three ints"}[dims]
    require(fits, f"{name} must be {words} >= {least}, got {value}")
    return each


def window_of(
    name: str, dims: int, kernel: Size, stride: Size | None, padding: Size = 0, dilation: Size = 1
) -> "Window":
    """The window of a layer, from its options; its stride is its size by default."""
    each = sizes(f"{name}: kernel_size", kernel, dims, 1)
    return Window(
        each,
        sizes(f"{name}: dilation", dilation, dims, 1),
        sizes(f"{name}: padding", padding, dims, 0),
        each if stride is None else sizes(f"{name}: stride", stride, dims, 1),
    )


def output_sizes(
    name: str, value: Size | Sequence[int | None] | None, dims: int
) -> tuple[int | None, ...]:
    """The output size of an adaptive layer, from one int or one for each; None stands for x's.

    >>> output_sizes("adaptive_avg_pool2d: output_size", (None, 7), 2)
    (None, 7)
    """
    each = (value,) * dims if value is None or isinstance(value, int) else tuple(value)
    sizes(name, [0 if size is None else size for size in each], dims, 0)
    return each


def filled(wanted: Sequence[int | None], size: Sequence[int]) -> list[int]:
    """An output size with that of x where it is None."""
    return [n if each is None else each for each, n in zip(wanted, size, strict=True)]


def require_spatial(dims: int) -> Callable[[Tree], Mapping[str, Param]]:
    """The declaration of a layer without parameters, of one example or a batch of them."""

    def declaration(x: Tree) -> Mapping[str, Param]:
        require_floating(x)
        shape = tuple(x.shape)
        fits = len(shape) in (dims + 1, dims + 2)
        require(fits, f"expects (batch, channels, {NAMES[dims]}), got {shape}")
        return EMPTY

    return declaration


def like_x(dy: Tensor, size: Sequence[int]) -> Tensor:
    """A tensor of the shape of x, for kernels that read nothing else of it."""
    return dy.new_empty(()).expand(*dy.shape[: -len(size)], *size)


def values_of(dy: Any) -> Tensor:
    """The cotangent of y, where the layer returns ``(y, indices)`` too."""
    return dy[0] if isinstance(dy, tuple) else dy


def of_images(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A kernel ``(dy, size, ...)`` of images that takes sequences too: as images of height one.

    Options that are a `Window` become one over images, residuals get a height; dy may be empty,
    and beside None for indices.
    """

    def run(dy: Any, size: tuple[int, ...], *options: Any, **residuals: Tensor) -> Tensor:
        dy = values_of(dy)
        if dy.numel() == 0:  # which kernels refuse
            return dy.new_zeros(like_x(dy, size).shape)
        if len(size) > 1:
            return kernel(dy, size, *options, **residuals)
        options = tuple([o.over_images() if isinstance(o, Window) else o for o in options])
        residuals = {name: each.unsqueeze(-2) for name, each in residuals.items()}
        return kernel(dy.unsqueeze(-2), (1, *size), *options, **residuals).squeeze(-2)

    return run


def apply_each(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """A linear map that is separable: each matrix applied along its own of the last dimensions.

    Half precision is computed in float32.

    >>> apply_each(torch.ones(2, 3), [torch.ones(1, 2), torch.eye(3)])
    tensor([[2., 2., 2.]])
    """
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    for dim, matrix in enumerate(matrices, -len(matrices)):
        y = (y.transpose(dim, -1) @ matrix.mT.to(y.dtype)).transpose(dim, -1)
    return y.to(x.dtype)


class Window(NamedTuple):
    """A window that slides over the spatial dimensions of x, which are padded with zeros.

    Args:
        kernel: the points of the window in each dimension.
        dilation: the step between its points.
        padding: on both sides of x.
        stride: the step from one window to the next.
    """

    kernel: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    stride: tuple[int, ...]

    def over_images(self) -> "Window":
        """The window of a sequence as one of an image of height one."""
        return Window((1, *self.kernel), (1, *self.dilation), (0, *self.padding), (1, *self.stride))

    def padded(self, size: Sequence[int]) -> list[int]:
        """The size of x with its padding."""
        return [each + 2 * added for each, added in zip(size, self.padding, strict=True)]

    def windows(self, size: Sequence[int]) -> tuple[int, ...]:
        """The number of windows in each dimension of an x of a size."""
        options = zip(self.padded(size), self.kernel, self.dilation, self.stride, strict=True)
        return tuple([(n - d * (k - 1) - 1) // s + 1 for n, k, d, s in options])

    def where(self, size: Sequence[int], count: Sequence[int], device: Any) -> Tensor:
        """Where the points of windows lie in the padded x with its dimensions as one.

        Returns:
            (points of the window, windows).

        >>> Window((3,), (1,), (0,), (2,)).where([5], [2], None)
        tensor([[0, 2],
                [1, 3],
                [2, 4]])
        """
        padded, dims = self.padded(size), len(size)
        where = torch.zeros([1] * (2 * dims), dtype=torch.int64, device=device)
        for dim in range(dims):
            points = torch.arange(self.kernel[dim], device=device) * self.dilation[dim]
            starts = torch.arange(count[dim], device=device) * self.stride[dim]
            shape = [1] * (2 * dims)
            shape[dim], shape[dims + dim] = self.kernel[dim], count[dim]
            offset = math.prod(padded[dim + 1 :])
            where = where + (points.unsqueeze(1) + starts).reshape(shape) * offset
        return where.reshape(math.prod(self.kernel), math.prod(count))

    def take(self, x: Tensor, count: Sequence[int]) -> Tensor:
        """The windows of x with its padding: (*, points of the window, windows)."""
        size = x.shape[-len(count) :]
        padded = torch.constant_pad_nd(x, self._around())
        where = self.where(size, count, x.device)
        taken = padded.flatten(-len(size)).index_select(-1, where.flatten())
        return taken.unflatten(-1, where.shape)

    def add(self, values: Tensor, size: Sequence[int], count: Sequence[int]) -> Tensor:
        """The pullback of `take`: the values of windows, added up where they came from."""
        where, padded = self.where(size, count, values.device), self.padded(size)
        added = values.new_zeros((*values.shape[:-2], math.prod(padded)))
        added = added.index_add(-1, where.flatten(), values.flatten(-2))
        x = added.unflatten(-1, padded)
        return torch.constant_pad_nd(x, [-each for each in self._around()])

    def _around(self) -> list[int]:
        """The padding as of ``F.pad``."""
        return [each for added in reversed(self.padding) for each in (added, added)]
