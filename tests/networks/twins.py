"""The networks of `nets` as PyTorch's users write them, with the same ``state_dict()``."""

from collections import OrderedDict

import torch
from benchmarks.peers.torch_nets import resnet18 as resnet18, unet as unet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


def lenet() -> nn.Module:
    """Two convolutions with average pooling, then three linear layers, with sigmoid and tanh."""
    features = [nn.Conv2d(1, 6, 5, padding=2), nn.Sigmoid(), nn.AvgPool2d(2)]
    features += [nn.Conv2d(6, 16, 5), nn.Sigmoid(), nn.AvgPool2d(2)]
    classifier = [nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10)]
    return nn.Sequential(
        OrderedDict(
            features=nn.Sequential(*features),
            flatten=nn.Flatten(),
            classifier=nn.Sequential(*classifier),
        )
    )


def mobilenet(width: int = 32) -> nn.Module:
    """Depthwise separable convolutions: one kernel a channel, then a mixture of the channels."""

    def conv_norm(before: int, channels: int, *geometry: int, groups: int = 1) -> list[nn.Module]:
        convolution = nn.Conv2d(before, channels, *geometry, groups=groups, bias=False)
        return [convolution, nn.BatchNorm2d(channels), nn.ReLU6(inplace=True)]

    def separable(before: int, channels: int, stride: int) -> nn.Module:
        depthwise = conv_norm(before, before, 3, stride, 1, groups=before)
        return nn.Sequential(*depthwise, *conv_norm(before, channels, 1))

    features = [nn.Sequential(*conv_norm(3, width, 3, 2, 1))]
    before = width
    for channels, stride in ((2 * width, 1), (4 * width, 2), (4 * width, 1)):
        features.append(separable(before, channels, stride))
        before = channels
    return nn.Sequential(
        OrderedDict(
            features=nn.Sequential(*features),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Linear(before, 10),
        )
    )


class Tagger(nn.Module):
    """A bidirectional LSTM of two layers over packed sentences, with a class for each word."""

    def __init__(self, words: int = 1000, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.ModuleDict({"input": nn.Embedding(words, width)})
        self.recurrent = nn.LSTM(width, width, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        words, lengths = self.embed["input"](x["input"]), x["lengths"].cpu()
        packed = pack_padded_sequence(words, lengths, batch_first=True, enforce_sorted=False)
        steps = words.shape[1]
        output, _ = pad_packed_sequence(self.recurrent(packed)[0], True, total_length=steps)
        return self.head(output).transpose(1, 2)


class VAE(nn.Module):
    """A variational autoencoder, whose noise is an argument."""

    def __init__(self, pixels: int = 784, width: int = 400, latent: int = 20) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, width), nn.ReLU())
        self.code = nn.ModuleList([nn.Linear(width, latent), nn.Linear(width, latent)])
        decoder = nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, pixels)
        self.decoder = nn.Sequential(*decoder)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.encoder(x)
        mean, log_variance = [linear(hidden) for linear in self.code]
        return self.decoder(mean + noise * (0.5 * log_variance).exp()), mean, log_variance


def elbo(prediction: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
    """Binary cross-entropy of the pixels, and the divergence of the codes from N(0, 1)."""
    logits, mean, log_variance = prediction
    reconstruction = F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
    divergence = -0.5 * torch.sum(1 + log_variance - mean.pow(2) - log_variance.exp())
    return (reconstruction + divergence) / len(target)
