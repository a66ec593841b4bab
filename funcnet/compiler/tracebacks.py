"""What a user sees of an error in a function that is traced: what eager says, at the user's line.

Between the call and the user's line, and below it, lie some eighty calls of torch and of this
package. They are taken out of the traceback; with ``FUNCNET_FULL_TRACEBACK=1`` they stay.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from funcnet import runtime, tree
from funcnet.compiler.numbers import value_of_number
from funcnet.compiler.user_code import is_library, is_users_frame

_MOST = 2**22
"""Elements of the tensors for which a call that failed is made again."""

_TRACES = "traced_function"
"""The function of `dispatch` that calls the user's."""


def trim(error: BaseException) -> None:
    """Leave the user's own calls in the traceback of an error, and of those behind it.

    What is neither an error of the function that was traced nor of its use stays whole.
    """
    if os.environ.get("FUNCNET_FULL_TRACEBACK", "0") not in ("", "0"):
        return
    if not _is_traced(error.__traceback__) and not str(error).startswith("jit"):
        return
    seen: set[int] = set()
    rest: list[BaseException | None] = [error]
    while rest:
        each = rest.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        each.__traceback__ = _users_own(each.__traceback__)
        _name_publicly(each)
        rest += [each.__cause__, each.__context__]


def _is_traced(traceback: TracebackType | None) -> bool:
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if code.co_name == _TRACES and is_library(code.co_filename):
            return True
        traceback = traceback.tb_next
    return False


def _users_own(traceback: TracebackType | None) -> TracebackType | None:
    frames = []
    below_user = False
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        # What the user calls of Python's library is kept, and what torch calls of it is not.
        below_user = is_users_frame(traceback.tb_frame) or (below_user and not is_library(file))
        if below_user:
            frames.append(traceback)
        traceback = traceback.tb_next
    kept: TracebackType | None = None
    for each in reversed(frames):
        kept = TracebackType(kept, each.tb_frame, each.tb_lasti, each.tb_lineno)
    return kept


def eager_error(error: Exception, func: Callable[..., Any], args: Any, kwargs: Any) -> Exception:
    """The error that a call has with real tensors, where that with fake tensors has another.

    It is found by calling it on zeros. Under a transformation the tensors are not those of the
    call, and the error stays.
    """
    fakes = [each for each in tree.leaves((args, kwargs)) if isinstance(each, FakeTensor)]
    small = sum([each.numel() for each in fakes]) <= _MOST
    if not fakes or not small or runtime.is_batched() or str(error).startswith("jit"):
        return error

    def real(leaf: Any) -> Any:
        if isinstance(leaf, FakeTensor):
            return torch.zeros(leaf.shape, dtype=leaf.dtype)
        return leaf if isinstance(leaf, Tensor) else value_of_number(leaf)

    try:
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
            positional, named = tree.map(real, (args, kwargs))
            func(*positional, **named)
    except Exception as found:
        return found.with_traceback(None)
    return error


def _name_publicly(error: BaseException) -> None:
    if error.args and isinstance(error.args[0], str):
        error.args = (error.args[0].replace("FakeTensor", "Tensor"), *error.args[1:])


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from logging the traceback of each operator that fails on fake tensors."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
