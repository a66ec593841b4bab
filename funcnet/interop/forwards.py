"""From a traced forward to a `graph`: what calls what, with which values."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from funcnet.core import Layer
from funcnet.errors import require
from funcnet.interop.classes import class_of, split_call
from funcnet.interop.layer_module import LayerModule
from funcnet.interop.module_facts import tensor_at
from funcnet.interop.operations import ATTRIBUTES, OPERATIONS, is_known, name_of
from funcnet.interop.program import Program, Ref, Step, frozen, refs_of, thawed
from funcnet.interop.tracing import IN_PLACE, Refused, Tracer

VIEWS = {
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel", "permute"),
    *("transpose", "swapaxes", "t", "movedim", "getattr", "expand", "expand_as", "view_as"),
    *("unbind", "split", "chunk", "getitem", "select", "narrow", "to", "type_as", "float"),
    *("double", "half", "bfloat16", "contiguous", "detach", "broadcast_to"),
}
"""Operations whose value may share the memory of their argument."""

NOISE = {
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
}
"""Functions that draw random numbers, each with an argument ``training``."""

CONSTANTS = "(constants)"
"""The child that has the tensors which are made in forward."""


class Converted(NamedTuple):
    """A layer; whether its y may be its x; whether its module changes its x in place."""

    layer: Layer
    may_alias: bool = True
    mutates: bool = False


class Builder:
    """Makes the program of one mode of a module's forward.

    Args:
        module: whose forward it is.
        inputs: the names of forward's arguments that are x, or its parts.
        child: ``(target, call) -> Converted``, for a module at a path below this one, and what a
            call of it is beside its x: converted once, whichever mode calls it.
        leaf: ``target -> name`` of a parameter or buffer, among the module's own leaves; None for
            a buffer that is a constant.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: tuple[str, ...],
        child: Callable[[str, Any], Converted],
        leaf: Callable[[str], str | None],
    ) -> None:
        self.module, self.inputs, self.child, self.leaf = module, inputs, child, leaf
        self.steps: list[Step] = []
        self.refs: dict[fx.Node, Any] = {}
        self.uses: dict[str, int] = {}
        self.layers: dict[str, Layer] = {}
        self.own: list[str] = []
        self.constants: list[Tensor] = []
        self.faults: list[str] = []
        # What was changed in place: by which node, or None for all that share its memory.
        self.changed: dict[fx.Node, fx.Node | None] = {}
        self.groups: dict[fx.Node, set[fx.Node]] = {}
        self.may_alias = False

    def build(self, graph: fx.Graph, tracer: Tracer, train: bool) -> Program:
        """The program; what it cannot have is among the ``faults``."""
        self.tracer, self.train = tracer, train
        # Those of forward's arguments that are fixed have a check of their values.
        for node in list(reversed(graph.nodes)):
            checks = getattr(node.target, "__name__", "") in ("_assert", "_assert_is_none")
            specialized = node.op == "call_function" and not node.users
            fixed = node.op == "placeholder" and node.target not in self.inputs
            if (checks and specialized) or (fixed and not node.users) or self._is_dead(node):
                graph.erase_node(node)
        output: Any = None
        for name in self.inputs:
            place = "" if len(self.inputs) == 1 else str(self.inputs.index(name))
            self._add(Step(name, "input", place))
        for node in graph.nodes:
            try:
                if node.op == "output":
                    output = self._frozen(node.args[0])
                    self.may_alias = self._aliases_input(node.args[0])
                    continue
                self.refs[node] = getattr(self, f"_{node.op}")(node)
            except (Refused, ValueError, TypeError) as error:
                self.faults.append(str(error))
                self.refs[node] = Ref(0)
        return Program(tuple(self.steps), output)

    def _is_dead(self, node: fx.Node) -> bool:
        """Whether nothing uses a value, and nothing else happens when it is computed."""
        pure = node.op in ("call_function", "call_method", "get_attr") and not node.users
        return pure and not self._is_in_place(node)

    def _add(self, step: Step) -> Ref:
        self.steps.append(step)
        return Ref(len(self.steps) - 1)

    def _frozen(self, argument: Any) -> Any:
        """An argument with refs in the places of nodes."""
        return frozen(argument, lambda each: self._ref(each) if isinstance(each, fx.Node) else each)

    def _ref(self, node: fx.Node) -> Any:
        while node in self.changed:
            later = self.changed[node]
            require(later is not None, f"uses {node.name} after it was changed in place")
            node = later  # type: ignore[assignment]
        return self.refs[node]

    def _placeholder(self, node: fx.Node) -> Any:
        require(node.target in self.inputs, f"its forward uses the argument {node.target!r}")
        self.groups[node] = {node}
        return Ref(self.inputs.index(str(node.target)))

    def _get_attr(self, node: fx.Node) -> Any:
        self.groups[node] = {node}
        target = str(node.target)
        if target.startswith("constant:"):
            return self._constant(self.tracer.constants[int(target.partition(":")[2])], node.name)
        name = self.leaf(target)
        if name is None:
            return self._constant(tensor_at(self.module, target), node.name)
        if name not in self.own:
            self.own.append(name)
        # The step of the leaves gets its names when all of them are known.
        step = Step(node.name, "op", "operator:getitem", (_OWN, name))
        return self._add(step)

    def _constant(self, tensor: Tensor, name: str) -> Ref:
        known = [place for place, each in enumerate(self.constants) if each is tensor]
        if not known:
            self.constants.append(tensor.detach().clone())
            known = [len(self.constants) - 1]
        return self._add(Step(name, "op", "operator:getitem", (_CONSTANTS, known[0])))

    def _call_module(self, node: fx.Node) -> Any:
        target = str(node.target)
        module = self.module.get_submodule(target)
        args, kwargs = self._frozen(tuple(node.args)), dict(node.kwargs)
        kwargs = {name: self._frozen(value) for name, value in kwargs.items()}
        call: Any
        if class_of(module) is not None:
            x, call = split_call(module, args, kwargs)
        elif isinstance(module, LayerModule):
            x, call = kwargs or (args[0] if len(args) == 1 else args), {}
        else:
            x, call = _split(module, args, kwargs)
        made = self.child(target, call)
        self._follow(node, made.may_alias, made.mutates, class_of(module) is not None)
        use = self.uses.get(target, 0)
        self.uses[target] = use + 1
        returns_pair = class_of(module) == "MultiheadAttention"
        alone = returns_pair and call.get("need_weights") is False
        step = Step(node.name, "child", target, frozen(x), use=use, with_none=alone)
        return self._add(step)

    def _call_method(self, node: fx.Node) -> Any:
        name, args, kwargs = str(node.target), tuple(node.args), dict(node.kwargs)
        in_place = name.endswith("_") and not name.startswith("__")
        return self._operation(node, f"method:{name.rstrip('_')}", args, kwargs, in_place)

    def _call_function(self, node: fx.Node) -> Any:
        function, args, kwargs = node.target, tuple(node.args), dict(node.kwargs)
        in_place = self._is_in_place(node)
        function = IN_PLACE.get(function, function)
        target = name_of(function)
        name = getattr(function, "__name__", str(function))
        require(target is not None, f"calls {name}, which has no layer")
        where, _, name = str(target).partition(":")
        if name.endswith("_") and not name.startswith("__"):
            target = f"{where}:{name.rstrip('_')}"
        if kwargs.get("inplace") is not None:
            kwargs.pop("inplace")
        if name == "getattr" and str(args[1]) not in ATTRIBUTES:
            known = args[1] in ("T", "mT", "values", "indices", "real", "data")
            require(known, f"reads the attribute {args[1]!r}, which has no layer")
        if name in NOISE or (name == "scaled_dot_product_attention" and _drops(node)):
            return self._noise(node, name, args, kwargs)
        return self._operation(node, str(target), args, kwargs, in_place)

    def _is_in_place(self, node: fx.Node) -> bool:
        if node.op == "call_method":
            name = str(node.target)
        else:
            name = getattr(node.target, "__name__", "")
            if node.target in IN_PLACE or node.kwargs.get("inplace"):
                return True
        return name.endswith("_") and not name.startswith("__") and not name.endswith("__")

    def _operation(self, node: fx.Node, target: str, args: Any, kwargs: Any, in_place: bool) -> Any:
        name = target.partition(":")[2]
        require(is_known(target), f"calls {name}, which has no layer")
        require(not in_place or name in OPERATIONS, f"calls {name}_, which has no layer")
        step = Step(node.name, "op", target, self._frozen(args), self._frozen(kwargs))
        self._follow(node, name in VIEWS, in_place, True)
        return self._add(step)

    def _noise(self, node: fx.Node, name: str, args: Any, kwargs: Any) -> Any:
        """A function with noise is a child: it gets a key of its own."""
        import funcnet

        if name == "scaled_dot_product_attention":
            given = dict(zip(_ATTENTION, args, strict=False)) | kwargs
            x = tuple([given.pop(each) for each in _ATTENTION[:3]])
            mask = given.pop("attn_mask", None)
            layer = funcnet.scaled_dot_product_attention(**given)
            wrong = "with dropout_p > 0 drops in eval mode, too; write dropout_p if self.training"
            require(self.train, f"scaled_dot_product_attention {wrong}")
            return self._random(node, layer, x if mask is None else (*x, mask))
        given = dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | kwargs
        x, p = given["input"], given.get("p", 0.5)
        default = name == "dropout" or name.startswith("dropout")
        training = given.get("training", default)
        constant = not isinstance(p, fx.Node) and not isinstance(training, fx.Node)
        require(constant, f"{name}: p and training depend on values")
        if not training:
            self._follow(node, True, False, True)
            return self._add(Step(node.name, "op", "method:clone", (self._frozen(x),)))
        wrong = "drops in eval mode, too; write training=self.training"
        require(self.train, f"{name} {wrong}")
        return self._random(node, getattr(funcnet, name)(p), x)

    def _random(self, node: fx.Node, layer: Layer, x: Any) -> Any:
        name = node.name
        while hasattr(self.module, name):
            name += "_"
        self.layers[name] = layer
        self._follow(node, False, False, True)
        return self._add(Step(node.name, "child", name, self._frozen(x), use=0))

    def _follow(self, node: fx.Node, is_view: bool, in_place: bool, elementwise: bool) -> None:
        """Keep account of who shares memory with whom, and of what was changed in place."""
        sources = list(node.all_input_nodes)
        group = {node}
        if is_view:
            for source in sources:
                group |= self.groups.get(source, {source})
        if in_place and sources:
            subject = sources[0]
            shared = self.groups.get(subject, {subject})
            given = [each.name for each in shared if each.op in ("placeholder", "get_attr")]
            what = f"{node.name} changes {', '.join(given)} in place"
            require(not given, f"{what}: an input, a parameter or a buffer")
            for each in shared:
                self.changed[each] = None
            if elementwise:
                self.changed[subject] = node
            group |= shared
        for each in group:
            self.groups[each] = group

    def _aliases_input(self, output: Any) -> bool:
        found: list[fx.Node] = []
        fx.node.map_arg(output, found.append)
        return any(
            [each.op == "placeholder" for node in found for each in self.groups.get(node, {node})]
        )


_OWN, _CONSTANTS = "own leaves", "constants"
_ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def _drops(node: fx.Node) -> bool:
    found = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
    return bool(found)


def _split(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """A call of a module of any class: its x, and the names of the parts and the constants."""
    signature = inspect.signature(type(module).forward)
    bound = signature.bind(module, *args, **kwargs).arguments
    given = dict(list(bound.items())[1:])
    for name, each in signature.parameters.items():
        variable = each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) and given.get(name)
        require(not variable, f"calls a {type(module).__name__} with *{name}")
    parts = [name for name, value in given.items() if any(True for _ in refs_of(frozen(value)))]
    require(parts, f"calls a {type(module).__name__} without a value")
    constants = {
        name: thawed(value, lambda ref: ref) for name, value in given.items() if name not in parts
    }
    x = tuple([given[name] for name in parts])
    return x[0] if len(parts) == 1 else x, (tuple(parts), constants)


def with_leaves(
    program: Program, own: tuple[str, ...], constants: str, unused: tuple[Any, ...]
) -> Program:
    """The program with steps right after the inputs: of the module's own leaves, its constants,
    and what it does not use.

    Args:
        program: as `Builder` makes it.
        own: the names of the module's own leaves, which are one child.
        constants: the name of the child that has the constants, "" if there are none.
        unused: the names of children that keep what forward does not use.
    """
    number = sum([step.kind == "input" for step in program.steps])
    extra: list[Step] = []
    places: dict[str, Ref] = {}
    for name, target in ((_OWN, own), (_CONSTANTS, constants), *[(str(n), n) for n in unused]):
        if target:
            places[name] = Ref(number + len(extra))
            extra.append(Step(name, "child", target, Ref(0), use=0))

    def moved(argument: Any) -> Any:
        """The frozen argument, whose refs to steps are moved past the extra ones."""
        by = len(extra)
        return frozen(
            thawed(argument, lambda ref: Ref(ref.index + by) if ref.index >= number else ref)
        )

    steps = []
    for step in program.steps:
        first = step.args[0] if type(step.args) is tuple and step.args else None
        if step.target == "operator:getitem" and first in (_OWN, _CONSTANTS):
            steps.append(step._replace(args=(places[first], *step.args[1:])))
            continue
        steps.append(step._replace(args=moved(step.args), kwargs=moved(step.kwargs)))
    steps[number:number] = extra
    return Program(tuple(steps), moved(program.output))
