"""Compilers and OpenMP: a program gives the same however it is compiled."""

import shutil

import pytest
import torch

import funcnet as fn
from funcnet.compiler import build

pytestmark = pytest.mark.cpu_only


def workload(x, w):
    """Kernels, products and loops of which threads take a part each."""
    net = fn.serial(fn.linear(8), fn.tanh(), fn.linear(2))

    def member(key):
        params, _ = net.init(key, x)
        y, pullback, _ = net.vjp(params, x)
        return pullback(y)[0]

    return {
        "product": x @ w,
        "sums": ((x @ w).relu().sum(0), (x * 2).sum(), x.softmax(1), x.amax(1)),
        "members": fn.vmap(member)(fn.random.split(fn.key(2), 16)),
        "scan": fn.scan(lambda c, row: (c * 0.9 + row, c.sum()), x[0], x),
        "draws": fn.random.normal(fn.key(3), (70_000,)),
    }


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("command", ["g++", "clang++"])
@pytest.mark.parametrize("openmp", ["with OpenMP", "without OpenMP"])
def test_two_threads(command, openmp, tmp_path, monkeypatch):
    if shutil.which(command) is None:
        pytest.skip(f"{command} is not installed")
    monkeypatch.setenv("FUNCNET_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", command)
    if openmp == "without OpenMP":
        # As where its library is missing: what is linked against it fails.
        monkeypatch.setattr(build, "_openmp", lambda command: ("-fopenmp", "-lno-such-library"))
    x = fn.random.normal(fn.key(0), (300, 200))
    w = fn.random.normal(fn.key(1), (200, 130))
    compiled = fn.jit(workload)
    found, expected = compiled(x, w), workload(x, w)
    assert compiled.lower(x, w).why_not_one is None
    for one, other in zip(fn.tree.leaves(found), fn.tree.leaves(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    for _ in range(5):
        for one, other in zip(fn.tree.leaves(compiled(x, w)), fn.tree.leaves(found), strict=True):
            assert torch.equal(one, other)


def test_a_program_of_one_thread_needs_no_openmp(tmp_path, monkeypatch):
    monkeypatch.setenv("FUNCNET_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "_openmp", lambda command: ("-fopenmp", "-lno-such-library"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert fn.jit(lambda x: x.sin().sum())(torch.zeros(5)) == 0
    finally:
        torch.set_num_threads(before)
