"""What the blocks of a program consist of: segments, primitives, loops and branches."""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from funcnet.compiler.calls import CALLS
from funcnet.compiler.loops import Branches, Loop, WhileLoop
from funcnet.compiler.nodes import Graph, Node, line_of, memory_of, value_of
from funcnet.compiler.primitives import Primitive
from funcnet.compiler.specs import spec_of


@dataclass(eq=False)
class Segment:
    """Operators without a graph break, as a function of ``inputs`` that gives ``outputs``.

    ``origins`` are the nodes of the program of which those of ``graph`` are copies.
    """

    inputs: list[Node]
    outputs: list[Node]
    graph: Graph
    origins: dict[Node, Node]

    def key(self) -> str:
        """The same text for segments that compute the same of tensors of the same kinds."""
        number = {node: f"%{index}" for index, node in enumerate(self.graph.nodes)}
        lines = []
        for node in self.graph.nodes:
            arguments = fx.node.map_arg((node.args, node.kwargs), lambda each: number[each])
            lines.append(
                f"{node.target if node.op != 'placeholder' else spec_of(value_of(node))}{arguments}"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        lines = [line_of(node) for node in self.graph.nodes if node.op == "call_function"]
        names = [node for node in self.graph.nodes if node.op == "placeholder"]
        given = [f"{name}={node}" for name, node in zip(names, self.inputs, strict=True)]
        results = self.graph.output_node().args[0]
        made = [f"{node}={result}" for node, result in zip(self.outputs, results, strict=True)]
        return f"segment ({_listed(given)}) -> ({_listed(made)})\n{_indented(lines)}"


@dataclass(eq=False)
class LoopStep:
    """A loop: its operands, its slices and body, and its results, in the graph around it."""

    loop: Loop
    operands: list[Node]
    slices: dict[int, Node]
    body: "Block"
    results: dict[int, Node]

    def __str__(self) -> str:
        operands = [
            f"{self.slices[index]} {'from' if index < self.loop.carried else 'in'} {operand}"
            for index, operand in enumerate(self.operands)
            if index in self.slices
        ]
        outputs = self.body.outputs
        results = [
            f"{node} {'is the last' if index < self.loop.carried else 'stacks'} {outputs[index]}"
            for index, node in sorted(self.results.items())
        ]
        body = _indented([str(self.body)])
        return f"{self.loop}: {_listed(operands)}\n{body}\n    results: {_listed(results)}"


@dataclass(eq=False)
class RepeatStep:
    """What a while loop does in each iteration; ``slices`` are what it carries."""

    slices: dict[int, Node]
    body: "Block"

    @property
    def results(self) -> dict[int, Node]:
        """None: those of the loop are results of the `WhileStep`."""
        return {}

    def __str__(self) -> str:
        return str(self.body)


@dataclass(eq=False)
class WhileStep:
    """A while loop: its operands, its condition and body, and its results.

    Attributes:
        loop: the loop.
        operands: the first values of what it carries.
        tested: what the condition sees of them.
        condition: gives whether there is another iteration.
        entered: what is done once, if there is any iteration, and last of all a `RepeatStep`.
        results: the last values.
    """

    loop: WhileLoop
    operands: list[Node]
    tested: dict[int, Node]
    condition: "Block"
    entered: "Block"
    repeated: RepeatStep
    results: dict[int, Node]

    def __str__(self) -> str:
        seen = [
            f"{slices[index]} from {operand}"
            for slices in (self.tested, self.repeated.slices)
            for index, operand in enumerate(self.operands)
            if index in slices
        ]
        outputs = self.repeated.body.outputs
        results = [f"{node} is the last {outputs[index]}" for index, node in self.results.items()]
        parts: dict[str, Sequence[Any]] = {"condition": [self.condition]}
        if len(self.entered.steps) > 1:
            parts["once"] = self.entered.steps[:-1]
        parts["each time"] = [self.repeated]
        lines = [f"{self.loop}: {_listed(seen)}"]
        for name, steps in parts.items():
            lines.append(f"  {name}:\n{_indented([str(each) for each in steps])}")
        return "\n".join([*lines, f"    results: {_listed(results)}"])


@dataclass(eq=False)
class BranchStep:
    """Branches, of which the selector says which one is run, and their results."""

    branches: Branches
    selector: Node
    blocks: list["Block"]
    results: dict[int, Node]

    @property
    def is_bool(self) -> bool:
        """Whether the selector is a bool, which is True for the first branch."""
        return bool(value_of(self.selector).dtype == torch.bool)

    @property
    def names(self) -> list[str]:
        """What the selector is for each branch."""
        return ["True", "False"] if self.is_bool else [*map(str, range(len(self.blocks)))]

    def __str__(self) -> str:
        parts = [
            f"  {name}:\n{_indented([str(block)])}"
            for name, block in zip(self.names, self.blocks, strict=True)
        ]
        results = [f"{node} is output {index}" for index, node in sorted(self.results.items())]
        head = f"{self.branches}, by {self.selector}:"
        return "\n".join([head, *parts, f"    results: {_listed(results)}"])


@dataclass(eq=False)
class PrimitiveStep:
    """A call of a primitive by a node; results that nothing reads are missing."""

    primitive: Primitive
    operands: list[Node]
    options: dict[str, Any]
    results: dict[int, Node]
    node: Node

    @property
    def is_called(self) -> bool:
        """Whether PyTorch runs it, and not a kernel."""
        return self.primitive.header == CALLS

    def __str__(self) -> str:
        options = [f"{name}={value!r}" for name, value in self.options.items()]
        given = _listed([*map(str, self.operands), *options])
        results = _listed(map(str, self.results.values()))
        kind = "call of PyTorch's" if self.is_called else "primitive"
        return f"{kind} {self.primitive.operator} ({given}) -> ({results})"


Step = Segment | LoopStep | WhileStep | RepeatStep | BranchStep | PrimitiveStep


@dataclass(eq=False)
class Block:
    """Steps, done in order, and the values that come of them."""

    steps: list[Step] = field(default_factory=list)
    outputs: list[Node] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [*map(str, self.steps)]
        if self.outputs:
            lines.append(f"outputs: {_listed(map(str, self.outputs))}")
        return "\n".join(lines)


def _listed(parts: Iterable[str]) -> str:
    return ", ".join(parts)


def _indented(lines: Iterable[str]) -> str:
    return textwrap.indent("\n".join(lines), "    ")


def reads(step: Step) -> set[Node]:
    """The values from outside that a step reads."""
    match step:
        case Segment():
            return _memories(step.inputs)
        case PrimitiveStep():
            return _memories(step.operands)
        case LoopStep() | WhileStep():
            return _memories(step.operands) | reads_inside(step)
        case BranchStep():
            return _memories([step.selector]) | reads_inside(step)
        case RepeatStep():
            return reads_inside(step)


def reads_inside(step: LoopStep | WhileStep | RepeatStep | BranchStep) -> set[Node]:
    """The values from outside that the blocks of a step read, its operands' slices aside."""
    match step:
        case LoopStep() | RepeatStep():
            return _reads_of(step.body) - set(step.slices.values())
        case WhileStep():
            tested = _reads_of(step.condition) - set(step.tested.values())
            return tested | _reads_of(step.entered)
        case BranchStep():
            return {node for block in step.blocks for node in _reads_of(block)}


def _reads_of(block: Block) -> set[Node]:
    """The values that a block reads and does not make."""
    made: set[Node] = set()
    read = _memories(block.outputs)
    for step in block.steps:
        read |= reads(step)
        made |= set(step.outputs if isinstance(step, Segment) else step.results.values())
    return read - made


def blocks_of(step: Step) -> list[Block]:
    """The blocks inside a step."""
    match step:
        case LoopStep() | RepeatStep():
            return [step.body]
        case WhileStep():
            return [step.condition, step.entered]
        case BranchStep():
            return step.blocks
        case _:
            return []


def _memories(nodes: Sequence[Node]) -> set[Node]:
    return {memory_of(node)[0] for node in nodes}
