"""Two and four ranks on this machine, for all tests of a session."""

import pytest

from distributed.ranks import Ranks


def _ranks(size):
    ranks = Ranks(size)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def two_ranks():
    yield from _ranks(2)


@pytest.fixture(scope="session")
def four_ranks():
    yield from _ranks(4)


@pytest.fixture(scope="session", params=[2, 4])
def ranks(request):
    """Two ranks, then four."""
    return request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[request.param])


def pytest_collection_modifyitems(config, items):
    """Those that compile for a minute run with ``--whole`` alone."""
    if config.getoption("whole"):
        return
    left_out = [item for item in items if item.get_closest_marker("whole")]
    items[:] = [item for item in items if not item.get_closest_marker("whole")]
    config.hook.pytest_deselected(items=left_out)
