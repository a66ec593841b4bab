"""The networks of `transformers` as PyTorch's users write them, with the same ``state_dict()``."""

from collections import OrderedDict
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Positions(nn.Embedding):
    """``y = x + weight``, a learned row for each position."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight[: x.shape[1]]


class ClassToken(nn.Module):
    """A learned token before those of each sequence."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.weight.expand(len(x), 1, -1), x], 1)


def encoder(width: int, heads: int, layers: int, activation: object) -> nn.TransformerEncoder:
    block = nn.TransformerEncoderLayer(
        *(width, heads, 4 * width, 0.0, activation), batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)


class GPT(nn.Module):
    """GPT-2's architecture, whose head has the weight of the embedding."""

    def __init__(
        self,
        vocabulary: int = 512,
        width: int = 128,
        heads: int = 4,
        layers: int = 4,
        length: int = 64,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = Positions(length, width)
        self.blocks = encoder(width, heads, layers, partial(F.gelu, approximate="tanh"))

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        y = self.blocks(self.positions(self.embedding(x)), mask=mask, is_causal=True)
        return F.linear(y, self.embedding.weight)


class LanguageModel(nn.Module):
    """`GPT`, with the classes where `F.cross_entropy` has them."""

    def __init__(self, **options: int) -> None:
        super().__init__()
        self.gpt = GPT(**options)

    def forward(self, x: Tensor) -> Tensor:
        return self.gpt(x).transpose(1, 2)


class Tokens(nn.Module):
    """Patches as a sequence."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class First(nn.Module):
    """The first token of each sequence."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


def vit(patch: int = 4, width: int = 128, heads: int = 4, layers: int = 4) -> nn.Module:
    """A Transformer of the patches of an image. Dosovitskiy et al. 2021."""
    return nn.Sequential(
        OrderedDict(
            patches=nn.Conv2d(3, width, patch, stride=patch),
            tokens=Tokens(),
            first=ClassToken(width),
            positions=Positions(1 + (32 // 4) ** 2, width),
            blocks=encoder(width, heads, layers, "gelu"),
            select=First(),
            head=nn.Linear(width, 10),
        )
    )


class Translator(nn.Module):
    """The Transformer of Vaswani et al. 2017, with learned positions."""

    def __init__(
        self,
        vocabulary: int = 512,
        width: int = 64,
        heads: int = 4,
        layers: int = 3,
        length: int = 32,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = Positions(length, width)
        options = {"dropout": 0.0, "batch_first": True}
        self.transformer = nn.Transformer(width, heads, layers, layers, 4 * width, **options)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        src, tgt = [self.positions(self.embedding(x[name])) for name in ("src", "tgt")]
        y = self.transformer(
            src,
            tgt,
            tgt_mask=torch.ones(tgt.shape[1], tgt.shape[1], dtype=torch.bool).triu(1),
            src_key_padding_mask=x["padding"],
            memory_key_padding_mask=x["padding"],
            tgt_is_causal=True,
        )
        return self.head(y).transpose(1, 2)
