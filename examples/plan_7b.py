"""Where a GPT of 7 billion parameters fits, on up to 1024 GPUs, and which layout is fastest.

    python examples/plan_7b.py
    python examples/plan_7b.py --ranks 64 --sequence 4096 --most 20

Nothing is trained and no GPU is needed: `fn.distributed.plans` runs each layout of the model on
tensors without memory, sees what it holds and communicates, and computes the time by a model of the
network. The GPT has the sizes of LLaMA-7B (Touvron et al. 2023): 32 layers, 4096 wide, 32 heads,
32,000 tokens. It computes in bfloat16; parameters, gradients and the state of Adam are float32.

The program prints, for each number of GPUs, the layouts that are fastest, then what the bubble of
each schedule costs, and what the same model of time says of two runs that were published.
"""

import argparse
import time
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

import funcnet as fn
from funcnet.distributed import Device, Link, Network


class Size(NamedTuple):
    """Of the GPT."""

    layers: int = 32
    width: int = 4096
    heads: int = 32
    tokens: int = 32_000


def stages_of(size: Size, mesh: Mapping[str, int], sharding: str, again: bool) -> list[fn.Layer]:
    """The GPT's layers for the ranks of "pipe", parted over those of "model".

    ``again``: the activations in a block are computed again for the backward pass.
    """
    count = mesh["pipe"]
    if mesh["model"] > 8:
        raise ValueError(f"{mesh['model']} ranks of 'model' are more than a machine has")
    for what, number, ranks in (
        ("layers", size.layers, count),
        ("heads", size.heads, mesh["model"]),
    ):
        if number % ranks:
            raise ValueError(f"{ranks} ranks do not divide {number} {what}")

    def own(layer: fn.Layer, again: bool = False) -> fn.Layer:
        layer = fn.remat(layer) if again else layer
        return fn.distributed.sharded(layer, mesh) if sharding == "sharded" else layer

    block = fn.distributed.parallel_encoder_layer(
        size.heads,
        mesh,
        4 * size.width,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
        is_causal=True,
        rotary=fn.rotary(),
    )
    blocks = fn.repeat(own(block, again), size.layers // count)
    embed = own(fn.distributed.vocabulary_embedding(size.tokens, size.width, mesh))
    head = fn.serial(
        fn.layer_norm(None),
        fn.distributed.column_linear(size.tokens, mesh, False),
        fn.permute(0, 2, 1),
    )
    # Beside the params, which are float32, a rank has a copy of them in bfloat16.
    layers = [embed, blocks, own(head)]
    cuts = [layers] if count == 1 else [layers[:2], *[[blocks]] * (count - 2), layers[1:]]
    middle = fn.cast(blocks, torch.bfloat16)
    return [middle if cut == [blocks] else fn.cast(fn.serial(*cut), torch.bfloat16) for cut in cuts]


def layout(
    size: Size, options: argparse.Namespace, mesh: Mapping[str, int], sharding: str
) -> dict[str, Any]:
    """What `plan` needs for a mesh."""
    stages, adam = stages_of(size, mesh, sharding, options.again), fn.adam(3e-4)
    optimizers = {
        "none": lambda: fn.chain(fn.distributed.mean(mesh), adam),
        "zero": lambda: fn.distributed.zero(adam, mesh),
        "sharded": lambda: adam,
    }
    return {
        "model": stages,
        "loss": fn.distributed.vocabulary_cross_entropy(mesh),
        "optimizer": optimizers[sharding](),
        "micro_batches": max(1, options.batch // (mesh["data"] * options.sequences)),
        "schedule": options.schedule,
        "overlap": options.overlap,
    }


def tables(options: argparse.Namespace, size: Size) -> None:
    """Print the fastest layouts for each number of ranks."""
    batch = options.batch
    x = torch.zeros(batch, options.sequence, dtype=torch.int64, device="meta")
    make = partial(layout, size, options)
    for ranks in options.ranks:
        begin = time.perf_counter()
        found = fn.distributed.plans(make, x, ranks, target=x)
        seconds = time.perf_counter() - begin
        fits = sum(each.fits for each in found.layouts)
        print(f"\n{ranks} GPUs: {fits} of {len(found.layouts)} layouts fit ({seconds:.0f} s)\n")
        print("\n".join(found.lines(options.most)))
        if fits:
            rate = batch * options.sequence / found.fastest.plan.seconds / ranks
            print(f"\nthe fastest: {rate:,.0f} tokens a second a GPU")


def number(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expects an integer of at least 1, got {text}")
    return int(text)


def bubbles(options: argparse.Namespace, size: Size) -> None:
    """Print what waiting costs, by schedule and number of micro-batches."""
    mesh = {"pipe": 8, "data": 16, "model": 8}
    print(f"\npipe=8 x data=16 x model=8, {options.sequence} tokens\n")
    print("micro-batches  schedule     bubble  step      peak")
    for micro in (8, 16, 64):
        x = torch.zeros(16 * micro, options.sequence, dtype=torch.int64, device="meta")
        for schedule in ("gpipe", "one_f_one_b", "zero_bubble"):
            told = argparse.Namespace(
                batch=len(x),
                sequences=1,
                schedule=schedule,
                overlap=options.overlap,
                again=options.again,
            )
            made = layout(size, told, mesh, "zero")
            found = fn.distributed.plan(made.pop("model"), x, mesh, target=x, **made)
            step, peak = f"{found.seconds * 1e3:.0f} ms", f"{found.memory.peak / 1e9:.1f} GB"
            print(f"{micro:>13}  {schedule:11}  {found.bubble:>6.1%}  {step:8}  {peak}")


def published(size: Size) -> None:
    """Print what the model of time says of runs on A100s that were published.

    LLaMA-7B: 82,432 GPU-hours for 1.0e12 tokens, in steps of 4 million (Touvron et al. 2023,
    Table 15). The number of GPUs and the layout are not told; here it is sharded over 256.
    Megatron-LM with 7.5 billion parameters: 36 layers on 128 GPUs, tensor parallelism over 4, 512
    sequences of 2048 tokens a step (Narayanan et al. 2021, Table 1): 142 TFLOP/s a GPU, by their
    count 64 GFLOP a token, with activations that are computed again.
    """
    a100 = Device(memory=80e9, flops=312e12, utilization=0.6, bandwidth=2.0e12)
    network = Network(8, Link(3e-6, 1 / 230e9), Link(1e-5, 1 / 21e9))
    cases = (
        ("LLaMA-7B", size, {"pipe": 1, "data": 256, "model": 1}, "sharded", 2048, 8, 3370),
        (
            "Megatron 7.5B",
            size._replace(layers=36, tokens=51_200),
            {"pipe": 1, "data": 32, "model": 4},
            "none",
            512,
            4,
            2220,
        ),
    )
    print("\nA100s at 60 % of their FLOPs: tokens a second a GPU")
    for name, own, mesh, sharding, batch, sequences, reported in cases:
        x = torch.zeros(batch, 2048, dtype=torch.int64, device="meta")
        told = argparse.Namespace(
            batch=batch,
            sequences=sequences,
            schedule="one_f_one_b",
            overlap=["data"],
            again=True,
        )
        made = layout(own, told, mesh, sharding)
        found = fn.distributed.plan(
            made.pop("model"), x, mesh, target=x, device=a100, network=network, **made
        )
        rate = batch * 2048 / found.seconds / found.ranks
        print(f"{name:14} planned {rate:,.0f}, reported {reported:,}")
        print(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=number, nargs="+", default=[1, 8, 64, 256, 1024])
    parser.add_argument("--batch", type=number, default=1024, help="sequences of a step")
    parser.add_argument("--sequence", type=number, default=4096, help="tokens of one")
    parser.add_argument("--sequences", type=number, default=1, help="of a micro-batch")
    parser.add_argument("--schedule", default="one_f_one_b")
    parser.add_argument("--again", action="store_true", help="compute activations again")
    parser.add_argument("--overlap", nargs="*", default=[], help='such as "data"')
    parser.add_argument("--most", type=number, default=8, help="layouts that are shown")
    options = parser.parse_args()
    tables(options, Size())
    bubbles(options, Size())
    published(Size())


if __name__ == "__main__":
    main()
