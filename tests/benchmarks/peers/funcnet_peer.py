"""funcnet's workers: "eager" and "jit"."""

import torch
from funcnet_nets import NETS as MAKE
from torch_device import device_memory, waiting
from worker import LEARNING_RATE, NETS, Job, Workload, serve

import funcnet as fn


def make_net(workload: Workload) -> fn.Layer:
    """Linear layers with ReLU between; with remat, two by two in rematerialised blocks."""
    layers = [layer for size in workload.sizes[1:] for layer in (fn.linear(size), fn.relu())][:-1]
    if not workload.remat:
        return fn.serial(*layers)
    blocks = [fn.serial(*layers[place : place + 4]) for place in range(0, len(layers), 4)]
    return fn.serial(*[fn.remat(block) for block in blocks])


def net_job(mode: str, workload: Workload) -> Job:
    """One of `NETS`, with cross entropy and AdamW."""
    (example, classes, vocabulary), device = NETS[workload.net], workload.device
    key, shape = fn.key(1, device=device), (workload.batch, *example)
    numbers = fn.random.normal(key, shape)
    x = fn.random.randint(key, shape, 0, vocabulary) if vocabulary else numbers
    labels = shape if vocabulary else shape[:1]
    target = fn.random.randint(fn.key(2, device=device), labels, 0, classes).flatten()
    net, optimizer = MAKE[workload.net](), fn.adamw(LEARNING_RATE)
    step = fn.train_step(net, fn.cross_entropy(), optimizer)
    call = fn.jit(step, donate=0) if mode == "jit" else step
    return Job(
        lambda: fn.init_train_state(net, optimizer, fn.key(0, device=device), x),
        lambda state: call(state, (x, target))[0],
        waiting(device),
    )


def build(mode: str, workload: Workload) -> Job:
    """A workload as funcnet's users write it."""
    torch.set_num_threads(workload.threads)
    device, wait = workload.device, waiting(workload.device)
    if workload.draws:
        key = fn.key(0, device=device)
        draw = lambda key: fn.random.uniform(key, (workload.draws,))  # noqa: E731
        draw = fn.jit(draw) if mode == "jit" else draw
        return Job(lambda: None, lambda _: draw(key), wait)
    if workload.net:
        return net_job(mode, workload)
    x = fn.random.normal(fn.key(1, device=device), workload.shape(workload.sizes[0]))
    target = fn.random.normal(fn.key(2, device=device), workload.shape(workload.sizes[-1]))
    example = torch.empty(workload.batch, workload.sizes[0], device=device)
    net = make_net(workload)
    optimizer = {"sgd": fn.sgd, "adam": fn.adam}[workload.optimizer](LEARNING_RATE)
    call = step = fn.train_step(net, fn.mse(), optimizer)

    def start_one(key: torch.Tensor) -> fn.TrainState:
        return fn.init_train_state(net, optimizer, key, example)

    def start() -> fn.TrainState:
        key = fn.key(0, device=device)
        if workload.members:
            return fn.vmap(start_one)(fn.random.split(key, workload.members))
        return start_one(key)

    if workload.members:
        call = fn.vmap(step)
    if workload.scan:
        call = lambda state, batches: fn.scan(step, state, batches)  # noqa: E731
    if mode == "jit":
        call = fn.jit(call, donate=0)
    return Job(start, lambda state: call(state, (x, target))[0], wait)


if __name__ == "__main__":
    serve(build, f"funcnet {fn.__version__}", device_memory)
