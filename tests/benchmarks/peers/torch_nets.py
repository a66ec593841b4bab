"""The networks of `worker.NETS` as PyTorch's users write them."""

from collections.abc import Callable
from itertools import cycle, pairwise

from torch import Tensor, nn


class Residual(nn.Sequential):
    """``x + f(x)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Permute(nn.Module):
    """Patches and channels change places."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 1)


def cnn() -> nn.Module:
    """Two convolutions with batch norm and pooling, dropout, two linear layers."""
    layers: list[nn.Module] = []
    for before, channels in pairwise((1, 32, 64)):
        layers += [nn.Conv2d(before, channels, 3, padding=1), nn.BatchNorm2d(channels)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    head = [nn.Linear(64 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.5), *head)


def vgg() -> nn.Module:
    """Six convolutions, with pooling after every other."""
    layers: list[nn.Module] = []
    sizes = pairwise((3, 32, 32, 64, 64, 128, 128))
    for (before, channels), pools in zip(sizes, cycle((False, True))):
        layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pools else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, 10))


def resnet() -> nn.Module:
    """Three stages of residual blocks with batch norm; a convolution of stride 2 between."""

    def block(channels: int) -> nn.Module:
        first, second = [nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2)]
        norms = [nn.BatchNorm2d(channels) for _ in range(2)]
        return nn.Sequential(Residual(first, norms[0], nn.ReLU(), second, norms[1]), nn.ReLU())

    layers: list[nn.Module] = []
    for (before, channels), stride in zip(pairwise((3, 16, 32, 64)), (1, 2, 2), strict=True):
        layers += [nn.Conv2d(before, channels, 3, stride, padding=1), nn.ReLU(), block(channels)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 8 * 8, 10))


def blocks() -> nn.Module:
    """An embedding, six residual MLP blocks, and a linear layer to the vocabulary."""

    def block() -> nn.Module:
        return Residual(nn.LayerNorm(256), nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))

    head = [nn.LayerNorm(256), nn.Linear(256, 4096), nn.Flatten(0, 1)]
    return nn.Sequential(nn.Embedding(4096, 256), *[block() for _ in range(6)], *head)


def mixer() -> nn.Module:
    """Four blocks that mix patches, then channels."""

    def block() -> list[nn.Module]:
        patches = [Permute(), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), Permute()]
        channels = [nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128)]
        return [Residual(nn.LayerNorm(128), *patches), Residual(nn.LayerNorm(128), *channels)]

    mixed = [layer for _ in range(4) for layer in block()]
    head = [nn.LayerNorm(128), nn.Flatten(), nn.Linear(64 * 128, 10)]
    return nn.Sequential(nn.Linear(48, 128), *mixed, *head)


def tabular() -> nn.Module:
    """Four linear layers of 512 with layer norm, SiLU and dropout."""
    layers: list[nn.Module] = []
    for sizes in pairwise((64, 512, 512, 512, 512)):
        layers += [nn.Linear(*sizes), nn.LayerNorm(512), nn.SiLU(), nn.Dropout(0.1)]
    return nn.Sequential(*layers, nn.Linear(512, 10))


NETS: dict[str, Callable[[], nn.Module]] = {
    each.__name__: each for each in (cnn, vgg, resnet, blocks, mixer, tabular)
}
