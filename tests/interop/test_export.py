"""`fn.interop.export`: programs of torch.export, and ONNX files where the packages are there."""

import importlib.util

import pytest
import torch
from layers import oracle

import funcnet as fn

pytestmark = pytest.mark.cpu_only
IMAGES = oracle.randn(3, 2, 8, 8).float()


def net():
    return fn.serial(
        *(fn.conv2d(4, 3, padding=1), fn.batch_norm(), fn.relu(), fn.max_pool2d(2)),
        *(fn.flatten(), fn.dropout(0.5), fn.linear(3)),
    )


def made():
    params, state = net().init(fn.key(0), IMAGES)
    return params, net().apply(params, IMAGES, state, key=fn.key(1), train=True)[1]


def test_a_program_gives_what_the_layer_gives_for_any_batch(tmp_path):
    params, state = made()
    program = fn.interop.export(net(), params, IMAGES, state, dynamic_batch=True)
    assert set(program.state_dict) == set(fn.interop.to_state_dict(params, state))
    torch.export.save(program, tmp_path / "net.pt2")
    module = torch.export.load(tmp_path / "net.pt2").module()
    for size in (2, 7):
        x = oracle.randn(size, 2, 8, 8).float()
        torch.testing.assert_close(module(x), net().apply(params, x, state)[0])


def test_the_parts_of_x_are_arguments():
    x = IMAGES.flatten(1)
    program = fn.interop.export(fn.add(), {}, (x, x))
    assert torch.equal(program.module()(x, x), 2 * x)
    named = fn.parallel(a=fn.relu(), b=fn.tanh())
    program = fn.interop.export(named, {}, {"a": x, "b": x}, dynamic_batch=True)
    y = program.module()({"a": x[:2], "b": x[:2]})
    torch.testing.assert_close(y, named.apply({}, {"a": x[:2], "b": x[:2]})[0])


def test_attention_and_recurrence_have_any_batch():
    layer = fn.serial(
        fn.transformer_encoder_layer(2, 8, batch_first=True),
        fn.lstm(3, batch_first=True),
        fn.item(0),
    )
    x = oracle.randn(3, 5, 4).float()
    params, _ = layer.init(fn.key(0), x)
    program = fn.interop.export(layer, params, x, dynamic_batch=True)
    x = oracle.randn(2, 5, 4, seed=1).float()
    torch.testing.assert_close(program.module()(x), layer.apply(params, x)[0])


def test_one_example_tells_nothing_about_a_batch():
    with pytest.raises(ValueError, match="at least 2 examples, got float32 \\(1, 3\\)"):
        fn.interop.export(fn.relu(), {}, torch.ones(1, 3), dynamic_batch=True)


def test_onnx_needs_its_packages_or_gives_the_same_numbers(tmp_path):
    params, state = made()
    path = tmp_path / "net.onnx"
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript")):
        with pytest.raises(ImportError, match="pip install onnx onnxscript"):
            fn.interop.export(net(), params, IMAGES, state, onnx=path)
        return
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    fn.interop.export(net(), params, IMAGES, state, dynamic_batch=True, onnx=path)
    session = onnxruntime.InferenceSession(path)
    x = oracle.randn(5, 2, 8, 8).float()
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected, _ = net().apply(params, x, state)
    torch.testing.assert_close(torch.from_numpy(y), expected, rtol=1e-4, atol=1e-5)
