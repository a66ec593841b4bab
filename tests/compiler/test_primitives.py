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
ROWS, WEIGHTS = fn.random.normal(fn.key(5), (5, 6)), fn.random.normal(fn.key(6), (4, 6))
PLACES = torch.tensor([[3], [0], [3], [1]]).repeat(1, 6)
ATTENDED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*HEADS, **CAUSAL)
SQUARE = X[0] + 4 * torch.eye(6)
# Tensors and options for each operator.
CASES = {
    "funcnet::threefry": ((KEY,), {"start": 3, "n": 40}),
    "funcnet::threefry_from": ((KEY, torch.tensor([3, 2**33 + 5])), {"n": 40}),
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
    "aten::addbmm": ((X[1, 0], X[0], X[1]), {}),
    **{
        f"aten::{name}": ((X,), {"dim": 1})
        for name in ("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "mode")
    },
    "aten::topk": ((X,), {"k": 2, "dim": 1, "largest": False}),
    "aten::kthvalue": ((X,), {"k": 2, "dim": 1, "keepdim": True}),
    "aten::median": ((X,), {}),
    "aten::nanmedian": ((X,), {}),
    "aten::searchsorted": ((X.sort().values, X[..., :4]), {"right": True}),
    "aten::bucketize": ((X, BIAS.sort().values), {}),
    "aten::scatter_reduce": ((ROWS, PLACES, WEIGHTS), {"dim": 0, "reduce": "prod"}),
    "aten::scatter.reduce": ((ROWS, PLACES, WEIGHTS), {"dim": 0, "reduce": "multiply"}),
    "aten::index_reduce": ((ROWS, PLACES[:, 0], WEIGHTS), {"dim": 0, "reduce": "amax"}),
    "aten::masked_scatter": ((ROWS, ROWS > 0, X), {}),
    "aten::_cdist_forward": ((ROWS, WEIGHTS), {"p": 1.0, "compute_mode": None}),
    "aten::_pdist_forward": ((ROWS,), {"p": 3.0}),
    "aten::histc": ((X,), {"bins": 5, "min": -1.0, "max": 2.0}),
    "aten::_linalg_solve_ex": ((SQUARE, X[1]), {"left": True, "check_errors": False}),
    "aten::linalg_inv_ex": ((SQUARE,), {"check_errors": False}),
    "aten::linalg_lu_factor_ex": ((SQUARE,), {"pivot": True, "check_errors": False}),
    "aten::linalg_lu": ((SQUARE,), {"pivot": True}),
    "aten::linalg_lu_solve": (
        (*torch.linalg.lu_factor(SQUARE), X[1]),
        {"left": True, "adjoint": False},
    ),
    "aten::_linalg_det": ((SQUARE,), {}),
    "aten::_linalg_slogdet": ((SQUARE,), {}),
    "aten::linalg_cholesky_ex": ((SQUARE @ SQUARE.mT,), {"upper": False, "check_errors": False}),
    "aten::cholesky_solve": ((X[1], SQUARE), {"upper": False}),
    "aten::linalg_solve_triangular": (
        (SQUARE, X[1]),
        {"upper": True, "left": True, "unitriangular": False},
    ),
    "aten::triangular_solve": (
        (X[1], SQUARE),
        {"upper": True, "transpose": False, "unitriangular": False},
    ),
}


def overload_of(name):
    """``aten::scatter.reduce``, or the first overload if none is named."""
    namespace, operator = name.split("::")
    packet, _, overload = operator.partition(".")
    function = getattr(getattr(torch.ops, namespace), packet)
    return getattr(function, overload or function.overloads()[0])


def test_all_files_are_found():
    folder = next(iter(primitives.__path__))
    from pathlib import Path

    files = [path for path in Path(folder).glob("*.py") if path.stem != "__init__"]
    headers = {path.name for path in Path(folder).glob("*.h")}
    assert {primitive.header for primitive in PRIMITIVES.values()} == headers
    assert len(files) == len(headers)


# Optional tensors that no case gives.
OMITTED = {"sorter", "attn_mask"}
HEADERS = sorted({primitive.header for primitive in PRIMITIVES.values()})


@pytest.mark.cpu_only
@pytest.mark.filterwarnings("ignore:index_reduce.* is in beta")
@pytest.mark.filterwarnings("ignore:The reduce argument of torch.scatter")
@pytest.mark.parametrize("header", HEADERS)
def test_the_formula_and_the_call_give_what_the_operator_gives(header):
    names = [name for name, primitive in PRIMITIVES.items() if primitive.header == header]

    def run(given):
        return {name: overload_of(name)(**arguments(name, given[name])) for name in names}

    given = {name: CASES[name][0] for name in names}
    expected = run(given)
    for name in names:
        tensors, options = CASES[name]
        primitive = PRIMITIVES[name]
        unread = arguments(name, tensors)
        read = [
            value
            for each, value in unread.items()
            if each not in options and each not in primitive.only_shape
        ]
        shapes = {each: tuple(unread[each].shape) for each in primitive.only_shape}
        torch.testing.assert_close(primitive.formula(*read, **options, **shapes), expected[name])
    compiled = fn.jit(run)
    lowered = compiled.lower(given)
    assert lowered.called == ()
    for name in names:
        assert f"primitive {name} " in lowered.blocks
    assert f'#include "primitives/{header}"' in lowered.code
    torch.testing.assert_close(compiled(given), expected)


def arguments(name, tensors):
    """The arguments of an operator, by name: the tensors in order, and the options."""
    given, options = iter(tensors), CASES[name][1]
    return {
        each.name: options[each.name] if each.name in options else next(given)
        for each in overload_of(name)._schema.arguments
        if each.name in options or (each.name not in OMITTED and "Tensor" in str(each.type))
    }


@pytest.mark.cpu_only
def test_all_headers_go_into_one_program():
    names = {PRIMITIVES[name].header: name for name in PRIMITIVES}.values()

    def run(given):
        return {name: overload_of(name)(**arguments(name, given[name])) for name in names}

    given = {name: CASES[name][0] for name in names}
    torch.testing.assert_close(fn.jit(run)(given), run(given))
    assert all(f'primitives/{header}"' in fn.jit(run).lower(given).code for header in HEADERS)
