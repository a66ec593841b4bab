"""Networks as funcnet's users write them; beside them, `twins` has the same ones in torch.nn.

The ResNet and the U-Net are those of the benchmarks.
"""

from typing import Any

import torch
from benchmarks.peers.funcnet_nets import (
    basic_block as basic_block,
    level as level,
    resnet18 as resnet18,
    unet as unet,
)
from torch import Tensor

import funcnet as fn


def lenet() -> fn.Layer:
    """Two convolutions with average pooling, then three linear layers, with sigmoid and tanh."""
    features = [fn.conv2d(6, 5, padding=2), fn.sigmoid(), fn.avg_pool2d(2)]
    features += [fn.conv2d(16, 5), fn.sigmoid(), fn.avg_pool2d(2)]
    classifier = fn.linear(120), fn.tanh(), fn.linear(84), fn.tanh(), fn.linear(10)
    return fn.serial(
        features=fn.serial(*features), flatten=fn.flatten(), classifier=fn.serial(*classifier)
    )


def mobilenet(width: int = 32) -> fn.Layer:
    """Depthwise separable convolutions: one kernel a channel, then a mixture of the channels."""

    def conv_norm(channels: int, *geometry: int, groups: int = 1) -> list[fn.Layer]:
        convolution = fn.conv2d(channels, *geometry, groups=groups, bias=False)
        return [convolution, fn.batch_norm(), fn.relu6()]

    def separable(before: int, channels: int, stride: int) -> fn.Layer:
        depthwise = conv_norm(before, 3, stride, 1, groups=before)
        return fn.serial(*depthwise, *conv_norm(channels, 1))

    features = [fn.serial(*conv_norm(width, 3, 2, 1))]
    before = width
    for channels, stride in ((2 * width, 1), (4 * width, 2), (4 * width, 1)):
        features.append(separable(before, channels, stride))
        before = channels
    return fn.serial(
        features=fn.serial(*features),
        pool=fn.adaptive_avg_pool2d(1),
        flatten=fn.flatten(),
        classifier=fn.linear(10),
    )


def tagger(words: int = 1000, width: int = 64) -> fn.Layer:
    """A class for each word of sentences of several lengths: a bidirectional LSTM of two layers.

    Its input is a dict with the words, ``input``, and ``lengths``.
    """
    return fn.serial(
        embed=fn.parallel(input=fn.embedding(words, width), lengths=fn.identity()),
        recurrent=fn.lstm(width, 2, batch_first=True, bidirectional=True),
        output=fn.item(0),
        head=fn.linear(10),
        classes=fn.permute(0, 2, 1),
    )


def sample_rule(residuals: Any, dy: Tensor, *, params: bool, x: bool) -> Any:
    """``dmean = dy``, ``dlog_variance = dy noise exp(log_variance / 2) / 2``."""
    dx = (dy, dy * residuals["half_offset"]) if x else None
    return {} if params else None, dx


def sample() -> fn.Layer:
    """``mean + noise exp(log_variance / 2)``, normal noise when it trains, else the mean.

    Source: the reparameterization of Kingma and Welling 2014.
    """

    def forward(params: Any, x: Any, state: Any, key: Any, train: bool) -> Any:
        mean, log_variance = x
        noise = torch.zeros_like(mean)
        if train:
            noise = fn.random.normal(key, mean.shape, mean.dtype, device=mean.device)
        offset = noise * (log_variance / 2).exp()
        return mean + offset, fn.Pullback(sample_rule, {"half_offset": offset / 2}), state

    return fn.stateful(lambda key, x: ({}, {}), forward, keyed=True)


def vae_forward(run: Any, x: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """The logits of an image like x, and the code that they were drawn from."""
    code = run("code", run("encoder", x))
    return (run("decoder", run("sample", code)), *code), {}


def vae_backward(pull: Any, dy: tuple[Tensor, ...], residuals: Any) -> Tensor | None:
    """The code has cotangents of its own, and those of the sample."""
    dlogits, *dcode = dy
    dsampled = pull("sample", pull("decoder", dlogits))
    return pull("encoder", pull("code", fn.sum_cotangents(tuple(dcode), dsampled)), needed=pull.x)


def vae(pixels: int = 784, width: int = 400, latent: int = 20) -> fn.Layer:
    """A variational autoencoder: ``y = (logits, mean, log_variance)``. Kingma and Welling 2014."""
    children = {
        "encoder": fn.serial(fn.linear(width), fn.relu()),
        "code": fn.branch(fn.linear(latent), fn.linear(latent)),
        "sample": sample(),
        "decoder": fn.serial(fn.linear(width), fn.relu(), fn.linear(pixels)),
    }
    return fn.combine("vae", children, vae_forward, vae_backward)


def elbo_rule(residuals: Any, dvalue: Tensor | float) -> tuple[Tensor, ...]:
    """``dmean = mean d / n``, ``dlog_variance = (variance - 1) d / (2 n)``."""
    mean, variance = residuals["mean"], residuals["variance"]
    share = dvalue / len(mean)
    return residuals["reconstruction"](share), mean * share, (variance - 1) * (share / 2)


def elbo() -> fn.Loss:
    """Binary cross-entropy of the pixels, and the divergence of the codes from N(0, 1).

    ``sum bce(logits, x) + sum (mean^2 + variance - log_variance - 1) / 2``, over n examples.
    """

    def vjp(prediction: Any, target: Tensor) -> tuple[Tensor, fn.LossPullback]:
        logits, mean, log_variance = prediction
        variance = log_variance.exp()
        reconstruction, pullback = fn.bce_with_logits(reduction="sum").vjp(logits, target)
        divergence = (mean.square() + variance - log_variance - 1).sum() / 2
        residuals = {"reconstruction": pullback, "mean": mean, "variance": variance}
        value = (reconstruction + divergence) / len(mean)
        return value, fn.LossPullback(elbo_rule, residuals)

    return fn.Loss(lambda prediction, target: vjp(prediction, target)[0], vjp)
