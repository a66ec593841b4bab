"""Dead, late and straying ranks: an error on the others that names them, in time."""

import multiprocessing
import os
import signal
import time

import pytest
import torch

import funcnet as fn
from distributed.ranks import free_port
from funcnet.distributed import PeerError

SECONDS = 4.0


def _run(function, rank, size, port, options, pipe):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    fn.distributed.initialize(device="cpu", timeout=SECONDS, **options)
    data = fn.distributed.axis_of(fn.distributed.mesh(), "data")
    data.sum(torch.ones(3))
    begin = time.monotonic()
    try:
        function(data, rank)
        told = None
    except PeerError as error:
        told = str(error), error.ranks, type(error.__cause__), time.monotonic() - begin
    pipe.send(told)
    fn.distributed.finalize()


def errors(function, size, silent=None, **options):
    """What PeerError each of so many new processes met: its text, ranks, cause and seconds."""
    context, port = multiprocessing.get_context("spawn"), free_port()
    pairs = [context.Pipe() for _ in range(size)]
    processes = [
        context.Process(target=_run, args=(function, rank, size, port, options, theirs))
        for rank, (_, theirs) in enumerate(pairs)
    ]
    for process in processes:
        process.start()
    for _, theirs in pairs:
        theirs.close()
    found = []
    for rank, (ours, _) in enumerate(pairs):
        if rank == silent:
            found.append(None)
        elif ours.poll(60):
            found.append(ours.recv())
        else:
            found.append(("no error", (), None, 60))
    for process in processes:
        process.kill()
        process.join()
    return found


def kill_last(data, rank):
    if rank == data.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        data.sum(torch.ones(3))


def kill_first(data, rank):
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        data.sum(torch.ones(3))


def stop_first(data, rank):
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    data.sum(torch.ones(3))


@pytest.mark.parametrize(
    ("function", "size", "dead"), [(kill_last, 3, 2), (kill_first, 3, 0), (stop_first, 2, 0)]
)
def test_a_dead_rank_is_named(function, size, dead):
    for rank, found in enumerate(errors(function, size, silent=dead)):
        if rank == dead:
            continue
        told, ranks, cause, seconds = found
        assert told.startswith("a sum over data of (pipe=1, data=")
        assert f"rank {dead} (data {dead})" in told
        assert "is dead, or does not answer" in told
        assert ranks == (dead,)
        assert issubclass(cause, RuntimeError)
        assert seconds < SECONDS + 12


def sleep(data, rank):
    step = fn.jit(lambda x: data.sum(2 * x) + 1)
    step(torch.ones(3))
    if rank == 1:
        time.sleep(2 * SECONDS)  # the line that the error names
    step(torch.ones(3))


def test_a_late_rank_is_named_with_its_line_also_within_a_compiled_program():
    (told, ranks, cause, seconds), late = errors(sleep, 2)
    assert "a sum over data of (pipe=1, data=2, model=1) failed: rank 1 (data 1)" in told
    assert "did not come, it is at" in told
    assert f"{__file__}:{sleep.__code__.co_firstlineno + 4}, in sleep" in told
    assert ranks == (1,)
    assert issubclass(cause, RuntimeError)
    assert SECONDS - 1 < seconds < SECONDS + 60
    assert f"{told[-40:]}" in late[0]


def ends(data, rank):
    if rank == 1:
        raise PeerError("its own error")
    data.sum(torch.ones(3))


def test_a_rank_that_has_ended_is_named():
    (told, ranks, _, seconds), _ = errors(ends, 2)
    assert "rank 1 (data 1) has ended" in told
    assert ranks == (1,)
    assert seconds < SECONDS


def astray(data, rank):
    """Both ranks know both collectives; one takes them in another order."""
    data.sum(torch.ones(5))
    data.sum(torch.ones(3 if rank else 5))


def test_every_collective_is_compared_if_asked_for():
    for told, *_ in errors(astray, 2, check=True):
        assert "the ranks do not do the same" in told
        assert "rank 0 (data 0): a sum of float32 (5,) over data" in told
        assert "rank 1 (data 1): a sum of float32 (3,) over data" in told


def differ(kind):
    data = fn.distributed.axis_of(fn.distributed.mesh(), "data")
    first = data.index == 0
    wide = torch.float64 if first else torch.float32
    cases = {
        "shape": lambda: data.sum(torch.ones(1237 if first else 1259)),
        "dtype": lambda: data.sum(torch.ones(1277, dtype=wide)),
        "kind": lambda: data.sum(torch.ones(1279)) if first else data.gather(torch.ones(1279)),
        "jit": lambda: fn.jit(lambda x: data.sum(2 * x))(torch.ones(1283 if first else 1289)),
    }
    with pytest.raises(PeerError, match="the ranks do not do the same") as caught:
        cases[kind]()
    # Nothing was communicated, so they may go on.
    assert data.sum(torch.ones(3)).tolist() == [data.size] * 3
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("shape", ("a sum of float32 (1237,)", "a sum of float32 (1259,)")),
        ("dtype", ("a sum of float64 (1277,)", "a sum of float32 (1277,)")),
        ("kind", ("a sum of float32 (1279,)", "a gather of float32 (1279,)")),
        ("jit", ("a sum of float32 (1283,)", "a sum of float32 (1289,)")),
    ],
)
def test_different_collectives_are_an_error_on_both_ranks_before_they_begin(
    two_ranks, kind, expected
):
    for told in two_ranks(differ, kind):
        assert f"rank 0 (data 0): {expected[0]} over data" in told
        assert f"rank 1 (data 1): {expected[1]} over data" in told


def names_the_odd_one():
    data = fn.distributed.axis_of(fn.distributed.mesh(data=2, model=2), "model")
    rank = torch.distributed.get_rank()
    with pytest.raises(PeerError) as caught:
        data.sum(torch.ones(3 + rank))
    return str(caught.value)


def test_ranks_are_named_by_their_place_on_the_mesh(four_ranks):
    for rank, told in enumerate(four_ranks(names_the_odd_one)):
        first = 2 * (rank // 2)
        assert f"rank {first} (data {first // 2}, model 0): a sum of float32 ({3 + first},)" in told
        assert f"rank {first + 1} (data {first // 2}, model 1)" in told
