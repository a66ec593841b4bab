"""`check_optimizer`: the laws of optimizers, each a named check of one over some steps."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from funcnet import random, tree
from funcnet.core import Optimizer, Params, Tree
from funcnet.optimizers import apply_updates
from funcnet.optimizers.parts import Part, SplitState
from funcnet.testing.assertions import (
    Unchanged,
    alike,
    by_path,
    check_laws,
    close,
    equal,
    list_of_laws,
    require,
    require_tensors,
)
from funcnet.testing.samples import cast, noise, stack
from funcnet.transforms import vmap as mapping

Reference = Callable[[list[Tensor]], torch.optim.Optimizer]


class Case(NamedTuple):
    """An optimizer with params, the gradients of some steps, and a peer of torch's if given."""

    optimizer: Optimizer
    params: Params
    grads: list[Params]
    key: Tensor
    reference: Reference | None
    rtol: float

    def first(self) -> tuple[Params, Tree, Params]:
        """The arguments of the first update."""
        return self.grads[0], self.optimizer.init_state(self.params), self.params

    def arguments(self) -> Iterator[tuple[Params, Tree, Params]]:
        """The arguments ``(grads, state, params)`` of the update of each step."""
        params, state = self.params, self.optimizer.init_state(self.params)
        for grads in self.grads:
            yield grads, state, params
            updates, state = self.optimizer.update(grads, state, params)
            params = apply_updates(params, updates)


def check_structure(case: Case) -> None:
    """The updates are like the params, and the state keeps its structure, shapes and dtypes."""
    require_tensors("the state", case.optimizer.init_state(case.params))
    for grads, state, params in case.arguments():
        updates, after = case.optimizer.update(grads, state, params)
        require_tensors("the state", after)
        alike("updates are like params", params, updates)
        alike("the state keeps its structure", state, after)


def _update(case: Case, grads: Params, state: Tree, params: Params) -> dict[str, Tree]:
    updates, state = case.optimizer.update(grads, state, params)
    return {"updates": updates, "state": state}


def check_pure(case: Case) -> None:
    """The same arguments give the same results bit for bit, and no argument is changed."""
    for grads, state, params in case.arguments():
        arguments = Unchanged(grads=grads, state=state, params=params)
        once = _update(case, grads, state, params)
        arguments.check()
        again = _update(case, grads, state, params)
        equal("the same arguments, the same result", once, again)
        arguments.check()


def check_no_autograd(case: Case) -> None:
    """No result needs a gradient, and inference mode changes nothing."""
    for arguments in case.arguments():
        for leaf in tree.leaves(case.optimizer.update(*arguments)):
            require(not leaf.requires_grad, "results need no gradient")
    eager = _update(case, *case.first())
    with torch.inference_mode():
        inferred = _update(case, *case.first())
        equal("inference mode changes nothing", eager, inferred)


def check_reference(case: Case) -> None:
    """The params after each step are those of the given optimizer of torch.optim."""
    if case.reference is None or not tree.leaves(case.params):
        return
    expected = [leaf.clone().requires_grad_() for leaf in tree.leaves(case.params)]
    peer = case.reference(expected)
    for step, (grads, state, params) in enumerate(case.arguments(), 1):
        updates, _ = case.optimizer.update(grads, state, params)
        for leaf, gradient in zip(expected, tree.leaves(grads), strict=True):
            leaf.grad = gradient.clone()
        peer.step()
        close(
            f"the params after step {step} are torch.optim's",
            [leaf.detach() for leaf in expected],
            tree.leaves(apply_updates(params, updates)),
            case.rtol,
        )


def check_float32(case: Case) -> None:
    """The updates and the state of float32 params are what those of float64 are, in float32.

    Numbers in the state, 0-d tensors that are of no leaf of the params, have what dtype they like.
    """
    params = cast(case.params, torch.float32)
    state = case.optimizer.init_state(params)
    updates, after = case.optimizer.update(noise(case.key, params), state, params)
    alike("updates are like params", params, updates)
    _, double = case.optimizer.update(*case.first())
    paths, found = tuple(by_path(params)), by_path(after)
    expected = {
        path: found.get(path) if leaf.dim() == 0 and not path.endswith(paths) else leaf
        for path, leaf in by_path(cast(double, torch.float32)).items()
    }
    alike("the state is like the params", expected, found)
    alike("the state keeps its structure", state, after)


def check_zero_gradients(case: Case) -> None:
    """Gradients of 0 give finite updates."""
    params = cast(case.params, torch.float32)
    state, zeros = case.optimizer.init_state(params), tree.map(torch.zeros_like, params)
    updates, _ = case.optimizer.update(zeros, state, params)
    finite = all(bool(leaf.isfinite().all()) for leaf in tree.leaves(updates))
    require(finite, "gradients of 0 give finite updates")


def check_vmap(case: Case) -> None:
    """Under vmap each member of a population has the results of its solo run."""
    if not tree.leaves(case.params):
        return
    members = [noise(random.fold_in(case.key, 100 + member), case.params) for member in range(3)]

    def run(params: Params) -> Tree:
        state, grads = case.optimizer.init_state(params), tree.map(torch.sin, params)
        updates, state = case.optimizer.update(grads, state, params)
        return updates, case.optimizer.update(updates, state, params)

    together = mapping.vmap(run)(stack(members))
    alone = stack([run(member) for member in members])
    close("under vmap each member equals its solo run", alone, together)


def check_alone(case: Case) -> None:
    """Each leaf, with its part of the state, can be updated alone, unless the optimizer says no."""
    if case.optimizer.needs_all_leaves:
        return
    for grads, state, params in case.arguments():
        together = _update(case, grads, state, params)
        leaves, treedef = tree.flatten(params)
        states, updates = SplitState(state, treedef), [*leaves]
        for index, path in enumerate(by_path(params)):
            part = Part({path: index})
            found, after = case.optimizer.update(part.of(grads), states.of(part), part.of(params))
            (updates[index],) = tree.leaves(found)
            states.put(part, after)
        alone = {"updates": treedef.unflatten(updates), "state": states.whole()}
        close("leaves updated alone are those updated together", together, alone)


LAWS: dict[str, Callable[[Case], None]] = {
    "structure": check_structure,  # first, because the other checks take steps
    "pure": check_pure,
    "reference": check_reference,
    "no autograd": check_no_autograd,
    "float32": check_float32,
    "zero gradients": check_zero_gradients,
    "vmap": check_vmap,
    "alone": check_alone,
}
"""The laws of optimizers, in the order of the checks; the first broken one is reported."""


def check_optimizer(
    optimizer: Optimizer,
    params: Params,
    *,
    reference: Reference | None = None,
    steps: int = 10,
    vmap: bool = True,
    alone: bool = False,
    rtol: float = 1e-12,
) -> None:
    """Check that an optimizer keeps the laws of the protocol; it is computed in float64.

    Args:
        optimizer: the optimizer.
        params: an example, a nested dict of tensors.
        reference: makes a torch.optim optimizer of a list of parameters; if given, the params
            after each of ``steps`` steps must equal its.
        steps: how many steps to check, at least one.
        vmap: False for an optimizer that cannot.
        alone: whether to check that it can update one layer at a time, unless it says that it
            needs all leaves, as `funcnet.clipped_train_step` asks.
        rtol: the greatest relative difference from the reference.

    Raises:
        AssertionError: its message names the law, and what differs.

    The laws:

    {laws}

    >>> import funcnet as fn
    >>> check_optimizer(fn.adam(0.1), {"w": torch.ones(3)},
    ...                 reference=lambda params: torch.optim.Adam(params, 0.1))
    """
    params, key = cast(params, torch.float64), random.key(0)
    grads = [noise(random.fold_in(key, step), params) for step in range(steps)]
    case = Case(optimizer, params, grads, key, reference, rtol)
    check_laws("optimizer", LAWS, case, {"vmap": vmap, "alone": alone})


check_optimizer.__doc__ = (check_optimizer.__doc__ or "").replace("{laws}", list_of_laws(LAWS))
