"""Tracing a module's forward with torch.fx: each module that it calls is one node."""

import dis
import inspect
import math
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

IN_PLACE = {
    getattr(operator, f"i{name}"): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "pow", "floordiv", "mod", "matmul")
}
"""From the operators such as ``+=`` to those that leave their operands as they are."""


class Refused(Exception):  # noqa: N818
    """A forward that cannot be traced, for a reason that a user may read."""


def _in_place(function: Any) -> Callable[..., Any]:
    def method(self: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


class _Value(fx.Proxy):
    """A value in a traced forward, which records ``y += x`` as what it is."""

    __iadd__ = _in_place(operator.iadd)
    __isub__ = _in_place(operator.isub)
    __imul__ = _in_place(operator.imul)
    __itruediv__ = _in_place(operator.itruediv)

    def __iter__(self: Any) -> Any:
        frame = sys._getframe(1)
        now = next(i for i in dis.get_instructions(frame.f_code) if i.offset == frame.f_lasti)
        unpacked = int(now.argval) if now.opname == "UNPACK_SEQUENCE" else 0  # a, b = y
        pieces = unpacked or _number_of_pieces(self.node)
        if not pieces:
            raise Refused("its control flow depends on sizes of its input (a loop over a value)")
        return iter([self[i] for i in range(pieces)])

    def __setitem__(self, index: Any, value: Any) -> None:
        raise Refused("assigns to elements of a tensor in place")


def _number_of_pieces(node: fx.Node) -> int:
    """How many pieces ``chunk`` or ``split`` makes, where its arguments tell; else 0."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    given = [*node.args[1:2], *node.kwargs.values()]
    sizes: Any = given[0] if given else None
    if name == "chunk" and isinstance(sizes, int):
        return sizes
    return len(sizes) if name == "split" and isinstance(sizes, (list, tuple)) else 0


class Tracer(fx.Tracer):
    """Records the calls of all modules, parameters and buffers by path, and tensors made inside."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__(autowrap_modules=(math,))
        self.constants: list[Tensor] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            known = [name for name, each in self.root.named_buffers() if each is a]
            if known:
                return self.create_node("get_attr", known[0], (), {})
            self.constants.append(a.detach())
            return self.create_node("get_attr", f"constant:{len(self.constants) - 1}", (), {})
        return super().create_arg(a)

    def to_bool(self, obj: fx.Proxy) -> bool:
        frame = sys._getframe(2)
        following = list(dis.get_instructions(frame.f_code))
        now = next(i for i, each in enumerate(following) if each.offset == frame.f_lasti)
        if any([each.opname == "LOAD_ASSERTION_ERROR" for each in following[now : now + 3]]):
            return True  # assert: what it asserts is left out
        raise Refused("its control flow depends on values, or on sizes, of its input")


def trace(module: nn.Module, constants: dict[str, Any], train: bool) -> tuple[fx.Graph, Tracer]:
    """The graph of a module's forward.

    Args:
        module: any module; its mode is another one in the meantime.
        constants: arguments of forward that are not inputs.
        train: the mode.

    Raises:
        Refused.
    """
    tracer, before = Tracer(), module.training
    kept = [(each, *_attributes(each)) for each in module.modules()]
    module.training = train
    try:
        with _recorded_functions(type(module).forward):
            return tracer.trace(module, constants), tracer
    except Refused:
        raise
    except Exception as error:
        raise Refused(_explained(error)) from error
    finally:
        module.training = before
        _restore(kept)


def _attributes(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """Copies of the dicts in which a module has its attributes."""
    return dict(module.__dict__), dict(module._buffers), dict(module._parameters)


def _restore(kept: list[tuple[Any, ...]]) -> None:
    """Undo what a forward assigned to attributes while it was traced, and refuse it."""
    assigned: list[str] = []
    for module, *before in kept:
        now = module.__dict__, module._buffers, module._parameters
        for old, new in zip(before, now, strict=True):
            changed = [name for name in new if name not in old or new[name] is not old[name]]
            for name in changed:
                if name in old:
                    new[name] = old[name]
                else:
                    del new[name]
            assigned += changed
    if assigned:
        raise Refused(f"its forward assigns to {assigned}: a layer returns what it changes")


def _explained(error: Exception) -> str:
    """Why torch.fx could not trace a forward."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "cannot be interpreted as an integer" in text:
        return "its control flow depends on values, or on sizes, of its input (a loop over them)"
    if "cannot assign" in text or "item assignment" in text:
        return f"changes a parameter or a buffer in forward: {text}"
    return f"torch.fx cannot trace its forward: {type(error).__name__}: {text}"


@contextmanager
def _recorded_functions(forward: Any) -> Iterator[None]:
    """``len(x)`` and ``torch.ones(*sizes)`` of traced values are recorded, too."""
    names = getattr(forward, "__globals__", {})
    had, before = "len" in names, names.get("len")
    made = {name: getattr(torch, name) for name in ("ones", "zeros", "empty")}

    def sized(value: Any) -> Any:
        if isinstance(value, fx.Proxy):
            return value.tracer.create_proxy("call_method", "size", (value, 0), {})
        return (before or len)(value)

    def recorded(function: Any) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            found = [each for each in args if isinstance(each, fx.Proxy)]
            if found and len(args) > 1:
                arguments = "call_function", function, (tuple(args),), options
                return found[0].tracer.create_proxy(*arguments)
            return function(*args, **options)

        return call

    names["len"] = sized
    for name, function in made.items():
        setattr(torch, name, recorded(function))
    try:
        yield
    finally:
        for name, function in made.items():
            setattr(torch, name, function)
        if had:
            names["len"] = before
        else:
            del names["len"]


def arguments_of(module: nn.Module) -> dict[str, inspect.Parameter]:
    """The arguments of a module's forward, by name. Raises: Refused for ``*args``."""
    found = dict(list(inspect.signature(type(module).forward).parameters.items())[1:])
    open_ended = [name for name, each in found.items() if each.kind in (each.VAR_POSITIONAL,)]
    if open_ended:
        raise Refused(f"its forward takes *{open_ended[0]}: name the arguments")
    return {name: each for name, each in found.items() if each.kind != each.VAR_KEYWORD}
