"""The package as a whole: what importing it costs and does, and what it exports."""

import subprocess
import sys

import pytest
import torch

import funcnet as fn

pytestmark = pytest.mark.cpu_only


def run(code, *flags):
    command = [sys.executable, *flags, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def test_importing_funcnet_imports_nothing_but_torch_optree_and_the_standard_library():
    code = (
        "import sys, torch, optree; before = set(sys.modules); import funcnet; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    imported = set(run(code).stdout.split()) - {"funcnet"}
    assert imported <= set(sys.stdlib_module_names)


def test_importing_funcnet_loads_no_more_of_torch():
    code = (
        "import sys, torch, optree, torch.nn.functional; before = set(sys.modules); "
        "import funcnet; print(*[m for m in set(sys.modules) - before if m.startswith('torch')])"
    )
    assert run(code).stdout.split() == []


def test_importing_funcnet_changes_no_global_setting():
    settings = (
        "torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads(), "
        "torch.random.get_rng_state().sum(), torch.are_deterministic_algorithms_enabled()"
    )
    code = f"import torch, optree; a = ({settings}); import funcnet; print(a == ({settings}))"
    assert run(code).stdout.strip() == "True"


def test_layers_losses_and_optimizers_unpack_into_their_functions():
    init, apply, vjp = fn.linear(2)
    assert all(map(callable, (init, apply, vjp)))
    apply, vjp = fn.mse()
    init_state, update = fn.sgd(0.1)
    assert all(map(callable, (apply, vjp, init_state, update)))


def test_a_replaced_rule_survives_every_rebuild():
    twice = fn.serial(fn.linear(2))
    edited = twice._replace(vjp=lambda *args, **kwargs: "mine")
    assert fn.map_layers(lambda path, layer: layer, edited).vjp() == "mine"


def test_a_pullback_can_be_mapped_over_counted_moved_and_pickled():
    import pickle

    net = fn.serial(fn.linear(3), fn.tanh())
    x = torch.randn(4, 2, dtype=torch.float64)
    params, _ = net.init(fn.key(0), x)
    y, pullback, _ = net.vjp(params, x)
    dy = torch.ones_like(y)
    halved = fn.tree.map(lambda leaf: leaf.to(torch.bfloat16).to(leaf.dtype), pullback)
    assert len(fn.tree.leaves(pullback)) == 3
    torch.testing.assert_close(halved(dy), pullback(dy), rtol=0.02, atol=0.02)
    restored = pickle.loads(pickle.dumps(pullback))
    torch.testing.assert_close(restored(dy), pullback(dy), rtol=0, atol=0)
