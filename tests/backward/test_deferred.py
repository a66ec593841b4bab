"""Deferred gradients: the plain ones, bit for bit, each half at its own cost."""

import optree
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import funcnet as fn

KEY = fn.key(7)
ROWS = fn.random.normal(fn.key(1), (4, 6))
IMAGES = fn.random.normal(fn.key(2), (2, 3, 8, 8))
STEPS = fn.random.normal(fn.key(3), (5, 2, 8))
TOKENS = torch.tensor([[0, 3, 1], [4, 4, 2]])

MLP = fn.serial(fn.linear(5), fn.tanh(), fn.linear(5), fn.layer_norm(), fn.linear(2))
TIED = fn.tie(
    fn.serial(embed=fn.embedding(6, 6), head=fn.linear(6, bias=False)),
    {"head.weight": "embed.weight"},
)
NETS = {
    "linear": (fn.linear(3), ROWS),
    "serial": (MLP, ROWS),
    "residual": (fn.residual(fn.serial(fn.linear(6), fn.gelu())), ROWS),
    "branch": (fn.serial(fn.branch(fn.linear(3), fn.linear(4)), fn.concat(), fn.linear(1)), ROWS),
    "shared": (fn.shared(fn.linear(3)), (ROWS, ROWS + 1)),
    "tied": (TIED, TOKENS),
    "repeat": (fn.repeat(fn.residual(fn.serial(fn.linear(6), fn.layer_norm())), 3), ROWS),
    "stacked": (fn.stacked(fn.linear(3), 4), ROWS),
    "remat": (fn.remat(fn.serial(fn.linear(6), fn.dropout(0.5), fn.linear(3))), ROWS),
    "checkpointed": (fn.checkpointed(fn.serial(*[fn.linear(6), fn.tanh()] * 3), 2), ROWS),
    "rnn": (fn.rnn(4), STEPS),
    "gru": (fn.gru(4, num_layers=2, dropout=0.5), STEPS),
    "lstm": (fn.lstm(4, num_layers=2, bidirectional=True, proj_size=2), STEPS),
    "gru_cell": (fn.gru_cell(4), ROWS),
    "conv": (fn.serial(fn.conv2d(4, 3), fn.batch_norm(), fn.prelu(4), fn.conv2d(2, 2)), IMAGES),
    "conv_transpose": (fn.conv_transpose2d(4, 3), IMAGES),
    "attention": (fn.multihead_attention(2), STEPS),
    "transformer": (fn.transformer_encoder_layer(2, 16, dropout=0.1), STEPS),
    "bilinear": (fn.bilinear(3), (ROWS, ROWS)),
    "group_norm": (fn.group_norm(3), IMAGES),
    "instance_norm": (fn.instance_norm(affine=True), IMAGES),
    "cast": (fn.cast(fn.serial(fn.linear(5), fn.linear(3)), torch.bfloat16), ROWS),
    "freeze": (fn.freeze(fn.serial(fn.linear(5), fn.linear(3)), ["0"]), ROWS),
    "lora": (fn.lora(fn.serial(fn.linear(5), fn.linear(3)), 2), ROWS),
    "weight_norm": (fn.weight_norm(fn.linear(3)), ROWS),
    "experts": (fn.experts(fn.linear(3), fn.linear(4), n=3), ROWS),
    "guarded": (fn.detect_nonfinite(MLP), ROWS),
    "without params": (fn.serial(fn.tanh(), fn.relu()), ROWS),
}
EVERY_NET = pytest.mark.parametrize("name", NETS)


def made(name):
    """A net with its params, and y, pullback and a cotangent."""
    net, x = NETS[name]
    params, state = net.init(KEY, x)
    y, pullback, _ = net.vjp(params, x, state, key=KEY)
    return params, pullback, cotangent(y)


def cotangent(y):
    return fn.tree.map(lambda leaf: fn.random.normal(fn.key(9), leaf.shape, leaf.dtype), y)


def require_equal(expected, found):
    assert optree.tree_structure(expected) == optree.tree_structure(found)
    for leaf, other in zip(fn.tree.leaves(expected), fn.tree.leaves(found), strict=True):
        assert torch.equal(leaf, other)


@EVERY_NET
def test_deferred_gradients_are_the_plain_ones_bit_for_bit(name):
    _, pullback, dy = made(name)
    dparams, dx = pullback(dy)
    deferred, first = fn.defer(pullback)(dy)
    require_equal(dx, first)
    require_equal(dparams, fn.gradients(deferred))
    require_equal(dparams, fn.gradients(deferred))  # it can be finished twice
    without_dx, nothing = fn.defer(pullback)(dy, x=False)
    assert nothing is None
    require_equal(dparams, fn.gradients(without_dx))


@EVERY_NET
def test_each_half_has_its_own_cost(name):
    _, pullback, dy = made(name)
    with FlopCounterMode(display=False) as whole:
        pullback(dy)
    with FlopCounterMode(display=False) as first:
        deferred, _ = fn.defer(pullback)(dy)
    with FlopCounterMode(display=False) as second:
        fn.gradients(deferred)
    assert first.get_total_flops() + second.get_total_flops() == whole.get_total_flops()


# The gradients of these are functions of their params.
OF_PARAMS = {"lora", "weight_norm"}


@pytest.mark.parametrize("name", [name for name in NETS if name not in OF_PARAMS])
def test_a_deferred_does_not_hold_the_params(name):
    params, pullback, dy = made(name)
    deferred, _ = fn.defer(pullback)(dy)
    own = {leaf.untyped_storage().data_ptr() for leaf in fn.tree.leaves(params) if leaf.dim() > 1}
    kept = {leaf.untyped_storage().data_ptr() for leaf in fn.tree.leaves(deferred)}
    assert not own & kept


@pytest.mark.parametrize("name", ["serial", "shared", "tied", "repeat", "lstm", "conv"])
def test_a_deferred_is_scaled_and_added(name):
    _, pullback, dy = made(name)
    dparams, _ = pullback(dy)
    deferred, _ = fn.defer(pullback)(dy)
    found = fn.gradients(deferred * 2.0 + deferred)
    for leaf, other in zip(fn.tree.leaves(dparams), fn.tree.leaves(found), strict=True):
        torch.testing.assert_close(3 * leaf, other, rtol=1e-5, atol=1e-5)
    require_equal(fn.gradients(deferred * 2.0), fn.gradients(torch.tensor(2.0) * deferred))


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", ["serial", "tied", "lstm", "conv", "transformer"])
def test_a_compiled_function_returns_a_deferred_and_another_takes_it(name):
    net, x = NETS[name]
    params, state = net.init(KEY, x)

    def first_half(params, x):
        y, pullback, _ = net.vjp(params, x, state, key=KEY)
        return y, *fn.defer(pullback)(fn.tree.map(torch.ones_like, y))

    _, deferred, _ = fn.jit(first_half)(params, x)
    y, pullback, _ = net.vjp(params, x, state, key=KEY)
    dparams, _ = pullback(fn.tree.map(torch.ones_like, y))
    found = fn.jit(fn.gradients)(deferred)
    for leaf, other in zip(fn.tree.leaves(dparams), fn.tree.leaves(found), strict=True):
        torch.testing.assert_close(leaf, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["serial", "repeat", "conv", "gru_cell"])
def test_under_vmap_each_member_has_its_own(name):
    net, x = NETS[name]
    keys = fn.random.split(fn.key(4), 3)
    params, state = fn.vmap(net.init, in_axes=(0, None))(keys, x)

    def run(params, state):
        y, pullback, _ = net.vjp(params, x, state, key=KEY)
        dy = fn.tree.map(torch.ones_like, y)
        return fn.defer(pullback)(dy, x=False)[0], pullback(dy)[0]

    deferred, dparams = fn.vmap(run)(params, state)
    found = fn.vmap(fn.gradients)(deferred)
    for leaf, other in zip(fn.tree.leaves(dparams), fn.tree.leaves(found), strict=True):
        torch.testing.assert_close(leaf, other)


def test_a_deferred_of_many_members_is_not_finished_as_one():
    deferred = fn.vmap(lambda x: deferred_of(MLP, x))(ROWS)
    with pytest.raises(ValueError, match=r"serial\['0'\] linear: its deferred gradient was made"):
        fn.gradients(deferred)
    single = deferred_of(MLP, ROWS)
    with pytest.raises(ValueError, match="finished by vmap"):
        fn.vmap(fn.gradients)(single)


def deferred_of(net, x):
    params, state = net.init(KEY, ROWS)
    y, pullback, _ = net.vjp(params, x, state, key=KEY)
    return fn.defer(pullback)(torch.ones_like(y))[0]


def test_in_a_scan_deferreds_are_stacked():
    params, _ = MLP.init(KEY, ROWS)

    def body(carry, x):
        y, pullback, _ = MLP.vjp(params, x)
        return carry, (fn.defer(pullback)(y, x=False)[0], pullback(y)[0])

    batches = torch.stack([ROWS, ROWS + 1, ROWS - 1])
    _, (deferred, dparams) = fn.scan(body, None, batches)
    require_equal(dparams, fn.scan(lambda c, each: (c, fn.gradients(each)), None, deferred)[1])


def test_terms_have_the_paths_of_their_params():
    assert [path for path, _ in deferred_of(MLP, ROWS).terms()] == ["0", "2", "3", "4"]
    _, pullback, dy = made("tied")
    paths = dict(fn.defer(pullback)(dy)[0].terms())
    assert list(paths) == ["embed", "head"]
    assert list(paths["head"].parts["pullback"].residuals) == ["x"]


@pytest.mark.parametrize("wrong", [fn.tanh(), None, {"a": torch.ones(2)}])
def test_what_is_no_pullback_or_deferred_is_refused(wrong):
    with pytest.raises(TypeError, match="defer: expects the pullback"):
        fn.defer(wrong)
    with pytest.raises(TypeError, match="gradients: expects a Deferred"):
        fn.gradients(wrong)


def test_a_wrong_cotangent_or_factor_is_refused():
    _, pullback, _ = made("serial")
    with pytest.raises(ValueError, match=r"serial: pullback expects dy of shape \(4, 2\)"):
        fn.defer(pullback)(torch.ones(4, 3))
    with pytest.raises(ValueError, match="0-d tensor as factor"):
        deferred_of(MLP, ROWS) * torch.ones(4)
    with pytest.raises(TypeError):
        deferred_of(MLP, ROWS) * "2"


def test_a_sum_of_other_params_is_refused():
    one, other = (deferred_of(fn.linear(size), ROWS) for size in (1, 4))
    with pytest.raises(ValueError, match=r"same params, got .*'bias': \(1,\).* and .* \(4,\)"):
        fn.gradients(one + other)
