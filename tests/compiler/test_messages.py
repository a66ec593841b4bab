"""What a user reads who needs the values of tensors while jit traces: the line, and what to write.

None of these functions gets as far as to be compiled.
"""

import copy
import json
import linecache
import logging
import math
import pickle
import traceback

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import funcnet as fn

X = torch.tensor([0.5, -1.0, 2.0, 3.0])


def if_statement(x):
    if x.sum() > 0:  # here
        return x
    return -x


def elif_statement(x, n=1):
    if n > 2:
        return x
    if not x.any():  # here
        return -x
    return x


def over_lines(x):
    if (
        x.sum()  # here
        > 0
    ):
        return x
    return -x


def while_statement(x):
    while x.sum() < 10:  # here
        x = 2 * x
    return x


def assertion(x):
    assert x.sum() > 0, "positive"  # here
    return x


def for_range(x):
    for _ in range(x.sum().long()):  # here
        x = x + 1
    return x


def comprehension(x):
    return [y for y in x if y > 0]  # here


def match_statement(x):
    match x.sum():
        case 1:  # here
            return x
    return -x


def printed(x):
    print("x is", x)  # here
    return x


def logged(x):
    return logging.Formatter().format(
        logging.LogRecord("test", logging.INFO, "", 0, "x is %s", (x,), None)  # here
    )


def written_by_mask(x):
    y = x.clone()
    y[x > 0] = x[x > 0]  # here
    return y


def distribution(x):
    return torch.distributions.Normal(x, x.exp()).mean  # here


def in_vmap(x):
    return torch.vmap(lambda y: y if y > 0 else -y)(x)  # here


def in_map(x):
    return fn.vmap(lambda y: y if y > 0 else -y)(x)  # here


def in_scan(x):
    return fn.scan(lambda c, y: (c, y.item()), x[0], x)  # here


def in_fori(x):
    return fn.fori(0, 3, lambda i, c: c if i > 1 else -c, x)  # here


def in_grad(x):
    return torch.func.grad(lambda y: y.sum() if y.sum() > 0 else -y.sum())(x)  # here


def in_a_jitted_function(x):
    return fn.jit(if_statement)(x) + 1


def in_a_helper(x):
    return [if_statement(y) for y in x]


VALUE = "reads the value of a tensor"
SHAPE = "the shape of a result of"
CASES = [
    (if_statement, f"{VALUE} (`if`)", "torch.where(condition, a, b)"),
    (if_statement, f"{VALUE} (`if`)", "fn.cond(condition, on_true, on_false, *operands)"),
    (elif_statement, f"{VALUE} (`if`)", "torch.where"),
    (over_lines, f"{VALUE} (`if`)", "torch.where"),
    (while_statement, f"{VALUE} (`while`)", "fn.while_loop(condition, body, carry)"),
    (assertion, f"{VALUE} (`assert`)", "outside the jitted function"),
    (for_range, f"{VALUE} (range())", "fn.while_loop"),
    (comprehension, f"{VALUE} (`if`)", "torch.where"),
    (match_statement, f"{VALUE} (`if`)", "fn.cond"),
    (printed, f"{VALUE} (as text)", "fn.debug_print"),
    (logged, f"{VALUE} (as text)", "fn.debug_print"),
    (written_by_mask, f"{SHAPE} x[mask]", "torch.where(mask, x, 0)"),
    (distribution, VALUE, "validate_args=False"),
    (in_vmap, f"{VALUE} (`if`)", "torch.where"),
    (in_map, f"{VALUE} (`if`)", "torch.where"),
    (in_scan, f"{VALUE} (item)", "0-d tensor"),
    (in_fori, f"{VALUE} (`if`)", "fn.cond"),
    (in_grad, f"{VALUE} (`if`)", "torch.where"),
    (lambda x: x if x.sum() > 0 else -x, f"{VALUE} (`if`)", "torch.where"),
    (lambda x: x.sum() and x, f"{VALUE} (`and`)", "a & b"),
    (lambda x: not x.sum(), f"{VALUE} (`and`)", "~a"),
    (lambda x: 0 < x.sum() < 1, f"{VALUE} (`a < b < c`)", "(a < x) & (x < b)"),
    (lambda x: max(x[0], x[1]), f"{VALUE} (max())", "torch.maximum"),
    (lambda x: min(x), f"{VALUE} (min())", "x.min()"),
    (lambda x: sorted(x), f"{VALUE} (sorted())", "torch.sort"),
    (lambda x: any(x > 0), f"{VALUE} (any())", "x.any()"),
    (lambda x: all(x > 0), f"{VALUE} (all())", "x.all()"),
    (lambda x: x[0] in [x[1], x[2]], f"{VALUE} (`in`)", "(values == x).any()"),
    (lambda x: 3.0 in x, f"{VALUE} (`in`)", "(values == x).any()"),
    (lambda x: bool(x.sum()), f"{VALUE} (bool())", "fn.cond"),
    (lambda x: int(x.sum()), f"{VALUE} (int())", "static="),
    (lambda x: float(x.sum()), f"{VALUE} (float())", "0-d tensor"),
    (lambda x: complex(x.sum()), f"{VALUE} (complex())", "0-d tensor"),
    (lambda x: math.sin(x.sum()), f"{VALUE} (float())", "torch.sin"),
    (lambda x: [1, 2, 3][x.sum().long()], VALUE, "static="),
    (lambda x: x[: x.sum().long()], f"{VALUE} (an index or a slice", "fn.dynamic_slice"),
    (lambda x: x.sum().item(), f"{VALUE} (item)", "0-d tensor"),
    (lambda x: x.tolist(), VALUE, "x.unbind()"),
    (lambda x: x.numpy(), f"{VALUE} (numpy)", "torch's functions"),
    (lambda x: x.detach().cpu().numpy(), f"{VALUE} (numpy)", "torch's functions"),
    (lambda x: np.asarray(x), f"{VALUE} (numpy)", "torch's functions"),
    (lambda x: np.sin(x), f"{VALUE} (numpy)", "torch's functions"),
    (lambda x: x * np.ones(4), f"{VALUE} (numpy)", "torch.as_tensor"),
    (lambda x: np.from_dlpack(x), VALUE, "torch's functions"),
    (lambda x: f"{x}", f"{VALUE} (as text)", "fn.debug_print"),
    (lambda x: f"{x.sum():.3f}", f"{VALUE} (as text)", "fn.debug_print"),
    (lambda x: "%s" % x, f"{VALUE} (as text)", "fn.debug_print"),  # noqa: UP031
    (lambda x: "%.3f" % x.sum(), VALUE, "0-d tensor"),  # noqa: UP031
    (lambda x: str(x), f"{VALUE} (as text)", "fn.debug_print"),
    (lambda x: repr([x]), f"{VALUE} (as text)", "fn.debug_print"),
    (lambda x: torch.vmap(lambda y: y * len(f"{y}"))(x), VALUE, "fn.debug_print"),
    (lambda x: torch.func.grad(lambda y: y.sum() * len(f"{y}"))(x), VALUE, "fn.debug_print"),
    (lambda x: torch.vmap(lambda y: y * y.item())(x), f"{VALUE} (item)", "0-d tensor"),
    (lambda x: pickle.dumps(x), f"{VALUE} (pickle)", "save the result"),
    (lambda x: torch.equal(x, x + 1), f"{VALUE} (equal)", "(a == b).all()"),
    (lambda x: torch.allclose(x, x + 1), f"{VALUE} (allclose)", "torch.isclose(a, b).all()"),
    (lambda x: x.sum().is_nonzero(), VALUE, "torch.where"),
    (lambda x: torch.tensor([x[0], x[1]]), f"{VALUE} (tensor)", "torch.stack"),
    (lambda x: torch.arange(x.sum()), f"{VALUE} (arange)", "static="),
    (lambda x: torch.zeros(x.sum().long()), f"{VALUE} (zeros)", "static="),
    (lambda x: torch.add(x, x, alpha=x.sum()), f"{VALUE} (add)", "with tensors"),
    (lambda x: F.one_hot(x.long()), f"{VALUE} (one_hot)", "num_classes"),
    (lambda x: x[x > 0], f"{SHAPE} x[mask]", "torch.where(mask, x, 0)"),
    (lambda x: torch.vmap(lambda y: y[y > 0])(x[None]), f"{SHAPE} x[mask]", "torch.where"),
    (lambda x: torch.masked_select(x, x > 0), f"{SHAPE} masked_select", "torch.where"),
    (lambda x: x.nonzero(), f"{SHAPE} nonzero", "torch.nonzero_static"),
    (lambda x: torch.argwhere(x), f"{SHAPE} argwhere", "torch.nonzero_static"),
    (lambda x: torch.where(x > 0), f"{SHAPE} where", "torch.where(mask, a, b)"),
    (lambda x: torch.unique(x), f"{SHAPE} unique", "x.sort()"),
    (lambda x: torch.unique_consecutive(x), f"{SHAPE} unique_consecutive", "x[1:] != x[:-1]"),
    (lambda x: torch.bincount(x.long()), f"{SHAPE} bincount", "index_add"),
    (lambda x: torch.repeat_interleave(x, x.long()), f"{SHAPE} repeat_inter", "output_size"),
    (in_a_helper, f"{VALUE} (`if`)", "torch.where"),
    (in_a_jitted_function, f"{VALUE} (`if`)", "torch.where"),
]


def line_of(function):
    """The line that a message is to show: the one marked "here", or the only one."""
    if function in (in_a_helper, in_a_jitted_function):
        function = if_statement
    first = function.__code__.co_firstlineno
    for number in range(first, first + 12):
        text = linecache.getline(__file__, number).strip()
        if function.__name__ == "<lambda>" or text.endswith("# here"):
            return f"{__file__}:{number}: {text}"
    raise AssertionError("no line is marked")


@pytest.mark.parametrize(("function", "message", "instead"), CASES, ids=range(len(CASES)))
def test_what_needs_values_shows_the_line_and_what_to_write(function, message, instead):
    with pytest.raises(TypeError) as caught:
        fn.jit(function)(X)
    said, *rest = str(caught.value).split("\n")
    assert said.startswith("jit: ")
    assert message in said
    # A log record is formatted elsewhere than where it is made.
    assert rest[0].strip() == line_of(function) or function is logged
    assert instead in "\n".join(rest[1:])


@pytest.mark.parametrize("read", [float, bool, torch.Tensor.tolist, str, np.asarray])
def test_a_tensor_closed_over_is_not_read_either(read):
    with pytest.raises(TypeError, match=r"reads the value of a tensor.*\n.*test_messages"):
        fn.jit(lambda x: x * len(str(read(X[0]))))(X)


def test_shapes_are_printed_and_lengths_read(capsys):
    def run(x):
        print(x.shape, x.dtype, len(x), x.device)
        return {x: x + len({x: 1, x + 1: 2})}[x]

    torch.testing.assert_close(fn.jit(run)(X), X + 2)
    assert capsys.readouterr().out == "torch.Size([4]) torch.float32 4 cpu\n"


def test_what_the_program_holds_is_read():
    def run(x):
        scale = torch.tensor(3.0)
        return copy.deepcopy(x) * scale.item() if scale else x

    torch.testing.assert_close(fn.jit(run)(X), X * 3)


def written(x):
    y = x * 2
    y.add_(1)
    x.view(2, 2)[0].mul_(2)  # here
    return y


def test_a_write_to_an_argument_shows_its_line():
    with pytest.raises(ValueError, match="writes in place to argument 0; ") as caught:
        fn.jit(written)(X)
    assert str(caught.value).endswith(f"only\n  {line_of(written)}")


def test_what_draws_is_named_as_users_know_it():
    with pytest.raises(
        ValueError, match=r"torch's generator \(randn\), .* by fn.random\n  .*randn"
    ):
        fn.jit(lambda x: x + torch.randn(4))(X)


def wrong_shapes(x):
    return x @ torch.ones(3, 3)


def wrong_sum(x):
    return x + torch.ones(3)


def wrong_index(x):
    return x.sum(4)


def wrong_view(x):
    return x.view(3, 5)


def wrong_dtype(x):
    return torch.mm(x[None], torch.ones(4, 2, dtype=torch.float64))


def no_such_item(x):
    return [x][3]


def of_json(x):
    return json.loads("{")


def with_a_cause(x):
    try:
        return no_such_item(x)
    except IndexError as error:
        raise KeyError("no item") from error


def wrong_layer(x):
    return fn.linear(3).apply({"weight": torch.ones(3, 7), "bias": torch.ones(3)}, x)


def wrong_in_scan(x):
    return fn.scan(lambda c, y: (c, wrong_shapes(x)), x[0], x)


def wrong_in_map(x):
    return fn.vmap(lambda y: wrong_shapes(x))(x)


def frames(error):
    """The functions in a traceback, without those of the test."""
    return [each.name for each in traceback.extract_tb(error.__traceback__)][1:]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        *[
            (each, [each.__name__])
            for each in (wrong_shapes, wrong_sum, wrong_index, wrong_view, wrong_dtype)
        ],
        (no_such_item, ["no_such_item"]),
        (of_json, ["of_json", "loads", "decode", "raw_decode"]),
        (with_a_cause, ["with_a_cause"]),
        (wrong_layer, ["wrong_layer"]),
        (wrong_in_scan, ["wrong_in_scan", "<lambda>", "wrong_shapes"]),
        (wrong_in_map, ["wrong_in_map", "<lambda>", "wrong_shapes"]),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_a_traceback_ends_at_the_users_line_and_says_what_eager_says(function, expected, caplog):
    with pytest.raises(Exception) as eager:  # noqa: PT011
        function(X)
    with pytest.raises(type(eager.value)) as caught:
        fn.jit(function)(X)
    assert str(caught.value) == str(eager.value)
    assert frames(caught.value) == expected
    # torch logs the traceback of an operator that fails on fake tensors.
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]
    shown = "".join(traceback.format_exception(caught.value))
    assert "torch/" not in shown
    assert "funcnet/compiler" not in shown


def test_causes_stay_and_end_at_the_users_line():
    with pytest.raises(KeyError) as caught:
        fn.jit(with_a_cause)(X)
    cause = caught.value.__cause__
    assert isinstance(cause, IndexError)
    assert [each.name for each in traceback.extract_tb(cause.__traceback__)] == [
        "with_a_cause",
        "no_such_item",
    ]


def test_lower_trims_as_calls_do():
    with pytest.raises(RuntimeError) as caught:
        fn.jit(wrong_shapes).lower(X)
    assert frames(caught.value) == ["wrong_shapes"]


def test_an_environment_variable_keeps_all_of_a_traceback(monkeypatch):
    monkeypatch.setenv("FUNCNET_FULL_TRACEBACK", "1")
    with pytest.raises(RuntimeError) as caught:
        fn.jit(wrong_shapes)(X)
    assert len(frames(caught.value)) > 10


def test_what_fails_in_the_compiler_itself_is_shown_whole(monkeypatch):
    def broken(*args):
        raise AssertionError("a fault of ours")

    monkeypatch.setattr("funcnet.compiler.record._captured_to_inputs", broken)
    with pytest.raises(AssertionError) as caught:
        fn.jit(lambda x: x + 1)(X)
    assert frames(caught.value)[-2:] == ["record", "broken"]


def test_an_error_can_be_caught_while_tracing():
    def run(x):
        try:
            return wrong_shapes(x)
        except RuntimeError:
            return x + 1

    torch.testing.assert_close(fn.jit(run)(X), X + 1)
