"""The program for what the C++ host does not know: Inductor's own, segment by segment.

It serves other devices than the CPU, and operators such as convolutions. Loops run in Python and
each segment is compiled once. A map does not loop: its segments are batched by `torch.vmap`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from funcnet.compiler import cache
from funcnet.compiler.build import BuildError
from funcnet.compiler.inductor import compiled, writing
from funcnet.compiler.tracing import (
    Block,
    Node,
    Primitive,
    Region,
    Segment,
    Traced,
    blocks,
    locate,
    reads,
    settings_of_programs,
    through_barriers,
)
from funcnet.threefry import threefry_at, threefry_range

aten = torch.ops.aten


class _Value(NamedTuple):
    """A tensor with one leading axis for each of the open maps in which it is ``batched``."""

    tensor: Tensor
    batched: tuple[bool, ...]


Values = dict[Node, _Value]


class Staged:
    """Runs a traced function; called with its inputs, gives its outputs."""

    def __init__(self, traced: Traced) -> None:
        self._inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
        self._program = blocks(traced)
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

    def _block(self, block: Block, values: Values, lengths: tuple[int, ...]) -> list[_Value]:
        last_use: dict[Node, int] = {}
        for place, item in enumerate(block.items):
            last_use.update(dict.fromkeys(reads(item), place))
        kept = {locate(node)[0] for node in block.outputs}
        made: set[Node] = set()
        for place, item in enumerate(block.items):
            if isinstance(item, Segment):
                self._segment(item, values)
                made.update(item.outputs)
            else:
                if isinstance(item, Primitive):
                    self._primitive(item, values)
                else:
                    self._region(item, values, lengths)
                made.update(item.results.values())
            # What this block made and nothing needs any more goes at once.
            for node in [node for node in made if last_use.get(node, -1) <= place]:
                if node not in kept:
                    values.pop(node, None)
                    made.discard(node)
        return [_read(node, values) for node in block.outputs]

    def _segment(self, segment: Segment, values: Values) -> None:
        results = self._apply(segment, segment.inputs, values)
        values.update(zip(segment.outputs, results, strict=True))

    def _primitive(self, item: Primitive, values: Values) -> None:
        results = self._apply(item, item.operands, values)
        values.update({node: results[place] for place, node in item.results.items()})

    def _apply(
        self, item: Segment | Primitive, operands: Sequence[Node], values: Values
    ) -> list[_Value]:
        """What an item does, compiled, on values that may be batched."""
        inputs = [_read(node, values) for node in operands]
        flags = tuple([value.batched for value in inputs])
        tensors = [value.tensor.contiguous() for value in inputs]
        depth = max([len(batched) for batched in flags], default=0)
        levels = [level for level in range(depth) if any(batched[level] for batched in flags)]
        key = (item, flags, tuple([tensor.shape for tensor in tensors]))
        if key not in self._compiled:
            with writing():
                self._compiled[key] = self._compile(item, flags, levels, tensors)
        batched = tuple([level in levels for level in range(depth)])
        results = self._compiled[key](*tensors)
        return [_Value(result, batched) for result in results]

    def _compile(
        self,
        item: Segment | Primitive,
        flags: tuple[tuple[bool, ...], ...],
        levels: list[int],
        tensors: list[Tensor],
    ) -> Any:
        if isinstance(item, Segment):
            function: Any = fx.GraphModule(torch.nn.Module(), _of_any_layout(item.graph))
        else:
            function = _formula(item)
        for level in reversed(levels):
            axes = tuple([0 if batched[level] else None for batched in flags])
            function = torch.vmap(function, in_dims=axes, randomness="different")
        # A tensor may come in twice, as two carries at the start of a scan, and would be one input.
        apart = [torch.empty_like(tensor) for tensor in tensors]
        graph = make_fx(lambda *inputs: _tuple(function(*inputs)), tracing_mode="fake")(*apart)
        self._codes.append(graph.code)
        try:
            return compiled(graph, list(tensors))
        except BuildError as reason:
            cache.say_once("jit: functions run eagerly, as no program can be made", reason)
            return graph

    def _region(self, region: Region, values: Values, lengths: tuple[int, ...]) -> None:
        operands = [_read(node, values) for node in region.operands]
        if region.loop.kind == "map":
            self._map(region, operands, values, lengths)
        else:
            self._scan(region, operands, values, lengths)

    def _map(
        self, region: Region, operands: list[_Value], values: Values, lengths: tuple[int, ...]
    ) -> None:
        inner: Values = {
            node: _Value(value.tensor, (*value.batched, False)) for node, value in values.items()
        }
        for place, node in region.slices.items():
            inner[node] = _Value(operands[place].tensor, (*operands[place].batched, True))
        length = region.loop.length
        for place, result in enumerate(self._block(region.body, inner, (*lengths, length))):
            if place in region.results:
                whole = _Value(result.tensor, result.batched)
                if not result.batched[-1]:
                    whole = _expand_last(whole, length)
                values[region.results[place]] = _Value(whole.tensor, result.batched[:-1])

    def _scan(
        self, region: Region, operands: list[_Value], values: Values, lengths: tuple[int, ...]
    ) -> None:
        loop = region.loop
        # A carry may become batched in the first round: let it be so from the start.
        carry = [_expand(value, lengths) for value in operands[: loop.carried]]
        stacks: list[list[_Value]] = [[] for _ in loop.outer[loop.carried :]]
        for index in range(loop.length):
            inner = dict(values)
            for place, node in region.slices.items():
                value = carry[place] if place < loop.carried else operands[place]
                if place >= loop.carried:
                    value = _Value(value.tensor.select(sum(value.batched), index), value.batched)
                inner[node] = value
            results = [_expand(each, lengths) for each in self._block(region.body, inner, lengths)]
            carry = results[: loop.carried]
            for stack, result in zip(stacks, results[loop.carried :], strict=True):
                stack.append(result)
        everywhere = (True,) * len(lengths)
        for place, node in region.results.items():
            if place < loop.carried:
                values[node] = carry[place]
                continue
            rounds = [result.tensor for result in stacks[place - loop.carried]]
            if rounds:
                whole = torch.stack(rounds, len(lengths))
            else:
                spec = loop.outer[place]
                whole = torch.empty((*lengths, *spec.shape), dtype=spec.dtype, device=spec.device)
            values[node] = _Value(whole, everywhere)


def _of_any_layout(graph: fx.Graph) -> fx.Graph:
    """The graph for members of a batch, which need not lie as one alone does."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    for node in copy.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
    return copy


def _formula(item: Primitive) -> Any:
    """A primitive in the operators that Inductor knows."""
    if item.name == "sort":
        options = {name: item.options.get(name, default) for name, default in _SORT}
        return lambda x: torch.sort(x, stable=True, **options)
    if item.name == "threefry":
        start, n = item.options["start"], item.options["n"]
        return lambda key: threefry_range(key, start, n)
    if item.name == "threefry_at":
        return threefry_at
    operator = getattr(aten, item.name).default

    def formula(*operands: Tensor) -> Any:
        given = iter(operands)
        names = [argument.name for argument in operator._schema.arguments]
        return operator(
            *[item.options[name] if name in item.options else next(given) for name in names]
        )

    return formula


def _tuple(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


_SORT = (("dim", -1), ("descending", False))


def _read(node: Node, values: Values) -> _Value:
    """The value of a node, which may be a view of another's memory."""
    root, distance = locate(node)
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
    """The value with an axis for each open map."""
    tensor = value.tensor
    for level, batched in enumerate(value.batched):
        if not batched:
            tensor = tensor.unsqueeze(level)
            shape = list(tensor.shape)
            shape[level] = lengths[level]
            tensor = tensor.expand(shape)
    return _Value(tensor, (True,) * len(lengths))
