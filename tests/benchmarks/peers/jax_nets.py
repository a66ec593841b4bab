"""The networks of `worker.NETS` as JAX's users write them: plain functions, images channels last.

A network is a list of layers ``(init, apply)``: ``init(key, shape) -> (params, shape)``, where the
shape is that of an example, and ``apply(params, x, key) -> y``. Running statistics of batch norm
are left out, which saves JAX some work.
"""

from collections.abc import Callable
from itertools import cycle
from math import prod
from typing import Any

import jax
from jax import lax, nn, numpy as jnp

Shape = tuple[int, ...]
Layer = tuple[Callable[..., Any], Callable[..., jax.Array]]


def plain(function: Callable[[jax.Array], jax.Array], shape: Callable[[Shape], Shape]) -> Layer:
    """A layer without params."""
    return lambda key, before: ({}, shape(before)), lambda params, x, key: function(x)


def uniform(key: jax.Array, shape: Shape, fan_in: int) -> jax.Array:
    """PyTorch's default."""
    return jax.random.uniform(key, shape, minval=-(fan_in**-0.5), maxval=fan_in**-0.5)


def linear(features: int) -> Layer:
    """``x weight + bias``."""

    def init(key: jax.Array, shape: Shape) -> Any:
        inputs = shape[-1]
        weight = uniform(key, (inputs, features), inputs)
        return {"weight": weight, "bias": jnp.zeros(features)}, (*shape[:-1], features)

    return init, lambda params, x, key: x @ params["weight"] + params["bias"]


def convolution(channels: int, stride: int = 1, bias: bool = True, size: int = 3) -> Layer:
    """Of 3 x 3, or another odd size, padded so that the stride alone makes the image smaller."""
    around = ((size // 2, size // 2),) * 2

    def init(key: jax.Array, shape: Shape) -> Any:
        height, width, inputs = shape
        fan_in = size * size * inputs
        params = {"weight": uniform(key, (size, size, inputs, channels), fan_in)}
        if bias:
            params["bias"] = jnp.zeros(channels)
        return params, (height // stride, width // stride, channels)

    def apply(params: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        y = lax.conv_general_dilated(
            x, params["weight"], (stride, stride), around,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return y + params["bias"] if bias else y

    return init, apply


def transposed(channels: int) -> Layer:
    """The transposed convolution of 2 x 2 with stride 2."""

    def init(key: jax.Array, shape: Shape) -> Any:
        height, width, inputs = shape
        weight = uniform(key, (2, 2, inputs, channels), 4 * channels)
        params = {"weight": weight, "bias": jnp.zeros(channels)}
        return params, (2 * height, 2 * width, channels)

    def apply(params: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        names = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_transpose(x, params["weight"], (2, 2), "VALID", dimension_numbers=names)
        return y + params["bias"]

    return init, apply


def norm(axes: Shape) -> Layer:
    """By the statistics over these axes, with weight and bias."""

    def init(key: jax.Array, shape: Shape) -> Any:
        return {"weight": jnp.ones(shape[-1]), "bias": jnp.zeros(shape[-1])}, shape

    def apply(params: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
        return (x - mean) * lax.rsqrt(var + 1e-5) * params["weight"] + params["bias"]

    return init, apply


def dropout(rate: float) -> Layer:
    """Each value 0 with this probability."""

    def apply(params: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)

    return lambda key, shape: ({}, shape), apply


def embedding(rows: int, features: int) -> Layer:
    """``weight[x]``."""

    def init(key: jax.Array, shape: Shape) -> Any:
        return {"weight": jax.random.normal(key, (rows, features))}, (*shape, features)

    return init, lambda params, x, key: params["weight"][x]


def serial(*layers: Layer) -> Layer:
    """Layers one after another."""

    def init(key: jax.Array, shape: Shape) -> Any:
        params = []
        for each, (start, _) in zip(jax.random.split(key, len(layers)), layers, strict=True):
            own, shape = start(each, shape)
            params.append(own)
        return params, shape

    def apply(params: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        for index, (own, (_, call)) in enumerate(zip(params, layers, strict=True)):
            x = call(own, x, jax.random.fold_in(key, index))
        return x

    return init, apply


def residual(*layers: Layer) -> Layer:
    """``x + f(x)``."""
    init, apply = serial(*layers)
    return init, lambda params, x, key: x + apply(params, x, key)


def combined(join: Callable[..., jax.Array], join_shapes: Any, *ways: Layer) -> Layer:
    """Layers side by side, of one input each, whose outputs are joined."""

    def init(key: jax.Array, shape: Shape) -> Any:
        keys = jax.random.split(key, len(ways))
        made = [start(each, shape) for each, (start, _) in zip(keys, ways, strict=True)]
        return [params for params, _ in made], join_shapes(*[shape for _, shape in made])

    def apply(params: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        keys = [jax.random.fold_in(key, index) for index in range(len(ways))]
        calls = zip(params, ways, keys, strict=True)
        return join(*[call(own, x, each) for own, (_, call), each in calls])

    return init, apply


def pool(x: jax.Array) -> jax.Array:
    """The maximum of 2 x 2."""
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def concatenate(*ways: jax.Array) -> jax.Array:
    """The channels of all."""
    return jnp.concatenate(ways, -1)


def concatenated(*shapes: Shape) -> Shape:
    """The shape of `concatenate`."""
    return (*shapes[0][:-1], sum(shape[-1] for shape in shapes))


def same(shape: Shape) -> Shape:
    """The shape of an elementwise layer's output."""
    return shape


RELU, GELU, SILU = (
    plain(function, same)
    for function in (nn.relu, lambda x: nn.gelu(x, approximate=False), nn.silu)
)
POOL = plain(pool, lambda shape: (shape[0] // 2, shape[1] // 2, shape[2]))
AVERAGE = plain(lambda x: x.mean((1, 2)), lambda shape: shape[-1:])
FLATTEN = plain(lambda x: x.reshape(x.shape[0], -1), lambda shape: (prod(shape),))
ROWS = plain(lambda x: x.reshape(-1, x.shape[-1]), lambda shape: shape[-1:])
PERMUTE = plain(lambda x: x.transpose(0, 2, 1), lambda shape: shape[::-1])
BATCH, LAYER = (0, 1, 2), (-1,)


def cnn() -> Layer:
    """Two convolutions with batch norm and pooling, dropout, two linear layers."""
    layers = [
        each for channels in (32, 64) for each in (convolution(channels), norm(BATCH), RELU, POOL)
    ]
    return serial(*layers, FLATTEN, dropout(0.5), linear(128), RELU, linear(10))


def vgg() -> Layer:
    """Six convolutions, with pooling after every other."""
    layers: list[Layer] = []
    for channels, pools in zip((32, 32, 64, 64, 128, 128), cycle((False, True))):
        layers += [convolution(channels), RELU, *([POOL] if pools else [])]
    return serial(*layers, FLATTEN, linear(10))


def resnet() -> Layer:
    """Three stages of residual blocks with batch norm; a convolution of stride 2 between."""
    layers: list[Layer] = []
    for channels, stride in ((16, 1), (32, 2), (64, 2)):
        first, second = [convolution(channels, bias=False) for _ in range(2)]
        body = residual(first, norm(BATCH), RELU, second, norm(BATCH))
        layers += [convolution(channels, stride), RELU, body, RELU]
    return serial(*layers, FLATTEN, linear(10))


def blocks() -> Layer:
    """An embedding, six residual MLP blocks, and a linear layer to the vocabulary."""
    inner = [residual(norm(LAYER), linear(1024), GELU, linear(256)) for _ in range(6)]
    return serial(embedding(4096, 256), *inner, norm(LAYER), linear(4096), ROWS)


def mixer() -> Layer:
    """Four blocks that mix patches, then channels."""
    mixed: list[Layer] = []
    for _ in range(4):
        mixed.append(residual(norm(LAYER), PERMUTE, linear(128), GELU, linear(64), PERMUTE))
        mixed.append(residual(norm(LAYER), linear(512), GELU, linear(128)))
    return serial(linear(128), *mixed, norm(LAYER), FLATTEN, linear(10))


def tabular() -> Layer:
    """Four linear layers of 512 with layer norm, SiLU and dropout."""
    return serial(*[linear(512), norm(LAYER), SILU, dropout(0.1)] * 4, linear(10))


def resnet18() -> Layer:
    """ResNet-18 with the stem for small images."""

    def block(channels: int, stride: int, projects: bool) -> list[Layer]:
        first, second = convolution(channels, stride, False), convolution(channels, bias=False)
        body = serial(first, norm(BATCH), RELU, second, norm(BATCH))
        projection = [convolution(channels, stride, False, 1), norm(BATCH)] if projects else []
        return [combined(jnp.add, lambda shape, _: shape, body, serial(*projection)), RELU]

    layers = [convolution(64, bias=False), norm(BATCH), RELU]
    for stage, channels in enumerate((64, 128, 256, 512)):
        layers += block(channels, 1 if stage == 0 else 2, stage > 0) + block(channels, 1, False)
    return serial(*layers, AVERAGE, linear(10))


def unet() -> Layer:
    """A U-Net of three levels, with a class for each pixel."""

    def double(channels: int) -> Layer:
        return serial(*[convolution(channels, bias=False), norm(BATCH), RELU] * 2)

    def level(channels: int, below: Layer) -> Layer:
        inner = serial(POOL, below, transposed(channels))
        skip = combined(concatenate, concatenated, serial(), inner)
        return serial(double(channels), skip, double(channels))

    return serial(level(32, level(64, double(128))), convolution(10, size=1))


def digits() -> Layer:
    """Two convolutions with a pooling between, for images of 8 x 8."""
    layers = [convolution(8), RELU, POOL, convolution(16), RELU]
    return serial(*layers, FLATTEN, linear(10))


def attend(x: jax.Array) -> jax.Array:
    """Causal attention in 8 heads, of queries, keys and values side by side."""
    heads = [each.reshape(*each.shape[:-1], 8, -1) for each in jnp.split(x, 3, -1)]
    return nn.dot_product_attention(*heads, is_causal=True).reshape(*x.shape[:-1], -1)


def positions() -> Layer:
    """Learned positions, added."""

    def init(key: jax.Array, shape: Shape) -> Any:
        return {"weight": 0.02 * jax.random.normal(key, shape)}, shape

    return init, lambda params, x, key: x + params["weight"]


def gpt(layers: int = 4) -> Layer:
    """A GPT of 4 layers, 256 wide, with 8 heads."""
    attention = plain(attend, lambda shape: (*shape[:-1], shape[-1] // 3))
    inner: list[Layer] = []
    for _ in range(layers):
        inner.append(residual(norm(LAYER), linear(768), attention, linear(256)))
        inner.append(residual(norm(LAYER), linear(1024), GELU, linear(256)))
    return serial(embedding(4096, 256), positions(), *inner, norm(LAYER), linear(4096), ROWS)


def gpt_loop() -> Layer:
    """`gpt`; funcnet's is a loop over its layers."""
    return gpt()


def gpt24() -> Layer:
    """`gpt` of 24 layers."""
    return gpt(24)


def recurrence(features: int) -> Layer:
    """An LSTM over the steps, which are the first dimension of an example, with one bias.

    The product with x is one for all steps.
    """

    def init(key: jax.Array, shape: Shape) -> Any:
        keys = jax.random.split(key)
        params = {
            "weight_ih": uniform(keys[0], (shape[-1], 4 * features), features),
            "weight_hh": uniform(keys[1], (features, 4 * features), features),
            "bias": jnp.zeros(4 * features),
        }
        return params, (*shape[:-1], features)

    def apply(params: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        def step(carry: Any, given: jax.Array) -> Any:
            h, c = carry
            i, f, g, o = jnp.split(given + h @ params["weight_hh"], 4, -1)
            c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
            h = nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        given = x.swapaxes(0, 1) @ params["weight_ih"] + params["bias"]
        zeros = jnp.zeros((len(x), features))
        return lax.scan(step, (zeros, zeros), given)[1].swapaxes(0, 1)

    return init, apply


def lstm() -> Layer:
    """Two layers of an LSTM of 256 features, and a class for the sequence from the last step."""
    last = plain(lambda x: x[:, -1], lambda shape: shape[1:])
    return serial(recurrence(256), recurrence(256), last, linear(10))


NETS: dict[str, Callable[[], Layer]] = {
    each.__name__: each
    for each in (
        *(cnn, vgg, resnet, blocks, mixer, tabular),
        *(resnet18, unet, digits, gpt, gpt_loop, gpt24, lstm),
    )
}
