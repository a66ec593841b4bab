"""Twenty steps of every configuration in PyTorch's own database of optimizers, beside PyTorch's.

The same params and gradients go to both; PyTorch's loop over the params (``foreach=False``) is
the oracle, and the params and the state are compared after every step. Configurations for CUDA
are run on the CPU without ``capturable``, which is about PyTorch's implementation: here a step is
always a tensor that nobody reads.

`LEFT` says which optimizers of the database are not here.
"""

import inspect

import pytest
import torch
from torch.testing._internal.common_optimizers import optim_db

import funcnet as fn

pytestmark = pytest.mark.cpu_only

STEPS = 20
OURS = {
    "Adadelta": fn.adadelta,
    "Adagrad": fn.adagrad,
    "Adam": fn.adam,
    "AdamW": fn.adamw,
    "Adamax": fn.adamax,
    "ASGD": fn.asgd,
    "NAdam": fn.nadam,
    "RAdam": fn.radam,
    "RMSprop": fn.rmsprop,
    "Rprop": fn.rprop,
    "SGD": fn.sgd,
}
LEFT = {
    "Adafactor": "it works on matrices; has a test of its own",
    "LBFGS": "a function of a value-and-gradient function; has a test of its own",
    "Muon": "it works on matrices; has a test of its own",
    "SparseAdam": "for sparse gradients, which no rule here gives",
}
STATES = {
    "exp_avg": "mu",
    "exp_avg_sq": "nu",
    "max_exp_avg_sq": "nu_max",
    "exp_inf": "u",
    "mu_product": "mu_product",
    "square_avg": "nu",
    "grad_avg": "mu",
    "acc_delta": "delta",
    "sum": "sum",
    "momentum_buffer": "trace",
    "ax": "ax",
    "prev": "last",
    "step_size": "size",
    "step": "step",
}
"""PyTorch's name of an entry of the state, and ours; its eta and mu are functions of the step."""

TENSOR_LR = {"lr": torch.tensor(0.002, dtype=torch.float64)}
MORE = {
    "Adam": [{"weight_decay": 0.1, "decoupled_weight_decay": True, **TENSOR_LR}],
    "Adagrad": [{"lr_decay": 0.1, **TENSOR_LR}],
    "ASGD": [{"t0": 4, "lambd": 0.01, "alpha": 0.5}, {"t0": 0, **TENSOR_LR}],
    "NAdam": [{"weight_decay": 0.1, "momentum_decay": 0.006, **TENSOR_LR}],
    "RAdam": [{"betas": (0.8, 0.9), "weight_decay": 0.1, **TENSOR_LR}],
    "RMSprop": [{"centered": True, "momentum": 0.9, **TENSOR_LR}],
    "Rprop": [{"etas": (0.3, 1.7), "step_sizes": (1e-3, 2e-2)}],
    "SGD": [{"momentum": 0.9, "dampening": 0.5, "nesterov": False, **TENSOR_LR}],
}


def configurations():
    for info in optim_db:
        if info.name not in OURS:
            continue
        seen = []
        for device in ("cpu", "cuda"):
            seen += [dict(entry.kwargs) for entry in info.optim_inputs_func(device=device)]
        done = []
        for options in seen + MORE.get(info.name, []):
            options.pop("capturable", None)
            if repr(options) not in done:
                done.append(repr(options))
                yield pytest.param(info.optim_cls, options, id=f"{info.name} {options}")


@pytest.fixture
def float64_scalars():
    """PyTorch's eta, mu and mu_product, and its steps, have the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def numbers(*shape, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def prepared(option, dtype, shape=None):
    """Tensors in the dtype: a product of two float32 numbers is rounded by PyTorch."""
    if isinstance(option, tuple):
        return tuple([prepared(entry, dtype, shape) for entry in option])
    if not isinstance(option, torch.Tensor):
        return option
    return option.to(dtype).reshape(option.shape if shape is None else shape)


def entries(opt_state):
    """``{name: {leaf: tensor} or tensor}`` of all states in a chain's."""
    found = {}
    for state in opt_state.values():
        found |= {
            name: entry for name, entry in state._asdict().items() if not isinstance(entry, tuple)
        }
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("theirs", "options"), list(configurations()))
def test_twenty_steps_are_those_of_torch(theirs, options, dtype, float64_scalars):
    eps = torch.finfo(dtype).eps
    tolerance = {"rtol": 40 * eps, "atol": 40 * eps}
    params = {
        "a": numbers(3, 2, seed=1, dtype=dtype),
        "b": numbers(4, seed=2, dtype=dtype),
        "c": numbers(seed=3, dtype=dtype),
    }
    leaves = {name: torch.nn.Parameter(leaf.clone()) for name, leaf in params.items()}
    wide = torch.promote_types(dtype, torch.float32)
    options = {name: prepared(option, wide) for name, option in options.items()}
    peer = theirs(list(leaves.values()), foreach=False, **options)
    # PyTorch takes a tensor of one element for a number, we a 0-d one.
    options = {name: prepared(option, wide, ()) for name, option in options.items()}
    optimizer = OURS[theirs.__name__](**options)
    state = optimizer.init_state(params)
    for step in range(STEPS):
        grads = {
            name: numbers(*leaf.shape, seed=100 * step + len(name) + ord(name), dtype=dtype)
            for name, leaf in params.items()
        }
        for name, leaf in leaves.items():
            leaf.grad = grads[name].clone()
        peer.step()
        updates, state = optimizer.update(grads, state, params)
        params = fn.apply_updates(params, updates)
        ours, compared = entries(state), 0
        for name, leaf in leaves.items():
            torch.testing.assert_close(params[name], leaf.detach(), **tolerance)
            for theirs_is, ours_is in STATES.items():
                expected = peer.state[leaf].get(theirs_is)
                if expected is None or ours_is not in ours:
                    continue
                found = ours[ours_is]
                found = found[name] if isinstance(found, dict) else found
                torch.testing.assert_close(found.to(expected.dtype), expected.detach(), **tolerance)
                compared += 1
        stateless = theirs is torch.optim.SGD and not options.get("momentum")
        assert compared >= 3 or stateless


def test_every_optimizer_of_the_database_is_here_or_named():
    assert {info.name for info in optim_db} == {*OURS, *LEFT}


IMPLEMENTATION = {"foreach", "fused", "capturable", "differentiable"}


@pytest.mark.parametrize("name", OURS)
def test_options_their_order_and_their_defaults_are_those_of_torch(name):
    theirs = list(inspect.signature(getattr(torch.optim, name)).parameters.values())[1:]
    ours = inspect.signature(OURS[name]).parameters
    assert ours.keys() == {option.name for option in theirs} - IMPLEMENTATION
    for option in theirs:
        if option.name not in IMPLEMENTATION:
            assert ours[option.name].default == option.default
    positional = [key for key, option in ours.items() if option.kind != option.KEYWORD_ONLY]
    assert positional == [option.name for option in theirs][: len(positional)]
    for option in IMPLEMENTATION:
        with pytest.raises(TypeError, match=option):
            OURS[name](**{option: True})
