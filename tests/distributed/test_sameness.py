"""check_same finds ranks that have drifted apart, and says which leaves differ, on all of them."""

import pytest
import torch

import funcnet as fn

NAN = float("nan")


def trees(kind, rank):
    """What the ranks compare; it differs for the last rank, if at all."""
    last = rank == torch.distributed.get_world_size() - 1
    zeros = torch.zeros(2)
    drifted = zeros.clone()
    drifted[1] = 1e-30
    return {
        "same": lambda: {"a": torch.tensor([NAN, 1.0]), "b": {"c": torch.ones(3, 2).T}},
        "a bit": lambda: {"a": zeros, "b": {"c": drifted if last else zeros}},
        "sign of zero": lambda: {"a": {"b": -zeros if last else zeros}},
        "shape": lambda: {"a": torch.zeros(3 if last else 2)},
        "dtype": lambda: {"a": torch.zeros(2, dtype=torch.float16 if last else torch.bfloat16)},
        "structure": lambda: {"a": zeros, **({} if last else {"b": zeros})},
        "many": lambda: {str(i): torch.full((), float(last)) for i in range(9)},
        "empty": lambda: {"a": torch.zeros(0, 3), "b": torch.zeros((), dtype=torch.bool)},
    }[kind]()


def told(kind):
    mesh = fn.distributed.mesh()
    try:
        fn.distributed.check_same(trees(kind, torch.distributed.get_rank()), mesh)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", ["same", "empty"])
def test_the_same(two_ranks, kind):
    assert two_ranks(told, kind) == [None, None]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("a bit", "'b.c' has different numbers on (rank 0 (data 0)) and (rank 1 (data 1))"),
        ("sign of zero", "'a.b' has different numbers on (rank 0 (data 0)) and (rank 1 (data 1))"),
        ("shape", "'a' is float32 (2,) on rank 0 (data 0) and float32 (3,) on rank 1 (data 1)"),
        ("dtype", "'a' is bfloat16 (2,) on rank 0 (data 0) and float16 (2,) on rank 1 (data 1)"),
        ("structure", "'b' is float32 (2,) on rank 0 (data 0) and nothing on rank 1 (data 1)"),
        ("many", "; and 4 more leaves"),
    ],
)
def test_what_differs_is_told_on_all_ranks(two_ranks, kind, expected):
    first, second = two_ranks(told, kind)
    assert first == second
    assert first.startswith("check_same: ranks have drifted apart: ")
    assert first.endswith(expected)


def parted():
    """Params differ along "model", where each rank has its part; along "data" they drifted."""
    mesh = fn.distributed.mesh(data=2, model=2)
    model, rank = fn.distributed.axis_of(mesh, "model"), torch.distributed.get_rank()
    optimizer = fn.adam(0.1)
    params = {"weight": torch.full((2, 1), float(model.index))}
    net = fn.linear(2, bias=False)
    state = fn.init_train_state(net, optimizer, fn.key(0), torch.ones(1, 1), params=params)
    return mesh, state, rank


def check_parted():
    mesh, state, rank = parted()
    fn.distributed.check_same(state, mesh)
    found = []
    for axis in ("data", "model"):
        drifted = state._replace(step=state.step + (rank == 3))
        with pytest.raises(ValueError, match="drifted") as caught:
            fn.distributed.check_same(drifted if axis == "data" else state, mesh, axis=axis)
        found.append(str(caught.value))
    return found


def test_parts_along_another_axis(four_ranks):
    first, *others = four_ranks(check_parted)
    assert all(found == first for found in others)
    assert "'step' has different numbers on (rank 1 (data 0, model 1)) and (rank 3" in first[0]
    assert "params.weight" not in first[0]
    assert "'params.weight' has different numbers on (rank 0 (data 0, model 0)) and" in first[1]
