"""Operators without a kernel: a program calls them through PyTorch, and stays one program."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

import funcnet as fn
from funcnet.compiler import errors

pytestmark = pytest.mark.cpu_only

X = fn.random.normal(fn.key(0), (6, 4, 3))
Z = torch.complex(X[0], X[1])


def norm(x):
    """The greatest singular value of a matrix, for which there is no kernel."""
    return torch.linalg.svd(x)[1][..., 0]


def along(x):
    return fn.scan(lambda carry, row: (carry + norm(row), carry * row), torch.tensor(0.0), x)


PROGRAMS = {
    "alone": (norm, X[0]),
    "all results": (lambda x: torch.linalg.svd(x), X[0]),
    "batched": (lambda x: norm(x.mT) * 2, X),
    "in a scan": (along, X),
    "in a map": (fn.vmap(norm), X),
    "in a map of scans": (fn.vmap(along), torch.stack([X, -X])),
    "in a scan of maps": (
        lambda x: fn.scan(lambda c, row: (c + fn.vmap(norm)(row).sum(), c), X.new_zeros(()), x),
        torch.stack([X, -X]),
    ),
    "of what is not contiguous": (lambda x: norm(x[:, ::2, 1:].mT), X),
    "of what is expanded": (lambda x: norm(x[0, 0].expand(5, 3)), X),
    "of nothing": (lambda x: norm(x[:0]), X),
    "a gradient": (torch.func.grad(lambda x: norm(x).sum()), X),
    "integers": (lambda x: torch.gcd((x * 10).long(), (x * 4).long()), X),
    "a list of tensors": (lambda x: torch.linalg.multi_dot([*x[:3, :3]]), X),
    "complex": (lambda z: z * 2 + 1j, Z),
    "conjugated": (lambda z: z * 2, Z.conj()),
    "a conjugate": (lambda z: z.conj(), Z),
    "complex in between": (lambda x: torch.fft.irfft(torch.fft.rfft(x).conj()).cos(), X),
    "complex carried": (
        lambda z: fn.scan(lambda c, x: (c * x + 1, c.abs()), torch.ones((), dtype=z.dtype), z[0]),
        Z,
    ),
    "complex members": (fn.vmap(lambda z: torch.fft.ifft(z).real), Z),
    "complex numbers written in place": (lambda z: fill_real(z.clone()), Z),
    "real numbers of a part": (lambda z: torch.view_as_real(z[::2, 1:]).sum(0), Z),
    "a complex matrix product": (lambda z: z @ z.mH, Z),
    "chosen": (lambda z: torch.where(z.real > 0, z, z.conj()), Z),
    "a complex constant": (lambda x: x * torch.tensor(1j), X),
}


def fill_real(z):
    z.real.fill_(3)
    return z


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_program_gives_what_the_function_gives(name):
    function, x = PROGRAMS[name]
    compiled = fn.jit(function)
    expected = fn.tree.map(torch.Tensor.resolve_conj, function(x))
    for _ in range(2):
        torch.testing.assert_close(compiled(x), expected)
    lowered = compiled.lower(x)
    assert lowered.why_not_one is None
    assert all(["test_calls.py" in line for line in lowered.called])


@pytest.mark.parametrize("threads", [1, 2])
def test_any_number_of_threads_gives_the_same(threads):
    before = torch.get_num_threads()
    x = fn.random.normal(fn.key(1), (50, 20, 20))
    torch.set_num_threads(threads)
    try:
        torch.testing.assert_close(fn.jit(fn.vmap(norm))(x), norm(x))
    finally:
        torch.set_num_threads(before)


def test_lower_says_what_is_called_how_often_and_how_long_it_took():
    compiled = fn.jit(along)
    (before,) = compiled.lower(X).called
    assert before.startswith("aten::_linalg_svd, 6 times a run, for ")
    assert before.endswith("return torch.linalg.svd(x)[1][..., 0]")
    compiled(X)
    (after,) = compiled.lower(X).called
    assert " us each, for " in after


def test_what_an_operator_raises_is_raised():
    singular = torch.zeros(2, 40, 40)
    compiled = fn.jit(
        lambda x: torch.linalg.ldl_factor(x + torch.nan).LD.sum() + norm(x * torch.nan)
    )
    with pytest.raises(torch.linalg.LinAlgError, match="svd"):
        compiled(singular)
    # The program is whole.
    with pytest.raises(torch.linalg.LinAlgError):
        compiled(singular)


def test_a_donated_argument_is_written_over():
    def step(state, x):
        return {"total": state["total"] + norm(x), "mean": state["mean"] * 0.9}, norm(x)

    state = {"total": torch.zeros(4), "mean": torch.ones(1000)}
    address = state["mean"].data_ptr()
    state, _ = fn.jit(step, donate=0)(state, X[:4])
    assert state["mean"].data_ptr() == address


def test_a_call_that_is_made_often_is_said_once_with_its_line(monkeypatch):
    monkeypatch.setattr(errors, "_said", set())
    rows = torch.ones(1000, 2, 2)
    with pytest.warns(RuntimeWarning, match=r"calls aten::_linalg_svd 1000 times for .*svd"):
        fn.jit(along)(rows)
    fn.jit(along)(rows)  # a second warning would be an error


def test_autocast_around_a_call_changes_nothing():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compiled = fn.jit(lambda x: norm(x) * 2)
        torch.testing.assert_close(compiled(X), norm(X) * 2)
        torch.testing.assert_close(compiled(X), norm(X) * 2)


def test_another_process_finds_the_program_and_its_calls(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent("""
        import sys, torch, funcnet as fn

        def run(x):
            spectrum = torch.fft.rfft(x[:, ::2].mT)
            return fn.vmap(lambda x: torch.linalg.svd(x)[1])(x), spectrum.conj().abs()

        x = torch.arange(24.0).reshape(3, 4, 2)
        compiled = fn.jit(run)
        torch.testing.assert_close(compiled(x), run(x))
        print(len(compiled.lower(x).called) if len(sys.argv) > 1 else "torch._inductor.lowering"
              in sys.modules)
        """)
    )
    (tmp_path / "cache").mkdir(mode=0o700)
    options = {"FUNCNET_CACHE_DIR": str(tmp_path / "cache"), **os.environ}
    options["FUNCNET_CACHE_DIR"] = str(tmp_path / "cache")
    said = [
        subprocess.run(
            [sys.executable, script, *more], env=options, capture_output=True, text=True, check=True
        ).stdout.strip()
        for more in ([], [], ["lower"])
    ]
    assert said[:2] == ["True", "False"]
    assert int(said[2]) >= 3
