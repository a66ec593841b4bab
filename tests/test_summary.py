"""`fn.summary` tells what a model holds before anything is computed."""

import pytest
import torch
from networks import nets, twins
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import funcnet as fn

NET = fn.serial(
    conv=fn.conv2d(8, 3, padding=1),
    norm=fn.batch_norm(),
    act=fn.relu(),
    noise=fn.dropout(0.5),
    flat=fn.flatten(),
    head=fn.serial(fn.linear(16), fn.tanh(), fn.linear(2)),
)
X = torch.ones(5, 3, 8, 8)


def rows():
    return {row.path: row for row in fn.summary(NET, X).rows}


def test_paths_are_those_of_the_parameters_and_in_the_order_of_the_run():
    assert list(rows()) == ["conv", "norm", "act", "noise", "flat", "head.0", "head.1", "head.2"]


def test_parameters_are_counted_as_torch_counts_them():
    peer = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Linear(512, 16),
        torch.nn.Linear(16, 2),
    )  # fmt: skip
    total = fn.summary(NET, X).total
    assert total.params == sum(leaf.numel() for leaf in peer.parameters())
    assert total.param_bytes == 4 * total.params
    assert total.state_bytes == sum(b.numel() * b.element_size() for b in peer.buffers())


def test_residual_bytes_count_each_storage_once():
    found = {path: row.residual_bytes for path, row in rows().items()}
    image = 5 * 8 * 8 * 8
    assert found == {
        "conv": 4 * 5 * 3 * 8 * 8,  # its input
        "norm": 4 * image + 2 * 4 * 8,  # its input, the mean and its spread
        "act": 4 * image,  # its output
        "noise": image,  # the mask, one byte each
        "flat": 0,
        "head.0": 4 * image,  # its input, which dropout made
        "head.1": 4 * 5 * 16,  # its output, which head.2 keeps too
        "head.2": 0,
    }


def test_in_evaluation_dropout_keeps_nothing():
    found = {row.path: row.residual_bytes for row in fn.summary(NET, X, train=False).rows}
    assert found["noise"] == 0


@pytest.mark.cpu_only
def test_the_total_is_what_a_step_really_holds():
    params, state = NET.init(fn.key(0), X)
    _, pullback, _ = NET.vjp(params, X, state, key=fn.key(1))
    own = {leaf.data_ptr() for leaf in fn.tree.leaves(params)}
    held = {
        leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes()
        for leaf in fn.tree.leaves(pullback)
        if leaf.data_ptr() not in own
    }
    assert fn.summary(NET, X).total.residual_bytes == sum(held.values())


def test_nothing_is_computed_for_an_example_without_data():
    huge = torch.empty(10**7, 10**4, device="meta")
    assert fn.summary(fn.serial(fn.linear(10**4), fn.dropout()), huge).total.params == 10**8 + 10**4


def test_a_shared_layer_is_one_row():
    pair = (torch.ones(5, 4), torch.ones(5, 4))
    (row,) = fn.summary(fn.shared(fn.linear(2)), pair).rows
    assert (row.params, row.residual_bytes) == (10, 2 * 4 * 5 * 4)


def test_a_model_that_does_not_fit_is_an_error_with_the_path():
    with pytest.raises(ValueError, match=r"serial\['1'\] conv2d: expects \(batch, channels"):
        fn.summary(fn.serial(fn.flatten(), fn.conv2d(2, 3)), X)


def test_the_table_has_a_line_for_each_row_and_the_total():
    lines = repr(fn.summary(NET, X)).splitlines()
    assert len(lines) == 8 + 4
    assert lines[-1].split()[0] == "total"


def held(net, x):
    """The bytes of the distinct storages of a pullback, less those of the params."""
    params, state = net.init(fn.key(0), x)
    _, pullback, _ = net.vjp(params, x, state, key=fn.key(1), train=True)
    owned = {leaf.untyped_storage()._cdata for leaf in fn.tree.leaves((params, state))}
    storages = {leaf.untyped_storage()._cdata: leaf for leaf in fn.tree.leaves(pullback)}
    return sum(
        leaf.untyped_storage().nbytes() for key, leaf in storages.items() if key not in owned
    )


def gated_forward(run, x):
    gate, value = run("gate", x), run("value", x)
    return gate * value, {"gate": gate, "value": value}


def gated_backward(pull, dy, residuals):
    dx_gate = pull("gate", dy * residuals["value"], needed=pull.x)
    dx_value = pull("value", dy * residuals["gate"], needed=pull.x)
    return fn.sum_cotangents(dx_gate, dx_value)


def gated(gate, value):
    return fn.combine("gated", {"gate": gate, "value": value}, gated_forward, gated_backward)


@pytest.mark.parametrize(
    "make",
    [
        lambda: gated(fn.linear(3), fn.linear(3)),
        lambda: fn.serial(gated(fn.serial(fn.linear(9), fn.tanh()), fn.linear(9)), fn.linear(2)),
        lambda: fn.remat(fn.serial(fn.linear(4), fn.batch_norm(), fn.tanh())),
        lambda: fn.serial(fn.remat(fn.serial(fn.linear(4), fn.tanh())), fn.linear(2)),
        lambda: fn.remat(fn.serial(fn.linear(4), fn.tanh(), fn.linear(2)), policy=["1"]),
        lambda: fn.remat(fn.serial(gated(fn.linear(4), fn.linear(4))), policy=["0.gate"]),
    ],
)
def test_the_total_is_what_a_combinator_or_a_remat_holds(make):
    net, x = make(), torch.ones(10, 3)
    params, _ = net.init(fn.key(0), x)
    total = fn.summary(net, x).total
    assert total.params == sum(leaf.numel() for leaf in fn.tree.leaves(params))
    assert total.residual_bytes == held(net, x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: fn.repeat(fn.residual(fn.serial(fn.linear(4), fn.tanh(), fn.linear(3))), 5),
        lambda: fn.serial(fn.linear(3), fn.repeat(fn.repeat(fn.linear(3), 2), 3), fn.tanh()),
        lambda: fn.serial(fn.repeat(fn.serial(fn.dropout(0.2), fn.batch_norm()), 2), fn.linear(2)),
        lambda: fn.serial(fn.repeat(fn.remat(fn.serial(fn.linear(3), fn.tanh())), 2), fn.tanh()),
        lambda: fn.serial(fn.branch(fn.tanh(), fn.relu()), fn.shared(fn.linear(3))),
        lambda: fn.weight_norm(fn.linear(2)),
        lambda: fn.freeze(fn.serial(fn.linear(3), fn.linear(2)), "0"),
        lambda: fn.lora(fn.serial(fn.linear(3), fn.tanh(), fn.linear(2)), rank=1),
        lambda: fn.tie(fn.serial(fn.linear(3), fn.linear(3)), {"1.weight": "0.weight"}),
    ],
)
def test_copies_and_params_made_of_others_count_once(make):
    net, x = make(), torch.ones(10, 3)
    params, state = net.init(fn.key(0), x)
    total = fn.summary(net, x).total
    assert total.params == fn.tree.count(params)
    assert total.param_bytes == fn.tree.bytes(params)
    assert total.state_bytes == fn.tree.bytes(state)
    assert total.residual_bytes == held(net, x)


def test_stacked_layers_count_as_copies():
    net, x = fn.stacked(fn.serial(fn.linear(4), fn.tanh()), 3), torch.ones(3, 10, 2)
    found = fn.summary(net, x)
    assert [row.copies for row in found.rows] == 2 * [(("", "stacked", 3),)]
    assert (found.total.params, found.total.residual_bytes) == (3 * 12, held(net, x))
    assert found.total.forward_flops == 3 * 2 * 10 * 2 * 4


def torch_flops(module, *x):
    """FLOPs of the forward and the backward pass as torch counts them on a module."""
    with FlopCounterMode(display=False) as forward:
        y = module(*x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


IMAGE = torch.ones(2, 3, 32, 32)


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("ours", "theirs", "x"),
    [
        (fn.linear(7), nn.Linear(5, 7), torch.ones(3, 4, 5)),
        (
            fn.serial(fn.linear(8), fn.relu(), fn.linear(2, bias=False)),
            nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2, bias=False)),
            torch.ones(3, 5),
        ),
        (fn.conv2d(8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1), IMAGE),
        (fn.conv2d(6, 3, stride=2, groups=3), nn.Conv2d(3, 6, 3, stride=2, groups=3), IMAGE),
        (fn.conv1d(6, 5, dilation=2), nn.Conv1d(3, 6, 5, dilation=2), torch.ones(2, 3, 32)),
        (fn.conv_transpose2d(5, 3, stride=2), nn.ConvTranspose2d(3, 5, 3, stride=2), IMAGE),
        (nets.lenet(), twins.lenet(), IMAGE[:, :1, :28, :28]),
        (nets.mobilenet(), twins.mobilenet(), IMAGE),
        (nets.resnet18(), twins.resnet18(), IMAGE),
    ],
)
def test_flops_are_those_that_torch_counts(ours, theirs, x):
    total = fn.summary(ours, x).total
    assert (total.forward_flops, total.backward_flops) == torch_flops(
        theirs.to("meta"), x.to("meta")
    )


def test_flops_of_attention_are_those_of_its_matrix_products():
    heads, batch, tokens, width = 2, 3, 10, 8
    net = fn.serial(fn.linear(width), fn.multihead_attention(heads, batch_first=True))
    rows = fn.summary(net, torch.ones(batch, tokens, width)).rows
    found = {row.layer: (row.forward_flops, row.backward_flops) for row in rows[1:]}
    projection, product = 2 * batch * tokens * width * width, 2 * batch * tokens * tokens * width
    assert found["in_projection"] == (3 * projection, 6 * projection)
    assert found["linear"] == (projection, 2 * projection)
    # The fused kernel of the backward pass computes the scores again.
    assert found["scaled_dot_product_attention"] == (2 * product, 5 * product)


@pytest.mark.parametrize(("make", "gates"), [(fn.lstm, 4), (fn.gru, 3), (fn.rnn, 1)])
def test_flops_of_recurrent_nets_are_those_of_every_step(make, gates):
    batch, tokens, width, hidden = 3, 6, 5, 7
    net = fn.serial(fn.linear(width), make(hidden, num_layers=1, batch_first=True))
    _, row = fn.summary(net, torch.ones(batch, tokens, width)).rows
    steps = 2 * batch * tokens * gates * hidden * (width + hidden)
    assert (row.forward_flops, row.backward_flops) == (steps, 2 * steps)


def test_a_remat_computes_the_forward_pass_again():
    block = fn.serial(fn.linear(9), fn.tanh(), fn.linear(4))
    x = torch.ones(5, 4)
    plain, again = [
        fn.summary(fn.serial(fn.tanh(), each), x).total for each in (block, fn.remat(block))
    ]
    assert again.forward_flops == plain.forward_flops
    assert again.backward_flops == plain.backward_flops + plain.forward_flops


def test_flops_in_evaluation_and_of_a_shared_layer():
    pair = (torch.ones(5, 4), torch.ones(5, 4))
    (row,) = fn.summary(fn.shared(fn.linear(2)), pair, train=False).rows
    assert (row.forward_flops, row.backward_flops) == (2 * 2 * 5 * 4 * 2, 2 * 2 * 5 * 4 * 2)


def printed(net, x):
    return repr(fn.summary(net, x))


def gpt(blocks):
    block = fn.transformer_encoder_layer(
        4, 256, 0.0, batch_first=True, norm_first=True, is_causal=True
    )
    return fn.serial(
        embed=fn.embedding(100, 64),
        blocks=fn.transformer_encoder(block, blocks),
        head=fn.linear(100),
    )


TOKENS = torch.zeros(2, 16, dtype=torch.int64)


def test_the_table_of_a_deep_net_is_short():
    found = fn.summary(gpt(48), TOKENS)
    lines = repr(found).splitlines()
    assert len(lines) == 18
    assert [line[:20].strip() for line in lines[2:5]] == ["embed", "blocks.layers.0 - 47", "norm1"]
    assert lines[3].split()[-2:] == ["x", "48"]
    assert found.total.params == 48 * 49_984 + 100 * 64 + 65 * 100


TABLES = {
    "alternating layers": (
        lambda: fn.serial(fn.linear(9), *[fn.relu(), fn.linear(9)] * 3, fn.relu(), fn.linear(2)),
        """
path   layer   output           params  bytes  state  residuals  forward  backward
-----  ------  ---------------  ------  -----  -----  ---------  -------  --------
0      linear  float32 (10, 9)      36    144      0        120      540       540
1 - 6  x 3
  1    relu    float32 (10, 9)       0      0      0        360        0         0
  2    linear  float32 (10, 9)      90    360      0          0    1.62k     3.24k
7      relu    float32 (10, 9)       0      0      0        360        0         0
8      linear  float32 (10, 2)      20     80      0          0      360       720
-----  ------  ---------------  ------  -----  -----  ---------  -------  --------
total                              326  1,304      0      1,560    5.76k       11k
""",
    ),
    "one layer several times": (
        lambda: fn.serial(fn.linear(3), *[fn.linear(3)] * 4),
        """
path   layer       output           params  bytes  state  residuals  forward  backward
-----  ----------  ---------------  ------  -----  -----  ---------  -------  --------
0      linear      float32 (10, 3)      12     48      0        120      180       180
1 - 4  linear x 4  float32 (10, 3)      12     48      0        120      180       360
-----  ----------  ---------------  ------  -----  -----  ---------  -------  --------
total                                   60    240      0        600      900     1.62k
""",
    ),
    "blocks of blocks": (
        lambda: fn.serial(
            *[fn.serial(*[fn.serial(fn.linear(4), fn.tanh())] * 2, fn.linear(4))] * 3
        ),
        """
path   layer   output           params  bytes  state  residuals  forward  backward
-----  ------  ---------------  ------  -----  -----  ---------  -------  --------
0.0.0  linear  float32 (10, 4)      16     64      0        120      240       240
0.0.1  tanh    float32 (10, 4)       0      0      0        160        0         0
0.1.0  linear  float32 (10, 4)      20     80      0          0      320       640
0.1.1  tanh    float32 (10, 4)       0      0      0        160        0         0
0.2    linear  float32 (10, 4)      20     80      0          0      320       640
1 - 2  x 2
  0.0  linear  float32 (10, 4)      20     80      0        160      320       640
  0.1  tanh    float32 (10, 4)       0      0      0        160        0         0
  1.0  linear  float32 (10, 4)      20     80      0          0      320       640
  1.1  tanh    float32 (10, 4)       0      0      0        160        0         0
  2    linear  float32 (10, 4)      20     80      0          0      320       640
-----  ------  ---------------  ------  -----  -----  ---------  -------  --------
total                              176    704      0      1,400     2.8k     5.36k
""",
    ),
    "a repeat": (
        lambda: fn.serial(
            body=fn.repeat(fn.residual(fn.serial(fn.linear(4), fn.tanh(), fn.linear(3))), 12)
        ),
        """
path   layer        output           params  bytes  state  residuals  forward  backward
-----  -----------  ---------------  ------  -----  -----  ---------  -------  --------
body   repeat x 12
  0    linear       float32 (10, 4)      16     64      0        120      240       480
  1    tanh         float32 (10, 4)       0      0      0        160        0         0
  2    linear       float32 (10, 3)      15     60      0        160      240       480
-----  -----------  ---------------  ------  -----  -----  ---------  -------  --------
total                                   372  1,488      0      5,280    5.76k     11.5k
""",
    ),
    "a repeat of one layer": (
        lambda: fn.serial(*[fn.serial(fn.linear(3), fn.repeat(fn.linear(3), 2))] * 3),
        """
path   layer       output           params  bytes  state  residuals  forward  backward
-----  ----------  ---------------  ------  -----  -----  ---------  -------  --------
0.0    linear      float32 (10, 3)      12     48      0        120      180       180
0.1    repeat x 2
  .    linear      float32 (10, 3)      12     48      0        120      180       360
1 - 2  x 2
  0    linear      float32 (10, 3)      12     48      0        120      180       360
  1    repeat x 2
    .  linear      float32 (10, 3)      12     48      0        120      180       360
-----  ----------  ---------------  ------  -----  -----  ---------  -------  --------
total                                  108    432      0      1,080    1.62k     3.06k
""",
    ),
    "blocks that differ": (
        lambda: fn.serial(fn.serial(fn.linear(3), fn.tanh()), fn.serial(fn.linear(4), fn.tanh())),
        """
path   layer   output           params  bytes  state  residuals  forward  backward
-----  ------  ---------------  ------  -----  -----  ---------  -------  --------
0.0    linear  float32 (10, 3)      12     48      0        120      180       180
0.1    tanh    float32 (10, 3)       0      0      0        120        0         0
1.0    linear  float32 (10, 4)      16     64      0          0      240       480
1.1    tanh    float32 (10, 4)       0      0      0        160        0         0
-----  ------  ---------------  ------  -----  -----  ---------  -------  --------
total                               28    112      0        400      420       660
""",
    ),
    "nothing": (
        lambda: fn.serial(),
        """
path   layer   output           params  bytes  state  residuals  forward  backward
-----  ------  ---------------  ------  -----  -----  ---------  -------  --------
       serial  float32 (10, 3)       0      0      0          0        0         0
-----  ------  ---------------  ------  -----  -----  ---------  -------  --------
total                                0      0      0          0        0         0
""",
    ),
}


@pytest.mark.parametrize(("make", "table"), TABLES.values(), ids=TABLES)
def test_equal_blocks_are_printed_once(make, table):
    assert printed(make(), torch.ones(10, 3)) == table.strip("\n")
