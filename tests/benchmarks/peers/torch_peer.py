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


def make_net(workload: Workload) -> nn.Module:
    """One of `NETS`, or linear layers with ReLU between.

    With remat these are two by two in checkpointed blocks.
    """
    if workload.net:
        return MAKE[workload.net]().to(workload.device)
    pairs = pairwise(workload.sizes)
    layers = [layer for pair in pairs for layer in (nn.Linear(*pair), nn.ReLU())][:-1]
    if workload.remat:
        layers = [Checkpointed(*layers[place : place + 4]) for place in range(0, len(layers), 4)]
    return nn.Sequential(*layers).to(workload.device)


def make_data(workload: Workload) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a call."""
    device = workload.device
    if not workload.net:
        shapes = [workload.shape(features) for features in (workload.sizes[0], workload.sizes[-1])]
        return torch.randn(shapes[0], device=device), torch.randn(shapes[1], device=device)
    example, classes, vocabulary, _ = NETS[workload.net]
    shape = workload.shape(*example)
    numbers = torch.randn(shape, device=device)
    x = torch.randint(vocabulary, shape, device=device) if vocabulary else numbers
    return x, torch.randint(classes, workload.labels, device=device)


def loss_of(workload: Workload) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross entropy for one of `NETS`, else the mean square."""
    return F.cross_entropy if workload.net else F.mse_loss


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
    net, value = make_net(workload), loss_of(workload)
    # Adam counts its steps on the CPU unless it is told that a graph shall hold them.
    capturable = {"capturable": True} if mode == "graphs" else {}
    make, options = {
        "sgd": (torch.optim.SGD, {}),
        "adam": (torch.optim.Adam, capturable),
        # Eager, the fused one is the fastest.
        "adamw": (torch.optim.AdamW, {"fused": mode == "eager", **capturable}),
    }[workload.optimizer]
    optimizer = make(net.parameters(), lr=LEARNING_RATE, **options)
    loss = compiled(mode, lambda x, target: value(net(x), target))
    update = compiled(mode, optimizer.step)

    def step(x: Tensor, target: Tensor) -> None:
        begin(mode)
        optimizer.zero_grad()
        loss(x, target).backward()
        update()

    def reset() -> None:
        for module in net.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for state in optimizer.state.values():
            for each in state.values():
                if isinstance(each, Tensor):
                    each.zero_()

    return reset, step


def population(mode: str, workload: Workload, x: Tensor, target: Tensor) -> Job:
    """SGD of all members at once, by torch.func."""
    net, value_of = make_net(workload), loss_of(workload)

    def loss(params: dict[str, Tensor], x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        value = value_of(functional_call(net, params, (x,)), target)
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


def build(mode: str, workload: Workload) -> Job:
    """A workload as PyTorch's users write it."""
    torch.set_num_threads(workload.threads)
    torch.manual_seed(0)
    device, wait = workload.device, waiting(workload.device)
    if workload.draws:
        draw = compiled(mode, lambda: torch.rand(workload.draws, device=device))
        return Job(lambda: None, lambda _: begin(mode) or draw(), wait)
    x, target = make_data(workload)
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
