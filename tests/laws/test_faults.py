"""check_layer, check_loss and check_optimizer catch what they are for: faults planted in rules."""

import pytest
import torch

import funcnet as fn
from funcnet.testing import check_layer, check_loss, check_optimizer
from funcnet.testing.assertions import alike

X = fn.random.normal(fn.key(1), (5, 3), torch.float64)
PAIR = (X, fn.random.normal(fn.key(2), (5, 3), torch.float64))
HIDDEN = {}


def norm_rule(residuals, dy, fault, *, params, x):
    """The rule of `normed` below, with the fault planted."""
    n, weight, mask = residuals["n"], residuals["weight"], residuals["mask"]
    if fault == "stale residual":
        n = HIDDEN["n"]
    if fault == "residual changed":
        n *= 2
    if fault == "dy changed":
        dy *= 2
    if fault == "rule wrong in float32" and dy.dtype == torch.float32:
        dy = dy * 2
    if fault == "NaN for dy of 0":
        dy = dy * (dy / dy)
    if fault == "wrong for expanded dy" and 0 in dy.stride():
        dy = dy * 2
    if fault == "not linear in dy":
        dy = dy.abs()
    g = dy * mask
    dparams = dx = None
    if params or fault == "half not None":
        dweight = g.T @ n
        dbias = g.sum(0)
        if fault == "missing sum over the batch":
            dbias = g[0]
        if fault == "mean instead of sum":
            dbias = g.mean(0)
        if fault == "wrong sign":
            dweight = -dweight
        if fault == "transposed":
            dweight = dweight.T.contiguous()
        if fault == "missing parameter":
            dparams = {"weight": dweight}
        elif fault == "swapped parameters":
            dparams = {"weight": dbias, "bias": dweight}
        else:
            dparams = {"weight": dweight, "bias": dbias}
        if fault == "wrong dtype":
            dparams = {name: leaf.float() for name, leaf in dparams.items()}
        if fault == "extra parameter":
            dparams["running"] = torch.zeros(3, dtype=dy.dtype)
    if x or fault == "half not None":
        dx = g @ weight
        if fault == "wrong mask":
            dx = dy @ weight
        if fault == "small error":
            dx = dx * (1 + 1e-8)
        if fault == "halves differ" and not params:
            dx = dx * 2
        if fault == "dx of wrong dtype":
            dx = dx.float()
        if fault == "dx of wrong shape":
            dx = dx.sum(0)
    if fault == "swapped outputs":
        return dx, dparams
    if fault == "torch's random generator":
        dx = dx + torch.rand(()) if x else dx
    if fault == "autograd in the rule" and x:
        with torch.enable_grad():
            z = torch.zeros_like(n).requires_grad_()
            (dx,) = torch.autograd.grad((z @ weight.T * g).sum(), z)
    return dparams, dx


CALLS = {"count": 0}


def normed(fault=None):
    """A layer with parameters, state, noise and two modes: ``y = (x weight^T + bias) mask``."""

    def init(key, x):
        kind = {"dtype": x.dtype, "device": x.device}
        weight = fn.random.normal(key, (4, x.shape[-1]), x.dtype, device=x.device)
        if fault == "init ignores its key":
            weight = torch.randn(weight.shape).to(weight)
        if fault == "init reads values" and not x.is_meta:
            weight = weight + x.mean()
        if fault == "init changes x":
            x.add_(1.0)
        if fault == "init of wrong dtype":
            kind["dtype"] = torch.float64
            weight = weight.to(torch.float64).cpu() if x.is_meta else weight
        return {"weight": weight, "bias": torch.ones(4, **kind)}, {"mean": torch.zeros(4, **kind)}

    def forward(params, x, state, key, train):
        if fault == "argument changed":
            x.add_(1.0)
        if fault == "state changed in place":
            state["mean"].add_(1.0)
        y = x @ params["weight"].T + params["bias"]
        if fault == "wrong in float32" and x.dtype == torch.float32:
            y = y * 1.01
        if fault == "reads the default dtype":
            y = y * torch.tensor(1 / 3)
        if fault == "grad mode changed":
            torch.set_grad_enabled(False)
        if fault == "reads values":
            float(y.detach().sum())
        mask = torch.ones_like(y)
        if train:
            mask = fn.random.bernoulli(key, 0.5, y.shape, device=y.device).to(y.dtype)
            if fault == "hidden noise":
                mask = torch.rand_like(y)
        y = y * mask
        CALLS["count"] += 1
        if fault == "hidden counter":
            y = y * CALLS["count"]
        state = {"mean": state["mean"] + 0.1 * y.mean(0)} if train else state
        if fault == "state not returned":
            state = {}
        HIDDEN["n"] = x
        return y, mask, state

    def apply(params, x, state=None, *, key=None, train=False):
        y, _, state = forward(params, x, state, key, train or fault == "ignores train")
        if fault == "other output":
            y = y + 1e-9
        if fault == "other state":
            state = {"mean": state["mean"] + 1.0}
        if fault == "output needs a gradient":
            y = y.clone().requires_grad_()
        return y, state

    def vjp(params, x, state=None, *, key=None, train=fault != "wrong default"):
        y, mask, state = forward(params, x, state, key, train)
        residuals = {"n": x, "weight": params["weight"], "mask": mask}
        if fault == "closure as a rule":
            return y, fn.Pullback(lambda *a, **k: norm_rule(*a, **k), residuals, (fault,)), state
        return y, fn.Pullback(norm_rule, residuals, (fault,)), state

    return fn.Layer(init, apply, vjp)


# Each fault with the law that finds it.
LAYER_FAULTS = {
    "wrong sign": "derivative",
    "missing sum over the batch": "derivative",
    "mean instead of sum": "derivative",
    "transposed": "structure",
    "wrong mask": "derivative",
    "small error": "derivative",
    "stale residual": "pure",
    "residual changed": "pure",
    "dy changed": "pure",
    "argument changed": "pure",
    "state changed in place": "pure",
    "not linear in dy": "linear",
    "half not None": "halves",
    "halves differ": "halves",
    "missing parameter": "structure",
    "extra parameter": "structure",
    "swapped parameters": "structure",
    "swapped outputs": "structure",
    "wrong dtype": "structure",
    "dx of wrong dtype": "structure",
    "dx of wrong shape": "structure",
    "init of wrong dtype": "init",
    "torch's random generator": "pure",
    "hidden noise": "pure",
    "hidden counter": "pure",
    "autograd in the rule": "no autograd",
    "output needs a gradient": "no autograd",
    "closure as a rule": "structure",
    "state not returned": "structure",
    "other output": "vjp equals apply",
    "other state": "vjp equals apply",
    "ignores train": "vjp equals apply",
    "wrong default": "defaults",
    "reads values": "meta",
    "init ignores its key": "init",
    "init reads values": "init",
    "init changes x": "init",
    "wrong in float32": "float32",
    "rule wrong in float32": "float32",
    "reads the default dtype": "pure",
    "grad mode changed": "derivative",
    "NaN for dy of 0": "linear",
    "wrong for expanded dy": "memory layout",
}


def test_the_layer_without_a_fault_passes():
    check_layer(normed(), X)


@pytest.mark.parametrize(("fault", "law"), LAYER_FAULTS.items())
def test_a_fault_in_a_layer_is_caught(fault, law):
    with pytest.raises((AssertionError, RuntimeError), match=rf"normed \(train=\w+\): {law}\b"):
        check_layer(normed(fault), X.clone())


def square_rule(residuals, dy, times, *, params, x):
    return ({} if params else None), times * dy * residuals["x"] if x else None


def square(times):
    """``y = x x``: an input that is used twice."""

    def vjp(params, x):
        return x * x, fn.Pullback(square_rule, {"x": x}, (times,))

    return fn.stateless(lambda key, x: {}, lambda params, x: x * x, vjp)


def once_rule(residuals, dy, *, params, x):
    return residuals["layer"](dy[0], params=params, x=x)[0], residuals["layer"](dy[0])[1:] * 2


def shared_counted_once(layer):
    """`fn.shared`, but for a gradient that forgets the second use."""
    right = fn.shared(layer)

    def vjp(params, x, state=None, *, key=None, train=True):
        y, _, state = right.vjp(params, x, {}, key=key, train=train)
        _, first, _ = layer.vjp(params, x[0], {}, key=key, train=train)
        _, second, _ = layer.vjp(params, x[1], {}, key=key, train=train)
        return y, fn.Pullback(counted_once_rule, {"0": first, "1": second}), state

    return right._replace(vjp=vjp)


def counted_once_rule(residuals, dy, *, params, x):
    dparams, dx0 = residuals["0"](dy[0], params=params, x=x)
    _, dx1 = residuals["1"](dy[1], params=False, x=x)
    return dparams, (dx0, dx1) if x else None


def test_the_gradient_of_a_tied_input_counted_once_is_caught():
    check_layer(square(2), X)
    with pytest.raises(AssertionError, match="autograd"):
        check_layer(square(1), X)


def test_the_gradient_of_tied_params_counted_once_is_caught():
    check_layer(fn.shared(fn.linear(2)), PAIR)
    with pytest.raises(AssertionError, match="autograd"):
        check_layer(shared_counted_once(fn.linear(2)), PAIR)


def test_the_message_names_the_layer_the_mode_the_law_the_leaf_and_the_error():
    with pytest.raises(
        AssertionError,
        match=r"normed \(train=True\): derivative: .*: the error at 'dparams.weight' is 2.32",
    ):
        check_layer(normed("wrong sign"), X)


def half_rule(residuals, dvalue, fault):
    error, target = residuals["error"], residuals["target"]
    if fault == "residual changed":
        error *= 2
    gradient = 2 * error / error.numel() * dvalue
    return {
        None: gradient,
        "residual changed": gradient,
        "wrong sign": -gradient,
        "no mean": gradient * error.numel(),
        "ignores dvalue": 2 * error / error.numel(),
        "wrong shape": gradient.sum(0),
        "wrong dtype": gradient.to(torch.float32),
        "gradient of the target": -gradient + 0 * target,
    }.get(fault, gradient)


def squares(fault=None):
    def apply(prediction, target):
        if fault == "prediction changed":
            prediction.mul_(2)
        value = (prediction - target).square().mean()
        if fault == "not a scalar":
            return value[None]
        return value + 1 if fault == "other value" else value

    def vjp(prediction, target):
        error = prediction - target
        residuals = {"error": error, "target": target}
        value = error.square().mean()
        if fault == "not a scalar":
            value = value[None]
        if fault == "needs a gradient":
            value = value.requires_grad_()
        return value, fn.core.LossPullback(half_rule, residuals, (fault,))

    return fn.Loss(apply, vjp)


LOSS_FAULTS = {
    "wrong sign": "derivative",
    "no mean": "derivative",
    "ignores dvalue": "linear",
    "wrong shape": "structure",
    "wrong dtype": "structure",
    "gradient of the target": "derivative",
    "residual changed": "pure",
    "prediction changed": "pure",
    "other value": "vjp equals apply",
    "not a scalar": "value",
    "needs a gradient": "no autograd",
}


def test_the_loss_without_a_fault_passes():
    check_loss(squares(), *PAIR)


@pytest.mark.parametrize(("fault", "law"), LOSS_FAULTS.items())
def test_a_fault_in_a_loss_is_caught(fault, law):
    with pytest.raises(AssertionError, match=f"loss: {law}: "):
        check_loss(squares(fault), *[part.clone() for part in PAIR])


def each_rule(residuals, dvalue, fault):
    if fault == "one dvalue for all" and isinstance(dvalue, torch.Tensor):
        dvalue = dvalue.mean()
    if fault == "the first dvalue of a row" and isinstance(dvalue, torch.Tensor):
        dvalue = dvalue[:, :1]
    return 2 * residuals["error"] * dvalue


def each_square(fault=None):
    def vjp(prediction, target):
        error = prediction - target
        value = None if fault == "tells no value" else error.square()
        pullback = fn.LossPullback(each_rule, {"error": error}, (fault,), value)
        return error.square(), pullback

    return fn.Loss(lambda prediction, target: vjp(prediction, target)[0], vjp)


def test_the_loss_of_elements_without_a_fault_passes():
    check_loss(each_square(), *PAIR)


@pytest.mark.parametrize(
    ("fault", "law"),
    [
        ("one dvalue for all", "derivative"),
        ("the first dvalue of a row", "derivative"),
        ("tells no value", "value"),
    ],
)
def test_a_fault_in_a_loss_of_elements_is_caught(fault, law):
    with pytest.raises(AssertionError, match=f"loss: {law}: "):
        check_loss(each_square(fault), *PAIR)


MEMORY = {}


def descent(fault=None):
    def init_state(params):
        return {"count": torch.zeros(()), "trace": fn.tree.map(torch.zeros_like, params)}

    def update(grads, state, params):
        if fault == "grads changed":
            fn.tree.map(lambda g: g.mul_(2), grads)
        if fault == "params changed":
            fn.tree.map(lambda p: p.mul_(2), params)
        if fault == "state changed":
            state["count"].add_(1)
        decay = 0.8 if fault == "wrong decay" else 0.9
        trace = fn.tree.map(lambda b, g: decay * b + g, state["trace"], grads)
        if fault == "hidden state":
            trace = fn.tree.map(lambda b, g: 0.9 * b + g, MEMORY.get("trace", trace), grads)
            MEMORY["trace"] = trace
        sign = 1 if fault == "ascends" else -1
        updates = fn.tree.map(lambda b: sign * 0.1 * b, trace)
        if fault == "wrong dtype":
            updates = fn.tree.map(lambda u: u.to(torch.float32), updates)
        if fault == "lost leaf":
            updates = {"w": updates["w"]}
        new = {"count": state["count"] + 1, "trace": trace}
        if fault == "state lost":
            new = {"count": new["count"]}
        if fault == "state not updated":
            new = state
        if fault == "NaN for gradients of 0":
            updates = fn.tree.map(lambda u, g: u * (g / g), updates, grads)
        if fault == "other in inference mode" and torch.is_inference_mode_enabled():
            updates = fn.tree.map(lambda u: 2 * u, updates)
        if fault == "updates of wrong dtype":
            updates = fn.tree.map(lambda u: u.to(torch.float64), updates)
        return updates, new

    return fn.Optimizer(init_state, update)


OPTIMIZER_FAULTS = {
    "grads changed": "pure",
    "params changed": "pure",
    "state changed": "pure",
    "wrong decay": "reference",
    "hidden state": "pure",
    "ascends": "reference",
    "wrong dtype": "structure",
    "lost leaf": "structure",
    "state lost": "structure",
    "state not updated": "reference",
    "NaN for gradients of 0": "zero gradients",
    "updates of wrong dtype": "float32",
    "other in inference mode": "no autograd",
}


def momentum_of_torch(params):
    return torch.optim.SGD(params, 0.1, 0.9)


def test_the_optimizer_without_a_fault_passes():
    check_optimizer(descent(), {"w": X, "b": X[0]}, reference=momentum_of_torch)


@pytest.mark.parametrize(("fault", "law"), OPTIMIZER_FAULTS.items())
def test_a_fault_in_an_optimizer_is_caught(fault, law):
    MEMORY.clear()
    params = {"w": X.clone(), "b": X[0].clone()}
    with pytest.raises(AssertionError, match=f"optimizer: {law}: "):
        check_optimizer(descent(fault), params, reference=momentum_of_torch)


def number_rule(residuals, dy, *, params, x):
    return ({} if params else None), dy * residuals["factor"] if x else None


def test_a_residual_that_is_no_tensor_is_named():
    layer = fn.stateless(
        lambda key, x: {},
        lambda params, x: 2 * x,
        lambda params, x: (2 * x, fn.Pullback(number_rule, {"factor": 2})),
        name="double",
    )
    with pytest.raises(AssertionError, match="residuals is a tree of tensors, got int 2 at"):
        check_layer(layer, X)


def draw_rule(residuals, dy, *, params, x):
    return ({} if params else None), dy if x else None


@pytest.mark.cpu_only
def test_a_layer_of_noise_keeps_the_laws_compiled_too():
    def noisy():
        def forward(params, x, state, key, train):
            drawn = 0.1 * fn.random.normal(key, x.shape, device=x.device) if train else 0.0
            return x + drawn, fn.Pullback(draw_rule, {}), {}

        return fn.stateful(lambda key, x: ({}, {}), forward, keyed=True)

    check_layer(noisy(), X, jit=True, modes=[True])
    check_layer(fn.gaussian_noise(0.1), X, jit=True, modes=[True])


def test_what_is_raised_within_a_law_names_the_law():
    def failing():
        def apply(params, x):
            if x.dtype == torch.float32:
                raise RuntimeError("no float32")
            return 2.0 * x

        def vjp(params, x):
            return apply(params, x), fn.Pullback(twice_rule, {})

        return fn.stateless(lambda key, x: {}, apply, vjp)

    with pytest.raises(AssertionError, match=r"float32: raised RuntimeError: no float32") as raised:
        check_layer(failing(), X)
    assert isinstance(raised.value.__cause__, RuntimeError)


def twice_rule(residuals, dy, *, params, x):
    return ({} if params else None), 2.0 * dy if x else None


def test_a_device_that_differs_is_shown():
    with pytest.raises(AssertionError, match=r"float32 \(2,\) on cpu at 'a', got .* on meta"):
        alike("one", {"a": torch.ones(2)}, {"a": torch.ones(2, device="meta")}, device=True)


def test_a_number_in_the_state_of_an_optimizer_is_named():
    optimizer = fn.Optimizer(lambda params: {"step": 0}, lambda g, state, p: (g, state))
    with pytest.raises(AssertionError, match="the state is a tree of tensors, got int 0 at 'step'"):
        check_optimizer(optimizer, {"w": X})
