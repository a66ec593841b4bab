"""Clipping and norms against torch.nn.utils, and formulas in numpy."""

import numpy as np
import pytest
import torch
from torch import nn

import funcnet as fn
from funcnet import optimizers as opt
from funcnet.optimizers.clipping import global_norm

F64 = torch.float64


def numbers(*shape, seed=0, dtype=F64):
    return fn.random.normal(fn.key(seed), shape, F64).to(dtype)


def some(dtype=F64, scale=1.0):
    tree = {
        "conv": {"weight": numbers(4, 2, 3, 3), "bias": numbers(4, seed=1)},
        "head": {"weight": numbers(3, 5, seed=2)},
        "s": numbers(seed=3),
    }
    return fn.tree.map(lambda leaf: (scale * leaf).to(dtype), tree)


def once(transform, grads, params=None):
    params = grads if params is None else params
    return transform.update(grads, transform.init_state(params), params)[0]


def by_torch(clip, grads):
    """What a function of torch.nn.utils, which writes to .grad, makes of gradients."""
    leaves, treedef = fn.tree.flatten(grads)
    parameters = [nn.Parameter(torch.zeros_like(leaf)) for leaf in leaves]
    for parameter, leaf in zip(parameters, leaves, strict=True):
        parameter.grad = leaf.clone()
    clip(parameters)
    return treedef.unflatten([parameter.grad for parameter in parameters])


def assert_close(found, expected, rtol=1e-14):
    for path, leaf in fn.tree.to_dotted(expected).items():
        torch.testing.assert_close(fn.tree.to_dotted(found)[path], leaf, rtol=rtol, atol=1e-15)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.5, torch.inf, "inf"])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 10.0])
def test_clip_by_global_norm_is_clip_grad_norm(scale, norm_type, max_norm):
    grads = some(scale=scale)
    expected = by_torch(lambda p: nn.utils.clip_grad_norm_(p, max_norm, norm_type), grads)
    assert_close(once(opt.clip_by_global_norm(max_norm, norm_type), grads), expected)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_clip_by_global_norm_is_clip_grad_norm_in_other_precisions(dtype, rtol):
    grads = some(dtype)
    expected = by_torch(lambda p: nn.utils.clip_grad_norm_(p, 0.5), grads)
    assert_close(once(opt.clip_by_global_norm(0.5), grads), expected, rtol)


def test_clip_is_clip_grad_value():
    expected = by_torch(lambda p: nn.utils.clip_grad_value_(p, 0.7), some())
    assert_close(once(opt.clip(0.7), some()), expected)


def test_the_global_norm_of_half_precision_is_summed_in_float32():
    grads = [torch.full((10_000,), 3.0, dtype=torch.bfloat16), torch.ones(2)]
    assert global_norm(grads).dtype == torch.float32
    torch.testing.assert_close(global_norm(grads), torch.tensor(90002.0).sqrt())
    large = [torch.full((2,), 300.0, dtype=torch.float16)]  # whose square is infinite
    assert once(opt.normalize(), {"w": large[0]})["w"].isfinite().all()
    assert once(opt.clip_by_block_rms(1.0), {"w": large[0]})["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("norm_type", [2.0, torch.inf])
def test_leaves_without_elements_have_no_norm(norm_type):
    grads = {"none": torch.ones(0, 3), "w": torch.tensor([3.0, 4.0])}
    found = once(opt.clip_by_global_norm(1.0, norm_type), grads)
    expected = once(opt.clip_by_global_norm(1.0, norm_type), {"w": grads["w"]})
    assert torch.equal(found["w"], expected["w"])
    assert found["none"].shape == (0, 3)


def test_the_norm_is_of_the_leaves_that_are_meant_alone():
    grads = {"w": torch.tensor([3.0, 4.0]), "v": torch.tensor([12.0])}
    found = once(opt.masked(opt.clip_by_global_norm(1.0), "w"), grads)
    torch.testing.assert_close(found["w"], torch.tensor([0.6, 0.8]))
    assert found["v"].item() == 12.0


def block_rms(g, p):
    return g / max(1.0, np.sqrt((g**2).mean()) / 0.5)


def unit_norm(x):
    units = x.reshape(x.shape[0], -1) if x.ndim > 1 else x.reshape(1, -1)
    norms = np.sqrt((units**2).sum(1))
    return norms.reshape((-1,) + (1,) * (x.ndim - 1)) if x.ndim > 1 else norms[0]


def adaptive(g, p):
    norm, limit = unit_norm(g), 0.3 * np.maximum(unit_norm(p), 1e-3)
    return np.where(norm < limit, g, g * limit / np.maximum(norm, 1e-6))


def centered(g, p):
    return g - g.mean(tuple(range(1, g.ndim)), keepdims=True) if g.ndim > 1 else g


FORMULAS = {
    "clip_by_block_rms": (opt.clip_by_block_rms(0.5), block_rms),
    "adaptive_grad_clip": (opt.adaptive_grad_clip(0.3), adaptive),
    "adaptive_grad_clip by a tensor": (
        opt.adaptive_grad_clip(torch.tensor(0.3, dtype=F64), torch.tensor(1e-3, dtype=F64)),
        adaptive,
    ),
    "centralize": (opt.centralize(), centered),
    "zero_nans": (opt.zero_nans(), lambda g, p: g),
    "set_to_zero": (opt.set_to_zero(), lambda g, p: 0.0 * g),
    "clip": (opt.clip(torch.tensor(0.1)), lambda g, p: g.clip(np.float32(-0.1), np.float32(0.1))),
}


@pytest.mark.cpu_only
@pytest.mark.parametrize(("transform", "formula"), FORMULAS.values(), ids=FORMULAS)
def test_a_transform_is_its_formula_in_numpy(transform, formula):
    grads, params = some(), some(scale=0.5)
    params["head"]["weight"] = 0.0 * params["head"]["weight"]
    params["conv"]["bias"] = 100 * params["conv"]["bias"]
    grads["conv"]["weight"][0] *= 1e-4  # one unit far below the limit
    expected = fn.tree.map(
        lambda g, p: torch.as_tensor(formula(g.numpy(), p.numpy())), grads, params
    )
    assert_close(once(transform, grads, params), expected)


def test_normalize_gives_a_norm_of_one():
    found = once(opt.normalize(), some(scale=50.0))
    torch.testing.assert_close(global_norm(fn.tree.leaves(found)), torch.ones((), dtype=F64))
    assert once(opt.normalize(), {"w": torch.zeros(2)})["w"].tolist() == [0.0, 0.0]


def test_zero_nans_leaves_infinities():
    grads = {"w": torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0])}
    assert once(opt.zero_nans(), grads)["w"].tolist() == [0.0, torch.inf, -torch.inf, 1.0]


BAD = {
    "negative": (lambda: opt.clip(-1.0), "clip: clip_value must be >= 0"),
    "nan": (lambda: opt.clip_by_global_norm(torch.nan), "max_norm must be >= 0, got nan"),
    "nan tensor": (lambda: opt.clip_by_global_norm(torch.tensor(torch.nan)), "max_norm must be"),
    "vector": (lambda: opt.clip(torch.ones(2)), r"clip_value must be a 0-d tensor, got \(2,\)"),
    "threshold of 0": (lambda: opt.clip_by_block_rms(0.0), "threshold must be > 0"),
    "negative clipping": (lambda: opt.adaptive_grad_clip(-0.1), "clipping must be >= 0"),
    "negative eps": (lambda: opt.normalize(-1e-6), "eps must be >= 0"),
    "norm_type": (lambda: opt.clip_by_global_norm(1.0, "two"), "norm_type"),
}


@pytest.mark.parametrize(("call", "match"), BAD.values(), ids=BAD)
def test_bad_options_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()
