"""Train a GPT of characters on one process, or on many, in any layout, with the same numbers.

    python examples/distributed.py
    torchrun --standalone --nproc-per-node=2 examples/distributed.py --layout zero
    torchrun --standalone --nproc-per-node=4 examples/distributed.py --layout pipeline --pipe 2

The layouts are what the ranks of a mesh have parts of:

    data      the batch: each rank has all of the model, and gradients are averaged
    zero      the batch, and the optimizer's state
    sharded   the batch, and the state, the gradients and the params, layer by layer
    tensor    each layer: heads, and features of the blocks between
    pipeline  the layers: one block after another, through which micro-batches go, each with a
              dropout of its own, as with ``fn.train_step(..., micro_batches=k)``

--model and --pipe are sizes of the mesh; what they leave of the ranks has parts of the batch. With
--checkpoint FOLDER, which all ranks share, the run is saved every few steps, and goes on from there
if it is started again, by hand or by torchrun's --max-restarts, also in another layout or on
another number of ranks. See the README for two machines, and for Slurm.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from python_topics import Data, load
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm

import funcnet as fn

LAYOUTS = ("data", "zero", "sharded", "tensor", "pipeline")
RATE, WEIGHT_DECAY, NORM = 3e-3, 0.1, 1.0
MICRO_BATCHES = 4
"""The parts of a batch that a pipeline's stages pass on one after another."""


class Size(NamedTuple):
    """Of the net, and of its training."""

    layers: int
    width: int
    heads: int
    context: int
    """The characters that the net sees at most."""
    batch: int
    """On all ranks."""
    steps: int
    every: int
    """The steps after which the run is saved."""


FULL = Size(layers=4, width=128, heads=4, context=256, batch=16, steps=1000, every=50)
SMALL = Size(layers=2, width=32, heads=4, context=32, batch=8, steps=20, every=5)


def gpt(layout: str, mesh: DeviceMesh, size: Size, classes: int) -> fn.Layer:
    """From characters (batch, tokens) to logits (batch, classes, tokens).

    In each layout the params are those, or parts of those, that a single process has.
    """

    def placed(layer: fn.Layer) -> fn.Layer:
        layer = fn.distributed.data_parallel(layer, mesh)
        return fn.distributed.sharded(layer, mesh) if layout == "sharded" else layer

    def block() -> fn.Layer:
        options = {
            "dim_feedforward": 4 * size.width,
            "dropout": 0.0,
            "activation": "gelu",
            "batch_first": True,
            "norm_first": True,
            "is_causal": True,
            "rotary": fn.rotary(),
        }
        if layout == "tensor":
            return fn.distributed.parallel_encoder_layer(size.heads, mesh, **options)
        return fn.transformer_encoder_layer(size.heads, **options)

    return fn.serial(
        embedding=placed(fn.embedding(classes, size.width)),
        dropout=placed(fn.dropout(0.1)),
        **{f"block{number}": placed(block()) for number in range(size.layers)},
        norm=placed(fn.layer_norm()),
        head=placed(fn.linear(classes)),
        classes_first=fn.permute(0, 2, 1),
    )


def adamw(layout: str, mesh: DeviceMesh) -> fn.Optimizer:
    """AdamW of the mean of the ranks' gradients, clipped by the norm of all of them.

    Its state has the same paths in all layouts, so that each can go on from another's checkpoint.
    """
    clipped = (
        fn.optimizers.clip_by_global_norm(NORM),
        fn.adamw(RATE, weight_decay=WEIGHT_DECAY),
    )
    if layout == "zero":
        return fn.distributed.zero(fn.chain(*clipped), mesh)
    return fn.chain(fn.distributed.mean(mesh), *clipped)


Step = Callable[[fn.TrainState, Tensor], tuple[fn.TrainState, Tensor]]
"""``(state, text) -> (state, loss)``, with the loss of all ranks."""


def step_of(
    options: argparse.Namespace,
    mesh: DeviceMesh,
    net: fn.Layer,
    optimizer: fn.Optimizer,
    size: Size,
) -> Step:
    """A step, on a batch that is a function of the key and of the number of the step."""
    data = fn.distributed.axis_of(mesh, "data")
    loss, count = fn.cross_entropy(), MICRO_BATCHES if options.layout == "pipeline" else 1

    def own_batch(state: fn.TrainState, text: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's rows of the batch that all ranks draw."""
        key = fn.fold_in(fn.fold_in(state.key, "batches"), state.step)
        first = fn.random.randint(key, (size.batch, 1), 0, len(text) - size.context)
        first = fn.distributed.part(first, mesh, micro_batches=count)
        windows = text[first + torch.arange(size.context + 1, device=text.device)]
        return windows[:, :-1], windows[:, 1:]

    if options.layout == "pipeline":
        staged = fn.distributed.pipeline_step(
            net, loss, optimizer, mesh, micro_batches=count, jit=not options.eager
        )

        def pipelined(state: fn.TrainState, text: Tensor) -> tuple[fn.TrainState, Tensor]:
            state, metrics = staged(state, own_batch(state, text))
            return state, data.mean(metrics["loss"])

        return pipelined

    step = fn.train_step(net, loss, optimizer)

    def one(state: fn.TrainState, text: Tensor) -> tuple[fn.TrainState, Tensor]:
        state, metrics = step(state, own_batch(state, text))
        return state, data.mean(metrics["loss"])

    return one if options.eager else fn.jit(one, donate=0)


def train(options: argparse.Namespace, size: Size, data: Data, device: torch.device) -> None:
    mesh = fn.distributed.mesh(model=options.model, pipe=options.pipe)
    text, x = data.train.to(device), torch.zeros(1, 1, dtype=torch.int64, device=device)
    net = gpt(options.layout, mesh, size, len(data.characters))
    optimizer = adamw(options.layout, mesh)
    begin = (
        fn.distributed.pipeline_state(net, optimizer, fn.key(options.seed), x, mesh)
        if options.layout == "pipeline"
        else fn.init_train_state(net, optimizer, fn.key(options.seed), x)
    )
    placed = fn.distributed.state_placements(begin, net, x)
    state, last = begin, None
    if options.checkpoint:
        last = fn.distributed.latest(options.checkpoint, mesh)
    if last:
        state = fn.distributed.load(last, begin, mesh, placed)
    step = step_of(options, mesh, net, optimizer, size)

    first = mesh.get_rank() == 0
    done, loss = int(state.step), None
    with tqdm(total=size.steps, initial=done, unit="step", disable=not first) as progress:
        for number in range(done + 1, size.steps + 1):
            state, loss = step(state, text)
            progress.update()
            if number % size.every == 0 or number == size.steps:
                progress.set_postfix(training=f"{loss.item() / math.log(2):.3f} bits")
                if options.checkpoint:
                    fn.distributed.save_step(options.checkpoint, number, state, mesh, placed)
    if first and loss is not None:
        sizes = " x ".join(f"{name} {mesh[name].size()}" for name in mesh.mesh_dim_names)
        print(f"{options.layout}, {sizes}: {loss.item() / math.log(2):.6f} bits per character")


def parse() -> tuple[argparse.Namespace, Size]:
    parser = argparse.ArgumentParser(
        description="Train a GPT of characters on one process, or on many, in any layout.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--layout", choices=LAYOUTS, default="data", help="what the ranks have parts of")
    everyone = "default: all ranks for the layout %s, else 1"
    hidden = {"type": int, "metavar": "N", "default": argparse.SUPPRESS}
    add("--model", help=f"ranks that have parts of each layer; {everyone % 'tensor'}", **hidden)
    add(
        "--pipe", help=f"ranks that have some of the layers each; {everyone % 'pipeline'}", **hidden
    )
    add("--seed", type=int, default=0, help="of the parameters, the batches and dropout")
    add("--steps", help=f"of training (default: {FULL.steps})", **hidden)
    add("--small", action="store_true", help="a net and a run for a test")
    add("--eager", action="store_true", help="do not compile the step")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--timeout", type=float, default=300.0, help="seconds that a rank waits for others")
    where = "where the run is saved, and goes on if there is one"
    add("--checkpoint", type=Path, metavar="FOLDER", help=where)
    options = parser.parse_args()
    size = SMALL if options.small else FULL
    return options, size._replace(steps=getattr(options, "steps", size.steps))


def main() -> None:
    options, size = parse()
    device = fn.distributed.initialize(device=options.device, timeout=options.timeout)
    ranks = torch.distributed.get_world_size()
    for name, layout in (("model", "tensor"), ("pipe", "pipeline")):
        given = getattr(options, name, ranks if options.layout == layout else 1)
        setattr(options, name, given)
    data, _ = load()
    train(options, size, data, device)


if __name__ == "__main__":
    main()
