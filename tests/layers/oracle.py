"""Holding a layer to a torch module or function: values, gradients, layout, state."""

import copy
import inspect
import itertools

import optree
import torch
from torch import Tensor

import funcnet as fn

# Relative to the largest number of the expected tensor.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2}


def randn(*shape, seed=0, dtype=torch.float64):
    # Drawn in float64 on the CPU: the numbers are the same up to rounding for all dtypes, and
    # on any device.
    generator = torch.Generator().manual_seed(seed + 1)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.to(torch.get_default_device(), dtype)


def transposed(x):
    """The same values in column-major order: not contiguous, nor the copy of a contiguous one."""
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def strided(x):
    """The same values as every second one of a larger tensor."""
    padded = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
    padded[..., ::2] = x
    return padded[..., ::2]


def assert_near(actual, expected, tolerance=None):
    """The same structure, shapes and dtypes, and values equal up to rounding."""
    assert optree.tree_structure(actual, none_is_leaf=True) == optree.tree_structure(
        expected, none_is_leaf=True
    )
    leaves = (optree.tree_leaves(tree, none_is_leaf=True) for tree in (actual, expected))
    for ours, theirs in zip(*leaves, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is None:
            continue
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        if not theirs.is_floating_point():
            assert torch.equal(ours, theirs)
            continue
        within = TOLERANCE[theirs.dtype] if tolerance is None else tolerance
        finite = theirs[torch.isfinite(theirs)].abs()
        scale = float(finite.max()) if finite.numel() else 0.0
        torch.testing.assert_close(ours, theirs, rtol=within, atol=within * scale, equal_nan=True)


def randomize(module, seed=100):
    """Parameters and running statistics that are all different, so that no mix-up cancels."""
    seeds = itertools.count(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(randn(*parameter.shape, seed=next(seeds)))
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(randn(*buffer.shape, seed=next(seeds)))
            if name.endswith("running_var"):
                buffer.copy_(randn(*buffer.shape, seed=next(seeds)).square() + 0.1)
    return module


def params_of(module):
    return fn.tree.from_dotted({k: v.detach().clone() for k, v in module.named_parameters()})


def state_of(module):
    return fn.tree.from_dotted({k: v.clone() for k, v in module.named_buffers()})


def cotangent(y, seed=50):
    """A random dy for each floating-point output; None for an integer one."""
    return optree.tree_map(
        lambda leaf: (
            randn(*leaf.shape, seed=seed, dtype=leaf.dtype) if leaf.is_floating_point() else None
        ),
        y,
    )


def autograd(function, params, x, dy):
    """``(y, dparams, dx)`` of ``function(params, x)`` by autograd."""
    leaves, treedef = optree.tree_flatten((params, x))
    leaves = [
        leaf.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        if leaf.is_floating_point()
        else leaf
        for leaf in leaves
    ]
    y = function(*treedef.unflatten(leaves))
    outputs, weights = [], []
    for own_y, own_dy in zip(
        optree.tree_leaves(y), optree.tree_leaves(dy, none_is_leaf=True), strict=True
    ):
        if own_dy is not None and own_y.requires_grad:
            outputs.append(own_y)
            weights.append(own_dy)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    grads = (
        torch.autograd.grad(outputs, wanted, weights, allow_unused=True, materialize_grads=True)
        if outputs
        else [torch.zeros_like(leaf) for leaf in wanted]
    )
    found = iter(grads)
    grads = [next(found) if leaf.requires_grad else None for leaf in leaves]
    dparams, dx = treedef.unflatten(grads)
    return optree.tree_map(Tensor.detach, y), dparams, dx


def check_against(
    function, layer, params, x, state=None, *, train=True, key=None, tolerance=None, dy=None
):
    """Hold apply, vjp and both halves of the pullback to autograd through ``function``.

    Returns the new state.
    """
    state = {} if state is None else state
    y, pullback, new_state = layer.vjp(params, x, state, train=train, key=key)
    applied, applied_state = layer.apply(params, x, state, train=train, key=key)
    dy = cotangent(y) if dy is None else dy
    expected_y, expected_dparams, expected_dx = autograd(function, params, x, dy)
    assert_near(y, expected_y, tolerance)
    assert_near(applied, expected_y, tolerance)
    assert_near(applied_state, new_state, 0.0)

    dparams, dx = pullback(dy)
    assert_near(dparams, expected_dparams, tolerance)
    assert_near(dx, expected_dx, tolerance)

    dparams, dx = pullback(dy, params=False)
    assert dparams is None
    assert_near(dx, expected_dx, tolerance)

    dparams, dx = pullback(dy, x=False)
    assert dx is None
    assert_near(dparams, expected_dparams, tolerance)

    assert pullback(dy, params=False, x=False) == (None, None)
    return new_state


def check_module(layer, module, x, *, train=True, tolerance=None, dy=None):
    """Hold a layer to a torch module: the layout of its params and state, then `check_against`.

    The module's numbers are copied in, so they must lie where the layer looks for them. A tuple
    x is the arguments of the module's forward.
    """
    floating = [leaf.dtype for leaf in fn.tree.leaves(x) if leaf.is_floating_point()]
    module = randomize(module.to(floating[0] if floating else torch.float64))
    module.train(train)
    params, state = params_of(module), state_of(module)

    own_params, own_state = layer.init(fn.key(0), x)
    for own, theirs in ((own_params, params), (own_state, state)):
        own, theirs = fn.tree.to_dotted(own), fn.tree.to_dotted(theirs)
        assert list(own) == list(theirs)
        assert {path: leaf.shape for path, leaf in own.items()} == {
            path: leaf.shape for path, leaf in theirs.items()
        }
        if floating:
            assert {path: leaf.dtype for path, leaf in own.items()} == {
                path: leaf.dtype for path, leaf in theirs.items()
            }

    # The module writes its running statistics, and autograd may want the old ones.
    working = copy.deepcopy(module)

    def function(params, x):
        return torch.func.functional_call(working, fn.tree.to_dotted(params), x)

    new_state = check_against(
        function, layer, params, x, state, train=train, tolerance=tolerance, dy=dy
    )
    assert_near(new_state, state_of(working), tolerance)
    return new_state


def samples_of(name, dtype=torch.float64):
    """PyTorch's own sample inputs of a module: ``(constructor's arguments by name, inputs)``."""
    # Here, since it forbids setting torch's global flags when it is imported.
    from torch.testing._internal.common_modules import module_db

    (info,) = [info for info in module_db if info.module_cls.__name__ == name]
    names = [*inspect.signature(info.module_cls).parameters]
    found = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=False, training=True
    )
    return [
        (
            dict(zip(names, one.constructor_input.args, strict=False))
            | one.constructor_input.kwargs,
            one.forward_input.args,
        )
        for one in found
    ]
