"""Averages of the params: torch.optim.swa_utils' numbers, and where they are found."""

from functools import cache, partial
from typing import NamedTuple

import pytest
import torch
from optimizers.case import Case
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import funcnet as fn
from funcnet.optimizers import eval_params, params_average, params_ema

F64 = torch.float64
CASES = {
    "params_ema": Case(lambda lr: params_ema(fn.sgd(lr), 0.9)),
    "params_ema of adamw, debiased": Case(lambda lr: params_ema(fn.adamw(lr), debias=True)),
    "params_average": Case(lambda lr: params_average(fn.sgd(lr, momentum=0.9), 2, 3)),
}


@cache
def drawn(step):
    generator = torch.Generator().manual_seed(step)
    draw = partial(torch.randn, generator=generator, dtype=F64, device="cpu")
    return {"0": {"weight": draw(3, 2)}, "1": {"weight": draw(1, 3)}}


def params_at(step, dtype=F64):
    return fn.tree.map(lambda leaf: leaf.to(torch.get_default_device(), dtype), drawn(step))


def trained(optimizer, steps, dtype=F64):
    """The params, the state and eval_params after each of some steps with random gradients."""
    params = params_at(0, dtype)
    opt_state = optimizer.init_state(params)
    for step in range(1, steps + 1):
        updates, opt_state = optimizer.update(params_at(step, dtype), opt_state, params)
        params = fn.apply_updates(params, updates)
        yield params, opt_state, eval_params(opt_state, params)


def close(found, expected, rtol=1e-12):
    for path, leaf in fn.tree.to_dotted(expected).items():
        torch.testing.assert_close(fn.tree.to_dotted(found)[path], leaf, rtol=rtol, atol=1e-14)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_laws_of_optimizers(case):
    fn.testing.check_optimizer(case.make(case.rate), params_at(0))


def averaged_by_torch(steps, **options):
    """torch's average of the params that `trained` gives with sgd(0.1), after each step."""
    net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False)).double()
    net.load_state_dict(fn.tree.to_dotted(params_at(0)))
    average = AveragedModel(net, **options)
    for params, _, _ in trained(fn.sgd(0.1), steps):
        net.load_state_dict(fn.tree.to_dotted(params))
        yield net, average


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999, 1.0])
def test_the_ema_is_that_of_torch(decay):
    options = {"multi_avg_fn": get_ema_multi_avg_fn(decay)}
    theirs = averaged_by_torch(20, **options)
    ours = trained(params_ema(fn.sgd(0.1), decay), 20)
    for (_, _, found), (net, average) in zip(ours, theirs, strict=True):
        average.update_parameters(net)
        close(found, fn.tree.from_dotted(dict(average.module.named_parameters())))


@pytest.mark.parametrize(("start", "every"), [(0, 1), (5, 1), (4, 3), (30, 1)])
def test_the_mean_is_that_of_torch_from_a_step_on(start, every):
    ours = trained(params_average(fn.sgd(0.1), start, every), 20)
    theirs = averaged_by_torch(20)
    for step, ((params, _, found), (net, average)) in enumerate(zip(ours, theirs, strict=True), 1):
        if step > start and (step - start) % every == 0:
            average.update_parameters(net)
        counted = step >= start + every
        expected = dict(average.module.named_parameters())
        close(found, fn.tree.from_dotted(expected) if counted else params)


def test_without_bias_it_is_the_mean_with_weights_that_fall():
    seen = []
    for params, _, found in trained(params_ema(fn.sgd(0.1), 0.8, debias=True), 10):
        seen.append(params)
        weights = torch.tensor([0.8 ** (len(seen) - i) for i in range(1, len(seen) + 1)], dtype=F64)
        weights /= weights.sum()
        expected = fn.tree.map(
            lambda *ps, w=weights: torch.einsum("i,i...->...", w, torch.stack(ps)), *seen
        )
        close(found, expected)


def test_the_params_are_those_of_the_optimizer_alone():
    alone = trained(fn.adam(0.1), 5)
    for (params, _, _), (expected, _, _) in zip(
        trained(params_ema(fn.adam(0.1)), 5), alone, strict=True
    ):
        close(params, expected, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_averaged_in_float32(dtype):
    *_, (_, state, found) = trained(params_ema(fn.sgd(0.1), 0.99), 5, dtype)
    assert {leaf.dtype for leaf in fn.tree.leaves(state.average)} == {torch.float32}
    assert {leaf.dtype for leaf in fn.tree.leaves(found)} == {dtype}


@pytest.mark.parametrize("donate", [False, True])
def test_in_a_train_step_the_average_is_of_the_params_that_the_step_gives(donate):
    net, optimizer = fn.linear(3), params_ema(fn.adam(0.1), 0.5)
    x, target = torch.ones(4, 2), torch.zeros(4, 3)
    step = fn.train_step(net, fn.mse(), optimizer, donate=donate)
    state = fn.init_train_state(net, optimizer, fn.key(0), x)
    seen = []
    for _ in range(3):
        state, _ = step(state, (x, target))
        seen.append(state.params["weight"].clone())
    expected = seen[0].lerp(seen[1], 0.5).lerp(seen[2], 0.5)
    found = eval_params(state.opt_state, state.params)["weight"]
    torch.testing.assert_close(found, expected)


def test_members_of_a_population_have_decays_of_their_own():
    def run(decay):
        *_, (_, _, found) = trained(params_ema(fn.sgd(0.1), decay), 4)
        return found

    [*trained(fn.sgd(0.1), 4)]  # draws: inside of vmap, torch draws others
    decays = torch.tensor([0.0, 0.5, 0.9], dtype=F64)
    together = fn.vmap(run)(decays)
    for index, decay in enumerate(decays):
        close(fn.tree.map(lambda leaf, i=index: leaf[i], together), run(float(decay)))


def test_jit_gives_the_same_average():
    optimizer = params_ema(fn.sgd(0.1), 0.9)
    update = fn.jit(optimizer.update)
    params = params_at(0)
    state = compiled = optimizer.init_state(params)
    for step in (1, 2):
        _, state = optimizer.update(params_at(step), state, params)
        _, compiled = update(params_at(step), compiled, params)
    close(compiled.average, state.average)


class KeptState(NamedTuple):
    factor: torch.Tensor

    def eval_params(self, params):
        return fn.tree.map(lambda p: self.factor * p, params)


def kept(factor):
    return fn.optimizers.stateful(lambda p: KeptState(torch.tensor(factor)), lambda g, s, p: (g, s))


def test_eval_params_finds_the_one_state_that_keeps_params():
    params = {"w": torch.ones(2)}
    nested = fn.chain(fn.optimizers.trace(0.9), inside=fn.chain(kept(2.0), fn.sgd(0.1)))
    assert eval_params(nested.init_state(params), params)["w"].tolist() == [2, 2]
    for none in (fn.sgd(0.1), fn.adam(0.1)):
        assert eval_params(none.init_state(params), params) is params
    two = fn.chain(a=kept(2.0), b=kept(3.0)).init_state(params)
    with pytest.raises(ValueError, match="eval_params: two optimizers"):
        eval_params(two, params)
    with pytest.raises(ValueError, match="eval_params: the average: the tree has no leaf 'v'"):
        eval_params(params_ema(fn.sgd(0.1)).init_state(params), {"v": torch.ones(2)})


SGD = fn.sgd(0.1)


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (
            TypeError,
            "params_ema: expects an Optimizer, got the",
            lambda: params_ema(fn.sgd),
        ),
        (TypeError, "params_average: expects an Optimizer, got float", lambda: params_average(0.1)),
        (ValueError, "decay must be >= 0, got -1", lambda: params_ema(SGD, -1)),
        (ValueError, "decay must be at most 1, got 2", lambda: params_ema(SGD, 2)),
        (ValueError, "decay must be below 1, got 1", lambda: params_ema(SGD, 1.0, debias=True)),
        (ValueError, "decay must be a 0-d tensor", lambda: params_ema(SGD, torch.ones(2))),
        (TypeError, "decay must be a number or a 0-d", lambda: params_ema(SGD, "0.9")),
        (ValueError, "start must be an integer >= 0, got -1", lambda: params_average(SGD, -1)),
        (ValueError, "every must be an integer >= 1, got 0", lambda: params_average(SGD, 0, 0)),
        (ValueError, "every must be an integer >= 1, got 1.5", lambda: params_average(SGD, 0, 1.5)),
    ],
)
def test_bad_options_are_told(error, message, make):
    with pytest.raises(error, match=message):
        make()


def test_a_state_of_another_optimizer_is_refused():
    params = {"w": torch.ones(2)}
    with pytest.raises(TypeError, match="params_ema: expects the state AveragedParamsState"):
        params_ema(fn.sgd(0.1)).update(params, fn.sgd(0.1).init_state(params), params)
