"""funcnet's workers: "eager" and "jit"."""

import torch
from funcnet_nets import NETS as MAKE
from torch_device import device_memory, waiting
from worker import LEARNING_RATE, NETS, Job, Workload, serve

import funcnet as fn


def make_net(workload: Workload) -> fn.Layer:
    """One of `NETS`, or linear layers with ReLU between.

    With remat these are two by two in rematerialised blocks.
    """
    if workload.net:
        return MAKE[workload.net]()
    layers = [layer for size in workload.sizes[1:] for layer in (fn.linear(size), fn.relu())][:-1]
    if not workload.remat:
        return fn.serial(*layers)
    blocks = [fn.serial(*layers[place : place + 4]) for place in range(0, len(layers), 4)]
    return fn.serial(*[fn.remat(block) for block in blocks])


def make_data(workload: Workload) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of a call."""
    x_key, target_key = [fn.key(seed, device=workload.device) for seed in (1, 2)]
    if not workload.net:
        shapes = [workload.shape(features) for features in (workload.sizes[0], workload.sizes[-1])]
        return fn.random.normal(x_key, shapes[0]), fn.random.normal(target_key, shapes[1])
    example, classes, vocabulary, _ = NETS[workload.net]
    shape = workload.shape(*example)
    numbers = fn.random.normal(x_key, shape)
    x = fn.random.randint(x_key, shape, 0, vocabulary) if vocabulary else numbers
    return x, fn.random.randint(target_key, workload.labels, 0, classes)


def build(mode: str, workload: Workload) -> Job:
    """A workload as funcnet's users write it."""
    torch.set_num_threads(workload.threads)
    device, wait = workload.device, waiting(workload.device)
    if workload.draws:
        key = fn.key(0, device=device)
        draw = lambda key: fn.random.uniform(key, (workload.draws,))  # noqa: E731
        draw = fn.jit(draw) if mode == "jit" else draw
        return Job(lambda: None, lambda _: draw(key), wait)
    x, target = make_data(workload)
    example = x[(0,) * sum(map(bool, (workload.scan, workload.members)))]
    net = make_net(workload)
    make = {"sgd": fn.sgd, "adam": fn.adam, "adamw": fn.adamw}[workload.optimizer]
    loss, optimizer = fn.cross_entropy() if workload.net else fn.mse(), make(LEARNING_RATE)
    call = step = fn.train_step(net, loss, optimizer, donate=True)

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
