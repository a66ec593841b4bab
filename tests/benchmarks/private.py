"""Clipped gradients of single examples beside torch.func, a plain compiled step, and Opacus.

    python tests/benchmarks/private.py [--rows "mlp eager" ...]

A step computes each example's gradient norm, clips and sums, without noise, and takes SGD's step,
but for the rows with torch.func. The MLP is 784-256-256-10, batch 128; the CNN has 2 convolutions
and 2 linear layers, batch 32 of 28 x 28; the GPT 4 layers of 128 features, batch 16 x 64. Float32,
one thread. Times are of the processor, of five steps in a row, the peers in turn in one process:
medians over the rounds, of the ratio too.
Memory is the greatest resident set of a process of its own beyond that with data and params, and
after a first step of a small batch; of a program, its workspace and results. Opacus is its
PrivacyEngine with grad_sample_mode="ghost"; without it (it is in the extra bench) its row says so.
"""

import argparse
import functools
import gc
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "peers"))
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from worker import host_memory

import funcnet as fn

VOCABULARY, WIDTH, HEADS, LAYERS, CONTEXT = 65, 128, 4, 4, 64
RATE, BOUND = 0.1, 1.0
IN_A_ROW = 5
"""Steps of a peer before it is the turn of the next one, as in a training."""
# By row: the net, the batch, and the peers, of which the last one is compared with.
ROWS = {
    "mlp eager": ("mlp", 128, ("funcnet", "torch.func")),
    "cnn eager": ("cnn", 32, ("funcnet", "torch.func")),
    "mlp jit": ("mlp", 128, ("funcnet jit", "plain jit")),
    "gpt jit": ("gpt", 16, ("funcnet jit", "plain jit")),
    "gpt eager, Opacus": ("gpt", 16, ("funcnet", "opacus")),
    "gpt jit, Opacus": ("gpt", 16, ("funcnet jit", "opacus")),
}
Step = Callable[[], Any]


def data(net: str, batch: int) -> tuple[Tensor, Tensor]:
    """x and target."""
    if net == "gpt":
        both = torch.randint(0, VOCABULARY, (2, batch, CONTEXT))
        return both[0], both[1]
    return torch.randn(batch, 1, 28, 28), torch.randint(0, 10, (batch,))


def funcnet_net(net: str) -> fn.Layer:
    """The net of layers."""
    if net == "mlp":
        hidden = [layer for _ in range(2) for layer in (fn.linear(256), fn.relu())]
        return fn.serial(fn.flatten(), *hidden, fn.linear(10))
    if net == "cnn":
        convolutions = [
            layer
            for channels in (32, 64)
            for layer in (fn.conv2d(channels, 3, padding=1), fn.relu(), fn.max_pool2d(2))
        ]
        return fn.serial(*convolutions, fn.flatten(), fn.linear(128), fn.relu(), fn.linear(10))
    options = {"batch_first": True, "norm_first": True, "is_causal": True}
    blocks = [
        fn.transformer_encoder_layer(HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", **options)
        for _ in range(LAYERS)
    ]
    ends = fn.layer_norm(), fn.linear(VOCABULARY), fn.flatten(0, 1)
    embedding = fn.embedding(VOCABULARY, WIDTH)
    return fn.serial(embedding, fn.learned_positions(CONTEXT), *blocks, *ends)


def loss_of(net: str) -> fn.Loss:
    """The loss; of the GPT, of all tokens."""
    plain = fn.cross_entropy()
    if net != "gpt":
        return plain
    return fn.Loss(
        lambda prediction, target: plain.apply(prediction, target.flatten()),
        lambda prediction, target: plain.vjp(prediction, target.flatten()),
    )


class Attention(nn.Module):
    """Causal attention of its own, of layers that Opacus knows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.inner(x).chunk(3, -1)
        heads = [each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in parts]
        y = F.scaled_dot_product_attention(*heads, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Residual(nn.Sequential):
    """x plus what its layers make of it."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Positions(nn.Module):
    """Learned positions, by an embedding, which Opacus knows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(CONTEXT, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(torch.arange(CONTEXT).repeat(len(x), 1))


def torch_net(net: str) -> nn.Module:
    """The net of modules."""
    if net == "mlp":
        sizes = ((784, 256), (256, 256))
        hidden = [layer for size in sizes for layer in (nn.Linear(*size), nn.ReLU())]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(256, 10))
    if net == "cnn":
        sizes = ((1, 32), (32, 64))
        convolutions = [
            layer
            for size in sizes
            for layer in (nn.Conv2d(*size, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        ]
        head = [nn.Flatten(), nn.Linear(3136, 128), nn.ReLU(), nn.Linear(128, 10)]
        return nn.Sequential(*convolutions, *head)
    blocks = [
        layer
        for _ in range(LAYERS)
        for layer in (
            Residual(nn.LayerNorm(WIDTH), Attention()),
            Residual(
                nn.LayerNorm(WIDTH),
                nn.Linear(WIDTH, 4 * WIDTH),
                nn.GELU(),
                nn.Linear(4 * WIDTH, WIDTH),
            ),
        )
    ]
    ends = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)
    return nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), Positions(), *blocks, *ends)


def descended(params: Any, grads: Any) -> Any:
    """SGD's step."""
    return fn.tree.map(lambda p, g: p - RATE * g, params, grads)


def make_funcnet(net: str, peer: str, x: Tensor, target: Tensor) -> Step:
    """Private steps, or plain ones, eager or compiled."""
    model, loss = funcnet_net(net), loss_of(net)
    params, _ = model.init(fn.key(0), x)
    plain, descends = peer == "plain jit", net == "gpt" or peer.endswith("jit")
    f = (
        fn.value_and_grad(model, loss)
        if plain
        else fn.private_value_and_grad(model, loss, BOUND, 0)
    )

    def step(params: Any, x: Tensor, target: Tensor) -> Any:
        grads = f(params, (x, target))[1]
        return descended(params, grads) if descends else grads

    if not peer.endswith("jit"):
        return lambda: step(params, x, target)
    run = fn.jit(step)
    made = functools.partial(run, params, x, target)
    made.lower = functools.partial(run.lower, params, x, target)  # type: ignore[attr-defined]
    return made


def make_torch_func(net: str, x: Tensor, target: Tensor) -> Step:
    """The gradients of all examples by torch.func, then their norms and the sum."""
    module = torch_net(net)
    params = {name: leaf.detach() for name, leaf in module.named_parameters()}

    def loss(params: Any, x: Tensor, target: Tensor) -> Tensor:
        y = torch.func.functional_call(module, params, (x[None],))
        return F.cross_entropy(y, target[None])

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))

    def step() -> Any:
        grads = gradients(params, x, target)
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]).norm(dim=0)
        factor = (BOUND / norms).clamp(max=1.0) / len(x)
        return {name: torch.einsum("i,i...", factor, g) for name, g in grads.items()}

    return step


def make_opacus(net: str, x: Tensor, target: Tensor) -> Step:
    """Opacus with ghost clipping: two backward passes and no gradients of examples."""
    from opacus import PrivacyEngine

    warnings.simplefilter("ignore")
    module = torch_net(net).train()
    optimizer = torch.optim.SGD(module.parameters(), RATE)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, target), len(x))
    module, optimizer, criterion, _ = PrivacyEngine().make_private(
        module=module,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=0.0,
        max_grad_norm=BOUND,
        criterion=nn.CrossEntropyLoss(),
        poisson_sampling=False,
        grad_sample_mode="ghost",
    )

    def step() -> None:
        optimizer.zero_grad()
        y = module(x)
        criterion(y.flatten(0, 1), target.flatten(), shape=target.shape).backward()
        optimizer.step()

    return step


def make(peer: str, net: str, batch: int) -> Step:
    """A step of a peer."""
    torch.manual_seed(0)
    x, target = data(net, batch)
    if peer == "torch.func":
        return make_torch_func(net, x, target)
    if peer == "opacus":
        return make_opacus(net, x, target)
    return make_funcnet(net, peer, x, target)


def peak(peer: str, net: str, batch: int) -> float:
    """MiB that steps take beyond data and params."""
    step: Any = make(peer, net, batch)
    if peer.endswith("jit"):
        workspace = re.search(r"program, .* a workspace w0 of (\d+) bytes", step.lower().buffers)
        results = fn.tree.leaves(step())
        return (int(workspace[1]) + sum([leaf.nbytes for leaf in results])) / 2**20
    small = make(peer, net, 2)
    for _ in range(2):
        small()
    gc.collect()
    watch = host_memory()
    for _ in range(3):
        step()
    return watch()


def timed(peers: tuple[str, ...], net: str, batch: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of the processor for a step, of each peer in each round."""
    steps = {peer: make(peer, net, batch) for peer in peers}
    times: dict[str, list[float]] = {peer: [] for peer in peers}
    for _ in range(rounds + 2):
        for peer, step in steps.items():
            start = time.process_time()
            for _ in range(IN_A_ROW):
                step()
            times[peer].append(1e3 * (time.process_time() - start) / IN_A_ROW)
    return {peer: found[2:] for peer, found in times.items()}


def main() -> None:
    """Print the table, or, for one run, its number."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15, help="rounds (default 15)")
    parser.add_argument("--rows", nargs="*", default=ROWS, help=f"among {[*ROWS]}")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        peer, net, batch = options.peak
        print(peak(peer, net, int(batch)))
        return
    print(
        "| row | ms | peer, ms | ratio | MiB | peer, MiB | ratio |\n|---|---|---|---|---|---|---|"
    )
    for row in options.rows:
        net, batch, peers = ROWS[row]
        try:
            times = timed(peers, net, batch, options.rounds)
        except ImportError as error:
            print(f"| {row} | {error}: pip install opacus |")
            continue
        ratio = statistics.median(a / b for a, b in zip(*times.values(), strict=True))
        memory = []
        for peer in peers:
            command = [sys.executable, __file__, "--peak", peer, net, str(batch)]
            found = subprocess.run(command, check=True, capture_output=True, text=True)
            memory.append(float(found.stdout))
        one, other = (f"{statistics.median(each):.2f}" for each in times.values())
        sizes = f"{memory[0]:.1f} | {memory[1]:.1f} | {memory[0] / max(memory[1], 1e-3):.3f}"
        print(f"| {row} | {one} | {other} | {ratio:.3f} | {sizes} |", flush=True)


if __name__ == "__main__":
    main()
