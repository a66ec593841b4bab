"""Results of compiled functions take memory that nobody has any more, and only that."""

import threading

import pytest
import torch

import funcnet as fn
from funcnet.compiler.recycling import Pool
from funcnet.compiler.specs import Spec

pytestmark = pytest.mark.cpu_only

N = 300  # a result of 360 kB
X = torch.ones(N, N)


def holders(storage):
    return torch._C._storage_Use_Count(storage._cdata)


def compiled():
    """A function of a 0-d tensor, with one large result full of its value."""
    f = fn.jit(lambda value: X * value)
    for _ in range(4):
        f(torch.tensor(0.0))
    return f


def test_memory_that_nobody_has_is_used_again():
    f = compiled()
    addresses = {f(torch.tensor(1.0)).data_ptr() for _ in range(8)}
    assert len(addresses) <= 2


@pytest.mark.parametrize(
    "hold",
    [
        lambda y: y,
        lambda y: y[1:, ::2],
        lambda y: y.numpy(),
        lambda y: y.detach().view(-1)[5:],
        lambda y: memoryview(y.numpy()),
        lambda y: torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(y)),
        lambda y: y.untyped_storage(),
        lambda y: {"a": [y.unbind(0)[3]]},
    ],
)
def test_what_somebody_has_in_any_form_is_never_written_to(hold):
    f = compiled()
    held = [hold(f(torch.tensor(float(value)))) for value in range(6)]

    def first(each):
        if isinstance(each, dict):
            each = each["a"][0]
        if isinstance(each, memoryview):
            return each[0, 0]
        if isinstance(each, torch.UntypedStorage):
            return torch.tensor(0.0).set_(each, 0, (1,)).item()
        return float(each.reshape(-1)[0])

    for value in range(100, 106):
        f(torch.tensor(float(value)))
    assert [first(each) for each in held] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_a_random_program_of_keeping_and_dropping():
    f, kept = compiled(), {}
    generator = torch.Generator().manual_seed(0)
    for value in range(200):
        kept[value] = f(torch.tensor(float(value)))
        for each in [*kept]:
            if torch.rand((), generator=generator) < 0.3:
                del kept[each]
        for number, result in kept.items():
            assert result[0, 0] == result[-1, -1] == number


def test_a_result_is_an_argument_of_the_next_call():
    f = fn.jit(lambda x, y: (x + y, x - y))
    a, b = X.clone(), 2 * X
    c, d = a, b
    for _ in range(10):
        a, b = f(a, b)
        c, d = c + d, c - d
        assert torch.equal(torch.stack([a, b]), torch.stack([c, d]))


def test_a_resized_storage_is_not_used_again():
    f = compiled()
    for _ in range(3):
        f(torch.tensor(1.0)).untyped_storage().resize_(0)
    assert torch.equal(f(torch.tensor(2.0)), 2 * X)


def test_inference_tensors_stay_apart():
    f = compiled()
    with torch.inference_mode():
        inside = f(torch.tensor(1.0))
    outside = f(torch.tensor(2.0))
    assert not outside.is_inference()
    outside.add_(1)
    assert [inside[0, 0], outside[0, 0]] == [1.0, 3.0]


def test_threads_share_no_result():
    f, wrong = compiled(), []

    def work(number):
        for count in range(200):
            value = float(number * 1000 + count)
            result = f(torch.tensor(value))
            if not (result == value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_function_that_is_called_once_keeps_nothing():
    f, once = fn.jit(lambda value: X * value), torch.ones(1)
    storages = f(torch.tensor(1.0)).untyped_storage(), once.untyped_storage()
    del once
    assert holders(storages[0]) == holders(storages[1])


def test_small_results_and_those_of_other_devices_have_no_pool():
    assert Pool.of(Spec((10,), torch.float32, torch.device("cpu"))) is None
    assert Pool.of(Spec((N, N), torch.float32, torch.device("meta"))) is None


def test_clear_frees_what_is_remembered():
    pool = Pool.of(Spec((N, N), torch.float32, torch.device("cpu")))
    for _ in range(5):
        storage = pool.new().untyped_storage()
    before = holders(storage)
    pool.clear()
    assert holders(storage) == before - 1
