"""What tests share, and ``pytest --device cuda``: torch's default device for them."""

import os

import pytest
import torch
from benchmarks.devices import missing

LEFT_OUT = pytest.StashKey[int]()


@pytest.fixture
def two_threads():
    """Two threads for torch, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        metavar="DEVICE",
        help="torch's default device for the tests, such as cuda; those marked cpu_only, "
        "and the doctests, are left out on another device than the CPU",
    )
    parser.addoption(
        "--whole",
        action="store_true",
        help="compile all cases of the laws' tables, not the first of each constructor, and the "
        "tests marked whole: an hour",
    )


def pytest_configure(config):
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Threads that wait for each other on cores that other workers use take many times as long.
        torch.set_num_threads(1)
    name = config.getoption("device")
    if name is None:
        return
    problem = missing(name)
    if problem is not None:
        raise pytest.UsageError(f"--device {name}: {problem}")
    # Test modules are imported after this, so that the tensors of their tables lie there too.
    torch.set_default_device(name)
    # The tolerances are those of float32 arithmetic, which TF32 is not.
    torch.backends.cudnn.allow_tf32 = False


def pytest_unconfigure(config):
    if config.getoption("device") is not None:
        torch.set_default_device(None)


def cpu_only(item):
    # A tensor's repr, which doctests show, names any device but the CPU.
    return item.get_closest_marker("cpu_only") is not None or isinstance(item, pytest.DoctestItem)


def pytest_collection_modifyitems(config, items):
    name = config.getoption("device")
    if name is None or torch.device(name).type == "cpu":
        return
    left_out = [item for item in items if cpu_only(item)]
    items[:] = [item for item in items if not cpu_only(item)]
    config.hook.pytest_deselected(items=left_out)
    config.stash[LEFT_OUT] = len(left_out)


def pytest_report_collectionfinish(config):
    name = config.getoption("device")
    if name is None:
        return None
    line = f"device: {name}"
    if LEFT_OUT in config.stash:
        line += f"; {config.stash[LEFT_OUT]} left out: doctests, and tests of what only the CPU has"
    return line
