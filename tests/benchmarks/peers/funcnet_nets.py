"""The networks of `worker.NETS` as funcnet's users write them."""

from collections.abc import Callable
from itertools import cycle
from typing import Any

from torch import Tensor

import funcnet as fn


def cnn() -> fn.Layer:
    """Two convolutions with batch norm and pooling, dropout, two linear layers."""
    layers = []
    for channels in (32, 64):
        layers += [fn.conv2d(channels, 3, padding=1), fn.batch_norm(), fn.relu(), fn.max_pool2d(2)]
    return fn.serial(
        *layers, fn.flatten(), fn.dropout(0.5), fn.linear(128), fn.relu(), fn.linear(10)
    )


def vgg() -> fn.Layer:
    """Six convolutions, with pooling after every other."""
    layers = []
    for channels, pools in zip((32, 32, 64, 64, 128, 128), cycle((False, True))):
        layers += [fn.conv2d(channels, 3, padding=1), fn.relu()]
        layers += [fn.max_pool2d(2)] if pools else []
    return fn.serial(*layers, fn.flatten(), fn.linear(10))


def resnet() -> fn.Layer:
    """Three stages of residual blocks with batch norm; a convolution of stride 2 between."""

    def block(channels: int) -> fn.Layer:
        first, second = [fn.conv2d(channels, 3, padding=1, bias=False) for _ in range(2)]
        body = fn.serial(first, fn.batch_norm(), fn.relu(), second, fn.batch_norm())
        return fn.serial(fn.residual(body), fn.relu())

    layers = []
    for channels, stride in ((16, 1), (32, 2), (64, 2)):
        layers += [fn.conv2d(channels, 3, stride, padding=1), fn.relu(), block(channels)]
    return fn.serial(*layers, fn.flatten(), fn.linear(10))


def blocks() -> fn.Layer:
    """An embedding, six residual MLP blocks, and a linear layer to the vocabulary."""

    def block() -> fn.Layer:
        return fn.residual(fn.serial(fn.layer_norm(), fn.linear(1024), fn.gelu(), fn.linear(256)))

    return fn.serial(
        fn.embedding(4096, 256),
        *[block() for _ in range(6)],
        *[fn.layer_norm(), fn.linear(4096), fn.reshape(-1, 4096)],
    )


def mixer() -> fn.Layer:
    """Four blocks that mix patches, then channels."""

    def block() -> list[fn.Layer]:
        patches = [fn.permute(0, 2, 1), fn.linear(128), fn.gelu(), fn.linear(64)]
        channels = [fn.linear(512), fn.gelu(), fn.linear(128)]
        return [
            fn.residual(fn.serial(fn.layer_norm(), *patches, fn.permute(0, 2, 1))),
            fn.residual(fn.serial(fn.layer_norm(), *channels)),
        ]

    mixed = [layer for _ in range(4) for layer in block()]
    return fn.serial(fn.linear(128), *mixed, fn.layer_norm(), fn.flatten(), fn.linear(10))


def tabular() -> fn.Layer:
    """Four linear layers of 512 with layer norm, SiLU and dropout."""
    layer = [fn.linear(512), fn.layer_norm(), fn.silu(), fn.dropout(0.1)]
    return fn.serial(*layer * 4, fn.linear(10))


BODY = ("conv1", "bn1", "relu1", "conv2", "bn2")


def block_forward(run: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The body beside the shortcut, then ReLU."""
    y = x
    for child in BODY:
        y = run(child, y)
    return run("relu2", y + run("downsample", x)), {}


def block_backward(pull: Any, dy: Tensor, residuals: Any) -> Tensor | None:
    """Through ReLU, then through both."""
    dy = dx = pull("relu2", dy)
    for child in reversed(BODY):
        dx = pull(child, dx, needed=pull.x or child != "conv1")
    return fn.sum_cotangents(dx, pull("downsample", dy, needed=pull.x))


def basic_block(channels: int, stride: int, projects: bool) -> fn.Layer:
    """Two convolutions beside a shortcut, which projects where the shape changes."""
    projection = fn.conv2d(channels, 1, stride, bias=False), fn.batch_norm()
    children = {
        "conv1": fn.conv2d(channels, 3, stride, padding=1, bias=False),
        "bn1": fn.batch_norm(),
        "relu1": fn.relu(),
        "conv2": fn.conv2d(channels, 3, padding=1, bias=False),
        "bn2": fn.batch_norm(),
        "downsample": fn.serial(*projection) if projects else fn.identity(),
        "relu2": fn.relu(),
    }
    return fn.combine("basic_block", children, block_forward, block_backward)


def resnet18(width: int = 64) -> fn.Layer:
    """ResNet-18 with the stem for small images; the names are torchvision's."""
    stem = {"conv1": fn.conv2d(width, 3, padding=1, bias=False), "bn1": fn.batch_norm()}
    stages = {}
    for stage in range(4):
        channels, stride = width * 2**stage, 1 if stage == 0 else 2
        blocks = basic_block(channels, stride, stage > 0), basic_block(channels, 1, False)
        stages[f"layer{stage + 1}"] = fn.serial(*blocks)
    head = {"avgpool": fn.adaptive_avg_pool2d(1), "flatten": fn.flatten(), "fc": fn.linear(10)}
    return fn.serial(**stem, relu=fn.relu(), **stages, **head)


def double_conv(channels: int) -> fn.Layer:
    """Twice a convolution with batch norm and ReLU."""
    layer = [fn.conv2d(channels, 3, padding=1, bias=False), fn.batch_norm(), fn.relu()]
    return fn.serial(*layer * 2)


def level(channels: int, below: fn.Layer) -> fn.Layer:
    """A level of a U-Net: what is below it sees the image at half the size."""
    up = fn.conv_transpose2d(channels, 2, stride=2)
    inner = fn.serial(pool=fn.max_pool2d(2), level=below, up=up)
    skip = fn.branch(fn.identity(), inner)
    convolve = double_conv(channels)
    return fn.serial(encode=convolve, skip=skip, concat=fn.concat(1), decode=convolve)


def unet(width: int = 32) -> fn.Layer:
    """A U-Net of three levels, with a class for each pixel."""
    body = level(width, level(2 * width, double_conv(4 * width)))
    return fn.serial(body=body, head=fn.conv2d(10, 1))


def digits() -> fn.Layer:
    """Two convolutions with a pooling between, for images of 8 x 8."""
    first = [fn.conv2d(8, 3, padding=1), fn.relu(), fn.max_pool2d(2)]
    second = [fn.conv2d(16, 3, padding=1), fn.relu()]
    return fn.serial(*first, *second, fn.flatten(), fn.linear(10))


def gpt(layers: int = 4, stack: Callable[[fn.Layer, int], fn.Layer] | None = None) -> fn.Layer:
    """A GPT of 4 layers, 256 wide, with 8 heads."""
    block = gpt_block()
    blocks = stack(block, layers) if stack else fn.serial(*[block] * layers)
    tokens = {"embed": fn.embedding(4096, 256), "positions": fn.learned_positions(128)}
    head = {"norm": fn.layer_norm(), "head": fn.linear(4096), "rows": fn.flatten(0, 1)}
    return fn.serial(**tokens, blocks=blocks, **head)


def gpt_block(cache: int | None = None) -> fn.Layer:
    """A layer of `gpt`."""
    return fn.transformer_encoder_layer(
        8, 1024, 0.0, "gelu", batch_first=True, norm_first=True, is_causal=True, cache=cache
    )


def decoder(tokens: int) -> fn.Layer:
    """`gpt` with a cache of so many tokens."""
    blocks = fn.serial(*[gpt_block(tokens)] * 4)
    embed = fn.embedding(4096, 256), fn.learned_positions(tokens, cache=True)
    head = fn.layer_norm(), fn.linear(4096), fn.flatten(0, 1)
    return fn.serial(*embed, blocks, *head)


def gpt_loop() -> fn.Layer:
    """`gpt`, as a loop over its layers."""
    return gpt(stack=fn.repeat)


def gpt24() -> fn.Layer:
    """`gpt` of 24 layers, as a loop."""
    return gpt(24, fn.repeat)


def lstm() -> fn.Layer:
    """Two layers of an LSTM of 256 features, and a class for the sequence from the last step."""
    recurrent = fn.lstm(256, 2, batch_first=True)
    return fn.serial(recurrent, fn.item(0), fn.select(-1), fn.linear(10))


NETS: dict[str, Callable[[], fn.Layer]] = {
    each.__name__: each
    for each in (
        cnn,
        vgg,
        resnet,
        blocks,
        mixer,
        tabular,
        resnet18,
        unet,
        digits,
        gpt,
        gpt_loop,
        gpt24,
        lstm,
    )
}
