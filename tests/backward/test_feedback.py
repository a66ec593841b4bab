"""Feedback alignment and sign-symmetric feedback: by hand in PyTorch, and a net that learns."""

import pytest
import torch
from torch.nn import functional as F

import funcnet as fn

X = fn.random.normal(fn.key(1), (6, 4), torch.float64)
IMAGES = fn.random.normal(fn.key(2), (2, 3, 5, 5), torch.float64)


class FeedbackLinear(torch.autograd.Function):
    """``y = x W^T + b``, whose cotangent goes back through another matrix."""

    @staticmethod
    def forward(ctx, x, weight, bias, feedback):
        ctx.save_for_backward(x, feedback)
        return x @ weight.t() + bias

    @staticmethod
    def backward(ctx, dy):
        x, feedback = ctx.saved_tensors
        return dy @ feedback, dy.t() @ x, dy.sum(0), None


def feedback_of(state, name):
    return state[name]["feedback"]["weight"]


def signs_of(params, name):
    weight = params[name]["weight"]
    return weight.abs().mean() * weight.sign()


@pytest.mark.parametrize("kind", ["feedback_alignment", "sign_symmetric"])
def test_the_rule_is_that_of_a_function_of_autograd(kind):
    net = getattr(fn, kind)(fn.serial(fn.linear(5), fn.tanh(), fn.linear(3)))
    params, state = net.init(fn.key(0), X)
    y, pullback, _ = net.vjp(params, X, state)
    dy = fn.random.normal(fn.key(3), y.shape, y.dtype)
    dparams, dx = pullback(dy)

    own, x = fn.tree.map(lambda leaf: leaf.clone().requires_grad_(), (params, X))
    other = {
        name: feedback_of(state, name) if state else signs_of(params, name) for name in ("0", "2")
    }
    hidden = FeedbackLinear.apply(x, own["0"]["weight"], own["0"]["bias"], other["0"]).tanh()
    FeedbackLinear.apply(hidden, own["2"]["weight"], own["2"]["bias"], other["2"]).backward(dy)
    torch.testing.assert_close(dx, x.grad, rtol=1e-12, atol=1e-15)
    for path, leaf in fn.tree.to_dotted(own).items():
        found = fn.tree.to_dotted(dparams)[path]
        torch.testing.assert_close(found, leaf.grad, rtol=1e-12, atol=1e-15)


def test_a_convolution_passes_back_through_its_feedback_weights():
    layer = fn.feedback_alignment(fn.conv2d(2, 3, padding=1))
    params, state = layer.init(fn.key(0), IMAGES)
    y, pullback, _ = layer.vjp(params, IMAGES, state)
    dy = fn.random.normal(fn.key(3), y.shape, y.dtype)
    dparams, dx = pullback(dy)
    weight = state["feedback"]["weight"]
    assert not torch.equal(weight, params["weight"])
    torch.testing.assert_close(dx, F.conv_transpose2d(dy, weight, padding=1))
    plain = fn.conv2d(2, 3, padding=1).vjp(params, IMAGES)[1](dy)[0]
    assert torch.equal(dparams["weight"], plain["weight"])


def test_the_model_is_as_before_but_for_its_feedback_weights():
    net = fn.serial(fn.embedding(7, 4), fn.layer_norm(), fn.linear(3), fn.relu(), fn.gru(2))
    tokens = torch.tensor([[1, 2], [3, 4]])
    aligned = fn.feedback_alignment(net)
    assert repr(aligned) == repr(net)
    params, state = aligned.init(fn.key(0), tokens)
    plain, _ = net.init(fn.key(0), tokens)
    for path, leaf in fn.tree.to_dotted(plain).items():
        assert torch.equal(leaf, fn.tree.to_dotted(params)[path])
    y, expected = aligned.apply(params, tokens, state)[0], net.apply(params, tokens)[0]
    assert fn.tree.map(torch.equal, y, expected)
    shapes = {path: tuple(leaf.shape) for path, leaf in fn.tree.to_dotted(state).items()}
    assert shapes == {
        "2.feedback.weight": (3, 4),
        "4.feedback.weight_ih_l0": (6, 3),
        "4.feedback.weight_hh_l0": (6, 2),
    }


def test_feedback_weights_are_drawn_as_one_says():
    layer = fn.feedback_alignment(fn.linear(3), fn.initializers.constant(0.5))
    _, state = layer.init(fn.key(0), X)
    assert torch.equal(state["feedback"]["weight"], torch.full((3, 4), 0.5, dtype=X.dtype))


def test_copies_and_casts_have_feedback_weights_too():
    net = fn.feedback_alignment(fn.repeat(fn.serial(fn.linear(4), fn.tanh()), 3))
    _, state = net.init(fn.key(0), X)
    assert state["0"]["feedback"]["weight"].shape == (3, 4, 4)
    half = fn.feedback_alignment(fn.cast(fn.linear(3), torch.bfloat16))
    params, state = half.init(fn.key(0), X.float())
    y, pullback, _ = half.vjp(params, X.float(), state)
    _, dx = pullback(torch.ones_like(y))
    assert dx.dtype == torch.float32
    expected = state["feedback"]["weight"].sum(0).expand(6, 4)
    torch.testing.assert_close(dx, expected, rtol=0.05, atol=0.05)


def test_a_layer_that_does_not_read_its_weights_as_they_are_is_refused():
    with pytest.raises(ValueError, match=r"^feedback_alignment: multihead_attention at '0' has no"):
        fn.feedback_alignment(fn.serial(fn.multihead_attention(2)))
    net = fn.sign_symmetric(fn.serial(fn.multihead_attention(2)))
    x = (X[None],) * 3
    params, _ = net.init(fn.key(0), x)
    with pytest.raises(ValueError, match=r"its pullback does not read \['in_proj_weight'\]"):
        net.vjp(params, x)
    with pytest.raises(TypeError, match=r"^feedback_alignment: expects a Layer"):
        fn.feedback_alignment(torch.tanh)


@pytest.mark.parametrize("rewrite", [fn.feedback_alignment, fn.sign_symmetric])
def test_a_net_learns_by_feedback_and_its_first_layer_does(rewrite):
    x = fn.random.uniform(fn.key(0), (400, 2), minval=-1.0, maxval=1.0)
    label = (x[:, 0] * x[:, 1] > 0).long()  # not linear in x
    net = rewrite(fn.serial(fn.linear(32), fn.tanh(), fn.linear(32), fn.tanh(), fn.linear(2)))
    optimizer = fn.adam(0.01)
    step = fn.train_step(net, fn.cross_entropy(), optimizer)
    first = state = fn.init_train_state(net, optimizer, fn.key(1), x)
    for _ in range(200):
        state, _ = step(state, (x, label))
    y, _ = net.apply(state.params, x, state.state)
    assert (y.argmax(-1) == label).float().mean() > 0.95
    for one, other in zip(fn.tree.leaves(first.state), fn.tree.leaves(state.state), strict=True):
        assert torch.equal(one, other)


def test_the_forward_weights_turn_towards_the_feedback_weights():
    # What makes feedback alignment work: the angle of W and B falls (Lillicrap et al. 2016).
    key = fn.key(4)
    x = fn.random.normal(key, (200, 10))
    target = x @ fn.random.normal(fn.key(5), (10, 5))
    net = fn.feedback_alignment(fn.serial(fn.linear(20), fn.linear(5)))
    optimizer = fn.sgd(0.02)
    step = fn.train_step(net, fn.mse(), optimizer)
    state = fn.init_train_state(net, optimizer, fn.key(6), x)

    def alignment(state):
        pair = state.params["1"]["weight"], state.state["1"]["feedback"]["weight"]
        return F.cosine_similarity(*[leaf.flatten() for leaf in pair], dim=0).item()

    before = alignment(state)
    for _ in range(1000):
        state, metrics = step(state, (x, target))
    assert metrics["loss"] < 0.05 * target.square().mean()
    assert alignment(state) > before + 0.3
