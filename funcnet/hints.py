"""What errors say of an argument of another kind than the expected one, and what to do instead."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import funcnet
from funcnet.constructors import Constructed
from funcnet.tree import describe

_MADE_BY = {
    "Layer": "a layer is made by a constructor, such as fn.linear(3)",
    "Loss": "a loss is made by a constructor, such as fn.cross_entropy()",
    "Optimizer": "an optimizer is made by a constructor, such as fn.adam(1e-3)",
}
_USES = {
    "Layer": "fn.jit(net) compiles it, and net.apply, net.vjp and net.init are its functions",
    "Loss": "fn.jit(loss) compiles it, and loss.apply and loss.vjp are its functions",
    "Optimizer": "fn.jit(optimizer) compiles it, and optimizer.update is its function",
}
_LOSSES = {
    "L1Loss": "mae",
    "NLLLoss": "nll",
    "MSELoss": "mse",
    "CTCLoss": "ctc",
    "BCELoss": "bce",
    "BCEWithLogitsLoss": "bce_with_logits",
    "KLDivLoss": "kl_div",
    "GaussianNLLLoss": "gaussian_nll",
    "PoissonNLLLoss": "poisson_nll",
    "SmoothL1Loss": "smooth_l1",
    "MultiLabelMarginLoss": "multilabel_margin",
    "MultiLabelSoftMarginLoss": "multilabel_soft_margin",
    "AdaptiveLogSoftmaxWithLoss": "adaptive_log_softmax",
}
"""The losses of torch.nn whose names are not plain in snake case."""


def hint_for(found: Any, where: str = "", wanted: str = "") -> str:
    """What ``found`` is, and what to write in its place.

    Args:
        found: the argument.
        where: the path of what it was given to, such as "serial['0']".
        wanted: "Layer", "Loss" or "Optimizer", if one is expected; else a function is.

    >>> hint_for(torch.nn.Linear(3, 2), "serial['0']", "Layer")
    'a torch.nn.Linear; use fn.linear, or make a layer of it by fn.interop.from_module'
    >>> hint_for(funcnet.relu, "serial['0']", "Layer")
    'the function relu; call it, as in fn.relu(...)'
    """
    parent = where.partition("[")[0].partition(":")[0]
    if isinstance(found, Constructed):
        return f"{_a_name(type(found).__name__)}, {found!r}{_of_ours(found, parent, wanted)}"
    if isinstance(found, type):
        return f"the class {_class_name(found)}{_of_torch(found, wanted)}"
    if isinstance(found, (torch.nn.Module, torch.optim.Optimizer)):
        return f"a {_class_name(type(found))}{_of_torch(type(found), wanted)}"
    if found is None:
        return "None; does the function that makes it return it?" if wanted else "None"
    if isinstance(found, (list, tuple, Mapping)) and (wanted == "Layer" or _of_all(found, "Layer")):
        return _several(found, parent)
    if isinstance(found, list) and _of_all(found, "Optimizer"):
        return "a list of optimizers; make one of them by fn.chain(*optimizers)"
    if isinstance(found, (Tensor, list, tuple, Mapping)):
        return describe(found)
    if callable(found):
        return _function(found, wanted)
    made_by = f"; {_MADE_BY[wanted]}" if wanted else ""
    return f"{describe(found)}{made_by}"


def _of_ours(found: Any, parent: str, wanted: str) -> str:
    if not wanted:
        return f"; {_USES[type(found).__name__]}"
    if parent in ("train_step", "init_train_state", "value_and_grad", "evaluate"):
        return "; are the arguments in another order?"
    if type(found).__name__ == "Loss" and wanted == "Layer":
        return "; a loss stands beside the model, as in fn.train_step(model, loss, optimizer)"
    return ""


def _class_name(kind: type) -> str:
    module = kind.__module__
    for public in ("torch.nn", "torch.optim"):
        if module.startswith(f"{public}.") and hasattr(getattr(torch, public[6:]), kind.__name__):
            return f"{public}.{kind.__name__}"
    return kind.__name__


def _of_torch(kind: type, wanted: str) -> str:
    """What to use in the place of a class of torch's."""
    if issubclass(kind, torch.optim.Optimizer):
        name = kind.__name__.lower()
        return f"; use fn.{name}" if hasattr(funcnet, name) else f"; {_MADE_BY['Optimizer']}"
    if not issubclass(kind, torch.nn.Module):
        return _made_by(kind.__name__ if issubclass(kind, Constructed) else wanted)
    name = funcnet.interop.classes.NAMES.get(kind.__name__, _snake(kind.__name__))
    if kind.__module__.startswith("torch.nn.") and hasattr(funcnet, name):
        if wanted == "Layer" and _made_of(getattr(funcnet, name)) == "Loss":
            return f"; as a loss use fn.{name}, in fn.train_step(model, loss, optimizer)"
        return f"; use fn.{name}{', or ' + _FROM_MODULE if wanted != 'Loss' else ''}"
    if kind.__name__ in ("Sequential", "ModuleList"):
        return f"; use fn.serial of layers, or {_FROM_MODULE}"
    return f"; {_FROM_MODULE}" if wanted != "Loss" else _made_by(wanted)


_FROM_MODULE = "make a layer of it by fn.interop.from_module"


def _made_by(wanted: str) -> str:
    return f"; {_MADE_BY[wanted]}" if wanted else ""


def _snake(name: str) -> str:
    """``cross_entropy`` for CrossEntropyLoss."""
    if name in _LOSSES:
        return _LOSSES[name]
    name = name.removesuffix("Loss")
    return "".join([f"_{c.lower()}" if c.isupper() else c for c in name]).lstrip("_")


def _of_all(found: Any, kind: str) -> bool:
    parts = found.values() if isinstance(found, Mapping) else found
    kinds = [isinstance(each, Constructed) and type(each).__name__ == kind for each in parts]
    return bool(kinds) and all(kinds)


def _several(found: Any, parent: str) -> str:
    if isinstance(found, tuple) and len(found) == 3 and all([callable(each) for each in found]):
        return "a tuple of three functions; make it a layer by fn.Layer(init, apply, vjp)"
    kind = "dict" if isinstance(found, Mapping) else type(found).__name__
    several = parent in ("serial", "parallel", "branch")
    stars = "**" if kind == "dict" else "*"
    parts = found.values() if kind == "dict" else found
    if not all([isinstance(each, (Constructed, torch.nn.Module)) for each in parts]):
        return f"{describe(found) if kind != 'list' else 'a list'}; {_MADE_BY['Layer']}"
    call = f"{parent if several else 'fn.serial'}({stars}layers)"
    return f"a {kind} of layers; " + (f"write {call}" if several else f"make one of them by {call}")


def _function(found: Callable[..., Any], wanted: str) -> str:
    module, name = getattr(found, "__module__", "") or "", getattr(found, "__name__", "")
    if not name:
        return f"{_thing(type(found).__name__)}{_made_by(wanted)}"
    called = f"the function {name}" if name != "<lambda>" else "a lambda"
    made = _made_of(found)
    if module.startswith("funcnet.") and made:
        # Of another kind than the expected one, calling it does not help.
        own = getattr(funcnet, name, None) is found
        call = f"call it, as in {'fn.' if own else ''}{name}(...)"
        return f"{called}; {call}" if made == wanted else f"{called}, which makes {_a_name(made)}"
    if module.startswith("torch") or type(found).__name__ == "builtin_function_or_method":
        if wanted == "Layer" and _made_of(getattr(funcnet, name, None)) == wanted:
            return f"{called} of torch; use fn.{name}()"
        theirs = {"mse_loss": "mse", "l1_loss": "mae", "nll_loss": "nll"}
        loss = theirs.get(name, name.removesuffix("_loss"))
        if wanted == "Loss" and _made_of(getattr(funcnet, loss, None)) == wanted:
            return f"{called} of torch; use fn.{loss}()"
    if wanted == "Layer":
        return (
            f"{called}; call it if it makes a layer, or make a layer of a function of x by "
            "fn.elementwise, or fn.interop.autodiff"
        )
    return f"{called}; call it if it makes {_a_name(wanted)}" if wanted else called


def _made_of(found: Any) -> str:
    """The kind that a constructor makes, by its annotations; "" for another function."""
    annotations = getattr(found, "__annotations__", {})
    made = annotations.get("return")
    name = getattr(made, "__name__", made)
    return name if inspect.isroutine(found) and name in _MADE_BY else ""


def _a_name(kind: str) -> str:
    return f"an {kind}" if kind == "Optimizer" else f"a {kind}"


def _thing(name: str) -> str:
    return f"an {name}" if name[0] in "AEIOUaeiou" else f"a {name}"
