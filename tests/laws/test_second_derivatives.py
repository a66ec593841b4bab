"""Higher derivatives of every layer and combinator: each rule is differentiable by torch.func.

A pullback's derivative in a direction, by forward mode over the rule (`fn.jvp`) and by reverse mode
over it (``torch.func.grad``), is that of autograd's double backward pass through ``apply``.

Eagerly this is all of the laws' tables. Compiled it is a sample, and all of them by
``pytest tests/laws/test_second_derivatives.py --whole``.
"""

import pytest
import torch
from cases import COMBINATORS, EAGER_ONLY, LAYERS

import funcnet as fn

DOUBLE = torch.float64
NETS = LAYERS | COMBINATORS
# PyTorch's own operator, which apply calls, has a single derivative.
NO_ORACLE = {"hardsigmoid"}
# The number of their iterations is not known, and a derivative of a compiled loop unrolls it.
LOOPS = {name for name in NETS if name.startswith(("fixed_point", "neural_ode dopri5"))}
SAMPLE = [
    *("linear", "conv2d", "batch_norm of images", "layer_norm", "gelu", "max_pool2d", "embedding"),
    *("scaled_dot_product_attention", "gru_cell", "serial of all kinds", "remat"),
]
# A program for many cases takes little longer to compile than one for a single case.
TOGETHER = 12


def pytest_generate_tests(metafunc):
    if "group" not in metafunc.fixturenames:
        return
    names = SAMPLE
    if metafunc.config.getoption("whole"):
        left_out = EAGER_ONLY | LOOPS
        names = [name for name in NETS if name not in left_out]
    groups = [names[start : start + TOGETHER] for start in range(0, len(names), TOGETHER)]
    metafunc.parametrize("group", groups, ids=[group[0] for group in groups])


def is_real(leaf):
    return leaf.is_floating_point()


def inner(one, other):
    """The inner product of two lists of tensors; None in either counts as nothing."""
    zero = torch.zeros((), dtype=DOUBLE)
    pairs = zip(one, other, strict=True)
    return sum(((a * b).sum() for a, b in pairs if a is not None and b is not None), zero)


class Case:
    """A layer with params, x and state, a cotangent, and directions v and w of params and x."""

    def __init__(self, name, train=True):
        self.layer, x = NETS[name]
        params, state = self.layer.init(fn.key(0), x)
        self.takes_mode = self.layer.takes_key or bool(state)
        params = fn.tree.map(lambda leaf: leaf.double() + 0.1 if is_real(leaf) else leaf, params)
        state = fn.tree.map(lambda leaf: leaf.double() if is_real(leaf) else leaf, state)
        self.options = {"state": state, "key": fn.key(1), "train": train}
        leaves, self.treedef = fn.tree.flatten((params, x))
        self.places = [place for place, leaf in enumerate(leaves) if is_real(leaf)]
        self.leaves, self.at = leaves, [leaves[place] for place in self.places]
        self.v, self.w = (
            [fn.random.normal(fn.key(seed + i), p.shape, DOUBLE) for i, p in enumerate(self.at)]
            for seed in (100, 200)
        )
        y, _ = self.layer.apply(params, x, **self.options)
        self.dy = fn.tree.map(lambda leaf: torch.sin(3 * leaf) + 0.1 if is_real(leaf) else None, y)

    def arguments(self, at):
        """Params and x with these tensors in them."""
        leaves = list(self.leaves)
        for place, leaf in zip(self.places, at, strict=True):
            leaves[place] = leaf
        return self.treedef.unflatten(leaves)

    def pulled(self, at):
        """What the pullback gives for the cotangent: a tensor for each of those."""
        _, pullback, _ = self.layer.vjp(*self.arguments(at), **self.options)
        return fn.tree.leaves(pullback(self.dy))

    def second_derivatives(self, at):
        """The change of the pullback along v, times w: by forward mode, and by reverse mode."""
        _, along = fn.jvp(self.pulled, (at,), (self.v,))
        grads = torch.func.grad(lambda at: inner(self.pulled(at), self.w))(at)
        return inner(along, self.w), inner(grads, self.v)

    def by_autograd(self):
        """The same by autograd, twice, through apply."""
        at = [leaf.clone().requires_grad_() for leaf in self.at]
        y, _ = self.layer.apply(*self.arguments(at), **self.options)
        dy = fn.tree.flatten(y)[1].flatten_up_to(self.dy)
        first = derivatives(inner(fn.tree.leaves(y), dy), at)
        return inner(derivatives(inner(first, self.w), at), self.v)


def derivatives(total, at):
    if not total.requires_grad or not at:
        return [None] * len(at)
    return torch.autograd.grad(total, at, create_graph=True, allow_unused=True)


@pytest.mark.parametrize("name", NETS)
def test_a_pullback_has_autograds_second_derivatives(name):
    first = Case(name)
    cases = [first, Case(name, train=False)] if first.takes_mode else [first]
    for case in cases if first.at else ():
        forward, reverse = case.second_derivatives(case.at)
        torch.testing.assert_close(forward, reverse, rtol=1e-9, atol=1e-9)
        if name not in NO_ORACLE and not case.layer.breaks:
            torch.testing.assert_close(forward, case.by_autograd(), rtol=1e-9, atol=1e-9)


def test_compiled_second_derivatives_are_the_eager_ones(group):
    cases = {name: case for name in group if (case := Case(name)).at}

    def run(points):
        return {name: case.second_derivatives(points[name]) for name, case in cases.items()}

    points = {name: case.at for name, case in cases.items()}
    compiled = fn.jit(run)
    torch.testing.assert_close(compiled(points), run(points), rtol=1e-6, atol=1e-8)
