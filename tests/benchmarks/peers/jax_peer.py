"""JAX's worker: "jit", with the state donated."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
from jax import numpy as jnp
from jax_nets import NETS as MAKE
from worker import LEARNING_RATE, NETS, Job, Workload, serve

Params = list[dict[str, jax.Array]]
State = tuple[Params, Any]


def init(key: jax.Array, sizes: tuple[int, ...]) -> Params:
    """Linear layers whose weights are uniform in ±1 / sqrt(inputs), PyTorch's own."""
    params = []
    for inputs, outputs in pairwise(sizes):
        key, weight_key, bias_key = jax.random.split(key, 3)
        bound = inputs**-0.5
        weight = jax.random.uniform(weight_key, (inputs, outputs), minval=-bound, maxval=bound)
        bias = jax.random.uniform(bias_key, (outputs,), minval=-bound, maxval=bound)
        params.append({"weight": weight, "bias": bias})
    return params


def apply(params: Params, x: jax.Array, remat: bool) -> jax.Array:
    """Linear layers with ReLU between; with remat, two by two in rematerialised blocks."""

    def block(layers: Params, x: jax.Array, last: bool) -> jax.Array:
        for place, layer in enumerate(layers):
            x = x @ layer["weight"] + layer["bias"]
            if not last or place < len(layers) - 1:
                x = jax.nn.relu(x)
        return x

    if not remat:
        return block(params, x, True)
    again = jax.checkpoint(block, static_argnums=2)
    for place in range(0, len(params), 2):
        x = again(params[place : place + 2], x, place + 2 >= len(params))
    return x


def use(device: str) -> None:
    """Compute on a device, given by torch's name for it."""
    kind, _, index = device.partition(":")
    try:
        found = jax.devices(kind)[int(index or 0)]
    except (RuntimeError, IndexError):
        raise RuntimeError(f"this JAX has no {device}") from None
    jax.config.update("jax_default_device", found)


def device_memory() -> Callable[[], float]:
    """The peak of JAX's arrays on the GPU beyond what they take now.

    The peak is that of the whole process; what is watched is the largest workload in it.
    """
    device = jax.config.jax_default_device or jax.devices()[0]
    before = device.memory_stats()["bytes_in_use"]
    return lambda: (device.memory_stats()["peak_bytes_in_use"] - before) / 2**20


def net_job(workload: Workload) -> Job:
    """One of `NETS`, with cross entropy and optax's optimizer; images have their channels last."""
    import optax

    example, classes, vocabulary, _ = NETS[workload.net]
    example = (*example[1:], example[0]) if len(example) == 3 else example
    shape, keys = workload.shape(*example), jax.random.split(jax.random.key(1), 2)
    numbers = jax.random.normal(keys[0], shape)
    x = jax.random.randint(keys[0], shape, 0, vocabulary) if vocabulary else numbers
    target = jax.random.randint(keys[1], workload.labels, 0, classes)
    init, apply = MAKE[workload.net]()
    optimizer = {
        "sgd": optax.sgd(LEARNING_RATE),
        "adam": optax.adam(LEARNING_RATE),
        "adamw": optax.adamw(LEARNING_RATE, weight_decay=1e-2),
    }[workload.optimizer]

    def start(key: jax.Array) -> Any:
        params, _ = init(key, example)
        return params, optimizer.init(params), 0

    def step(state: Any, x: jax.Array, target: jax.Array) -> Any:
        params, opt_state, count = state

        def loss(params: Any) -> jax.Array:
            logits = apply(params, x, jax.random.fold_in(keys[0], count))
            return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, count + 1), value

    key = jax.random.key(0)
    if workload.members:
        key, start, step = jax.random.split(key, workload.members), jax.vmap(start), jax.vmap(step)
    begin, call = jax.jit(start), jax.jit(step, donate_argnums=0)
    advance = lambda state: call(state, x, target)[0]  # noqa: E731
    return Job(lambda: begin(key), advance, jax.block_until_ready)


def build(mode: str, workload: Workload) -> Job:
    """A workload as JAX's users write it; Adam is optax's."""
    if workload.device != "cpu":
        use(workload.device)
    if workload.draws:
        key, draw = jax.random.key(0), jax.jit(lambda key: jax.random.uniform(key, workload.draws))
        return Job(lambda: None, lambda _: draw(key), jax.block_until_ready)
    if workload.net:
        return net_job(workload)
    x = jax.random.normal(jax.random.key(1), workload.shape(workload.sizes[0]))
    target = jax.random.normal(jax.random.key(2), workload.shape(workload.sizes[-1]))
    if workload.optimizer == "adam":
        import optax

        optimizer = optax.adam(LEARNING_RATE)

    def start_one(key: jax.Array) -> State:
        params = init(key, workload.sizes)
        return params, optimizer.init(params) if workload.optimizer == "adam" else ()

    def loss(params: Params, x: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.mean((apply(params, x, workload.remat) - target) ** 2)

    def step(state: State, batch: tuple[jax.Array, jax.Array]) -> tuple[State, jax.Array]:
        params, opt_state = state
        value, grads = jax.value_and_grad(loss)(params, *batch)
        if workload.optimizer == "adam":
            updates, opt_state = optimizer.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
        else:
            params = jax.tree.map(lambda param, dp: param - LEARNING_RATE * dp, params, grads)
        return (params, opt_state), value

    call, start, key = step, jax.jit(start_one), jax.random.key(0)
    if workload.members:
        key = jax.random.split(key, workload.members)
        call, start = jax.vmap(step), jax.jit(jax.vmap(start_one))
    if workload.scan:
        call = lambda state, batches: jax.lax.scan(step, state, batches)  # noqa: E731
    call = jax.jit(call, donate_argnums=0)
    return Job(lambda: start(key), lambda state: call(state, (x, target))[0], jax.block_until_ready)


if __name__ == "__main__":
    serve(build, f"jax {jax.__version__}", device_memory)
