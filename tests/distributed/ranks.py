"""Processes to run tests on several ranks, which stay from test to test.

def test_sum(two_ranks):
    assert two_ranks(summed, 3) == [6, 6]

def summed(x):  # runs on each rank
    ...
"""

import multiprocessing
import os
import socket
import traceback

import torch

import funcnet as fn

_SECONDS = 600


def _serve(rank, size, port, pipe):
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    fn.distributed.initialize(device="cpu", timeout=120)
    while (order := pipe.recv()) is not None:
        function, args, options = order
        try:
            pipe.send((True, function(*args, **options)))
        except BaseException as error:
            pipe.send(
                (False, f"rank {rank}: {type(error).__name__}: {error}\n{traceback.format_exc()}")
            )
    fn.distributed.finalize()


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Ranks:
    """So many processes; called with a module's function and its arguments, they all run it.

    What it returns is a list of what each gave. A rank that raises is an AssertionError with its
    traceback. After one that does not answer, new processes are started.
    """

    def __init__(self, size):
        self.size, self._processes = size, []

    def _start(self):
        context, port = multiprocessing.get_context("forkserver"), free_port()
        # One process imports torch, which takes seconds, and all ranks are its children.
        context.set_forkserver_preload(["funcnet"])
        pairs = [context.Pipe() for _ in range(self.size)]
        self._pipes = [ours for ours, _ in pairs]
        self._processes = [
            context.Process(target=_serve, args=(rank, self.size, port, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self._processes:
            process.start()

    def __call__(self, function, *args, **options):
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args, options))
        found = []
        for rank, pipe in enumerate(self._pipes):
            try:
                if not pipe.poll(_SECONDS):
                    raise EOFError
                found.append(pipe.recv())
            except (EOFError, OSError):
                self.stop(at_once=True)
                raise AssertionError(f"rank {rank} did not answer") from None
        problems = [value for good, value in found if not good]
        if problems:
            # Others may wait in a collective that the one that raised never came to.
            self.stop(at_once=True)
            raise AssertionError("\n".join(problems))
        return [value for _, value in found]

    def stop(self, at_once=False):
        for rank, process in enumerate(self._processes):
            if at_once:
                process.kill()
            else:
                self._pipes[rank].send(None)
        for process in self._processes:
            process.join()
        self._processes = []
