"""Tensors that a function leaves outside itself while it is traced: to use one is an error."""

from typing import Any, NoReturn

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import TensorWeakRef

from funcnet import tree
from funcnet.compiler.user_code import Line

_MESSAGE = "funcnet_escaped"


class Escaped(Tensor):
    """What a tensor becomes that was made while a function was traced, and is there afterwards."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _refuse((args, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        _refuse((args, kwargs))

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return "<a tensor without a value, made while a function was traced>"

    def __format__(self, spec: str) -> str:
        return repr(self)


def _refuse(arguments: Any) -> NoReturn:
    leaves = tree.leaves(arguments)
    found = next((leaf for leaf in leaves if isinstance(leaf, Escaped)), None)
    raise RuntimeError(
        vars(found)[_MESSAGE] if found is not None else escape_of("a function", None)
    )


def escape_of(name: str, line: Line | None, what: str = "tensor") -> str:
    """What to say of a value that escaped from a function, which made it at this line."""
    where = f"\n  {line}\n" if line else " "
    return (
        f"jit: this {what} was made while {name} was traced, and has no value:{where}"
        "Return it from the function, which must not keep it anywhere else: not in a list, an "
        "attribute or a cache"
    )


class Made:
    """The tensors that are made while a function is traced."""

    def __init__(self) -> None:
        self._tensors: list[tuple[TensorWeakRef, Line | None]] = []

    def note(self, made: Any, line: Line | None) -> None:
        """Note what an operator gave, or what the function was given."""
        for each in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(each, FakeTensor):
                self._tensors.append((TensorWeakRef(each), line))

    def let_go(self, name: str) -> None:
        """The function has been traced: what is left of its tensors may not be used."""
        for reference, line in self._tensors:
            tensor = reference()
            if isinstance(tensor, FakeTensor):
                vars(tensor)[_MESSAGE] = escape_of(name, line)
                tensor.__class__ = Escaped  # type: ignore[assignment]
        self._tensors.clear()
