"""What `char_lm` learns, Python's own documentation, and what it is compared with: counts.

The text is what the interpreter's ``help()`` shows of the language, `pydoc_data.topics`.
"""

import hashlib
import math
from collections import Counter
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from torch import Tensor

RARE, UNKNOWN = 20, "\N{REPLACEMENT CHARACTER}"
"""Characters that the training text has less often are one token, which is written like this."""

STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Those that a model that counts chooses from."""


class Data(NamedTuple):
    """Texts as numbers of characters; 0 is a rare one."""

    characters: str
    """What the numbers stand for."""
    train: Tensor
    validation: Tensor


def encode(text: str, characters: str) -> Tensor:
    number_of = {character: number for number, character in enumerate(characters)}
    return torch.tensor([number_of.get(character, 0) for character in text])


def decode(numbers: Tensor, characters: str) -> str:
    return "".join(characters[number] for number in numbers.tolist())


def distinct(texts: list[str]) -> list[str]:
    """The texts without the paragraphs that are in them before, but for their white space."""
    seen: set[str] = set()
    found = []
    for text in texts:
        kept = []
        for paragraph in text.split("\n\n"):
            words = " ".join(paragraph.split())
            if words not in seen:
                kept.append(paragraph + "\n\n")
            seen.add(words)
        found.append("".join(kept))
    return found


def load() -> tuple[Data, str]:
    """The data, and the SHA-256 of all topics."""
    texts = [topics[name] for name in sorted(topics)]
    digest = hashlib.sha256("".join(texts).encode()).hexdigest()
    texts = distinct(texts)
    first = len(texts) - math.ceil(len(texts) / 10)
    train, validation = "".join(texts[:first]), "".join(texts[first:])
    frequent = [each for each, count in sorted(Counter(train).items()) if count >= RARE]
    characters = UNKNOWN + "".join(frequent)
    return Data(characters, encode(train, characters), encode(validation, characters)), digest


def counting_model(text: Tensor, classes: int, strengths: list[float]) -> Tensor:
    """``p[a, ..., y, z]``, the probability of z after a ... y, by how often it came there.

    ``p = (n(context, z) + s p_shorter(z)) / (n(context) + s)``, with p of the context without its
    first character, down to ``1 / classes``, and a strength s for each length of the context
    (MacKay and Peto 1995).
    """
    p = torch.full((classes,), 1 / classes, dtype=torch.float64)
    for order, strength in enumerate(strengths, 1):
        places = (text.unfold(0, order, 1) * classes ** torch.arange(order).flip(0)).sum(1)
        found = torch.bincount(places, minlength=classes**order).double()
        found = found.reshape([classes] * order)
        p = (found + strength * p) / (found.sum(-1, keepdim=True) + strength)
    return p


def bits(p: Tensor, text: Tensor, first: int) -> float:
    """Bits per character of ``text[first:]``, each given those before it."""
    windows = text[first - p.dim() + 1 :].unfold(0, p.dim(), 1)
    return -p[windows.unbind(1)].log2().mean().item()


def best_counting_model(text: Tensor, classes: int, order: int) -> Tensor:
    """Of the strengths that are best for the last tenth of the text, each for its order."""
    fitted, held = text.tensor_split([len(text) * 9 // 10])
    chosen: list[float] = []
    for _ in range(order):
        by_bits = {
            bits(counting_model(fitted, classes, [*chosen, strength]), held, order): strength
            for strength in STRENGTHS
        }
        chosen.append(by_bits[min(by_bits)])
    return counting_model(text, classes, chosen)
