"""Save and load 1 GB: `fn.save` and `fn.load` beside safetensors' own functions.

    python -m tests.benchmarks.checkpoints

The tree is the train state of a transformer with AdamW. Each row has the medians of the interleaved
runs, in seconds of the clock and of the processor, and of their ratios. `fn.save` waits until the
file is on the disk, which safetensors' does not: it is timed without and with `os.fsync` after it.
To load is to map the file into memory, here as there, so it is timed too with a pass that reads
all of the tensors.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import funcnet as fn


def train_state(size):
    """A train state of about so many bytes."""
    layers = 12
    # Of a layer 12 width^2 params, three times with AdamW's means, of 4 bytes.
    width = 64 * round((size / (layers * 12 * 3 * 4)) ** 0.5 / 64)
    block = fn.transformer_encoder_layer(width // 64, 4 * width, batch_first=True)
    net = fn.serial(*[block] * layers)
    optimizer = fn.adamw(1e-3)
    state = fn.init_train_state(net, optimizer, fn.key(0), torch.zeros(1, 2, width))
    return fn.tree.map(torch.clone, state)


def synced(function, path):
    function()
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def read(tree):
    for leaf in fn.tree.leaves(tree):
        leaf.sum()


def timed(functions, runs):
    """The seconds of each function, by run, and those of the processor.

    They take turns, in another order each time: what one leaves for the disk to write slows down
    the next.
    """
    seconds = {name: [] for name in functions}
    order = random.Random(0)
    for run in range(runs + 1):
        for name, function in order.sample([*functions.items()], len(functions)):
            os.sync()
            begin, used = time.perf_counter(), time.process_time()
            function()
            if run:  # the first one is for the caches
                both = time.perf_counter() - begin, time.process_time() - used
                seconds[name].append(both)
    return seconds


def report(seconds, ours, *peers):
    for peer in peers:
        row = []
        for kind in range(2):
            mine, theirs = ([run[kind] for run in seconds[name]] for name in (ours, peer))
            ratio = statistics.median([a / b for a, b in zip(mine, theirs, strict=True)])
            medians = statistics.median(mine), statistics.median(theirs)
            row.append("{:.4f} | {:.4f} | {:.2f}".format(*medians, ratio))
        print(f"| {ours} | {peer} | {' | '.join(row)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="default: a temporary one")
    options = parser.parse_args()
    state = train_state(options.gigabytes * 1e9)
    flat = {
        name: leaf
        for name, leaf in fn.tree.to_dotted(state._asdict()).items()
        if isinstance(leaf, torch.Tensor)
    }
    size = sum(leaf.nbytes for leaf in flat.values())
    print(f"{size / 1e9:.2f} GB in {len(flat)} tensors\n")
    print("| ours | peer | s | peer's | ratio | of the processor | peer's | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        ours, theirs = Path(folder, "ours.safetensors"), Path(folder, "theirs.safetensors")
        saves = {
            "fn.save": lambda: fn.save(ours, state),
            "save_file": lambda: save_file(flat, theirs),
            "save_file and fsync": lambda: synced(lambda: save_file(flat, theirs), theirs),
            "fn.save, checksum=True": lambda: fn.save(Path(folder, "sums"), state, checksum=True),
        }
        seconds = timed(saves, options.runs)
        report(seconds, "fn.save", "save_file and fsync", "save_file")
        report(seconds, "fn.save, checksum=True", "save_file and fsync")
        loads = {
            "fn.load": lambda: fn.load(ours),
            "fn.load, like": lambda: fn.load(ours, state),
            "load_file": lambda: load_file(theirs),
        }
        seconds = timed(loads, 5 * options.runs)
        report(seconds, "fn.load", "load_file")
        report(seconds, "fn.load, like", "load_file")
        loads = {
            "fn.load, like, and read": lambda: read(fn.load(ours, state)),
            "load_file and read": lambda: read(load_file(theirs)),
            "fn.load, checksum": lambda: fn.load(Path(folder, "sums"), state),
        }
        seconds = timed(loads, options.runs)
        report(seconds, "fn.load, like, and read", "load_file and read")
        report(seconds, "fn.load, checksum", "load_file and read")


if __name__ == "__main__":
    main()
