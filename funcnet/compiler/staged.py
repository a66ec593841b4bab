"""The staged path, for what cannot be one C++ program: Inductor's programs, one for each segment.

It serves other devices than the CPU, and operators for which
Inductor has no kernel. Scans loop in Python, and each segment is compiled once. Maps do not loop:
their segments are batched by `torch.vmap`. While loops and branches read their conditions, for
which a device is waited for; where the members of a map differ in them, all go on until the last is
done, or through every branch, and `torch.where` chooses.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from funcnet.compiler.errors import BuildError, NoCompilerError, say_once, say_unknown
from funcnet.compiler.inductor import compiled, writing
from funcnet.compiler.nodes import Node, memory_of, memory_order, through_barriers, value_of
from funcnet.compiler.record import ANY_LAYOUT, settings_of_programs
from funcnet.compiler.steps import (
    Block,
    BranchStep,
    LoopStep,
    PrimitiveStep,
    RepeatStep,
    Segment,
    WhileStep,
    reads,
)


class _Value(NamedTuple):
    """A tensor, with a leading axis for each of the enclosing maps in which it is ``batched``."""

    tensor: Tensor
    batched: tuple[bool, ...]


Values = dict[Node, _Value]


class Staged:
    """Runs a recorded function; called with its inputs, gives its outputs."""

    def __init__(self, inputs: Sequence[Node], program: Block) -> None:
        self._inputs = inputs
        self._program = program
        self._compiled: dict[Any, Any] = {}
        self._codes: list[str] = []

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The outputs for these inputs."""
        values = {
            node: _Value(tensor.detach(), ())
            for node, tensor in zip(self._inputs, tensors, strict=True)
        }
        with settings_of_programs():
            return [value.tensor for value in self._block(self._program, values, ())]

    def code(self) -> str:
        """The graphs of the segments that were compiled so far."""
        return "\n\n".join(self._codes)

    def _block(
        self,
        block: Block,
        values: Values,
        lengths: tuple[int, ...],
        repeat: Callable[[Values], None] = dict.clear,
    ) -> list[_Value]:
        """The outputs of a block; ``repeat`` is what its `RepeatStep` does, if it has one."""
        last_use: dict[Node, int] = {}
        for index, step in enumerate(block.steps):
            last_use.update(dict.fromkeys(reads(step), index))
        kept = {memory_of(node)[0] for node in block.outputs}
        made: set[Node] = set()
        for index, step in enumerate(block.steps):
            match step:
                case Segment():
                    self._segment(step, values)
                    made.update(step.outputs)
                case PrimitiveStep():
                    self._primitive(step, values)
                    made.update(step.results.values())
                case LoopStep():
                    self._loop(step, values, lengths)
                    made.update(step.results.values())
                case WhileStep():
                    self._while(step, values, lengths)
                    made.update(step.results.values())
                case RepeatStep():
                    repeat(values)
                case BranchStep():
                    self._branches(step, values, lengths)
                    made.update(step.results.values())
            # What this block made and nothing needs any more goes at once.
            for node in [node for node in made if last_use.get(node, -1) <= index]:
                if node not in kept:
                    values.pop(node, None)
                    made.discard(node)
        return [_read(node, values) for node in block.outputs]

    def _segment(self, segment: Segment, values: Values) -> None:
        results = self._apply(segment, segment.inputs, values)
        values.update(zip(segment.outputs, results, strict=True))

    def _primitive(self, step: PrimitiveStep, values: Values) -> None:
        results = self._apply(step, step.operands, values)
        values.update({node: results[index] for index, node in step.results.items()})

    def _apply(
        self, step: Segment | PrimitiveStep, operands: Sequence[Node], values: Values
    ) -> list[_Value]:
        """What a step does, compiled, on values that may be batched."""
        inputs = [_read(node, values) for node in operands]
        flags = tuple([value.batched for value in inputs])
        tensors = [value.tensor.contiguous() for value in inputs]
        depth = max([len(batched) for batched in flags], default=0)
        levels = [level for level in range(depth) if any(batched[level] for batched in flags)]
        key = (step, flags, tuple([tensor.shape for tensor in tensors]))
        if key not in self._compiled:
            self._compiled[key] = self._compile(step, flags, levels, tensors)
        batched = tuple([level in levels for level in range(depth)])
        results = self._compiled[key](*tensors)
        return [_Value(result, batched) for result in results]

    def _compile(
        self,
        step: Segment | PrimitiveStep,
        flags: tuple[tuple[bool, ...], ...],
        levels: list[int],
        tensors: list[Tensor],
    ) -> Any:
        if isinstance(step, PrimitiveStep) and step.is_called:
            return self._batched(step, flags, levels)
        with writing():
            graph = self._graph(step, flags, levels, tensors)
        self._codes.append(graph.code)
        # The warnings are given outside: Inductor's are not shown.
        try:
            with writing():
                return compiled(graph, tensors)
        except NoCompilerError:
            raise
        except BuildError as reason:
            say_once("jit: functions run eagerly, as no program can be made", reason)
        except Exception as reason:
            say_unknown("functions run eagerly", reason)
        return graph

    def _graph(
        self,
        step: Segment | PrimitiveStep,
        flags: tuple[tuple[bool, ...], ...],
        levels: list[int],
        tensors: list[Tensor],
    ) -> fx.GraphModule:
        """A step as a graph of its own, batched over the maps at these levels."""
        function = self._batched(step, flags, levels)
        # A tensor may come in twice, as two carries at the start of a scan, and would be one input.
        apart = [torch.empty_like(tensor) for tensor in tensors]
        return make_fx(lambda *inputs: _tuple(function(*inputs)), tracing_mode="fake")(*apart)

    def _batched(
        self,
        step: Segment | PrimitiveStep,
        flags: tuple[tuple[bool, ...], ...],
        levels: list[int],
    ) -> Any:
        """A step as a function, batched over the maps at these levels."""
        if isinstance(step, Segment):
            function: Any = fx.GraphModule(torch.nn.Module(), _of_any_layout(step.graph))
        else:
            function = _in_memory_order(step)
        for level in reversed(levels):
            axes = tuple([0 if batched[level] else None for batched in flags])
            function = torch.vmap(function, in_dims=axes, randomness="different")
        return function

    def _loop(self, step: LoopStep, values: Values, lengths: tuple[int, ...]) -> None:
        operands = [_read(node, values) for node in step.operands]
        if step.loop.is_map:
            self._map(step, operands, values, lengths)
        else:
            self._scan(step, operands, values, lengths)

    def _map(
        self, step: LoopStep, operands: list[_Value], values: Values, lengths: tuple[int, ...]
    ) -> None:
        inner: Values = {
            node: _Value(value.tensor, (*value.batched, False)) for node, value in values.items()
        }
        for index, node in step.slices.items():
            inner[node] = _Value(operands[index].tensor, (*operands[index].batched, True))
        length = step.loop.length
        for index, result in enumerate(self._block(step.body, inner, (*lengths, length))):
            if index in step.results:
                whole = _Value(result.tensor, result.batched)
                if not result.batched[-1]:
                    whole = _expand_last(whole, length)
                values[step.results[index]] = _Value(whole.tensor, result.batched[:-1])

    def _scan(
        self, step: LoopStep, operands: list[_Value], values: Values, lengths: tuple[int, ...]
    ) -> None:
        loop = step.loop
        # A carry may become batched in the first iteration: let it be so from the start.
        carry = [_expand(value, lengths) for value in operands[: loop.carried]]
        stacks: list[list[_Value]] = [[] for _ in loop.outer[loop.carried :]]
        for iteration in loop.iterations:
            inner = dict(values)
            for index, node in step.slices.items():
                value = carry[index] if index < loop.carried else operands[index]
                if index >= loop.carried:
                    slices = value.tensor.select(sum(value.batched), iteration)
                    value = _Value(slices, value.batched)
                inner[node] = value
            results = [_expand(each, lengths) for each in self._block(step.body, inner, lengths)]
            carry = results[: loop.carried]
            for stack, result in zip(stacks, results[loop.carried :], strict=True):
                stack.append(result)
        everywhere = (True,) * len(lengths)
        for index, node in step.results.items():
            if index < loop.carried:
                values[node] = carry[index]
                continue
            members = [result.tensor for result in stacks[index - loop.carried]]
            members = members[::-1] if loop.reverse else members
            if members:
                whole = torch.stack(members, len(lengths))
            else:
                spec = loop.outer[index]
                whole = torch.empty((*lengths, *spec.shape), dtype=spec.dtype, device=spec.device)
            values[node] = _Value(whole, everywhere)

    def _while(self, step: WhileStep, values: Values, lengths: tuple[int, ...]) -> None:
        given = [_expand(_read(node, values), lengths) for node in step.operands]
        # A result shares no memory with what was given.
        carry = [_Value(value.tensor.clone(), value.batched) for value in given]
        holds: _Value

        def tested() -> _Value:
            inner = values | {node: carry[index] for index, node in step.tested.items()}
            return self._block(step.condition, inner, lengths)[0]

        def repeat(around: Values) -> None:
            nonlocal carry, holds
            while holds.tensor.any():
                slices = {node: carry[index] for index, node in step.repeated.slices.items()}
                results = self._block(step.repeated.body, around | slices, lengths)
                after = [_expand(result, lengths) for result in results]
                if any(holds.batched):
                    flag = _expand(holds, lengths).tensor
                    after = [*map(partial(_where, flag), after, carry)]
                carry = after
                holds = tested()

        holds = tested()
        if holds.tensor.any():
            self._block(step.entered, dict(values), lengths, repeat)
        values.update({node: carry[index] for index, node in step.results.items()})

    def _branches(self, step: BranchStep, values: Values, lengths: tuple[int, ...]) -> None:
        selector = _read(step.selector, values)
        if any(selector.batched):
            number = _expand(selector, lengths).tensor
            number = (~number).long() if step.is_bool else number
            *others, results = [
                [_expand(result, lengths) for result in self._block(block, dict(values), lengths)]
                for block in step.blocks
            ]
            for index, each in enumerate(others):
                results = [*map(partial(_where, number == index), each, results)]
        else:
            taken = int(selector.tensor.item())
            block = step.blocks[1 - taken if step.is_bool else taken]
            results = self._block(block, dict(values), lengths)
            # What a branch gives as it was given is not to share memory with the result.
            for index, node in enumerate(block.outputs):
                if memory_of(node)[0] in values:
                    results[index] = _Value(results[index].tensor.clone(), results[index].batched)
        values.update({node: results[index] for index, node in step.results.items()})


def _where(flag: Tensor, yes: _Value, no: _Value) -> _Value:
    """``yes`` for the members for which the flag is True, of values that are batched everywhere."""
    flag = flag.reshape(*flag.shape, *[1] * (yes.tensor.dim() - flag.dim()))
    return yes._replace(tensor=torch.where(flag, yes.tensor, no.tensor))


def _of_any_layout(graph: fx.Graph) -> fx.Graph:
    """The graph for members of a batch, whose strides may differ from those of one alone."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    for node in copy.nodes:
        node.target = ANY_LAYOUT.get(node.target, node.target)
    return copy


def _in_memory_order(step: PrimitiveStep) -> Callable[..., tuple[Tensor, ...]]:
    """A primitive's formula of values as they lie in memory; views come as they are."""
    given = []
    for node in step.operands:
        order = memory_order(value_of(node))
        given.append(order if through_barriers(node) is memory_of(node)[0] else sorted(order))
    made = {index: memory_order(value_of(node)) for index, node in step.results.items()}

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        operands = [
            tensor.permute([order.index(axis) for axis in range(len(order))])
            for tensor, order in zip(tensors, given, strict=True)
        ]
        results = [*_tuple(step.primitive.formula(*operands, **step.options))]
        # What was not asked for is None, which a map cannot give.
        results = [tensors[0].new_zeros(()) if each is None else each for each in results]
        for index, order in made.items():
            results[index] = results[index].permute(order).contiguous()
        return tuple(results)

    return function


def _tuple(results: Any) -> tuple[Tensor, ...]:
    if results is None:
        return ()
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _read(node: Node, values: Values) -> _Value:
    """The value of a node, which may be a view of another's memory."""
    root, distance = memory_of(node)
    value = values[root]
    if through_barriers(node) is root:
        return value
    tensor, view = value.tensor.contiguous(), node.meta["val"]
    leading = sum(value.batched)
    viewed = tensor.as_strided(
        (*tensor.shape[:leading], *view.shape),
        (*tensor.stride()[:leading], *view.stride()),
        tensor.storage_offset() + distance // view.element_size(),
    )
    return _Value(viewed, value.batched)


def _expand_last(value: _Value, length: int) -> _Value:
    """The same value for each of the ``length`` members of the innermost map."""
    axis = sum(value.batched[:-1])
    tensor = value.tensor.unsqueeze(axis)
    shape = list(tensor.shape)
    shape[axis] = length
    return _Value(tensor.expand(shape), (*value.batched[:-1], True))


def _expand(value: _Value, lengths: tuple[int, ...]) -> _Value:
    """The value with an axis for each enclosing map."""
    tensor = value.tensor
    for level, batched in enumerate(value.batched):
        if not batched:
            tensor = tensor.unsqueeze(level)
            shape = list(tensor.shape)
            shape[level] = lengths[level]
            tensor = tensor.expand(shape)
    return _Value(tensor, (True,) * len(lengths))
