"""The networks of `worker.NETS` as PyTorch's users write them."""

from collections import OrderedDict
from collections.abc import Callable
from itertools import cycle, pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut, which projects where the shape changes."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential()
        if stride != 1 or before != channels:
            projection = nn.Conv2d(before, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.downsample(x))


def resnet18(width: int = 64) -> nn.Module:
    """ResNet-18 with the stem for small images; modules have torchvision's names."""
    layers: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(3, width, 3, padding=1, bias=False),
        "bn1": nn.BatchNorm2d(width),
        "relu": nn.ReLU(inplace=True),
    }
    before = width
    for stage in range(4):
        channels, stride = width * 2**stage, 1 if stage == 0 else 2
        blocks = BasicBlock(before, channels, stride), BasicBlock(channels, channels, 1)
        layers[f"layer{stage + 1}"], before = nn.Sequential(*blocks), channels
    layers |= {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    return nn.Sequential(OrderedDict(layers | {"fc": nn.Linear(before, 10)}))


def double_conv(before: int, channels: int) -> nn.Module:
    """Twice a convolution with batch norm and ReLU."""
    layers: list[nn.Module] = []
    for inputs in (before, channels):
        layers += [nn.Conv2d(inputs, channels, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class Level(nn.Module):
    """A level of a U-Net: what is below it sees the image at half the size."""

    def __init__(self, before: int, channels: int, below: nn.Module) -> None:
        super().__init__()
        up = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2)
        inner = nn.Sequential(OrderedDict(pool=nn.MaxPool2d(2), level=below, up=up))
        self.encode = double_conv(before, channels)
        self.skip = nn.ModuleList([nn.Identity(), inner])
        self.decode = double_conv(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encode(x)
        return self.decode(torch.cat([way(x) for way in self.skip], 1))


def unet(width: int = 32) -> nn.Module:
    """A U-Net of three levels, with a class for each pixel."""
    net = double_conv(2 * width, 4 * width)
    for before, channels in ((width, 2 * width), (3, width)):
        net = Level(before, channels, net)
    return nn.Sequential(OrderedDict(body=net, head=nn.Conv2d(width, 10, 1)))


def digits() -> nn.Module:
    """Two convolutions with a pooling between, for images of 8 x 8."""
    first = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(16 * 4 * 4, 10))


class Attention(nn.Module):
    """Causal attention in 8 heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = [
            each.unflatten(-1, (8, -1)).transpose(1, 2) for each in self.project(x).chunk(3, -1)
        ]
        y = F.scaled_dot_product_attention(*heads, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(-2))


class Positions(nn.Embedding):
    """Learned positions, added."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight[: x.shape[-2]]


def gpt(layers: int = 4) -> nn.Module:
    """A GPT of 4 layers, 256 wide, with 8 heads."""

    def block() -> list[nn.Module]:
        net = nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)
        return [Residual(nn.LayerNorm(256), Attention(256)), Residual(nn.LayerNorm(256), *net)]

    blocks = [layer for _ in range(layers) for layer in block()]
    head = [nn.LayerNorm(256), nn.Linear(256, 4096), nn.Flatten(0, 1)]
    return nn.Sequential(nn.Embedding(4096, 256), Positions(128, 256), *blocks, *head)


def gpt_loop() -> nn.Module:
    """`gpt`; funcnet's is a loop over its layers."""
    return gpt()


def gpt24() -> nn.Module:
    """`gpt` of 24 layers."""
    return gpt(24)


class LSTM(nn.LSTM):
    """An LSTM that gives the output of its last step."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0][:, -1]


def lstm() -> nn.Module:
    """Two layers of an LSTM of 256 features, and a class for the sequence from the last step."""
    return nn.Sequential(LSTM(256, 256, 2, batch_first=True), nn.Linear(256, 10))


NETS: dict[str, Callable[[], nn.Module]] = {
    each.__name__: each
    for each in (
        *(cnn, vgg, resnet, blocks, mixer, tabular),
        *(resnet18, unet, digits, gpt, gpt_loop, gpt24, lstm),
    )
}
