"""What the laws assert of trees of tensors; an AssertionError says where two of them differ."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import optree
import torch
from torch import Tensor

from funcnet import tree
from funcnet.core import EMPTY, Layer, Pullback, Tree


def list_of_laws(laws: Mapping[str, Callable[..., None]]) -> str:
    """A table of laws as lines of a docstring: the name, and the check's docstring's first line."""
    lines = [f"- {name}: {(check.__doc__ or '').splitlines()[0]}" for name, check in laws.items()]
    return "\n    ".join(lines)


@contextmanager
def named(where: str) -> Iterator[None]:
    """Start the message of an AssertionError with ``where``; any other error becomes one."""
    try:
        yield
    except AssertionError as error:
        if len(error.args) != 1:
            error.add_note(f"in {where}")
            raise
        error.args = (f"{where}: {error.args[0]}",)
        raise
    except Exception as error:
        raise AssertionError(f"{where}: raised {type(error).__name__}: {error}") from error


def check_laws(
    where: str,
    laws: Mapping[str, Callable[[Any], None]],
    case: Any,
    chosen: Mapping[str, bool] = EMPTY,
) -> None:
    """Check each law on a case, but for those that are not ``chosen``; errors name the law."""
    for law, check in laws.items():
        if chosen.get(law, True):
            with named(f"{where}: {law}"):
                check(case)


def require(condition: object, what: str) -> None:
    """Raise AssertionError unless the condition holds."""
    if not condition:
        raise AssertionError(what)


def equal(what: str, expected: Tree, got: Tree) -> None:
    """The trees are equal bit for bit, but for the sign of zero and the payload of NaN."""
    for path, leaf, other in _pairs(what, expected, got):
        require(_same(leaf, other), f"{what}: they differ{_at(path)}")


def close(what: str, expected: Tree, got: Tree, rtol: float = 1e-10) -> None:
    """The trees are equal up to a relative error of each leaf."""
    pairs = _pairs(what, expected, got)
    greatest = max((magnitude(leaf) for _, leaf, _ in pairs), default=0.0)
    for path, leaf, other in pairs:
        if leaf is None or other is None:
            require(leaf is other, f"{what}: only one is None{_at(path)}")
            continue
        shapes = f"{tuple(leaf.shape)} and {tuple(other.shape)}"
        require(leaf.shape == other.shape, f"{what}: the shapes differ{_at(path)}: {shapes}")
        difference = (leaf - other).double() if leaf.is_floating_point() else leaf != other
        error = magnitude(difference)
        # A leaf that is small beside the others may be the rounding error of a sum that vanishes.
        scale = max(magnitude(leaf), 1e-3 * greatest)
        require(
            error <= rtol * scale,
            f"{what}: the error{_at(path)} is {error:.3g}, of {scale:.3g}",
        )


def alike(
    what: str, expected: Tree, got: Tree, *, floating_only: bool = False, device: bool = False
) -> None:
    """The trees have the same structure, shapes and dtypes, and devices if ``device``.

    With ``floating_only`` the second has None where the first has integers, or is None if the
    first has nothing else.
    """
    if floating_only:
        expected = optree.tree_map(
            lambda leaf: leaf if leaf is not None and leaf.is_floating_point() else None,
            expected,
            none_is_leaf=True,
        )
        if got is None:
            got = optree.tree_map(lambda leaf: None, expected, none_is_leaf=True)
    for path, leaf, other in _pairs(what, expected, got):
        if leaf is None or other is None:
            require(leaf is other, f"{what}: only one is None{_at(path)}")
            continue
        tensors = isinstance(leaf, Tensor) and isinstance(other, Tensor)
        same = tensors and (leaf.shape, leaf.dtype) == (other.shape, other.dtype)
        same = same and (not device or leaf.device == other.device)
        require(
            same,
            f"{what}: expected {_kind(leaf, other)}{_at(path)}, got {_kind(other, leaf)}",
        )


def halves(grads: tuple[Tree, Tree]) -> dict[str, Tree]:
    """What a pullback gives, by name."""
    dparams, dx = grads
    return {"dparams": dparams, "dx": dx}


def require_tensors(what: str, node: Tree) -> None:
    """Each leaf of the tree is a tensor; None is one that is not there."""
    for path, leaf in by_path(node).items():
        found = f"got {type(leaf).__name__} {leaf!r}{_at(path)}"
        require(leaf is None or isinstance(leaf, Tensor), f"{what} is a tree of tensors, {found}")


def _at(path: str) -> str:
    return f" at {path!r}" if path else ""


def _kind(leaf: Any, other: Any) -> str:
    """The shape and dtype of a leaf, and its device if that of the other one is another."""
    found = tree.describe(leaf)
    both = isinstance(leaf, Tensor) and isinstance(other, Tensor)
    return f"{found} on {leaf.device}" if both and leaf.device != other.device else found


def module_level(pullback: Pullback) -> None:
    """The rule, and each function among its static arguments, can be imported by its name."""
    static = [each for each in pullback.static if not isinstance(each, Layer)]
    for function in (pullback.rule, *filter(callable, static)):
        name = getattr(function, "__qualname__", "<object>")
        require("<" not in name, f"the rule's function {name} is a module-level function")
    hash(pullback.static)
    residuals: Any = pullback.residuals
    for leaf in optree.tree_leaves(residuals, is_leaf=lambda leaf: isinstance(leaf, Pullback)):
        if isinstance(leaf, Pullback):
            module_level(leaf)


class Unchanged:
    """Remembers tensors; `check` requires that neither their version nor values changed since."""

    def __init__(self, **trees: Tree) -> None:
        for what, watched in trees.items():
            require_tensors(what, watched)
        self.seen = [
            (what, leaf, leaf._version, leaf.clone())
            for what, watched in trees.items()
            for leaf in tree.leaves(watched)
        ]

    def check(self) -> None:
        for what, leaf, version, values in self.seen:
            same = leaf._version == version and _same(leaf, values)
            require(same, f"{what} must not be changed in place")


@contextmanager
def unchanged_globals(name: str) -> Iterator[None]:
    """Require that torch's generators and two of its settings stay; restore the settings."""
    generators, settings = _generators(), _settings()
    try:
        yield
        after = _settings()
    finally:
        torch.set_grad_enabled(settings[0])
        torch.set_default_dtype(settings[1])
    # A GPU that was first used here may not have had a generator before.
    pairs = zip(generators, _generators(), strict=False)
    unused = all([torch.equal(before, now) for before, now in pairs])
    require(unused, f"{name}: pure: torch's random generator is not used")
    require(after == settings, f"{name}: pure: no global setting is changed")


def _generators() -> list[Tensor]:
    """The states of torch's generators, one for each device in use."""
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.random.get_rng_state(), *on_gpus]


def _settings() -> tuple[bool, torch.dtype]:
    return torch.is_grad_enabled(), torch.get_default_dtype()


def by_path(node: Tree) -> dict[str, Any]:
    """The leaves of a tree by their paths; None is a leaf."""
    paths, leaves, _ = optree.tree_flatten_with_path(node, none_is_leaf=True)
    return {tree.path_string(path): leaf for path, leaf in zip(paths, leaves, strict=True)}


def magnitude(leaf: Any) -> float:
    """The greatest absolute value; 0 without elements or for None."""
    return float(leaf.double().abs().max()) if isinstance(leaf, Tensor) and leaf.numel() else 0.0


def _pairs(what: str, expected: Tree, got: Tree) -> list[tuple[str, Any, Any]]:
    """The paths of two trees of one structure with the leaves of both."""
    wanted, found = by_path(expected), by_path(got)
    require(
        wanted.keys() == found.keys(),
        f"{what}: expected the leaves {list(wanted)}, got {list(found)}",
    )
    return [(path, leaf, found[path]) for path, leaf in wanted.items()]


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a is b
    same_kind = a.shape == b.shape and a.dtype == b.dtype
    return same_kind and bool(((a == b) | (a.isnan() & b.isnan())).all())
