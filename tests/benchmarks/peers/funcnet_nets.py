"""The networks of `worker.NETS` as funcnet's users write them."""

from collections.abc import Callable
from itertools import cycle

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


NETS: dict[str, Callable[[], fn.Layer]] = {
    each.__name__: each for each in (cnn, vgg, resnet, blocks, mixer, tabular)
}
