"""Threads: first calls of several functions at once, stacks of little size."""

import threading

import pytest
import torch

import funcnet as fn

X = fn.random.normal(fn.key(0), (5, 4))


def functions():
    """Eight that have little in common, each compiled for the first time."""
    net = fn.serial(fn.linear(3), fn.tanh(), fn.linear(1))
    step = fn.train_step(net, fn.mse(), fn.adam(0.1))
    start = fn.init_train_state(net, fn.adam(0.1), fn.key(0), X)
    return [
        lambda x: x * 5 + 1,
        lambda x: fn.scan(lambda c, row: (c + row, c * 2), torch.zeros(4), x),
        lambda x: fn.vmap(lambda row: torch.outer(row, row))(x),
        lambda x: torch.sort(x @ x.T, 0),
        lambda x: step(start, (x, x[:, :1]))[0].params,
        lambda x: fn.random.normal(fn.key(3), (7,)) + x.sum(),
        lambda x: torch.nn.functional.layer_norm(x, (4,)),
        lambda x: x.bfloat16() @ x.T.bfloat16(),
    ]


def run_together(work, count):
    """The errors of ``count`` threads that start at once."""
    errors, ready = [], threading.Barrier(count)

    def run(index):
        ready.wait()
        try:
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_eight_threads_compile_eight_functions(tmp_path, monkeypatch):
    monkeypatch.setenv("FUNCNET_CACHE_DIR", str(tmp_path))
    eager = functions()
    expected = [function(X) for function in eager]
    compiled = [fn.jit(function) for function in eager]
    found = [None] * len(eager)

    def work(index):
        for _ in range(3):
            found[index] = compiled[index](X)

    assert run_together(work, len(eager)) == []
    for one, other in zip(fn.tree.leaves(found), fn.tree.leaves(expected), strict=True):
        tolerance = {"rtol": 0.05, "atol": 0.05} if one.dtype == torch.bfloat16 else {}
        torch.testing.assert_close(one, other, **tolerance)


def test_threads_that_meet_in_one_function_compile_it_once():
    calls = []

    def run(x, n):
        calls.append(None)
        return x * n - 4

    compiled = fn.jit(run)
    assert run_together(lambda index: compiled(X, float(index)), 6) == []
    assert len(calls) == 1


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_thread_with_a_small_stack(dtype, threads):
    a, b = (
        fn.random.normal(fn.key(0), (4, 2000), dtype),
        fn.random.normal(fn.key(1), (16, 2000), dtype),
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compiled = fn.jit(lambda a, b: (a @ b.T, a.T @ a[:, :30], fn.vmap(lambda r: r @ b.T)(a)))
        expected = compiled(a, b)
        size = threading.stack_size(128 * 1024)
        try:
            found = []
            assert run_together(lambda index: found.append(compiled(a, b)), 1) == []
        finally:
            threading.stack_size(size)
    finally:
        torch.set_num_threads(before)
    for one, other in zip(found[0], expected, strict=True):
        assert torch.equal(one, other)
