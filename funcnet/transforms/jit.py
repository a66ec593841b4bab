"""`jit`: a pure function compiled as one program."""

import functools
import inspect
import types
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, overload

import optree
import torch

from funcnet import runtime
from funcnet.checks import check_function
from funcnet.compiler.errors import say_unknown
from funcnet.compiler.methods import Method, without_self
from funcnet.core import Layer, Loss, Optimizer
from funcnet.hints import hint_for
from funcnet.transforms.compiled import COMPILED

if TYPE_CHECKING:
    from funcnet.compiler.compiled import Lowered
    from funcnet.compiler.dispatch import Dispatcher

Made = TypeVar("Made", Layer, Loss, Optimizer)


class Jitted:
    """A compiled function; see `jit`."""

    def __init__(
        self,
        function: Callable[..., Any],
        donate: tuple[int, ...],
        static: tuple[int | str, ...],
        instance: Callable[[], Any] | None = None,
    ) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._donate = donate
        self._static = static
        self._dispatcher = _dispatcher(function, repr(self), donate, static, instance)
        self._last: Any = None
        self._methods: dict[int, tuple[Jitted, Callable[[], Any]]] = {}

    def __repr__(self) -> str:
        return f"jit({getattr(self._function, '__qualname__', self._function)})"

    def __deepcopy__(self, memo: Any) -> "Jitted":
        return self

    def __reduce__(self) -> str:
        # As functions are pickled: by name.
        return str(getattr(self, "__qualname__", ""))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if runtime.is_transformed():
            # One program is compiled, that of the outermost function.
            return self._function(*args, **kwargs)
        last = self._last
        if last is not None:
            recognize, program, plain = last
            found = recognize((args, kwargs))
            if found is not None:
                tensors, numbers = found
                inputs = program.arithmetic.again(numbers) if numbers else ()
                if inputs is not None:
                    return program(tensors, inputs, plain)
        if self._dispatcher is None:
            return self._function(*args, **kwargs)
        try:
            result = self._dispatcher(args, kwargs)
        except Exception as error:
            _trim(error)
            raise
        self._last = self._dispatcher.last
        return result

    def lower(self, *args: Any, **kwargs: Any) -> "Lowered":
        """The graph, blocks, buffers and code for these arguments, as text."""
        if self._dispatcher is None:
            raise RuntimeError(
                "jit: the compiler does not know this PyTorch: functions run eagerly"
            )
        try:
            return self._dispatcher.lower(args, kwargs)
        except Exception as error:
            _trim(error)
            raise

    def clear(self) -> None:
        """Free the memory that the programs keep from call to call."""
        if self._dispatcher is not None:
            self._dispatcher.clear()
        for method, _ in self._methods.values():
            method.clear()

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """As a method: of a tree, such as a NamedTuple, whose tensors are arguments then.

        Any other instance is closed over, as by a lambda: the values of its tensors are read at
        each call, and what else it has is part of what the program is made for.
        """
        if instance is None:
            return self
        if not optree.tree_is_leaf(instance):
            return types.MethodType(self, instance)
        identity = id(instance)
        found, reference = self._methods.get(identity, (None, None))
        if found is None or reference is None or reference() is not instance:
            try:
                # When the instance goes, so do its programs.
                reference = weakref.ref(instance, lambda _: self._methods.pop(identity, None))
            except TypeError:
                reference = functools.partial(_itself, instance)
            found = self._bound_to(instance, reference)
            self._methods[identity] = found, reference
        return Method(found, instance)

    def _bound_to(self, instance: Any, reference: Callable[[], Any]) -> "Jitted":
        """This function without its first parameter, which is what ``reference`` gives."""
        if 0 in self._donate:
            raise ValueError(f"{self!r}: self is no tree of tensors, and cannot be donated")

        def method(*args: Any, **kwargs: Any) -> Any:
            return self._function(reference(), *args, **kwargs)

        functools.update_wrapper(method, self._function)
        method.__signature__ = inspect.signature(  # type: ignore[attr-defined]
            types.MethodType(self._function, instance)
        )
        donate, static = without_self(self._donate), without_self(self._static)
        return Jitted(method, donate, static, reference)


def _trim(error: Exception) -> None:
    from funcnet.compiler.tracebacks import trim

    trim(error)


def _itself(instance: Any) -> Any:
    return instance


def _dispatcher(*options: Any) -> "Dispatcher | None":
    """What finds the programs of a function; None if the compiler does not know this PyTorch."""
    try:
        from funcnet.compiler.dispatch import Dispatcher
    except (ImportError, AttributeError) as error:
        say_unknown("functions run eagerly", error)
        return None
    return Dispatcher(*options)


@overload
def jit(f: Made) -> Made: ...  # type: ignore[overload-overlap]


@overload
def jit(
    f: Callable[..., Any],
    donate: int | Sequence[int] = (),
    static: int | str | Sequence[int | str] = (),
) -> Jitted: ...


def jit(
    f: Any,
    donate: int | Sequence[int] = (),
    static: int | str | Sequence[int | str] = (),
) -> Any:
    """Compile a pure function: one program for all that it does, loops included.

    The function is traced once for each structure, shapes, dtypes and devices of its arguments,
    each value of the static ones, and each setting of torch that operators read, such as autocast
    or the default dtype. On the CPU the program is C++: Inductor fuses the operators into kernels,
    and one function calls them, without a tensor made or memory allocated between. It is kept on
    disk, in ``FUNCNET_CACHE_DIR`` or the user's cache folder, for other processes. Where no program
    can be made, a warning says so once, and the function itself runs. The page
    ``funcnet/compiler/README.md`` walks one step from Python to the program.

    Tensors that the function closes over are read at each call; if one has become of another shape
    or dtype, the function is traced again. All else that it closes over, other tensors that a name
    is bound to later among it, and Python's own effects, such as printing, belong to tracing only.
    Inside another transformation, f itself is called. As a decorator of a method it binds self:
    what the instance and the objects in it hold is then part of what the program is made for.

    Args:
        f: a pure function of trees of tensors and numbers. Another value of an int or a float
            needs no new program: arithmetic among numbers is done by Python at each call, and a
            number meets a tensor as it does eagerly. Only an ``if`` that goes another way, or a
            result of another type, is traced anew, and each bool has its own program. While f is
            traced, ``isinstance(n, float)`` is what it is eagerly, and ``type(n)`` is not. Numbers
            among the results become 0-d tensors. Or a Layer, Loss or Optimizer: the same with its
            functions compiled, ``apply``, ``vjp`` and the pullback, or ``update``. What makes the
            first values, ``init`` and ``init_state``, is called once, and is not. A whole training
            step is faster as one program, ``jit(train_step(...))``.
        donate: positions of arguments whose memory the results may take. Their tensors cannot be
            used afterwards, unless f returns them as they are.
        static: positions or names of hashable arguments that f may read while it is traced.

    Returns:
        A function like f, with ``lower(*args)``, which gives as text what each stage makes of it:
        ``graph``, ``blocks``, ``buffers``, ``code``, and ``clear()``. Its results need no gradient
        and are contiguous.

    Memory: a program keeps that of its intermediate values from call to call, up to 1 GiB, and
    PyTorch's convolutions in programs keep up to 512 MiB in all. ``clear()`` frees it, as does
    dropping the function. Calls at the same time have memory of their own.

    Raises:
        RuntimeError: there is no C++ compiler, other users can write to the cache folder, a donated
            tensor is used, or an index is out of range; what was donated to that call is lost.
        TypeError: f reads the value of a tensor, or turns a number into an int, a float or an
            index; an argument is neither a plain, dense tensor nor a number.
        ValueError: a donated tensor shares its memory with another argument.

    >>> import funcnet as fn
    >>> f = jit(lambda x, factor: (factor * x).sum())
    >>> f(torch.ones(3), 2.0), f(torch.ones(3), 3.0)
    (tensor(6.), tensor(9.))
    >>> net = jit(fn.serial(fn.linear(1, bias=False), fn.tanh()))
    >>> y, pullback, _ = net.vjp({"0": {"weight": torch.ones(1, 1)}}, torch.zeros(2, 1))
    >>> pullback(torch.ones(2, 1))
    ({'0': {'weight': tensor([[0.]])}}, tensor([[1.], [1.]]))
    """
    if type(f) in COMPILED:
        if donate != () or static != ():
            what = f"a {type(f).__name__}'s functions have no such arguments"
            raise TypeError(f"jit: donate and static are of a function, and {what}; jit them alone")
        return COMPILED[type(f)](jit, f)
    if isinstance(f, torch.nn.Module):
        got = f"{hint_for(f)}, and fn.jit(layer.apply) or the training step"
        raise TypeError(f"jit: expects a function, got {got}")
    check_function("jit", f)
    donated = (donate,) if isinstance(donate, int) else tuple(donate)
    fixed = (static,) if isinstance(static, (int, str)) else tuple(static)
    if any(not isinstance(each, int) for each in donated):
        raise TypeError(f"jit: donate expects positions of arguments, got {donate!r}")
    if any(not isinstance(each, (int, str)) for each in fixed):
        raise TypeError(f"jit: static expects positions or names of arguments, got {static!r}")
    if both := set(donated) & set(fixed):
        raise ValueError(f"jit: argument {min(both)} cannot be donated and static")
    return Jitted(f, donated, fixed)
