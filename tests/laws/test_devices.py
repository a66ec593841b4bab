"""Every layer, loss and optimizer keeps to the device of its input, and does not wait for it.

The device is a CUDA that need not be there: a fake tensor has a shape, a dtype and a device, and
no values. Operators on fake tensors raise an error where operands lie on different devices, or
where values are read.
"""

import pytest
import torch
from cases import COMBINATORS, LAYERS, LOSSES, OPTIMIZERS, PARAMS, WEIGHT, losses
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import funcnet as fn

THERE = torch.device("cuda:0")
# detect_nonfinite is there to read values, and loops that end when they have converged read whether
# they have; the kernel of fractional_max_pool3d takes no fakes.
APART = ("detect_nonfinite", "fixed_point", "neural_ode dopri5", "fractional_max_pool3d")
NETS = {name: case for name, case in (LAYERS | COMBINATORS).items() if not name.startswith(APART)}


class Crossings(TorchDispatchMode):
    """The operators that bring tensors from one device to another, which waits for the device.

    An operator of elementwise arithmetic takes a 0-d CPU tensor as a number, and does not wait;
    ``where`` copies it.
    """

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        read = {leaf.device for leaf in tensors((args, kwargs))}
        made = {leaf.device for leaf in tensors(result)}
        copies = operator in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if (copies and read != made) or (operator is torch.ops.aten.where.self and len(read) > 1):
            self.found.append(str(operator))
        return result


def tensors(tree):
    return [leaf for leaf in fn.tree.leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.fixture(params=["eager", "traced"])
def crossings(request, monkeypatch):
    """Where the test runs: on fake tensors, which the library takes for those of a tracer."""
    monkeypatch.setattr(FakeTensor, "__getitem__", subscript)
    # Python's own operator asks for CUDA's driver too.
    monkeypatch.setattr(FakeTensor, "__invert__", torch.Tensor.bitwise_not)
    if request.param == "eager":
        monkeypatch.setattr(fn.runtime, "_dispatch_modes", lambda: 0)
        # A CPU tensor can be read, such as a key; which values it has does not matter here.
        monkeypatch.setattr(FakeTensor, "tolist", zeros_for)
    with FakeTensorMode(allow_non_fake_inputs=True), Crossings() as found:
        yield found.found if request.param == "eager" else None


def zeros_for(fake):
    assert fake.device.type == "cpu", "values are read"
    return [0] * len(fake) if fake.dim() else 0


def subscript(fake, index):
    """``fake[index]`` by operators: Python's own asks for CUDA's driver, which may be missing."""
    dim = 0
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, int):
            fake = fake.select(dim, part)
        elif part is Ellipsis:
            dim = fake.dim() - (len(index) - 1 - index.count(None))
        elif part is None:
            fake, dim = fake.unsqueeze(dim), dim + 1
        elif isinstance(part, slice):
            fake = torch.ops.aten.slice.Tensor(fake, dim, part.start, part.stop)
            dim += 1
        else:
            fake = torch.ops.aten.index.Tensor(fake, [None] * dim + [part])
            dim += part.dim()
    return fake


def there(tree):
    """Fake tensors like those of a tree, on the device."""
    return fn.tree.map(
        lambda leaf: (
            torch.empty(leaf.shape, dtype=leaf.dtype, device=THERE)
            if isinstance(leaf, torch.Tensor)
            else leaf
        ),
        tree,
    )


def key_on(device):
    return fn.key(0, device="cpu") if device == "cpu" else there(fn.key(0, device="meta"))


def assert_there(**trees):
    for name, tree in trees.items():
        assert {leaf.device for leaf in tensors(tree)} <= {THERE}, name


def cotangent(y):
    return fn.tree.map(lambda leaf: leaf if leaf.is_floating_point() else None, y)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("key_device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", NETS)
def test_a_layer_keeps_to_the_device_of_its_input(name, key_device, train, crossings):
    layer, x = NETS[name]
    x, key = there(x), key_on(key_device)
    params, state = layer.init(key, x)
    assert_there(params=params, state=state)
    y, after = layer.apply(params, x, state, key=key, train=train)
    assert_there(y=y, state=after)
    y, pullback, after = layer.vjp(params, x, state, key=key, train=train)
    assert_there(y=y, state=after)
    # The key is a residual of remat, and stays where it is.
    assert {leaf.device for leaf in tensors(pullback)} <= {THERE, key.device}
    dparams, dx = pullback(cotangent(y))
    assert_there(dparams=dparams, dx=dx)
    assert not crossings


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_keeps_to_the_device_of_the_prediction(name, crossings):
    loss, prediction, target = losses(there(WEIGHT))[name]
    prediction, target = there((prediction, target))
    value, pullback = loss.vjp(prediction, target)
    assert_there(apply=loss.apply(prediction, target), value=value, pullback=pullback)
    assert_there(dprediction=pullback(), scaled=pullback(value))
    assert not crossings


@pytest.mark.parametrize("rate_device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_keeps_to_the_device_of_the_params(name, rate_device, crossings):
    optimizer, _ = OPTIMIZERS[name]
    if name == "sgd of a tensor":
        optimizer = fn.sgd(torch.empty((), device=rate_device))
    params = grads = there(PARAMS)
    opt_state = optimizer.init_state(params)
    assert_there(opt_state=opt_state)
    for _ in range(2):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = fn.apply_updates(params, updates)
        assert_there(updates=updates, opt_state=opt_state, params=params)
    assert not crossings


@pytest.mark.parametrize("key_device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["serial of all kinds", "serial of tokens", "residual"])
def test_a_training_step_keeps_to_the_device(name, key_device, crossings):
    layer, x = COMBINATORS[name]
    x, key = there(x), key_on(key_device)
    step = fn.train_step(layer, fn.mse(), fn.adam(0.1), metrics={"mae": fn.mae()})
    state = fn.init_train_state(layer, fn.adam(0.1), key, x)
    y, _ = layer.apply(state.params, x, state.state)
    state, metrics = step(state, (x, y))
    assert_there(params=state.params, state=state.state, opt_state=state.opt_state, metrics=metrics)
    assert {state.step.device, state.key.device} == {key.device}
    assert not crossings


SAMPLERS = {
    "bits": lambda key, on: fn.random.bits(key, (3,), device=on),
    "uniform": lambda key, on: fn.random.uniform(key, (3,), device=on),
    "uniform of bounds": lambda key, on: fn.random.uniform(
        key, (3,), torch.float64, 0.1, torch.ones((), device=on), device=on
    ),
    "normal": lambda key, on: fn.random.normal(key, (70_000,), device=on),
    "truncated_normal": lambda key, on: fn.random.truncated_normal(key, shape=(3,), device=on),
    "bernoulli": lambda key, on: fn.random.bernoulli(key, 0.3, (3,), device=on),
    "bernoulli of tensors": lambda key, on: fn.random.bernoulli(key, torch.ones(3, device=on)),
    "randint": lambda key, on: fn.random.randint(key, (3,), 0, 5, device=on),
    "permutation": lambda key, on: fn.random.permutation(key, 5, device=on),
    "permutation of rows": lambda key, on: fn.random.permutation(key, torch.ones(5, 2, device=on)),
    "categorical": lambda key, on: fn.random.categorical(key, torch.ones(5, 2, device=on)),
    "epoch_batches": lambda key, on: fn.epoch_batches(key, torch.ones(5, device=on), 2),
}


@pytest.mark.parametrize("key_device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_draw_lies_where_it_is_wanted(name, key_device, crossings):
    key = key_on(key_device)
    assert SAMPLERS[name](key, THERE).device == THERE
    for derived in (fn.random.split(key), fn.random.fold_in(key, 7), fn.random.fold_in(key, "a")):
        assert derived.device == key.device
    assert not crossings


INITIALIZERS = {
    name: make()
    for name, make in vars(fn.initializers).items()
    if getattr(make, "__annotations__", {}).get("return") is fn.initializers.Initializer
    and name not in ("_rounded", "constant", "variance_scaling", "torch_default")
}


@pytest.mark.parametrize("key_device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", INITIALIZERS)
def test_an_initializer_makes_its_tensor_on_the_device(name, key_device, crossings):
    made = INITIALIZERS[name](key_on(key_device), (4, 3), torch.float32, THERE)
    assert made.device == THERE
    assert not crossings
