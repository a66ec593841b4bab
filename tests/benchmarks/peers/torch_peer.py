"""PyTorch's workers: "eager", "compile", and "one by one" for a population's models in turn.

"graphs" is "compile" with CUDA graphs, which replay a call's kernels without Python's part in it.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch_device import device_memory, waiting
from torch_nets import NETS as MAKE
from worker import LEARNING_RATE, NETS, Job, Workload, serve


class Checkpointed(nn.Sequential):
    """A block that is run again for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def make_net(workload: Workload) -> nn.Sequential:
    """Linear layers with ReLU between; with remat, two by two in checkpointed blocks."""
    pairs = pairwise(workload.sizes)
    layers = [layer for pair in pairs for layer in (nn.Linear(*pair), nn.ReLU())][:-1]
    if workload.remat:
        layers = [Checkpointed(*layers[place : place + 4]) for place in range(0, len(layers), 4)]
    return nn.Sequential(*layers).to(workload.device)


def compiled(mode: str, f: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled for its shapes, if that is the mode."""
    if mode == "graphs":
        return torch.compile(f, dynamic=False, mode="reduce-overhead")
    return torch.compile(f, dynamic=False) if mode == "compile" else f


def begin(mode: str) -> None:
    """Tell CUDA graphs that a step begins, and that nobody needs the results of the last one."""
    if mode == "graphs":
        torch.compiler.cudagraph_mark_step_begin()


def trainer(mode: str, workload: Workload) -> tuple[Callable[[], None], Callable[..., None]]:
    """A model's ``reset()``, in place, and ``step(x, target)``: torch.nn, autograd, torch.optim."""
    net = make_net(workload)
    make = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[workload.optimizer]
    # Adam counts its steps on the CPU unless it is told that a graph shall hold them.
    options = {"capturable": True} if mode == "graphs" and workload.optimizer == "adam" else {}
    optimizer = make(net.parameters(), lr=LEARNING_RATE, **options)
    loss = compiled(mode, lambda x, target: F.mse_loss(net(x), target))
    update = compiled(mode, optimizer.step)

    def step(x: Tensor, target: Tensor) -> None:
        begin(mode)
        optimizer.zero_grad()
        loss(x, target).backward()
        update()

    def reset() -> None:
        for module in net.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        for state in optimizer.state.values():
            for each in state.values():
                if isinstance(each, Tensor):
                    each.zero_()

    return reset, step


def population(mode: str, workload: Workload, x: Tensor, target: Tensor) -> Job:
    """SGD of all members at once, by torch.func."""
    net = make_net(workload)

    def loss(params: dict[str, Tensor], x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        value = F.mse_loss(functional_call(net, params, (x,)), target)
        return value, value

    def step(params: dict[str, Tensor], x: Tensor, target: Tensor) -> tuple[Any, Tensor]:
        grads, value = grad(loss, has_aux=True)(params, x, target)
        return {name: params[name] - LEARNING_RATE * grads[name] for name in params}, value

    members = [make_net(workload) for _ in range(workload.members)]
    initial = {name: each.detach() for name, each in stack_module_state(members)[0].items()}
    call = compiled(mode, vmap(step))

    def advance(params: dict[str, Tensor]) -> dict[str, Tensor]:
        begin(mode)
        found = call(params, x, target)[0]
        # The next replay writes to the memory of this one's results.
        return {name: each.clone() for name, each in found.items()} if mode == "graphs" else found

    return Job(lambda: initial, advance, waiting(workload.device))


def net_job(mode: str, workload: Workload) -> Job:
    """One of `NETS`, with cross entropy and AdamW; the fused one, which is the fastest."""
    (example, classes, vocabulary), device = NETS[workload.net], workload.device
    shape = (workload.batch, *example)
    numbers = torch.randn(shape, device=device)
    x = torch.randint(vocabulary, shape, device=device) if vocabulary else numbers
    labels = shape if vocabulary else shape[:1]
    target = torch.randint(classes, labels, device=device).flatten()
    net = MAKE[workload.net]().to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, fused=mode == "eager")
    loss = compiled(mode, lambda: F.cross_entropy(net(x), target))
    update = compiled(mode, optimizer.step)

    def advance(_: None) -> None:
        begin(mode)
        optimizer.zero_grad()
        loss().backward()
        update()

    return Job(lambda: None, advance, waiting(device))


def build(mode: str, workload: Workload) -> Job:
    """A workload as PyTorch's users write it."""
    torch.set_num_threads(workload.threads)
    torch.manual_seed(0)
    device, wait = workload.device, waiting(workload.device)
    if workload.draws:
        draw = compiled(mode, lambda: torch.rand(workload.draws, device=device))
        return Job(lambda: None, lambda _: begin(mode) or draw(), wait)
    if workload.net:
        return net_job(mode, workload)
    x = torch.randn(workload.shape(workload.sizes[0]), device=device)
    target = torch.randn(workload.shape(workload.sizes[-1]), device=device)
    if workload.members and mode != "one by one":
        return population(mode, workload, x, target)
    members = [trainer(mode, workload) for _ in range(workload.members or 1)]

    def start() -> None:
        for reset, _ in members:
            reset()

    def advance(_: None) -> None:
        if workload.scan:
            _, step = members[0]
            for batch in zip(x, target, strict=True):
                step(*batch)
        elif workload.members:
            for (_, step), *batch in zip(members, x, target, strict=True):
                step(*batch)
        else:
            members[0][1](x, target)

    return Job(start, advance, wait)


if __name__ == "__main__":
    serve(build, f"torch {torch.__version__}", device_memory)
