"""Errors of the first hour: what is expected in the user's words, and what to write instead."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import funcnet as fn

pytestmark = pytest.mark.cpu_only

X, TARGET = torch.ones(5, 3), torch.zeros(5, 2)
LABELS = torch.zeros(5, dtype=torch.int64)
NET = fn.serial(fn.linear(4), fn.relu(), fn.linear(2))
LOSS, OPTIMIZER = fn.mse(), fn.sgd(0.1)
PARAMS, _ = NET.init(fn.key(0), X)
STATE = fn.init_train_state(NET, OPTIMIZER, fn.key(0), X)
STEP = fn.train_step(NET, LOSS, OPTIMIZER)
MODULE = nn.Linear(3, 2)


def raises(call, message, error=TypeError):
    with pytest.raises(error, match=re.escape(message)):
        call()


OF_A_LAYER = [
    (fn.relu, "the function relu; call it, as in fn.relu(...)"),
    (fn.mse, "the function mse, which makes a Loss"),
    (MODULE, "a torch.nn.Linear; use fn.linear, or make a layer of it by fn.interop.from_module"),
    (nn.Conv2d(1, 1, 1), "a torch.nn.Conv2d; use fn.conv2d, or make a layer"),
    (nn.BatchNorm1d(1), "a torch.nn.BatchNorm1d; use fn.batch_norm, or make a layer"),
    (nn.Linear, "the class torch.nn.Linear; use fn.linear, or make a layer"),
    (nn.Sequential(MODULE), "a torch.nn.Sequential; use fn.serial of layers, or make a layer"),
    (nn.MSELoss(), "a torch.nn.MSELoss; as a loss use fn.mse, in fn.train_step(model, loss, "),
    (LOSS, "a Loss, mse(); a loss stands beside the model, as in fn.train_step(model, loss, "),
    (OPTIMIZER, "an Optimizer, sgd(lr=0.1)"),
    (torch.relu, "the function relu of torch; use fn.relu()"),
    (F.relu, "the function relu of torch; use fn.relu()"),
    (F.gelu, "the function gelu of torch; use fn.gelu()"),
    (
        torch.sin,
        "the function sin; call it if it makes a layer, or make a layer of a function of x",
    ),
    (lambda x: x, "a lambda; call it if it makes a layer, or make a layer of a function of x by"),
    ([fn.relu()], "a list of layers; write serial(*layers)"),
    ((fn.relu(), fn.tanh()), "a tuple of layers; write serial(*layers)"),
    ({"a": fn.relu()}, "a dict of layers; write serial(**layers)"),
    (tuple(fn.relu()), "a tuple of three functions; make it a layer by fn.Layer(init, apply, vjp)"),
    (fn.Layer, "the class Layer; a layer is made by a constructor, such as fn.linear(3)"),
    (None, "None; does the function that makes it return it?"),
    (3, "int; a layer is made by a constructor, such as fn.linear(3)"),
    (X, "float32 (5, 3)"),
    (PARAMS, "{'0': {'weight': float32 (4, 3), 'bias': float32 (4,)}, "),
]


@pytest.mark.parametrize(("given", "hint"), OF_A_LAYER, ids=[hint[:40] for _, hint in OF_A_LAYER])
def test_what_is_no_layer_gets_the_hint_that_fits(given, hint):
    raises(lambda: fn.serial(fn.tanh(), given), f"serial['1']: expects a Layer, got {hint}")
    hint = re.sub(r"write serial", "make one of them by fn.serial", hint)
    raises(lambda: fn.residual(given), f"residual: expects a Layer, got {hint}")
    raises(lambda: fn.combine("own", {"a": given}, None, None), "own['a']: expects a Layer, got ")


OTHERS = [
    (
        lambda: fn.train_step(MODULE, LOSS, OPTIMIZER),
        "a Layer as model, got a torch.nn.Linear",
    ),
    (
        lambda: fn.train_step(NET, nn.CrossEntropyLoss(), OPTIMIZER),
        "a Loss as loss, got a torch.nn.CrossEntropyLoss; use fn.cross_entropy",
    ),
    (
        lambda: fn.train_step(NET, nn.KLDivLoss(), OPTIMIZER),
        "a Loss as loss, got a torch.nn.KLDivLoss; use fn.kl_div",
    ),
    (
        lambda: fn.train_step(NET, F.cross_entropy, OPTIMIZER),
        "a Loss as loss, got the function cross_entropy of torch; use fn.cross_entropy()",
    ),
    (
        lambda: fn.train_step(NET, F.mse_loss, OPTIMIZER),
        "a Loss as loss, got the function mse_loss of torch; use fn.mse()",
    ),
    (lambda: fn.train_step(NET, fn.mse, OPTIMIZER), "got the function mse; call it, as in fn.mse("),
    (lambda: fn.train_step(NET, LOSS, fn.sgd), "got the function sgd; call it, as in fn.sgd(...)"),
    (
        lambda: fn.train_step(NET, LOSS, torch.optim.Adam(MODULE.parameters())),
        "an Optimizer as optimizer, got a torch.optim.Adam; use fn.adam",
    ),
    (
        lambda: fn.train_step(NET, LOSS, torch.optim.AdamW),
        "an Optimizer as optimizer, got the class torch.optim.AdamW; use fn.adamw",
    ),
    (
        lambda: fn.train_step(NET, OPTIMIZER, LOSS),
        "an Optimizer as optimizer, got a Loss, mse(); are the arguments in another order?",
    ),
    (
        lambda: fn.init_train_state(OPTIMIZER, NET, fn.key(0), X),
        "a Layer as model, got an Optimizer, sgd(lr=0.1); are the arguments in another order?",
    ),
    (lambda: fn.vmap(NET), "vmap: expects a function, got a Layer, serial(linear(4), relu(), "),
    (
        lambda: fn.jit([fn.relu()]),
        "jit: expects a function, got a list of layers; make one of them by fn.serial(*layers)",
    ),
    (lambda: fn.vmap(3), "vmap: expects a function, got int"),
    (lambda: fn.chain(fn.sgd), "an Optimizer, got the function sgd; call it, as in fn.sgd(...)"),
    (
        lambda: fn.chain([OPTIMIZER]),
        "an Optimizer, got a list of optimizers; make one of them by fn.chain(*optimizers)",
    ),
]


@pytest.mark.parametrize(("call", "hint"), OTHERS, ids=[hint[-40:] for _, hint in OTHERS])
def test_what_is_no_loss_and_no_optimizer_gets_the_hint_that_fits(call, hint):
    raises(call, hint)


CALLS = [
    (lambda: NET(X), "serial: a layer is not called, its functions are: y, state = net.apply("),
    (lambda: LOSS(X, X), "mse: a loss is not called, its functions are: value = loss.apply("),
    (lambda: OPTIMIZER(X), "sgd: an optimizer is not called, its functions are: updates, "),
    (lambda: NET.init(0, X), "serial: init expects a key, such as fn.key(0), got int"),
    (lambda: NET.init(7, X), "serial: init expects a key, such as fn.key(7), got int"),
    (
        lambda: NET.init(torch.Generator(), X),
        "init expects a key, such as fn.key(0), got Gen",
    ),
    (lambda: NET.init(X), "init expects a key and an example input, net.init(key, x), got float32"),
    (lambda: NET.init(X, fn.key(0)), "got float32 (5, 3); the key comes first: net.init(key, x)"),
    (
        lambda: NET.apply(X),
        "serial: apply expects params and x, net.apply(params, x), where params,",
    ),
    (lambda: NET.vjp(X), "serial: vjp expects params and x, net.vjp(params, x), where params, "),
    (
        lambda: NET.apply(PARAMS),
        "serial: apply expects params and x, net.apply(params, x); got one",
    ),
    (
        lambda: NET.apply(X, PARAMS),
        "serial: expects a dict of params, got float32 (5, 3); the params come first: net.apply(",
    ),
    (lambda: NET.apply(None, X), "serial: expects a dict of params, got NoneType"),
    (lambda: NET.apply(PARAMS, X, fn.key(0)), "got int64 (2,); a key is given by name: key=..."),
    (lambda: NET.apply(PARAMS, X, key=3), "serial: expects a key, such as fn.key(3), got int"),
    (lambda: LOSS.apply(X), "mse.apply() missing 1 required positional argument: 'target'"),
    (
        lambda: STEP(PARAMS, (X, TARGET)),
        "a step expects a TrainState and a batch, step(train_state, (x, target)); got a dict with "
        "['0', '2'] as the train state; make it by fn.init_train_state(model, optimizer, key, x), "
        "where params=... are those that are there",
    ),
    (
        lambda: STEP(STEP(STATE, (X, TARGET)), (X, TARGET)),
        "got what a step returns as the train state; it is a pair: train_state, metrics = step(",
    ),
    (lambda: STEP(STATE), "step(train_state, (x, target)); got no batch"),
    (lambda: STEP(STATE, X, TARGET), "got 2 arguments for it: write them as one, a tuple"),
    (lambda: STEP((X, TARGET), STATE), "step(train_state, (x, target)); got the batch first"),
    (lambda: STEP(None, (X, TARGET)), "got NoneType as the train state; make it by fn.init_train"),
    (
        lambda: fn.init_train_state(NET, OPTIMIZER, 0, X),
        "expects a key, such as fn.key(0), got int",
    ),
    (lambda: fn.random.normal(0, (2,)), "an int64 tensor of shape (2,) such as fn.key(0), got 0"),
]


@pytest.mark.parametrize(("call", "message"), CALLS, ids=[message[-40:] for _, message in CALLS])
def test_a_call_with_other_arguments_says_what_is_expected(call, message):
    raises(call, message)


def test_a_batch_that_is_no_pair_says_so():
    raises(lambda: STEP(STATE, X), "expects a batch (x, target), got float32 (5, 3)", ValueError)
    raises(lambda: STEP(STATE, (X,)), "expects a batch (x, target), got 1 things", ValueError)


ARRAY = X.numpy()
ARRAYS = {"w": ARRAY}
OF_ARRAYS = {
    "init": lambda: NET.init(fn.key(0), ARRAY),
    "init of a layer": lambda: fn.linear(2).init(fn.key(0), ARRAY),
    "init of a tuple": lambda: fn.add().init(fn.key(0), (X, ARRAY)),
    "apply": lambda: NET.apply(PARAMS, ARRAY),
    "apply of a layer": lambda: fn.relu().apply({}, ARRAY),
    "vjp": lambda: NET.vjp(PARAMS, ARRAY),
    "params": lambda: NET.apply(fn.tree.map(torch.Tensor.numpy, PARAMS), X),
    "pullback": lambda: NET.vjp(PARAMS, X)[1](TARGET.numpy()),
    "loss": lambda: LOSS.apply(ARRAY, X),
    "loss's target": lambda: LOSS.vjp(X, ARRAY),
    "classes": lambda: fn.cross_entropy().apply(X, LABELS.numpy()),
    "loss's pullback": lambda: fn.mse("none").vjp(X, X)[1](ARRAY),
    "metric": lambda: fn.metrics.accuracy().of_batch(ARRAY, LABELS),
    "metric's target": lambda: fn.metrics.accuracy().of_batch(X, LABELS.numpy()),
    "init_state": lambda: OPTIMIZER.init_state(ARRAYS),
    "update": lambda: OPTIMIZER.update(ARRAYS, {}, {"w": X}),
    "params of an update": lambda: OPTIMIZER.update({"w": X}, {}, ARRAYS),
    "apply_updates": lambda: fn.apply_updates(ARRAYS, {"w": X}),
    "step": lambda: STEP(STATE, (ARRAY, TARGET)),
    "step's target": lambda: STEP(STATE, (X, TARGET.numpy())),
    "value_and_grad": lambda: fn.value_and_grad(NET, LOSS)(PARAMS, (ARRAY, TARGET)),
    "params to start from": lambda: fn.init_train_state(
        fn.linear(2), OPTIMIZER, fn.key(0), params=ARRAYS
    ),
    "jit": lambda: fn.jit(lambda x: x)(ARRAY),
    "jit by name": lambda: fn.jit(lambda x: x)(x=ARRAY),
    "jitted layer": lambda: fn.jit(NET).apply(PARAMS, ARRAY),
    "vmap": lambda: fn.vmap(lambda x: x)(ARRAY),
    "scan": lambda: fn.scan(lambda carry, x: (carry, x), X, ARRAY),
    "summary": lambda: fn.summary(NET, ARRAY),
}


@pytest.mark.parametrize("call", OF_ARRAYS.values(), ids=OF_ARRAYS)
def test_an_array_of_numpy_is_refused_by_what_computes(call):
    raises(call, "torch.from_numpy", (TypeError, ValueError))


def test_arrays_of_numpy_are_data_to_what_makes_batches():
    data = ARRAY, TARGET.numpy()
    batch = fn.batches(data, 5, shuffle=False)(fn.key(0), 0)
    stacked = fn.epoch_batches(None, data, 5)
    assert torch.equal(batch[0], X)
    assert torch.equal(stacked[0][0], X)
    state = fn.init_train_state(NET, OPTIMIZER, fn.key(0), ARRAY)
    expected, _ = STEP(state, (X, TARGET))
    trained, _ = fn.fit(STEP, state, [data], progress=False)
    assert fn.tree.leaves(trained.params)[0].equal(fn.tree.leaves(expected.params)[0])
    assert fn.evaluate(NET, LOSS, None, [data])(state)["loss"] >= 0


def gated_forward(run, x):
    gate, value = run("gate", x), run("value", x)
    return gate * value, {"gate": gate, "value": value}


def gated_backward(pull, dy, residuals):
    return fn.sum_cotangents(
        pull("gate", dy * residuals["value"]), pull("value", dy * residuals["gate"])
    )


def gated(gate, value):
    return fn.combine("gated", {"gate": gate, "value": value}, gated_forward, gated_backward)


def resized():
    """A layer whose params may be of any size of output."""

    def apply(params, x):
        return x @ params["w"]

    def vjp(params, x):
        raise NotImplementedError

    return fn.stateless(lambda key, x: {"w": torch.ones(3, 2)}, apply, vjp)


def test_branches_that_do_not_go_together_are_named():
    given = "for x float32 (5, 3): 'gate' gives float32 (5, 2), 'value' gives float32 (5, 4): "
    message = f"serial['1'] gated: what its layers give does not go together, {given}"
    net = fn.serial(fn.relu(), gated(fn.linear(2), fn.linear(4)))
    raises(lambda: net.init(fn.key(0), X), message, ValueError)
    net = fn.serial(fn.relu(), gated(resized(), resized()))
    params = {"1": {"gate": {"w": torch.ones(3, 2)}, "value": {"w": torch.ones(3, 4)}}}
    raises(lambda: net.apply(params, X), message, ValueError)
    raises(lambda: fn.jit(net.apply)(params, X), given, ValueError)
    message = "serial['0'] residual: the layer must keep the shape and dtype float32 (5, 3), got"
    net = fn.serial(fn.residual(fn.linear(2)))
    raises(lambda: net.init(fn.key(0), X), f"{message} float32 (5, 2)", ValueError)
    net = fn.serial(fn.branch(fn.linear(2), fn.linear(4)), fn.add())
    given = "serial['1'] add: "
    raises(lambda: net.init(fn.key(0), X), given, ValueError)


def test_a_childs_own_error_is_not_the_combinators():
    def broken():
        def apply(params, x):
            raise RuntimeError("of its own")

        return fn.stateless(lambda key, x: {}, apply, apply)

    with pytest.raises(RuntimeError, match="of its own") as raised:
        gated(broken(), fn.relu()).apply({}, X)
    assert raised.value.__notes__ == ["in gated['gate']"]


def test_a_run_starts_from_given_params_and_state():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    layer, params, state = fn.interop.from_module(module)
    net = fn.serial(fn.linear(4), fn.batch_norm(), fn.linear(2))
    for model in (layer, net):
        start = fn.init_train_state(model, fn.adam(), fn.key(0), X, params=params, state=state)
        assert torch.equal(start.params["0"]["weight"], module[0].weight)
        assert start.state.keys() == {"1"}
        fn.train_step(model, LOSS, fn.adam())(start, (X, TARGET))
    assert fn.init_train_state(net, fn.adam(), fn.key(0), params=params, state=state).state
    # What is not given is made.
    start = fn.init_train_state(net, fn.adam(), fn.key(0), X, params=params)
    assert start.state.keys() == {"1"}
    start = fn.init_train_state(net, fn.adam(), fn.key(0), X, state=state)
    assert start.params.keys() == {"0", "1", "2"}
    # As the module's own parameters, which autograd would follow.
    own = fn.tree.from_dotted(dict(module.named_parameters()))
    start = fn.init_train_state(net, fn.adam(), fn.key(0), X, params=own)
    assert not any(leaf.requires_grad for leaf in fn.tree.leaves(start.params))


WEIGHT, BIAS = torch.ones(2, 3), torch.ones(2)
GIVEN = [
    ({"weight": WEIGHT}, ValueError, "params: the tree has no leaf 'bias'"),
    ({"weight": WEIGHT, "bias": BIAS, "more": BIAS}, ValueError, "has 'more', which was not"),
    ({"weight": WEIGHT.T, "bias": BIAS}, ValueError, "expects float32 (2, 3) at 'weight', got"),
    ({"weight": WEIGHT, "bias": BIAS.double()}, ValueError, "expects float32 (2,) at 'bias', got"),
    ({"weight": WEIGHT, "bias": 0.0}, TypeError, "params: expects a tensor at 'bias', got float"),
    ({"a.weight": WEIGHT, "a.bias": BIAS}, ValueError, "fn.tree.from_dotted makes a tree of"),
    (WEIGHT, TypeError, "params: expects a dict of tensors, got float32 (2, 3)"),
]  # fmt: skip


@pytest.mark.parametrize(("params", "error", "message"), GIVEN, ids=[m for _, _, m in GIVEN])
def test_given_params_that_do_not_fit_are_refused_by_path(params, error, message):
    def start():
        fn.init_train_state(fn.linear(2), OPTIMIZER, fn.key(0), X, params=params)

    raises(start, message, error)


def rate(step):
    return 0.1 if step < 10 else 0.01


def test_a_schedule_that_asks_for_the_step_says_so_under_jit():
    step = fn.train_step(NET, LOSS, fn.adam(rate))
    state = fn.init_train_state(NET, fn.adam(rate), fn.key(0), X)
    with pytest.raises(TypeError, match=r"torch\.where") as raised:
        fn.jit(step)(state, (X, TARGET))
    assert "return 0.1 if step < 10 else 0.01" in str(raised.value)
