"""Decoding of one token by a GPT with a cache of 256 tokens, beside PyTorch's with one too.

    python tests/benchmarks/decode.py

The net has 4 layers, 256 features, 8 heads and 4096 tokens; the batch is 1, on 2 threads. Each
peer decodes 255 tokens greedily from an empty cache, in turns; a time is the median over the
rounds, per token. PyTorch writes to a cache that it was given, and attends to what is in it.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from funcnet_nets import decoder
from torch_nets import gpt

import funcnet as fn

TOKENS = 256


def funcnet_decoder(mode: str) -> Callable[[int], None]:
    """One call for each token, or one for all of them."""
    net = decoder(TOKENS)
    first = torch.zeros(1, 1, dtype=torch.int64)
    params, state = net.init(fn.key(0), first)

    def step(params: Any, state: Any, token: Tensor) -> tuple[Any, Tensor]:
        logits, state = net.apply(params, token, state)
        return state, logits.argmax(-1, keepdim=True)

    def whole(params: Any, state: Any, token: Tensor, count: int) -> Tensor:
        def body(carry: Any, _: None) -> tuple[Any, Tensor]:
            state, token = step(params, *carry)
            return (state, token), token

        return fn.scan(body, (state, token), length=count)[1]

    if mode == "scan":
        all_at_once = fn.jit(whole, static=3)
        return lambda count: all_at_once(params, state, first, count)
    call = fn.jit(step, donate=1) if mode == "jit" else step

    def decode(count: int) -> None:
        token, now = first, fn.tree.map(torch.clone, state)
        for _ in range(count):
            now, token = call(params, now, token)

    return decode


def torch_decoder() -> Callable[[int], None]:
    """torch.nn in inference mode, with preallocated keys and values."""
    net = gpt()
    caches = [torch.zeros(2, 1, 8, TOKENS, 32) for _ in range(4)]
    embed, _, *blocks, norm, head, _ = net
    positions = nn.Embedding(TOKENS, 256)

    def attend(attention: nn.Module, x: Tensor, cache: Tensor, place: int) -> Tensor:
        parts = attention.project(x).chunk(3, -1)
        query, key, value = (each.unflatten(-1, (8, -1)).transpose(1, 2) for each in parts)
        cache[0, :, :, place], cache[1, :, :, place] = key[:, :, 0], value[:, :, 0]
        seen = cache[:, :, :, : place + 1]
        y = F.scaled_dot_product_attention(query, seen[0], seen[1])
        return attention.out(y.transpose(1, 2).flatten(-2))

    @torch.inference_mode()
    def decode(count: int) -> None:
        token = torch.zeros(1, 1, dtype=torch.int64)
        for place in range(count):
            x = embed(token) + positions.weight[place]
            for layer, cache in enumerate(caches):
                (before, attention), mlp = blocks[2 * layer], blocks[2 * layer + 1]
                x = x + attend(attention, before(x), cache, place)
                x = mlp(x)
            token = head(norm(x)).argmax(-1)

    return decode


def main() -> None:
    """Print a table: milliseconds a token, and the ratios to PyTorch's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    peers = {"torch eager": torch_decoder()}
    for mode in ("eager", "jit", "scan"):
        peers[f"funcnet {mode}"] = funcnet_decoder(mode)
    times: dict[str, list[float]] = {name: [] for name in peers}
    for decode in peers.values():
        decode(TOKENS - 1)
    for _ in range(options.rounds):
        for name, decode in peers.items():
            begin = time.perf_counter()
            decode(TOKENS - 1)
            times[name].append((time.perf_counter() - begin) / (TOKENS - 1) * 1e3)
    found = {name: statistics.median(each) for name, each in times.items()}
    print("| peer | ms a token | / torch eager |\n|---|---|---|")
    for name, each in found.items():
        print(f"| {name} | {each:.3f} | {each / found['torch eager']:.2f} |")


if __name__ == "__main__":
    main()
