"""Primitives: what each file says of its operators is so."""

import pytest
import torch

import funcnet as fn
from funcnet.compiler import primitives
from funcnet.compiler.primitives import PRIMITIVES

KEY = fn.key(3)
X = fn.random.normal(fn.key(0), (2, 3, 6, 6))
WEIGHT = fn.random.normal(fn.key(1), (4, 3, 3, 3))
BIAS = fn.random.normal(fn.key(2), (4,))
WINDOW = {
    "stride": [1, 1],
    "padding": [1, 1],
    "dilation": [1, 1],
    "transposed": False,
    "output_padding": [0, 0],
    "groups": 1,
}
POOL = {"kernel_size": [3, 2], "stride": [2, 1], "padding": [1, 0], "dilation": [1, 2]}
POOLED, INDICES = torch.nn.functional.max_pool2d(X, *POOL.values(), return_indices=True)
FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"
CAUSAL = {"dropout_p": 0.0, "is_causal": True}
HEADS = fn.random.normal(fn.key(4), (3, 2, 5, 4, 8)).transpose(2, 3).unbind()
ATTENDED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*HEADS, **CAUSAL)
# Tensors and options for each operator.
CASES = {
    "funcnet::threefry": ((KEY,), {"start": 3, "n": 40}),
    "funcnet::threefry_at": ((KEY, torch.arange(40, dtype=torch.int32)), {}),
    "aten::sort": ((X,), {"dim": 1, "descending": True}),
    "aten::convolution": ((X, WEIGHT, BIAS), WINDOW),
    "aten::convolution_backward": (
        (torch.ones(2, 4, 6, 6), X, WEIGHT),
        {"bias_sizes": [4], **WINDOW, "output_mask": [True, True, True]},
    ),
    "aten::max_pool2d_with_indices": ((X,), {**POOL, "ceil_mode": False}),
    "aten::max_pool2d_with_indices_backward": (
        (POOLED, X, INDICES),
        {**POOL, "ceil_mode": False},
    ),
    FLASH: (HEADS, CAUSAL),
    f"{FLASH}_backward": ((torch.ones(2, 4, 5, 8), *HEADS, *ATTENDED), CAUSAL),
    "aten::mm": ((X[0, 0], X[1, 1].T), {}),
    "aten::addmm": ((BIAS, X[0, 0], X[1, 1, :, :4]), {}),
    "aten::bmm": ((X[0], X[1].mT), {}),
    "aten::baddbmm": ((X[0, :, :1], X[1], X[0]), {}),
}


def test_all_files_are_found():
    folder = next(iter(primitives.__path__))
    from pathlib import Path

    files = [path for path in Path(folder).glob("*.py") if path.stem != "__init__"]
    headers = {path.name for path in Path(folder).glob("*.h")}
    assert {primitive.header for primitive in PRIMITIVES.values()} == headers
    assert len(files) == len(headers)


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", PRIMITIVES)
def test_the_formula_and_the_call_give_what_the_operator_gives(name):
    tensors, options = CASES[name]
    namespace, operator = name.split("::")
    function = getattr(getattr(torch.ops, namespace), operator).default
    names = [each.name for each in function._schema.arguments if not each.kwarg_only]

    def run(*tensors):
        given = iter(tensors)
        return function(*[options[each] if each in options else next(given) for each in names])

    expected = run(*tensors)
    primitive = PRIMITIVES[name]
    inputs = [each for each in names if each not in options]
    unread = dict(zip(inputs, tensors, strict=True))
    read = [tensor for each, tensor in unread.items() if each not in primitive.only_shape]
    shapes = {each: tuple(unread[each].shape) for each in primitive.only_shape}
    torch.testing.assert_close(primitive.formula(*read, **options, **shapes), expected)
    compiled = fn.jit(run)
    assert compiled.lower(*tensors).why_not_one is None
    assert f"primitive {name} " in compiled.lower(*tensors).blocks
    assert f'#include "primitives/{PRIMITIVES[name].header}"' in compiled.lower(*tensors).code
    torch.testing.assert_close(compiled(*tensors), expected)
