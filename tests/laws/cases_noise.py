"""Noise, embeddings and the layers of pairs, with inputs to check them on."""

import torch

import funcnet as fn

DOUBLE = torch.float64


def draw(seed, *shape):
    return fn.random.normal(fn.key(seed), shape, DOUBLE)


ROWS = draw(20, 5, 6)
OTHERS = draw(21, 5, 6)
IMAGES = draw(22, 2, 4, 3, 3)
WORDS = torch.tensor([[0, 3, 3], [4, 4, 1], [1, 2, 0]])
FLAT, OFFSETS = torch.tensor([0, 3, 3, 4, 1, 2, 0]), torch.tensor([0, 2, 2, 6])

LAYERS = {
    "dropout": (fn.dropout(0.3), ROWS),
    "dropout of all": (fn.dropout(1.0), ROWS),
    "dropout of none": (fn.dropout(0.0), ROWS),
    "dropout1d": (fn.dropout1d(0.3), IMAGES[0]),
    "dropout1d of one": (fn.dropout1d(0.3), ROWS),
    "dropout2d": (fn.dropout2d(0.3), IMAGES),
    "dropout3d": (fn.dropout3d(0.3), draw(23, 2, 4, 2, 2, 2)),
    "dropout3d of one": (fn.dropout3d(0.3), draw(23, 4, 2, 2, 2)),
    "alpha_dropout": (fn.alpha_dropout(0.3), ROWS),
    "alpha_dropout of all": (fn.alpha_dropout(1.0), ROWS),
    "feature_alpha_dropout": (fn.feature_alpha_dropout(0.3), IMAGES),
    "drop_path": (fn.drop_path(0.4), IMAGES),
    "drop_path of the batch": (fn.drop_path(0.4, "batch"), IMAGES),
    "gaussian_noise": (fn.gaussian_noise(0.3), ROWS),
    "gaussian_noise relative": (fn.gaussian_noise(0.3, relative=True), ROWS),
    "embedding": (fn.embedding(5, 3), torch.tensor([[0, 3], [4, 4], [1, 2]])),
    "embedding_bag": (fn.embedding_bag(5, 3, dtype=DOUBLE), WORDS),
    "embedding_bag of offsets": (fn.embedding_bag(5, 3, mode="sum", dtype=DOUBLE), (FLAT, OFFSETS)),
    "embedding_bag mean of offsets": (fn.embedding_bag(5, 3, dtype=DOUBLE), (FLAT, OFFSETS)),
    "embedding_bag max": (fn.embedding_bag(5, 3, mode="max", dtype=DOUBLE), (FLAT, OFFSETS)),
    "embedding_bag with the last offset": (
        fn.embedding_bag(5, 3, mode="sum", include_last_offset=True, dtype=DOUBLE),
        (FLAT, OFFSETS, draw(24, 7)),
    ),
    "embedding_bag weighted": (
        fn.embedding_bag(5, 3, mode="sum", dtype=DOUBLE),
        (WORDS, None, draw(25, 3, 3)),
    ),
    "bilinear": (fn.bilinear(3), (ROWS, OTHERS[:, :4])),
    "bilinear of vectors": (fn.bilinear(3, bias=False), (ROWS[0], OTHERS[0, :4])),
    "cosine_similarity": (fn.cosine_similarity(), (ROWS, OTHERS)),
    "cosine_similarity broadcast": (fn.cosine_similarity(0), (ROWS, OTHERS[:, :1])),
    "pairwise_distance": (fn.pairwise_distance(), (ROWS, OTHERS)),
    "pairwise_distance of p 3": (fn.pairwise_distance(3.0, keepdim=True), (ROWS, OTHERS[:1])),
    "pairwise_distance of p inf": (fn.pairwise_distance(torch.inf), (ROWS, OTHERS)),
}
