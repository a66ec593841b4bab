"""How often ranks talk to each other, by collective."""

import collections
import contextlib

import pytest

from funcnet import ranks


@contextlib.contextmanager
def counted():
    """A Counter of the collectives that are started, by the name of the operator.

    with counted() as counts:
        ...
    """
    counts, start = collections.Counter(), ranks._start

    def counting(key, what, *args):
        counts[what] += 1
        return start(key, what, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "_start", counting)
        yield counts
