"""Save and restore 1 GB over two ranks: `fn.distributed.save` and `load` beside torch's own.

    python -m tests.benchmarks.distributed_checkpoints

The tree is the train state of a transformer with AdamW, of each leaf of which a rank has half of
the rows; torch.distributed.checkpoint (DCP) has the same halves as DTensors. Each row has the
medians of the interleaved runs, from the first rank's begin to the last one's end, and of their
ratios. Both wait until the files are on the disk. `load` maps files, where DCP reads into tensors
that are there: so the values are read after it, or written to.
"""

import argparse
import os
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from torch.distributed.tensor import DTensor, Shard

import funcnet as fn
from funcnet.collectives import Split
from tests.benchmarks.checkpoints import train_state
from tests.distributed.ranks import free_port


def timed(functions, runs, before=lambda: None):
    """The seconds of each function, by run, of the last rank to end."""
    seconds = {name: [] for name in functions}
    order = random.Random(0)
    for run in range(runs + 1):
        for name, function in order.sample([*functions.items()], len(functions)):
            if dist.get_rank() == 0:
                os.sync()
                before()
            dist.barrier()
            begin = time.perf_counter()
            function()
            dist.barrier()
            if run:  # the first one is for the caches
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def report(seconds, ours, peer, note=""):
    ratio = statistics.median([a / b for a, b in zip(seconds[ours], seconds[peer], strict=True)])
    both = [statistics.median(seconds[name]) for name in (ours, peer)]
    if dist.get_rank() == 0:
        print("| {}{} | {} | {:.3f} | {:.3f} | {:.2f} |".format(ours, note, peer, *both, ratio))


def forget(*folders):
    """Make the system forget the files that it has in memory, as after a restart."""
    for path in [path for folder in folders for path in folder.iterdir() if path.is_file()]:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(tensors):
    for tensor in tensors:
        tensor.sum()


def written(tensors):
    for tensor in tensors:
        tensor.add_(0)


def measure(rank, options, port, folder):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    fn.distributed.initialize(device="cpu")
    mesh = fn.distributed.mesh()
    axis = fn.distributed.axis_of(mesh, "data")
    whole = fn.tree.to_dotted(train_state(options.gigabytes * 1e9)._asdict())
    placed = {name: (Split(axis, tuple(x.shape), 0),) for name, x in whole.items() if x.dim()}
    tree = {n: placed[n][0].part(x) if n in placed else x for n, x in whole.items()}
    del whole
    parts = [tree[name] for name in placed]
    if rank == 0:
        size = 2 * sum([part.nbytes for part in parts])
        print(f"{size / 1e9:.2f} GB in {len(parts)} tensors\n")
        print("| ours | peer | s | peer's | ratio |")
        print("|---|---|---|---|---|")

    def peers():
        tensors = [part.clone() for part in parts]
        return tensors, {
            name: DTensor.from_local(part, mesh["data"], [Shard(0)])
            for name, part in zip(placed, tensors, strict=True)
        }

    ours, theirs = folder / "ours", folder / "theirs"

    def save_theirs():
        dcp.save(state, checkpoint_id=theirs)

    tensors, state = peers()
    saves = {
        "save": lambda: fn.distributed.save(ours, tree, mesh, placed),
        "DCP save": save_theirs,
    }
    report(timed(saves, options.runs), "save", "DCP save")

    def load():
        return [*fn.distributed.load(ours, tree, mesh, placed).values()]

    def load_theirs():
        dcp.load(state, checkpoint_id=theirs)
        return tensors

    loads = {
        "load": load,
        "load and read": lambda: read(load()),
        "load and write": lambda: written(load()),
        "DCP load": load_theirs,
        "DCP load and read": lambda: read(load_theirs()),
        "DCP load and write": lambda: written(load_theirs()),
    }
    seconds = timed(loads, options.runs)
    for name in ("load", "load and read", "load and write"):
        report(seconds, name, f"DCP {name}")
    colds = {name: loads[name] for name in ("load and read", "DCP load and read")}
    seconds = timed(colds, options.runs, lambda: forget(folder, theirs))
    report(seconds, *colds, note=", cold")
    for mine, other in zip(load(), tree.values(), strict=True):
        assert torch.equal(mine, other)
    fn.distributed.finalize()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="default: a temporary one")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        torch.multiprocessing.spawn(measure, (options, free_port(), folder), nprocs=2)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
