"""Forwards with assert, which pytest rewrites in the modules of tests."""

import math


def checked(x):
    assert x.dim() == 3, "three dimensions"
    batch, rows, _ = x.shape
    return x.view(batch * rows, -1) / math.sqrt(x.size(-1))
