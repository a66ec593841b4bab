"""Adafactor, Muon, Shampoo, SOAP: torch.optim's numbers, or those of the papers in numpy."""

import math

import numpy as np
import pytest
import torch
from torch.testing._internal.common_optimizers import optim_db

import funcnet as fn
from funcnet import optimizers as opt

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
SHAPES = {
    "Adafactor": {"matrix": (3, 4), "vector": (4,), "scalar": (), "filter": (2, 3, 2, 2)},
    "Muon": {"tall": (4, 3), "wide": (3, 5), "like": (4, 3), "large": (40, 64), "empty": (0, 3)},
}
PAIRS = {
    "Adafactor": (fn.adafactor, torch.optim.Adafactor),
    "Muon": (fn.muon, torch.optim.Muon),
}
MORE = {
    "Adafactor": [{"eps": (1e-3, 0.1)}, {"lr": 0.9, "d": 2.0, "weight_decay": 0.01}],
    "Muon": [
        {"nesterov": False},
        {"adjust_lr_fn": "match_rms_adamw"},
        {"adjust_lr_fn": "original", "eps": 10.0},
        {"weight_decay": 0.0, "momentum": 0.0},
    ],
}


def numbers(shape, seed, dtype=F64):
    return fn.random.normal(fn.key(seed), shape, F64).to(dtype)


def tree_of(shapes, seed, dtype=F64):
    return {
        name: numbers(shape, 100 * seed + i, dtype)
        for i, (name, shape) in enumerate(shapes.items())
    }


def options_of(name):
    """The configurations of PyTorch's own database of optimizers, and ours."""
    info = next(info for info in optim_db if info.optim_cls.__name__ == name)
    drawn = [entry.kwargs for entry in info.optim_inputs_func(device="cpu", dtype=F64)]
    return [{k: v for k, v in row.items() if k != "foreach"} for row in drawn] + MORE[name]


ROWS = [
    pytest.param(name, options, id=f"{name} {options}")
    for name in PAIRS
    for options in options_of(name)
]


def ours(optimizer, shapes, dtype, steps=20):
    params = tree_of(shapes, 0, dtype)
    state = optimizer.init_state(params)
    for step in range(1, steps + 1):
        updates, state = optimizer.update(tree_of(shapes, step, dtype), state, params)
        params = fn.apply_updates(params, updates)
    return params


def theirs(make, shapes, dtype, steps=20):
    leaves = {name: torch.nn.Parameter(p) for name, p in tree_of(shapes, 0, dtype).items()}
    optimizer = make([*leaves.values()])
    for step in range(1, steps + 1):
        for leaf, g in zip(leaves.values(), tree_of(shapes, step, dtype).values(), strict=True):
            leaf.grad = g
        optimizer.step()
    return {name: leaf.detach() for name, leaf in leaves.items()}


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize(("name", "options"), ROWS)
def test_twenty_steps_equal_those_of_torch(name, options, dtype):
    make, peer = PAIRS[name]
    expected = theirs(lambda params: peer(params, **options), SHAPES[name], dtype)
    # torch rounds what it computes with a rate that is a float32 tensor.
    rtol = 1e-12 if dtype == F64 and not isinstance(options.get("lr"), torch.Tensor) else 5e-6
    found = ours(make(**options), SHAPES[name], dtype)
    for path, leaf in expected.items():
        torch.testing.assert_close(found[path], leaf, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(("name", "options"), ROWS)
def test_in_bfloat16_twenty_steps_are_as_near_to_the_exact_ones_as_torchs(name, options):
    make, peer = PAIRS[name]
    exact = ours(make(**options), SHAPES[name], F64)
    expected = theirs(lambda params: peer(params, **options), SHAPES[name], BF16)
    found = ours(make(**options), SHAPES[name], BF16)
    for path, leaf in exact.items():
        assert found[path].dtype == BF16
        error, allowed = [(p[path].double() - leaf).norm() for p in (found, expected)]
        assert error <= 1.5 * allowed + 0.01 * leaf.norm()


def test_momentum_in_bfloat16_survives_a_step_of_muon():
    """torch divides the momentum buffer itself by its norm, in bfloat16 without nesterov."""
    optimizer = opt.scale_by_muon(nesterov=False)
    params = {"w": torch.full((2, 2), 3.0, dtype=BF16)}
    _, state = optimizer.update(params, optimizer.init_state(params), params)
    torch.testing.assert_close(state.mu["w"], 0.05 * params["w"])


def test_large_matrices_are_made_orthogonal_as_small_ones_are():
    """From 256 rows on one at a time, and in halves where a product is symmetric."""
    m = numbers((3, 257, 300), 0, F32) @ torch.diag(torch.linspace(0.1, 1, 300))
    u, s, v = torch.linalg.svd(m.double(), full_matrices=False)
    s = s / m.double().norm(dim=(1, 2))[:, None]
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    exact = u @ torch.diag_embed(s) @ v
    for shape in (m, m.mT):
        found = opt.orthogonalize(shape, ns_dtype=None)
        torch.testing.assert_close(
            found, (exact if shape is m else exact.mT).float(), rtol=1e-4, atol=1e-4
        )
        rounded = opt.orthogonalize(shape)
        assert rounded.dtype == BF16
        alone = [
            torch.optim._muon._zeropower_via_newtonschulz(one, (3.4445, -4.7750, 2.0315), 5, 1e-7)
            for one in shape
        ]
        assert (rounded != torch.stack(alone)).double().mean() < 0.02


def moved(x, axis, matrix):
    return np.moveaxis(np.tensordot(matrix, x, (1, axis)), 0, axis)


def outer(x, axis):
    rows = np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)
    return rows @ rows.T


def inverse_root(matrix, order):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * values ** (-1 / order)) @ vectors.T


def shampoo_in_numpy(shape, lr, eps, beta2, frequency, most, momentum, decay):
    """Gupta et al. 2018, algorithm 2, with running means and one-sided as `shampoo` says."""
    p = numbers(shape, 0).numpy()
    axes = [i for i, n in enumerate(shape) if 1 < n <= most]
    sums = {i: eps * np.eye(shape[i]) for i in axes}
    square, buffer, roots = np.full(shape, eps), None, {}
    for step in range(1, 8):
        g = numbers(shape, 100 * step).numpy()
        weight = 1.0 if beta2 == 1 else 1 - beta2
        square = beta2 * square + weight * g * g
        sums = {i: beta2 * m + weight * outer(g, i) for i, m in sums.items()}
        if (step - 1) % frequency == 0:
            roots = {i: inverse_root(m, 2 * len(axes)) for i, m in sums.items()}
        u = g if axes else g / np.sqrt(square)
        for i in axes:
            u = moved(u, i, roots[i])
        buffer = u if buffer is None else momentum * buffer + u
        p = p - lr * (buffer + decay * p)
    return p


@pytest.mark.parametrize("options", [(1e-4, 1.0, 1, 99, 0.0, 0.0), (0.1, 0.9, 3, 4, 0.5, 0.1)])
@pytest.mark.parametrize("shape", [(4, 3), (3, 6), (5,), (), (4, 1, 3), (2, 3, 4, 2), (6, 7)])
def test_shampoo_is_that_of_the_paper(shape, options):
    eps, beta2, frequency, most, momentum, decay = options
    optimizer = fn.shampoo(0.1, momentum, decay, eps, beta2, frequency, most)
    found = ours(optimizer, {"w": shape}, F64, 7)["w"]
    expected = shampoo_in_numpy(shape, 0.1, eps, beta2, frequency, most, momentum, decay)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8)


def soap_in_numpy(shape, lr, betas, beta, eps, frequency, most, vectors, normalize, correct):
    """Vyas et al. 2024, algorithm 3, in the order of the authors' code."""
    p = numbers(shape, 0).numpy()
    axes = [i for i, n in enumerate(shape) if n <= most and (len(shape) > 1 or vectors)]
    sums = {i: np.zeros((shape[i], shape[i])) for i in axes}
    m, v, bases = np.zeros(shape), np.zeros(shape), {}
    for t in range(7):
        g = numbers(shape, 100 * (t + 1)).numpy()
        if t:
            turned = g
            for i, q in bases.items():
                turned = moved(turned, i, q.T)
            m = betas[0] * m + (1 - betas[0]) * turned
            v = betas[1] * v + (1 - betas[1]) * turned**2
            u = m / (np.sqrt(v) + eps)
            if correct:
                u = u * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
            for i, q in bases.items():
                u = moved(u, i, q)
            if normalize:
                u = u / np.sqrt((u**2).mean())
            p = p - lr * u
        sums = {i: beta * s + (1 - beta) * outer(g, i) for i, s in sums.items()}
        if t == 0:
            bases = {i: np.linalg.eigh(s)[1][:, ::-1] for i, s in sums.items()}
        elif t % frequency == 0:
            for i, q in bases.items():
                m = moved(m, i, q)
            for i, q in bases.items():
                order = np.argsort(-np.diag(q.T @ sums[i] @ q))
                v = np.take(v, order, i)
                bases[i] = np.linalg.qr(sums[i] @ q[:, order])[0]
            for i, q in bases.items():
                m = moved(m, i, q.T)
    return p


@pytest.mark.parametrize(
    "options",
    [
        ((0.95, 0.95), None, 1e-8, 3, 99, False, False, True),
        ((0.9, 0.99), 0.8, 1e-3, 1, 3, True, True, False),
    ],
)
# With more than one column more than rows, the first gradient has no one basis.
@pytest.mark.parametrize("shape", [(3, 3), (4, 3), (3, 4), (5,), (), (3, 1, 2), (2, 3, 4)])
def test_soap_is_that_of_the_paper(shape, options):
    betas, beta, eps, frequency, most, *switches = options
    optimizer = fn.soap(0.1, betas, beta, eps, 0.0, frequency, most, *switches)
    found = ours(optimizer, {"w": shape}, F64, 7)["w"]
    beta = betas[1] if beta is None else beta
    expected = soap_in_numpy(shape, 0.1, betas, beta, eps, frequency, most, *switches)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("optimizer", [fn.shampoo(), fn.soap(), fn.adafactor(), fn.muon()])
def test_a_gradient_that_is_nan_gives_nan_and_no_error(optimizer):
    params = {"w": numbers((3, 4), 0)}
    grads, state = {"w": params["w"] * torch.nan}, optimizer.init_state(params)
    for _ in range(2):
        updates, state = optimizer.update(grads, state, params)
    assert updates["w"].isnan().all()


@pytest.mark.parametrize("optimizer", [fn.shampoo(precondition_frequency=3), fn.soap()])
def test_updates_between_factorizations_do_without_one(optimizer, monkeypatch):
    params = {"w": numbers((3, 4), 0)}
    _, state = optimizer.update(params, optimizer.init_state(params), params)
    for name in ("eigh", "qr"):
        monkeypatch.setattr(torch.linalg, name, None)
    optimizer.update(params, state, params)


@pytest.mark.cpu_only
@pytest.mark.parametrize("optimizer", [fn.shampoo(precondition_frequency=3), fn.soap()])
def test_a_compiled_update_factorizes_in_a_branch_alone(optimizer):
    params = {"w": numbers((3, 4), 0)}
    update, state = fn.jit(optimizer.update), optimizer.init_state(params)
    blocks = update.lower(params, state, params).blocks.splitlines()
    lines = [line for line in blocks if "eigh" in line or "qr" in line]
    assert lines
    assert all([line.startswith("    ") for line in lines])


BAD = {
    "muon of a vector": (
        lambda: fn.muon().init_state({"hidden": {"bias": torch.ones(3)}}),
        ValueError,
        r"muon: expects matrices, got \(3,\) at 'hidden.bias'; .*partition",
    ),
    "muon of a filter": (
        lambda: opt.scale_by_muon().update(
            {"w": torch.ones(2, 2, 2)},
            opt.MuonState({"w": torch.ones(2, 2, 2)}),
            {"w": torch.ones(2, 2, 2)},
        ),
        ValueError,
        r"muon: expects matrices, got \(2, 2, 2\) at 'w'",
    ),
    "muon steps": (lambda: fn.muon(ns_steps=100), ValueError, "ns_steps must be an integer"),
    "muon coefficients": (lambda: fn.muon(ns_coefficients=(1.0,)), ValueError, "three numbers"),
    "muon adjust": (lambda: fn.muon(adjust_lr_fn="none"), ValueError, "adjust_lr_fn must be one"),
    "muon dtype": (lambda: fn.muon(ns_dtype=torch.int64), TypeError, "ns_dtype"),
    "muon momentum": (lambda: fn.muon(momentum=-1.0), ValueError, "muon: momentum"),
    "muon decay": (lambda: fn.muon(weight_decay=-1.0), ValueError, "muon: weight_decay"),
    "muon rate": (lambda: fn.muon(-1.0), ValueError, "muon: lr"),
    "adafactor rate": (lambda: fn.adafactor(math.nan), ValueError, "adafactor: lr"),
    "adafactor eps": (lambda: fn.adafactor(eps=1e-3), ValueError, "eps must be two numbers"),
    "adafactor eps below 0": (lambda: fn.adafactor(eps=(-1.0, 1.0)), ValueError, "eps"),
    "adafactor least": (lambda: fn.adafactor(eps=(None, -1.0)), ValueError, r"eps\[1\]"),
    "adafactor d": (lambda: fn.adafactor(d=0.5), ValueError, "d must be >= 1"),
    "adafactor beta2_decay": (lambda: fn.adafactor(beta2_decay=0.8), ValueError, "must be <= 0"),
    "adafactor state of other shapes": (
        lambda: fn.adafactor().update(
            {"w": torch.ones(2, 3)},
            fn.adafactor().init_state({"w": torch.ones(3, 2)}),
            {"w": torch.ones(2, 3)},
        ),
        ValueError,
        r"state.rows: expects shape \(2, 1\) at 'w', got float32 \(3, 1\)",
    ),
    "shampoo frequency": (
        lambda: fn.shampoo(precondition_frequency=0),
        ValueError,
        "precondition_frequency",
    ),
    "shampoo eps": (lambda: fn.shampoo(eps=-1.0), ValueError, "eps"),
    "soap betas": (lambda: fn.soap(betas=(0.9, 1.0)), ValueError, r"betas\[1\] must be below 1"),
    "soap one beta": (lambda: fn.soap(betas=0.9), ValueError, "betas must be two numbers"),
    "soap dim": (lambda: fn.soap(max_precond_dim=0.5), ValueError, "max_precond_dim"),
}


@pytest.mark.parametrize(("call", "error", "match"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()
