"""Layers of positions, with inputs to check them on."""

import torch

import funcnet as fn

DOUBLE = torch.float64
WORDS = fn.random.normal(fn.key(70), (2, 3, 4, 6), DOUBLE)
PLACES = torch.tensor([[3, 0, 2, 5], [1, 1, 4, 2]])

LAYERS = {
    "learned_positions": (fn.learned_positions(6), WORDS),
    "learned_positions given": (fn.learned_positions(6), (WORDS, PLACES[0])),
    "learned_positions of each": (fn.learned_positions(6), (WORDS[:, 0], PLACES)),
    "learned_positions cached": (fn.learned_positions(6, cache=True), WORDS),
    "sinusoidal_positions": (fn.sinusoidal_positions(), WORDS[0, 0, :, :5]),
    "sinusoidal_positions of each": (fn.sinusoidal_positions(100.0), (WORDS, PLACES)),
    "sinusoidal_positions cached": (fn.sinusoidal_positions(cache=True), WORDS),
    "rotary": (fn.rotary(), WORDS),
    "rotary interleaved": (fn.rotary(100.0, 4.0, True), (WORDS, PLACES)),
    "rotary of some": (fn.rotary(dim=4), (WORDS, PLACES[0])),
    "alibi": (fn.alibi(3), WORDS),
    "alibi of each": (fn.alibi(3), (WORDS, PLACES)),
}
