"""The combinator of a `Program`: layers and operations whose inputs are any values before them."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from funcnet import tree
from funcnet.combinators.combine import Pull, Run, combine
from funcnet.core import EMPTY, Grads, Layer, Pullback, Tree, kinds_of, sum_cotangents
from funcnet.errors import located
from funcnet.interop.operations import layer_of_call, run_plain
from funcnet.interop.program import Program, Ref, Step, refs_of, thawed


def graph(children: Mapping[Any, Layer], train: Program, evaluation: Program, name: str) -> Layer:
    """A layer that runs a program: one with ``train=True``, and one with ``train=False``.

    Args:
        children: the layers that the steps call, by dotted path, or by the names of their leaves.
        train, evaluation: the programs, often the same one.
        name: for errors and summaries.
    """
    programs = (evaluation, train)
    return combine(name, children, graph_forward, graph_backward, programs, dotted=True)


_OTHERS = "others"
"""Where the params of children that this mode does not call are among the residuals."""

_done_after = lru_cache(maxsize=256)(Program.done_after)


def graph_forward(run: Run, x: Tree, programs: tuple[Program, Program]) -> tuple[Tree, Any]:
    """The steps of the program for the mode, one after the other."""
    train = getattr(run, "train", None)
    if train is None and programs[0] != programs[1]:
        _run(run, x, programs[1])  # init: children of both programs have params
    program = programs[bool(train)]
    y, residuals = _run(run, x, program)
    if train is not None and programs[0] != programs[1]:
        # What the other mode alone calls has no gradient, and keeps its state.
        called = {step.target for step in program.steps if step.kind == "child"}
        others = [child for child in run.names if child not in called]
        residuals[_OTHERS] = {child: run.params[child] for child in others if child in run.params}
        run.new_state.update({child: run.state[child] for child in others if child in run.state})
    if train:
        residuals["train"] = ()
    return y, residuals


def _run(run: Run, x: Tree, program: Program) -> tuple[Tree, dict[str, Tree]]:
    values: list[Any] = []
    residuals: dict[str, Tree] = {}
    train = bool(getattr(run, "train", False))
    for index, (step, done) in enumerate(zip(program.steps, _done_after(program), strict=True)):
        y: Any = None
        if step.kind == "input":
            y = x if step.target == "" else x[int(step.target)]
        elif step.kind == "child":
            y = run(step.target, thawed(step.args, lambda ref: values[ref.index]), step.use)
        else:
            with located(f"{step.name}:"):
                y = _operate(step, values, train, str(index), residuals)
        if step.kind != "op":
            residuals[str(index)] = Pullback(graph_step_rule, {}, (None, *kinds_of(y)))
        y = (y, None) if step.with_none else y
        values.append(y)
        for each in done:
            values[each] = None
    return thawed(program.output, lambda ref: values[ref.index]), residuals


def _operate(
    step: Step, values: list[Any], train: bool, place: str, residuals: dict[str, Tree]
) -> Any:
    """The value of an operation; a pullback goes into the residuals if it has a derivative."""
    known: dict[int, int] = {}

    def value_of(ref: Ref) -> Any:
        value = values[ref.index]
        if isinstance(value, Tensor) and known.setdefault(id(value), ref.index) != ref.index:
            value = value.view_as(value)  # the cotangents of two steps are told by their values
            known[id(value)] = ref.index
        return value

    args, kwargs = thawed((step.args, step.kwargs), value_of)
    found = layer_of_call(step.target, args, kwargs)
    if found is None:
        return run_plain(step.target, args, kwargs)
    layer, operands = found
    y, pullback, _ = layer.forward(EMPTY, operands, {}, None, train)
    if isinstance(operands, Tensor):
        sources: Any = known.get(id(operands))
    else:
        whole = [r.index for r in refs_of(step.args) if values[r.index] is operands]
        sources = whole[0] if whole else tuple([known.get(id(each)) for each in operands])
    residuals[place] = Pullback(graph_step_rule, {"": pullback}, (sources, *kinds_of(y)))
    return y


def graph_step_rule(residuals: Any, dy: Tree, *static: Any, params: bool, x: bool) -> Grads:
    """The dx of an operation; what a step of `graph` keeps is in the form of a pullback."""
    return None, residuals[""](dy, params=False)[1]


def graph_backward(
    pull: Pull, dy: Tree, residuals: Mapping[str, Tree], programs: tuple[Program, Program]
) -> Tree:
    """The steps in the opposite order; cotangents of a value that was used often are summed."""
    program = programs["train" in residuals]
    for child, params in residuals.get(_OTHERS, {}).items():
        if child in pull.learned:
            pull.learned[child] = tree.map(torch.zeros_like, params)
    like = tree.leaves(dy)
    cotangents: dict[int, list[Tree]] = {}
    _send(program.output, dy, cotangents)
    needed = _needed(program, pull)
    dx: dict[str, Tree] = {}
    for index in range(len(program.steps) - 1, -1, -1):
        step, kept = program.steps[index], residuals.get(str(index))
        dvalue = _total(cotangents.pop(index, ()))
        if kept is None or (step.kind == "op" and (dvalue is None or not needed[index])):
            continue
        sources, treedef, kinds = kept.static
        dvalue = dvalue[0] if step.with_none and dvalue is not None else dvalue
        dvalue = _filled(dvalue, treedef, kinds, like)
        if step.kind == "input":
            dx[step.target] = dvalue
        elif step.kind == "child":
            below = any([needed[ref.index] for ref in refs_of(step.args)])
            _send(step.args, pull(step.target, dvalue, step.use, needed=below), cotangents)
        else:
            doperands = kept(dvalue)[1]
            if isinstance(sources, tuple):
                for source, each in zip(sources, doperands, strict=True):
                    _send(None if source is None else Ref(source), each, cotangents)
            elif sources is not None:
                _send(Ref(sources), doperands, cotangents)
    return _of_input(program, dx) if pull.x else None


def _needed(program: Program, pull: Pull) -> list[bool]:
    """Whether a value depends on what a gradient is asked for."""
    needed: list[bool] = []
    for step in program.steps:
        below = any([needed[ref.index] for ref in refs_of((step.args, step.kwargs))])
        own = pull.x if step.kind == "input" else step.target in pull.learned
        needed.append(below or (own and step.kind != "op"))
    return needed


def _total(found: Any) -> Tree:
    return found[0] if len(found) == 1 else sum_cotangents(*found)


def _send(argument: Any, cotangent: Tree, cotangents: dict[int, list[Tree]]) -> None:
    """Add the parts of a cotangent to those of the values that an argument refers to."""
    if cotangent is None:
        return
    if type(argument) is Ref:
        cotangents.setdefault(argument.index, []).append(cotangent)
    elif type(argument) is tuple:
        for item, part in zip(argument, cotangent, strict=True):
            _send(item, part, cotangents)
    elif hasattr(argument, "items"):
        if isinstance(cotangent, Mapping):
            for name, item in argument.items:
                _send(item, cotangent[name], cotangents)
        else:
            for item, part in zip(argument.items, cotangent, strict=True):
                _send(item, part, cotangents)


def _filled(cotangent: Tree, treedef: Any, kinds: Any, like: list[Tensor]) -> Tree:
    """The cotangent with zeros where a value was not used, or has no derivative further on."""
    if isinstance(cotangent, Tensor):
        return cotangent
    parts = [None] * len(kinds) if cotangent is None else treedef.flatten_up_to(cotangent)
    device = like[0].device if like else None
    return treedef.unflatten(
        [
            torch.zeros(shape, dtype=dtype, device=device)
            if part is None and dtype.is_floating_point
            else part
            for part, (shape, dtype) in zip(parts, kinds, strict=True)
        ]
    )


def _of_input(program: Program, dx: Mapping[str, Tree]) -> Tree:
    """The dx of x, a tuple where x is one."""
    names = [step.target for step in program.steps if step.kind == "input"]
    return dx[""] if names == [""] else tuple([dx[str(i)] for i in range(len(names))])
