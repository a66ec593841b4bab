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
    names = [argument.name for argument in function._schema.arguments]

    def run(*tensors):
        given = iter(tensors)
        return function(*[options[each] if each in options else next(given) for each in names])

    expected = run(*tensors)
    torch.testing.assert_close(PRIMITIVES[name].formula(*tensors, **options), expected)
    compiled = fn.jit(run)
    assert compiled.lower(*tensors).why_not_one is None
    assert f"primitive {name} " in compiled.lower(*tensors).blocks
    assert f'#include "primitives/{PRIMITIVES[name].header}"' in compiled.lower(*tensors).code
    torch.testing.assert_close(compiled(*tensors), expected)
