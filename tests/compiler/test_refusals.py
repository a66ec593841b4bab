"""What jit lets pass though it looks impure: attention without dropout, statistics of their own."""

import pytest
import torch
import torch.nn.functional as F

import funcnet as fn

aten = torch.ops.aten
X = fn.random.normal(fn.key(0), (3, 4, 5))
W = fn.random.normal(fn.key(1), (4,))
V = fn.random.uniform(fn.key(2), (4,)) + 1
Q, K, VALUE = fn.random.normal(fn.key(3), (3, 2, 4, 6, 8)).unbind()
MASK = fn.random.normal(fn.key(4), (6, 6))
attend = F.scaled_dot_product_attention


def legit(x, weight, mean, variance, training):
    return aten._native_batch_norm_legit(x, weight, weight, mean, variance, training, 0.1, 1e-5)


def of_own_statistics(x, weight, variance):
    mean, variance = weight.clone(), variance.clone()
    y = F.batch_norm(x, mean, variance, weight, weight, True)
    return y, mean, variance


def gradients(**options):
    return lambda q, k, v: torch.func.vjp(lambda *a: attend(*a, **options), q, k, v)[1](q)


# Functions and what they are given.
CASES = {
    "batch_norm in evaluation": (lambda x, w, v: legit(x, w, w, v, False), X, W, V),
    "batch_norm of its own statistics": (of_own_statistics, X, W, V),
    "rrelu": (F.rrelu, X),
    "rrelu in place": (lambda x: F.rrelu_(x * 2, 0.2, 0.4), X),
    "native_dropout in evaluation": (lambda x: torch.native_dropout(x, 0.5, False), X),
    "dropout": (lambda x: F.dropout(x, training=False), X),
    "attention": (attend, Q, K, VALUE),
    "dropout by position": (lambda q, k, v: attend(q, k, v, None, 0.0), Q, K, VALUE),
    "an integer": (lambda q, k, v: attend(q, k, v, dropout_p=0), Q, K, VALUE),
    "causal": (lambda q, k, v: attend(q, k, v, is_causal=True, scale=0.3), Q, K, VALUE),
    "bool mask": (lambda q, k, v, m: attend(q, k, v, m > 0), Q, K, VALUE, MASK),
    "float mask": (attend, Q, K, VALUE, MASK),
    "mask of nothing": (lambda q, m: attend(q, q, q, m > 99), Q, MASK),
    "groups": (lambda q, k, v: attend(q, k[:, :2], v[:, :2], enable_gqa=True), Q, K, VALUE),
    "short values": (lambda q, k, v: attend(q, k, v[..., :4]), Q, K, VALUE),
    "turned": (lambda q, k, v: attend(q.mT, k.mT, v.mT), Q, K, VALUE),
    "heads last": (lambda q, k, v: attend(*[x.transpose(1, 2) for x in (q, k, v)]), Q, K, VALUE),
    "one head": (lambda q, k, v: attend(q[0, 0], k[0, 0], v[0, 0]), Q, K, VALUE),
    "no queries": (lambda q, k, v: attend(q[:, :, :0], k, v), Q, K, VALUE),
    "float64": (lambda q, k, v: attend(q.double(), k.double(), v.double()), Q, K, VALUE),
    "bfloat16": (lambda q, k, v: attend(q.bfloat16(), k.bfloat16(), v.bfloat16()), Q, K, VALUE),
    "gradients": (gradients(), Q, K, VALUE),
    "causal gradients": (gradients(is_causal=True, scale=0.4), Q, K, VALUE),
    "masked gradients": (gradients(attn_mask=MASK), Q, K, VALUE),
    "map": (lambda q, k, v, m: fn.vmap(lambda q: attend(q, k[0], v[0], m))(q), Q, K, VALUE, MASK),
    "scan": (lambda q, k: fn.scan(lambda c, k: (attend(c, k, k), c.sum()), q[0], k), Q, K),
    "gradients in a map in a scan": (
        lambda q, k: fn.scan(
            lambda c, k: (fn.vmap(torch.func.grad(lambda c, k: attend(c, k, k).sum()))(c, k), c),
            q[0],
            k,
        ),
        Q.unsqueeze(3),
        K.unsqueeze(3),
    ),
}


@pytest.mark.cpu_only
def test_what_is_pure_compiles():
    functions = [function for function, *_ in CASES.values()]
    inputs = [given for _, *given in CASES.values()]

    def run(inputs):
        return [function(*each) for function, each in zip(functions, inputs, strict=True)]

    compiled = fn.jit(run)
    assert compiled.lower(inputs).why_not_one is None
    for name, found, expected in zip(CASES, compiled(inputs), run(inputs), strict=True):
        tolerance = 0.02 if name == "bfloat16" else 1e-4
        message = f"{name}: {{}}".format
        torch.testing.assert_close(
            found, expected, rtol=tolerance, atol=tolerance, equal_nan=True, msg=message
        )


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, w, v: legit(x, w, w * 1, v, True)[0], "writes in place to argument 2"),
        (lambda x, w, v: F.batch_norm(x, w, v, training=True), "writes in place to argument"),
        (lambda x, w, v: F.batch_norm(x, W, V, training=True), "writes in place to a tensor"),
        (lambda x, w, v: F.rrelu(x, training=True), "draws from torch's generator"),
        (lambda x, w, v: attend(x, x, x, dropout_p=0.5), "draws from torch's generator"),
    ],
)
def test_what_is_not_pure_is_refused(function, message):
    with pytest.raises(ValueError, match=message):
        fn.jit(function)(X, W.clone(), V.clone())
