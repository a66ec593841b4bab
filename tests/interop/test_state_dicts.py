"""State dicts by path, both ways."""

import pytest
import torch
from layers import oracle
from torch import nn

import funcnet as fn

X = oracle.randn(5, 3)


def net():
    return fn.serial(hidden=fn.linear(4), norm=fn.batch_norm(), act=fn.relu(), out=fn.linear(2))


def twin():
    from collections import OrderedDict

    parts = {"hidden": nn.Linear(3, 4), "norm": nn.BatchNorm1d(4), "act": nn.ReLU()}
    return nn.Sequential(OrderedDict(parts, out=nn.Linear(4, 2))).double()


LIKE = net().init(fn.key(0), X)


def test_a_state_dict_becomes_params_and_state_and_is_the_same_again():
    theirs = oracle.randomize(twin()).state_dict()
    params, state = fn.interop.from_state_dict(theirs, LIKE)
    assert list(state) == ["norm"]
    assert list(fn.tree.to_dotted(params)) == list(fn.tree.to_dotted(LIKE[0]))
    again = fn.interop.to_state_dict(params, state)
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[key], theirs[key]) for key in theirs)


def test_the_tensors_are_copies_with_the_dtypes_that_are_expected():
    module = twin().float()
    params, state = fn.interop.from_state_dict(module.state_dict(), LIKE)
    before = params["out"]["weight"].clone()
    with torch.no_grad():
        module[3].weight.add_(1)
    assert torch.equal(params["out"]["weight"], before)
    assert before.dtype == torch.float64
    assert state["norm"]["num_batches_tracked"].dtype == torch.int64


def test_like_may_lie_on_the_meta_device():
    like = net().init(fn.key(0, device="meta"), X.to("meta"))
    params, _ = fn.interop.from_state_dict(twin().state_dict(), like)
    assert params["out"]["weight"].device == X.device


def test_a_frozen_tied_and_normalized_net_has_the_keys_of_torch():
    frozen = fn.freeze(net(), "hidden")
    like = frozen.init(fn.key(0), X)
    keys = list(fn.interop.to_state_dict(*like))
    assert sorted(keys) == sorted(twin().state_dict())
    params, state = fn.interop.from_state_dict(twin().state_dict(), like)
    assert fn.tree.alike((params, state), like)
    frozen.apply(params, X, state)
    nested = fn.serial(fn.freeze(net(), "hidden"), fn.linear(2))
    like = nested.init(fn.key(0), X)
    assert "0.hidden.weight" in fn.interop.to_state_dict(*like)

    tied = fn.tie(fn.serial(fn.linear(3), fn.linear(3)), {"1.weight": "0.weight"})
    like = tied.init(fn.key(0), X)
    assert sorted(fn.interop.to_state_dict(*like)) == ["0.bias", "0.weight", "1.bias"]

    theirs = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)).double()
    like = fn.spectral_norm(fn.linear(3)).init(fn.key(0), X)
    assert sorted(fn.interop.to_state_dict(*like)) == sorted(theirs.state_dict())


def test_a_child_called_frozen_is_a_child():
    layer = fn.serial(frozen=fn.serial(fn.linear(3), fn.batch_norm()))
    params, state = layer.init(fn.key(0), X)
    assert "frozen.1.running_mean" in fn.interop.to_state_dict(params, state)


def test_every_mismatch_is_named_at_once():
    theirs = twin().state_dict()
    theirs["out.bias"] = torch.ones(3)
    theirs["head.weight"] = torch.ones(1)
    del theirs["norm.running_mean"], theirs["hidden.weight"]
    with pytest.raises(ValueError, match="from_state_dict: 4 faults") as caught:
        fn.interop.from_state_dict(theirs, LIKE)
    lines = str(caught.value).splitlines()[1:]
    assert sorted(lines) == [
        "  'head.weight': is not expected, got float32 (1,)",
        "  'hidden.weight': is missing, expects shape (4, 3)",
        "  'norm.running_mean': is missing, expects shape (4,)",
        "  'out.bias': expects shape (2,), got float32 (3,)",
    ]


def test_without_strict_what_is_missing_stays_and_what_is_unknown_is_left_out():
    theirs = {"out.bias": torch.ones(2), "head.weight": torch.ones(1)}
    params, state = fn.interop.from_state_dict(theirs, LIKE, strict=False)
    assert params["out"]["bias"].tolist() == [1.0, 1.0]
    assert torch.equal(params["hidden"]["weight"], LIKE[0]["hidden"]["weight"])
    assert params["hidden"]["weight"] is not LIKE[0]["hidden"]["weight"]
    assert fn.tree.alike((params, state), LIKE)


def test_the_prefix_of_a_wrapper_is_named():
    theirs = {f"module.{key}": leaf for key, leaf in twin().state_dict().items()}
    with pytest.raises(ValueError, match=r"all keys begin with 'module\.'.*then 9 fit"):
        fn.interop.from_state_dict(theirs, LIKE)


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda: fn.interop.from_state_dict([], LIKE), TypeError, "expects a dict of tensors"),
        (lambda: fn.interop.from_state_dict({}, LIKE[0]), TypeError, "like=\\(params, state\\)"),
        (lambda: fn.interop.from_state_dict({"a": 1}, LIKE), TypeError, "others at \\['a'\\]"),
        (lambda: fn.interop.to_state_dict({"a": (X,)}), TypeError, "at 'a'"),
        (lambda: fn.interop.to_state_dict({"a": {1: X}}), TypeError, "with the key 1"),
    ],
    ids=["no dict", "params alone", "no tensors", "a tuple", "a number as a name"],
)
def test_what_is_no_state_dict_is_refused(call, error, told):
    with pytest.raises(error, match=told):
        call()
