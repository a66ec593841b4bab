"""Data-parallel training equals the single process on the whole batch."""

import functools
import itertools

import pytest
import torch

import funcnet as fn
from distributed.counting import counted
from funcnet.distributed import everywhere, mean, part, replicated, sum, total

STEPS = 5


def mesh():
    return fn.distributed.mesh()


def net():
    """With an unused leaf, an empty one, tied weights, and a layer that is used twice."""
    pair = fn.serial(a=fn.linear(6, bias=False), tanh=fn.tanh(), b=fn.linear(6, bias=False))
    tied, twice = fn.tie(pair, {"b.weight": "a.weight"}), in_a_row(fn.linear(6))
    return fn.serial(
        first=fn.linear(6), tanh=fn.tanh(), extra=extra(), tied=tied, twice=twice, out=fn.linear(3)
    )


def in_a_row(layer):
    return fn.combine("in_a_row", {"": layer}, in_a_row_forward, in_a_row_backward)


def in_a_row_forward(run, x):
    return run("", run("", x, use=0), use=1), {}


def in_a_row_backward(pull, dy, residuals):
    return pull("", pull("", dy, use=1), use=0, needed=pull.x)


def extra_rule(residuals, dy, *, params, x):
    dparams = {"unused": torch.zeros(4, dtype=dy.dtype), "empty": torch.zeros(0, 2)}
    return dparams if params else None, dy if x else None


def extra():
    def init(key, x):
        return {"unused": torch.ones(4, dtype=x.dtype), "empty": torch.zeros(0, 2)}

    def vjp(params, x):
        return x, fn.Pullback(extra_rule, {})

    return fn.stateless(init, lambda params, x: x, vjp, name="extra")


def batch(rows, dtype=torch.float64):
    """Of which targets of class 2 are ignored, unevenly."""
    x = fn.random.normal(fn.key(1), (rows, 4), dtype)
    return x, fn.random.randint(fn.key(2), (rows,), 0, 3)


def trained(model, loss, optimizer, data, steps=STEPS, mode="eager", **options):
    state = fn.init_train_state(model, optimizer, fn.key(0), data[0])
    step = fn.train_step(model, loss, optimizer, **options)
    step = fn.jit(step) if mode == "jit" else step
    values = []
    for _ in range(steps):
        state, metrics = step(state, data)
        values.append(metrics)
    return state.params, values


def check_same(found, expected, **options):
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13, **options)


def equals_one_process(case, mode, rows=8):
    data = batch(rows)
    own = part(data, mesh())
    loss = fn.cross_entropy()
    adam = fn.adam(0.01)
    model, chain, options = net(), fn.chain(mean(mesh()), adam), {}
    if case == "buckets":
        chain = fn.chain(mean(mesh(), bucket_bytes=100), adam)
    elif case == "clipped":
        clip = fn.optimizers.clip_by_global_norm(0.1)
        chain, adam = fn.chain(mean(mesh()), clip, adam), fn.chain(clip, adam)
    elif case.startswith("replicated"):
        size = 100 if case.endswith("buckets") else 10**6
        model, chain = replicated(model, mesh(), bucket_bytes=size), fn.adam(0.01)
    elif case == "micro":
        options = {"micro_batches": 2}
    elif case == "accumulated":
        adam = fn.optimizers.accumulate(adam, 2)
        chain = fn.optimizers.accumulate(chain, 2)
    found, _ = trained(model, loss, chain, own, mode=mode, **options)
    expected, _ = trained(net(), loss, adam, data)
    check_same(found, expected)


@pytest.mark.parametrize(
    "case",
    [
        *("flat", "buckets", "clipped", "replicated", "replicated buckets", "micro"),
        "accumulated",
    ],
)
def test_equal_parts(ranks, case):
    ranks(equals_one_process, case, "eager")


@pytest.mark.parametrize("case", ["buckets", "replicated buckets"])
def test_equal_parts_in_a_program(two_ranks, case):
    two_ranks(equals_one_process, case, "jit")


LOSSES = {
    "ignored": fn.cross_entropy(ignore_index=2),
    "weighted": fn.cross_entropy(torch.tensor([0.1, 3.0, 1.0], dtype=torch.float64)),
    "smooth": fn.cross_entropy(label_smoothing=0.1, ignore_index=1),
    "sum": fn.cross_entropy(reduction="sum"),
}


def unequal(name, mode, rows):
    data, loss = batch(rows), LOSSES[name]
    own = part(data, mesh(), equal=False)
    accuracy = fn.metrics.accuracy()
    chain = fn.chain(sum(mesh()), fn.adam(0.01))
    options = {"metrics": {"accuracy": everywhere(accuracy, mesh())}}
    found = trained(net(), total(loss, mesh()), chain, own, mode=mode, **options)
    model = replicated(net(), mesh(), reduction="sum")
    again = trained(model, total(loss, mesh()), fn.adam(0.01), own, mode="eager", **options)
    expected = trained(net(), loss, fn.adam(0.01), data, metrics={"accuracy": accuracy})
    check_same(found, expected)
    check_same(again, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_unequal_parts(ranks, name):
    ranks(unequal, name, "eager", 9)


def test_unequal_counts_in_a_program(two_ranks):
    two_ranks(unequal, "ignored", "jit", 8)


def rows_in_a_program():
    def own(data):
        return part(data, mesh())

    data = batch(8)
    check_same(fn.jit(own)(data), own(data))
    with pytest.raises(
        ValueError, match="part: expects a number of rows that 2 ranks divide, got 5"
    ):
        fn.jit(own)(batch(5))


def test_a_program_takes_its_part(two_ranks):
    two_ranks(rows_in_a_program)


def rows_of(rows):
    rows_of_both = {"x": torch.arange(rows), "y": torch.arange(rows).numpy()}
    return part(rows_of_both, mesh(), equal=False)


def test_parts_are_all_rows_in_order(ranks):
    for rows in (4, 5, 7, 8):
        parts = ranks(rows_of, rows)
        sizes = [len(each["x"]) for each in parts]
        assert max(sizes) - min(sizes) <= 1
        assert torch.equal(torch.cat([each["x"] for each in parts]), torch.arange(rows))
        assert torch.equal(torch.cat([each["y"] for each in parts]), torch.arange(rows))


def refused():
    for data, message in (
        (torch.ones(1), "part: expects a row for each of 2 ranks, got 1"),
        ((torch.ones(4), torch.ones(3)), "part: expects a batch of tensors with one leading"),
        (torch.ones(()), "part: expects a batch of tensors with one leading"),
    ):
        with pytest.raises(ValueError, match=message):
            part(data, mesh())
    with pytest.raises(ValueError, match="total: expects a loss with a scalar value that is"):
        total(fn.mse("none"), mesh())
    with pytest.raises(TypeError, match="everywhere: expects a Metric, got Loss"):
        everywhere(fn.mse(), mesh())
    with pytest.raises(ValueError, match="replicated: reduction must be one of"):
        replicated(net(), mesh(), reduction="max")


def test_bad_input_is_refused_on_every_rank(two_ranks):
    two_ranks(refused)


def mixed(mode):
    """The mean of gradients of several dtypes; half precision as if summed in float32."""
    data = fn.distributed.axis_of(mesh(), "data")
    shapes = {"a": (3, 2), "b": (), "c": (0,), "d": (5,), "e": (7,)}
    dtypes = torch.float32, torch.float64, torch.float32, torch.bfloat16, torch.float16

    def gradients(rank):
        key = fn.random.fold_in(fn.key(3), rank)
        return {
            name: fn.random.normal(fn.random.fold_in(key, name), shape, torch.float32).to(dtype)
            for (name, shape), dtype in zip(shapes.items(), dtypes, strict=True)
        }

    own, all_of = gradients(data.index), [gradients(rank) for rank in range(data.size)]
    update = functools.partial(mean(mesh()).update, opt_state={}, params=own)
    with counted() as counts:
        found, _ = (fn.jit(lambda g: update(g)) if mode == "jit" else update)(own)
    expected = {
        name: torch.stack(
            [g[name].to(torch.promote_types(leaf.dtype, torch.float32)) for g in all_of]
        )
        .mean(0)
        .to(leaf.dtype)
        for name, leaf in own.items()
    }
    torch.testing.assert_close(found, expected)
    return counts["a sum"]


@pytest.mark.parametrize("mode", ["eager", "jit"])
def test_mixed_dtypes_take_one_collective_for_each_wide_dtype(two_ranks, mode):
    assert two_ranks(mixed, mode) == [2, 2]


def reductions(**options):
    chain = fn.chain(mean(mesh()), fn.sgd(0.1))
    accumulated = fn.optimizers.accumulate(chain, 4)
    found = []
    for optimizer, steps, more in ((chain, 1, {"micro_batches": 4}), (accumulated, 4, {})):
        with counted() as counts:
            trained(net(), fn.cross_entropy(), optimizer, batch(8), steps, **more, **options)
        found.append(dict(counts))
    return found


def test_accumulated_gradients_are_reduced_once(two_ranks):
    for micro, accumulated in two_ranks(reductions):
        # A leaf of float32 among those of float64 would be a second one, but it is empty.
        assert micro == accumulated == {"a sum": 1}


def one_vector():
    """What comes out are views of the bucket; and the gradients that came in stay as they are."""
    grads = {"a": torch.ones(3), "b": torch.ones(2, 2)}
    found, _ = mean(mesh()).update(grads, {}, grads)
    same = found["a"].untyped_storage().data_ptr() == found["b"].untyped_storage().data_ptr()
    return same, grads["a"].sum().item(), found["b"].sum().item()


def test_the_results_are_views_of_one_vector(two_ranks):
    assert two_ranks(one_vector) == 2 * [(True, 3.0, 4.0)]


def evaluated(jit):
    """Each rank has another number of batches, of other sizes, some without a target."""
    data = fn.distributed.axis_of(mesh(), "data")
    x, target = batch(20)
    cuts = [0, 3, 4, 11, 20]
    batches = [(x[a:b], target[a:b]) for a, b in itertools.pairwise(cuts)]
    own = batches[:1] if data.index == 0 else batches[1:]
    model, loss = net(), fn.cross_entropy(ignore_index=2)
    metrics = {"accuracy": fn.metrics.accuracy(), "f1": fn.metrics.f1(3, average="macro")}
    state = fn.init_train_state(model, fn.sgd(0.1), fn.key(0), x)
    everyone = {name: everywhere(metric, mesh()) for name, metric in metrics.items()}
    with counted() as counts:
        found = fn.evaluate(model, total(loss, mesh()), everyone, own, jit=jit)(state)
    expected = fn.evaluate(model, loss, metrics, [(x, target)])(state)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13, check_dtype=False)
    return dict(counts)


@pytest.mark.parametrize("jit", [False, True])
def test_evaluation_is_of_what_all_ranks_saw(two_ranks, jit):
    # One for each dtype of each metric's accumulators, when all batches are over.
    assert two_ranks(evaluated, jit) == 2 * [{"a sum": 3}]


def auxiliary(mode):
    data = batch(8, torch.float64)

    def scalars_rule(residuals, dy, *, params, x):
        dy, scalars = dy
        return ({} if params else None), dy + scalars["size"] * 2 * residuals["x"] / len(dy)

    balanced = fn.stateless(
        lambda key, x: {},
        lambda params, x: (x, {"size": x.square().sum() / len(x)}),
        lambda params, x: (
            (x, {"size": x.square().sum() / len(x)}),
            fn.Pullback(scalars_rule, {"x": x}),
        ),
        name="balanced",
    )
    model = fn.serial(net(), balanced)
    loss = fn.losses.auxiliary(fn.cross_entropy(), {"size": 0.3})
    chain = fn.chain(sum(mesh()), fn.adam(0.01))
    found = trained(model, total(loss, mesh()), chain, part(data, mesh()), mode=mode)
    check_same(found, trained(model, loss, fn.adam(0.01), data))


def test_scalars_beside_the_output_count_as_the_loss_does(two_ranks):
    two_ranks(auxiliary, "eager")
