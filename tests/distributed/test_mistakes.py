"""What looks right over ranks and is not: it is made right, or refused."""

import pytest
import torch

import funcnet as fn
from funcnet.distributed import (
    axis_of,
    column_linear,
    mean,
    over_parts,
    part,
    pipeline_state,
    pipeline_step,
    placements,
    sharded,
    state_placements,
    sum,
    zero,
)
from funcnet.parted_params import whole_params

F64 = torch.float64
ABSTRACT = {"data": 2}


def batch():
    x = fn.random.normal(fn.key(1), (8, 3), F64)
    return x, x.sin() @ torch.ones(3, 2, dtype=F64)


def overflowing(of, around):
    """Three steps, of which the second has an infinity in the last row of the batch."""
    mesh = fn.distributed.mesh()
    inside = {"mean": fn.chain(mean(mesh), fn.adam()), "zero": zero(fn.adam(), mesh)}[of]
    optimizer = {
        "scale": lambda: fn.optimizers.dynamic_loss_scale(inside, initial=4.0),
        "skip": lambda: fn.optimizers.apply_if_finite(inside, 5),
    }[around]()
    net, (x, target) = fn.linear(2), batch()
    state = fn.init_train_state(net, optimizer, fn.key(0), x.float())
    step = fn.train_step(net, fn.mse(), optimizer)
    for number in range(3):
        rows = x.float().clone()
        rows[-1] = torch.inf if number == 1 else 1.0
        state, _ = step(state, part((rows, target.float()), mesh))
        if number == 0:
            before = state.params
        if number == 1:
            after = state.params
    return before, after, state.params


@pytest.mark.parametrize("of", ["mean", "zero"])
@pytest.mark.parametrize("around", ["scale", "skip"])
def test_an_overflow_on_one_rank_skips_the_step_of_all(two_ranks, of, around):
    (before, after, last), other = two_ranks(overflowing, of, around)
    for path, leaf in fn.tree.to_dotted(before).items():
        assert torch.equal(leaf, fn.tree.to_dotted(after)[path])
        assert not torch.equal(leaf, fn.tree.to_dotted(last)[path])
        assert torch.equal(fn.tree.to_dotted(last)[path], fn.tree.to_dotted(other[2])[path])


def test_a_norm_of_the_ranks_own_gradients_is_refused():
    clip = fn.optimizers.clip_by_global_norm(1.0)
    for reduction in (mean(ABSTRACT), sum(ABSTRACT), zero(fn.adam(), ABSTRACT)):
        with pytest.raises(ValueError, match="must come before 'clip_by_global_norm'"):
            fn.chain(clip, reduction)
    chain = fn.chain(mean(ABSTRACT), fn.adam())
    with pytest.raises(ValueError, match=r"chain reduces them over ranks; use chain\(mean"):
        fn.clipped_train_step(fn.linear(2), fn.mse(), chain, 1.0)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda part: fn.weight_norm(part), "weight_norm: each rank has a part of the params"),
        (lambda part: fn.spectral_norm(part), "spectral_norm: each rank has a part"),
        (lambda part: fn.lora(part, 2), "lora"),
    ],
)
@pytest.mark.parametrize(
    "parted", [lambda: sharded(fn.linear(4), ABSTRACT), lambda: column_linear(4, {"model": 2})]
)
def test_what_needs_whole_params_refuses_parts(layer, message, parted):
    with pytest.raises(ValueError, match=message):
        layer(parted()).init(fn.key(0), torch.ones(2, 3))


def test_gradients_that_are_reduced_in_two_ways_are_refused():
    model, x = fn.serial(sharded(fn.linear(4), ABSTRACT), fn.linear(2)), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"'0.weight' is the mean of the ranks', and chain takes"):
        over_parts(fn.chain(sum(ABSTRACT), fn.adam()), placements(model, x))


def test_an_axis_that_is_none_is_refused():
    with pytest.raises(ValueError, match="the mesh has no axis 'modle', only"):
        mean(ABSTRACT, axis="modle")
    with pytest.raises(ValueError, match="part: expects a number of rows that 2 ranks divide"):
        part(torch.ones(5, 2), ABSTRACT)


def saved(folder):
    mesh = fn.distributed.mesh()
    net = fn.serial(fn.freeze(sharded(fn.linear(5), mesh), "weight"), fn.linear(3))
    x = batch()[0]
    state = fn.init_train_state(net, zero(fn.adam(), mesh, axis="model"), fn.key(0), x)
    with pytest.raises(ValueError, match=r"ranks have drifted apart.*pass placed=state_placements"):
        fn.distributed.save(f"{folder}/parts", state, mesh)
    placed = state_placements(state, net, x)
    fn.distributed.save(f"{folder}/run", state, mesh, placed)
    again = fn.distributed.load(f"{folder}/run", state, mesh, placed)
    assert torch.equal(again.state["0"]["frozen"]["weight"], state.state["0"]["frozen"]["weight"])


def test_parts_of_frozen_params_are_saved(two_ranks, tmp_path):
    two_ranks(saved, str(tmp_path))
    net = fn.serial(fn.freeze(fn.linear(5), "weight"), fn.linear(3))
    alone = fn.init_train_state(net, fn.adam(), fn.key(0), batch()[0])
    found = fn.load(f"{tmp_path}/run")
    assert torch.equal(
        fn.tree.to_dotted(found)["state.0.frozen.weight"], alone.state["0"]["frozen"]["weight"]
    )


def staged(inner):
    mesh = fn.distributed.mesh(data=2, pipe=2)
    net = fn.serial(fn.linear(4), inner(mesh), fn.tanh(), fn.linear(2))
    clip = fn.optimizers.clip_by_global_norm(0.1)
    optimizer = fn.chain(mean(mesh), clip, fn.adam(0.01))
    x, target = part(batch(), mesh)
    state = pipeline_state(net, optimizer, fn.key(0), x, mesh)
    step = pipeline_step(net, fn.mse(), optimizer, mesh, micro_batches=2)
    for _ in range(5):
        state, _ = step(state, (x, target))
    placed = placements(net, x)
    return whole_params(state.params, placed), axis_of(mesh, "pipe").index


def block(mesh):
    return sharded(fn.linear(4), mesh)


def test_stages_know_which_params_are_parts(four_ranks):
    net = fn.serial(fn.linear(4), fn.linear(4), fn.tanh(), fn.linear(2))
    optimizer = fn.chain(fn.optimizers.clip_by_global_norm(0.1), fn.adam(0.01))
    state = fn.init_train_state(net, optimizer, fn.key(0), batch()[0])
    step = fn.train_step(net, fn.mse(), optimizer)
    for _ in range(5):
        state, _ = step(state, batch())
    expected = fn.tree.to_dotted(state.params)
    for params, _ in four_ranks(staged, block):
        for path, leaf in fn.tree.to_dotted(params).items():
            torch.testing.assert_close(leaf, expected[path], rtol=1e-10, atol=1e-12, msg=path)


def unlike_stages(other):
    mesh = fn.distributed.mesh(data=1, pipe=2)
    net, first = fn.serial(fn.linear(4), fn.linear(2)), axis_of(mesh, "pipe").index == 0
    state = pipeline_state(net, fn.adam(), fn.key(0), batch()[0], mesh)
    schedule = fn.distributed.gpipe if other == "schedule" and first else fn.distributed.zero_bubble
    count = 4 if other == "micro-batches" and first else 2
    step = pipeline_step(net, fn.mse(), fn.adam(), mesh, micro_batches=count, schedule=schedule)
    with pytest.raises(ValueError, match="expects the same on all stages, and stage 1 has") as told:
        step(state, batch())
    return str(told.value)


@pytest.mark.parametrize(
    ("other", "message"),
    [("schedule", "another schedule than stage 0"), ("micro-batches", "2 micro-batches, each")],
)
def test_stages_that_do_not_do_the_same_are_told_before_they_begin(two_ranks, other, message):
    assert all(message in told for told in two_ranks(unlike_stages, other))


def test_norms_and_curvature_of_parts_are_refused():
    inside = fn.serial(fn.linear(4), fn.residual(column_linear(4, {"model": 2})))
    loss, error = fn.mse(), r"the params of \w+ at '1' are parts over ranks"
    for make in (
        lambda: fn.private_value_and_grad(inside, loss, 1.0, 0.0),
        lambda: fn.defer_examples(inside, loss),
        lambda: fn.clipped_train_step(inside, loss, fn.sgd(0.1), 1.0),
        lambda: fn.kfac_train_step(inside, loss, fn.kfac(), fn.random.categorical),
    ):
        with pytest.raises(ValueError, match=error):
            make()


def drawn_in(dim):
    """Whether the ranks' parts of a draw along a dimension are those of one process."""
    axis, dropout = axis_of(fn.distributed.mesh(), "data"), fn.dropout(0.5)
    x, options = torch.ones(4, 6, 3), {"key": fn.key(1), "train": True}
    whole, _ = dropout.apply({}, x, **options)
    own = fn.distributed.data_parallel(dropout, fn.distributed.mesh(), dim=dim)
    part_of_it, _ = own.apply({}, axis.part(x, dim).contiguous(), **options)
    return torch.equal(axis.gather(part_of_it.contiguous(), dim), whole)


def test_a_batch_is_in_a_dimension_counted_from_the_front(two_ranks):
    assert two_ranks(drawn_in, 0) == two_ranks(drawn_in, 1) == [True, True]
    with pytest.raises(ValueError, match=r"data_parallel: dim must be an integer >= 0, got -2"):
        fn.distributed.data_parallel(fn.dropout(0.5), ABSTRACT, dim=-2)


def test_an_axis_in_the_place_of_a_flag_is_refused():
    with pytest.raises(TypeError, match="sharded: keep must be a bool, got 'model'"):
        sharded(fn.linear(3), ABSTRACT, "model")
    with pytest.raises(TypeError, match="data_parallel: equal must be a bool, got 'data'"):
        fn.distributed.data_parallel(fn.linear(3), ABSTRACT, "data")


def other_names():
    """What is said of meshes of one's own without an axis "data"."""
    found = []
    for names in (("dp",), ("dp", "model"), None):
        sizes = (2,) if names is None else (2, 1)[: len(names)]
        mesh = torch.distributed.init_device_mesh("cpu", sizes, mesh_dim_names=names)
        try:
            mean(mesh)
        except ValueError as error:
            found.append(str(error))
    mesh = torch.distributed.init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    return found, axis_of(mesh, "dp").sum(torch.ones(())).item()


def test_a_mesh_with_other_names_is_not_one_of_a_single_rank(two_ranks):
    told, total = two_ranks(other_names)[0]
    assert told[:2] == [
        "the mesh has no axis 'data', only ['dp']; its name is the argument `axis`",
        "the mesh has no axis 'data', only ['dp', 'model']; its name is the argument `axis`",
    ]
    assert told[2].startswith("expects a DeviceMesh whose axes have names")
    assert total == 2.0


def in_micro_batches(parallel):
    """The params after three steps of two micro-batches, of layers that mix or draw."""
    mesh, (x, target) = fn.distributed.mesh(), batch()
    net = fn.serial(fn.linear(4), fn.batch_norm(), fn.dropout(0.5), fn.linear(2))
    loss, optimizer, rows = fn.mse(), fn.sgd(0.1), (x, target)
    if parallel:
        net, optimizer = fn.distributed.data_parallel(net, mesh), fn.chain(mean(mesh), optimizer)
        rows = part(rows, mesh, micro_batches=2)
    state = fn.init_train_state(net, optimizer, fn.key(0), x)
    step = fn.train_step(net, loss, optimizer, micro_batches=2)
    for _ in range(3):
        state, _ = step(state, rows)
    return state.params


def test_micro_batches_of_ranks_are_parts_of_those_of_one_process(two_ranks):
    one = two_ranks(in_micro_batches, False)[0]
    for params in two_ranks(in_micro_batches, True):
        torch.testing.assert_close(params, one, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="8 micro-batches of 2 ranks divide, got 8"):
        part(torch.ones(8), ABSTRACT, micro_batches=8)


def tied_over_stages(parallel):
    """The params after three steps of a model of parts whose head is its embedding, or of one."""
    d, mesh = fn.distributed, fn.distributed.mesh(data=1, model=2, pipe=2)
    tokens = fn.random.randint(fn.key(1), (4, 6), 0, 7)
    rows = tokens, tokens.roll(1, 1)
    options = {"dropout": 0.0, "batch_first": True}
    block = (
        d.parallel_encoder_layer(2, mesh, 9, **options)
        if parallel
        else fn.transformer_encoder_layer(2, 9, **options)
    )
    head = fn.linear(7, bias=False, weight_init=fn.initializers.normal(0.1), dtype=F64)
    parts = {"embed": fn.embedding(7, 8, dtype=F64), "block": block, "head": head}
    net = fn.tie(fn.serial(**parts, classes=fn.permute(0, 2, 1)), {"head.weight": "embed.weight"})
    optimizer, loss = fn.sgd(0.1), fn.cross_entropy()
    if not parallel:
        state = fn.init_train_state(net, optimizer, fn.key(0), tokens)
        step = fn.train_step(net, loss, optimizer, micro_batches=2)
    else:
        state = pipeline_state(net, optimizer, fn.key(0), tokens, mesh)
        step = pipeline_step(net, loss, optimizer, mesh, micro_batches=2)
    for _ in range(3):
        state, metrics = step(state, rows)
    return metrics["loss"].item()


def test_leaves_are_tied_across_stages_of_parts(four_ranks):
    expected = four_ranks(tied_over_stages, False)
    assert four_ranks(tied_over_stages, True) == pytest.approx(expected, rel=1e-12)
