"""Trees of arrays: numpy and DLPack, what is shared and what is copied."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

import funcnet as fn

pytestmark = pytest.mark.cpu_only


class Pair(NamedTuple):
    first: object
    second: object


DTYPES = ["float64", "float32", "float16", "int64", "int32", "uint8", "bool", "complex64"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tree_becomes_arrays_and_tensors_again_without_a_copy(dtype):
    tensor = torch.ones(2, 3).to(getattr(torch, dtype))
    tree = Pair({"a": tensor, "b": (tensor.t(),)}, tensor[0, 0])
    arrays = fn.interop.to_numpy(tree)
    assert isinstance(arrays, Pair)
    assert arrays.first["b"][0].shape == (3, 2)
    assert arrays.first["a"].dtype == np.dtype(dtype)
    assert np.shares_memory(arrays.first["a"], arrays.first["b"][0])
    back = fn.interop.from_numpy(arrays)
    assert fn.tree.alike(back, tree)
    assert back.first["a"].data_ptr() == tensor.data_ptr()


def test_what_has_a_gradient_or_a_lazy_conjugate_is_an_array_of_its_values():
    z = torch.tensor([1 + 2j], requires_grad=True)
    assert fn.interop.to_numpy({"z": z.conj(), "im": z.conj().imag})["z"].tolist() == [1 - 2j]


def test_arrays_that_torch_cannot_share_are_copied():
    base = np.arange(4.0)
    fixed = np.arange(3)
    fixed.flags.writeable = False
    given = {"back": base[::-1], "fixed": fixed, "other": base.astype(">f8"), "number": 2.5}
    tensors = fn.interop.from_numpy(given)
    assert tensors["back"].tolist() == [3.0, 2.0, 1.0, 0.0]
    assert tensors["other"].tolist() == base.tolist()
    assert tensors["number"].item() == 2.5
    tensors["fixed"][0] = 9
    assert fixed[0] == 0


def test_dlpack_shares_whole_trees():
    params, _ = fn.serial(fn.linear(2), fn.linear(3)).init(fn.key(0), torch.ones(1, 4))
    arrays = fn.interop.to_dlpack(params, np.from_dlpack)
    assert np.shares_memory(arrays["0"]["weight"], params["0"]["weight"].numpy())
    back = fn.interop.from_dlpack(arrays)
    assert fn.tree.alike(back, params)
    assert back["1"]["bias"].data_ptr() == params["1"]["bias"].data_ptr()


def test_jax_arrays_come_and_go_by_dlpack():
    jax = pytest.importorskip("jax", reason="jax is not installed")
    params, _ = fn.linear(2).init(fn.key(0), torch.ones(1, 4))
    theirs = fn.interop.to_dlpack(params, jax.dlpack.from_dlpack)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, theirs)
    assert torch.equal(fn.interop.from_dlpack(doubled)["weight"], 2 * params["weight"])


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: fn.interop.to_numpy({"a": [1]}), "to_numpy: at 'a.0' expects a tensor, got int"),
        (lambda: fn.interop.to_numpy(torch.ones(1).bfloat16()), "to_numpy: numpy has no bfloat16"),
        (lambda: fn.interop.from_numpy({"a": "text"}), "from_numpy: at 'a' expects an array of"),
        (lambda: fn.interop.from_dlpack({"a": 1}), "from_dlpack: at 'a' expects an array with"),
        (lambda: fn.interop.to_dlpack({"a": 1}, np.from_dlpack), "to_dlpack: at 'a' expects a"),
    ],
    ids=["a number", "bfloat16", "a string", "no dlpack", "no tensor"],
)
def test_a_wrong_leaf_is_named(call, told):
    with pytest.raises(TypeError, match=told):
        call()
