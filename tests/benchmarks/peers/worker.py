"""What the workers of `compare.py` share: the workloads and the protocol. Standard library only.

A worker builds one workload, makes its first call and says how many seconds that took; then, for
each line that it reads, it times one round and says the seconds a step.
"""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

LEARNING_RATE = 1e-3


class Net(NamedTuple):
    """What a network takes and gives: the shape of an example, and how many classes.

    With a ``vocabulary``, an example is that of tokens, and each has a class. With ``places``,
    each of them has a class, such as each pixel of an image.
    """

    example: tuple[int, ...]
    classes: int = 10
    vocabulary: int = 0
    places: tuple[int, ...] = ()


NETS = {
    "cnn": Net((1, 28, 28)),
    "vgg": Net((3, 32, 32)),
    "resnet": Net((3, 32, 32)),
    "blocks": Net((128,), 4096, 4096),
    "mixer": Net((64, 48)),
    "tabular": Net((64,)),
    "resnet18": Net((3, 32, 32)),
    "unet": Net((3, 64, 64), places=(64, 64)),
    "digits": Net((1, 8, 8)),
    "gpt": Net((128,), 4096, 4096),
    "gpt_loop": Net((128,), 4096, 4096),
    "gpt24": Net((128,), 4096, 4096),
    "lstm": Net((64, 256)),
}
"""Networks of the sizes that people train; each library has them in a module of its own."""


@dataclass(frozen=True)
class Workload:
    """What to train, all in float32; the activation is ReLU and the loss MSE.

    With a ``net`` of `NETS`, that is trained instead, with cross entropy.

    ``scan`` steps are one call, of ``members`` models at once; 0 means a single step or model.
    With ``draws``, that many uniform draws are all that a call does. ``device`` is as torch
    names it.
    """

    name: str
    net: str = ""
    sizes: tuple[int, ...] = (2, 25, 25, 25, 2)
    batch: int = 100
    optimizer: str = "sgd"
    threads: int = 1
    scan: int = 0
    members: int = 0
    remat: bool = False
    draws: int = 0
    repeat_first: bool = False
    memory: bool = False
    device: str = "cpu"

    def shape(self, *example: int) -> tuple[int, ...]:
        """The shape of a call's batches of such examples."""
        return (*[each for each in (self.scan, self.members) if each], self.batch, *example)

    @property
    def labels(self) -> tuple[int, ...]:
        """The shape of the classes of a call's batches, for its ``net``."""
        example, _, vocabulary, places = NETS[self.net]
        # The networks give the logits of all tokens as rows.
        return (self.batch * prod(example),) if vocabulary else self.shape(*places)


class Job(NamedTuple):
    """A workload, built.

    ``start()`` makes a state, ``advance(state)`` is a call, and gives the next state;
    ``wait(state)`` returns when that is computed, which on the CPU it is at once for a library
    that does not work ahead.
    """

    start: Callable[[], Any]
    advance: Callable[[Any], Any]
    wait: Callable[[Any], Any] = lambda state: None


Build = Callable[[str, Workload], Job]


def time_calls(job: Job, calls: int) -> float:
    """Seconds a call, from the first state on, so that every round does the same work."""
    state = job.advance(job.start())
    job.wait(state)
    begin = time.perf_counter()
    for _ in range(calls):
        state = job.advance(state)
    job.wait(state)
    return (time.perf_counter() - begin) / calls


def calls_for(job: Job, seconds: float) -> int:
    """How many calls take so long."""
    calls = 1
    while (found := time_calls(job, calls)) * calls < seconds / 4:
        calls *= 2
    return max(1, round(seconds / found))


def resident(field: str) -> float:
    """A field of this process's status, in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


Watch = Callable[[], Callable[[], float]]
"""Begins to watch memory; the function that it gives says the peak since then, in MiB."""


def host_memory() -> Callable[[], float]:
    """The peak of this process beyond what it has now."""
    Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM counts
    before = resident("VmRSS")
    return lambda: resident("VmHWM") - before


def peak_memory(build: Build, mode: str, workload: Workload, watch: Watch) -> float:
    """MiB that the workload takes: its data, state, compilation and three calls.

    The same workload in small comes first: it imports and warms up what compiles.
    """
    small = replace(workload, net="", sizes=(8,) * len(workload.sizes), batch=8)
    for each in (small, workload):
        gc.collect()
        peak = watch()
        job = build(mode, each)
        state = job.start()
        for _ in range(3):
            state = job.advance(state)
        job.wait(state)
        found = peak()
        del job, state
    return found


def serve(build: Build, version: str, device_memory: Watch) -> None:
    """Be a worker: answer the driver in lines of JSON.

    ``device_memory`` watches the memory of a device that is not the CPU.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", help="which way of the library, such as eager")
    parser.add_argument("task", choices=("time", "first", "memory", "mapped"))
    parser.add_argument("workload", type=json.loads)
    parser.add_argument("seconds", type=float, help="of a round")
    options = parser.parse_args()
    workload = Workload(**options.workload)
    # What libraries print shall not get between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=answers)

    try:
        if options.task in ("memory", "mapped"):
            watch = host_memory if workload.device == "cpu" else device_memory
            answer(memory=peak_memory(build, options.mode, workload, watch))
            return
        job = build(options.mode, workload)
        state = job.start()
        job.wait(state)
        begin = time.perf_counter()
        state = job.advance(state)
        job.wait(state)
        answer(first=time.perf_counter() - begin, version=version)
        del state
        if options.task == "first":
            return
        calls = 0
        for _ in sys.stdin:
            calls = calls or calls_for(job, options.seconds)
            answer(seconds=time_calls(job, calls) / max(workload.scan, 1), calls=calls)
    except Exception as error:
        answer(error=f"{type(error).__name__}: {error}")
        raise
