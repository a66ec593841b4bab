"""What the blocks of a program consist of: segments, loops and primitives."""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from funcnet.compiler.calls import CALLS
from funcnet.compiler.loops import Loop
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


Step = Segment | LoopStep | PrimitiveStep


@dataclass(eq=False)
class Block:
    """Steps, done in order, and the values that come of them."""

    steps: list[Step] = field(default_factory=list)
    outputs: list[Node] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.steps), f"outputs: {_listed(map(str, self.outputs))}"])


def _listed(parts: Iterable[str]) -> str:
    return ", ".join(parts)


def _indented(lines: Iterable[str]) -> str:
    return textwrap.indent("\n".join(lines), "    ")


def reads(step: Step) -> set[Node]:
    """The values from outside that a step reads."""
    if isinstance(step, Segment):
        return _memories(step.inputs)
    if isinstance(step, PrimitiveStep):
        return _memories(step.operands)
    return _memories(step.operands) | reads_inside(step)


def reads_inside(step: LoopStep) -> set[Node]:
    """The values from outside that the body of a loop reads, its operands' slices aside."""
    made = set(step.slices.values())
    read = _memories(step.body.outputs)
    for inner in step.body.steps:
        read |= reads(inner)
        made |= set(inner.outputs if isinstance(inner, Segment) else inner.results.values())
    return read - made


def _memories(nodes: Sequence[Node]) -> set[Node]:
    return {memory_of(node)[0] for node in nodes}
