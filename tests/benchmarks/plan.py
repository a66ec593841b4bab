"""What a plan says of a step beside what processes on this machine take for it.

    python -m tests.benchmarks.plan [--ranks 2] [--rounds 7] [--width 512]

First the same processes measure the links between them, and how many FLOPs they do in a step
without others, all at once; then the steps themselves, by layout. A time is the greatest of the
ranks' medians. ``peak`` is the greatest resident set of a rank in a step with donated state, less
what there was before its params, beside that of the plan.
"""

import argparse
import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import funcnet as fn
from funcnet.distributed import Device, Link, Network

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent / "peers"))
from distributed.ranks import Ranks
from worker import host_memory

BATCH, BLOCKS = 512, 4


def parts_of(layout: str, mesh: Any, width: int) -> tuple[fn.Layer, fn.Optimizer]:
    """The net and its optimizer."""
    at = fn.distributed
    block = fn.serial(at.column_linear(4 * width, mesh), fn.relu(), at.row_linear(width, mesh))
    if layout == "sharded":
        block = at.sharded(block, mesh)
    optimizer = {
        "mean": lambda: fn.chain(at.mean(mesh), fn.adam()),
        "zero": lambda: at.zero(fn.adam(), mesh),
    }.get(layout, fn.adam)()
    return fn.serial(*[fn.residual(block)] * BLOCKS), optimizer


def sizes_of(layout: str, ranks: int) -> dict[str, int]:
    """The mesh."""
    return {"data": 1, "model": ranks} if layout == "model" else {"data": ranks, "model": 1}


LAYOUTS = ("mean", "zero", "sharded", "model")


def links(sizes: Mapping[str, int]) -> Link:
    """That of the axis that has all ranks."""
    mesh = fn.distributed.mesh(**sizes)
    axis = max(sizes, key=lambda name: sizes[name])
    return fn.distributed.link_of(mesh, axis, sizes=(2**10, 2**24))


def timed(
    layout: str, sizes: Mapping[str, int], width: int, rounds: int, alone: bool
) -> tuple[float, float]:
    """The seconds of a step, and the bytes that it takes; ``alone``, without the other ranks."""
    mesh: Any = {"data": 1} if alone else fn.distributed.mesh(**sizes)
    data = 1 if alone else sizes["data"]
    model, optimizer = parts_of(layout, mesh, width)
    step = fn.train_step(model, fn.mse(), optimizer, donate=True)
    x = torch.ones(BATCH // data, width)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # gives freed memory back, which would not count again
    peak = host_memory()
    state = fn.init_train_state(model, optimizer, fn.key(0), x)
    times = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        state, _ = step(state, (x, x))
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:]), peak() * 2**20


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--width", type=int, default=512)
    options = parser.parse_args()
    ranks = Ranks(options.ranks)
    single = {"data": options.ranks, "model": 1}
    x = torch.ones(BATCH, options.width, device="meta")
    link = ranks(links, single)[0]
    alone = max(
        each for each, _ in ranks(timed, "none", single, options.width, options.rounds, True)
    )
    model, optimizer = parts_of("none", {"data": 1}, options.width)
    whole = fn.distributed.plan(model, x, {"data": 1}, loss=fn.mse(), target=x, optimizer=optimizer)
    (stage,) = whole.stages
    rate = (stage.forward_flops + stage.backward_flops) / alone
    device = Device(memory=1e12, flops=rate, utilization=1.0)
    print(
        f"{rate / 1e9:.3g} GFLOP/s a rank; {link.alpha * 1e6:.3g} us, {1e-9 / link.beta:.3g} GB/s"
    )
    print(
        f"{'layout':10}{'planned':>10}{'measured':>10}{'ratio':>7}{'planned':>11}{'measured':>10}"
    )
    for layout in LAYOUTS:
        sizes = sizes_of(layout, options.ranks)
        model, optimizer = parts_of(layout, sizes, options.width)
        planned = fn.distributed.plan(
            model,
            x,
            sizes,
            loss=fn.mse(),
            target=x,
            optimizer=optimizer,
            device=device,
            network=Network(2**30, link, link),
        )
        found = ranks(timed, layout, sizes, options.width, options.rounds, False)
        seconds, peak = (max(each) for each in zip(*found, strict=True))
        print(
            f"{layout:10}{planned.seconds * 1e3:>7.1f} ms{seconds * 1e3:>7.1f} ms"
            f"{seconds / planned.seconds:>7.2f}{planned.memory.peak / 1e6:>8.1f} MB"
            f"{peak / 1e6:>7.1f} MB"
        )
    ranks.stop()


if __name__ == "__main__":
    main()
