"""What programs keep from call to call: their own memory, and that of PyTorch's convolutions."""

import gc
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import funcnet as fn

pytestmark = pytest.mark.cpu_only
MIB = 1 << 20


def resident():
    """The memory of this process, in MiB."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def wide(x):
    """An intermediate value of 64 MiB."""
    return (x[:, None] * x) @ x[:, None]


X = torch.linspace(0, 1, 4096)


def a_program_keeps_its_memory_until_it_is_cleared():
    step = fn.jit(wide)
    step(X)
    kept = resident()
    assert torch.equal(step(X), step(X))
    assert abs(resident() - kept) < 8
    step.clear()
    assert resident() < kept - 56
    step(X)
    assert resident() > kept - 8


def a_program_that_is_dropped_keeps_nothing():
    step = fn.jit(lambda x: wide(x) + 1)
    step(X)
    kept = resident()
    del step
    assert resident() < kept - 56


def test_calls_at_the_same_time_have_memory_of_their_own():
    step = fn.jit(lambda x: wide(x) + 2)
    expected = [step(X), step(2 * X)]
    found = [[], []]

    def run(which):
        for _ in range(5):
            found[which].append(step((1 + which) * X))

    threads = [threading.Thread(target=run, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for values, value in zip(found, expected, strict=True):
        assert all([torch.equal(each, value) for each in values])


def convolutions_leave_pytorchs_allocator_as_it_was_and_can_be_cleared():
    images, weight = torch.ones(32, 16, 64, 64), torch.ones(16, 16, 3, 3)
    convolve = fn.jit(lambda x, w: F.conv2d(x, w).sum())
    convolve(images, weight)
    kept = resident()
    for _ in range(5):
        convolve(images, weight)
    assert abs(resident() - kept) < 8
    large = torch.ones(16 * MIB)
    assert resident() > kept + 56
    del large
    assert abs(resident() - kept) < 8
    convolve.clear()
    assert resident() < kept - 8


CASES = {
    each.__name__: each
    for each in (
        a_program_keeps_its_memory_until_it_is_cleared,
        a_program_that_is_dropped_keeps_nothing,
        convolutions_leave_pytorchs_allocator_as_it_was_and_can_be_cleared,
    )
}


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is read in /proc")
@pytest.mark.parametrize("name", CASES)
def test_in_a_process_of_its_own(name):
    done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    CASES[sys.argv[1]]()
