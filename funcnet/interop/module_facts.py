"""What `from_module` asks of an ``nn.Module``: what it has, what its forward takes, its order."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from funcnet.core import Layer, join_paths
from funcnet.interop.tracing import Refused, arguments_of

PARAMETRIZED = {
    *("Linear", "Bilinear", "Embedding", "EmbeddingBag", "MultiheadAttention", "PReLU"),
    *(f"{name}{dims}d" for name in ("Conv", "ConvTranspose") for dims in (1, 2, 3)),
}
"""Classes that may have parametrizations here."""


class Unparametrized:
    """A module as one of the class that it had before it was parametrized."""

    def __new__(cls, module: nn.Module, kind: Any) -> Any:
        plain = kind.__new__(kind)
        plain.__dict__ = dict(module.__dict__)
        parameters = dict(module._parameters)
        for name in module.parametrizations:  # type: ignore[union-attr]
            parameters[name] = nn.Parameter(getattr(module, name).detach(), requires_grad=False)
        plain.__dict__["_parameters"] = parameters
        return plain


def what_it_has(module: nn.Module) -> str:
    """Hooks, which a layer does not have, and parameters without values."""
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if any([isinstance(each, (UninitializedParameter, UninitializedBuffer)) for each in tensors]):
        return "has no parameters yet; call it once"
    hooks = {
        "forward hook": (module._forward_hooks, module._forward_pre_hooks),
        "backward hook": (module._backward_hooks, module._backward_pre_hooks),
    }
    for name, found in hooks.items():
        for each in found:
            for hook in each.values():
                called = getattr(hook, "__qualname__", type(hook).__name__)
                return f"has a {name}, {called}, which a layer does not have"
    for name, parameter in module.named_parameters(recurse=False):
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            return f"has a hook on the gradient of {name}, which a layer does not have"
    return ""


def saved_buffers(module: nn.Module, own: bool) -> dict[str, Tensor]:
    """The buffers that are in the module's ``state_dict()``."""
    found: dict[str, Tensor] = {}
    for prefix, each in module.named_modules(remove_duplicate=False):
        if own and prefix:
            break
        drawn = "_random_samples" if isinstance(each, nn.Module) else ""
        for name, buffer in each._buffers.items():
            if buffer is not None and name not in (*each._non_persistent_buffers_set, drawn):
                found[join_paths(prefix, name)] = buffer
    return found


def own_tensors(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters and the saved buffers of a module itself."""
    return dict(module.named_parameters(recurse=False)), saved_buffers(module, True)


def repeats_state(module: nn.Module) -> bool:
    """Whether a module with running statistics is among the children twice."""
    children = [child for child in module._modules.values() if child is not None]
    stateful = [id(child) for child in children if saved_buffers(child, False)]
    return len(set(stateful)) < len(stateful)


def is_abstract(module: nn.Module) -> bool:
    """Whether a class of torch.nn has no layer, and no forward that could be traced."""
    return type(module).__module__.startswith("torch.nn.modules") and not isinstance(
        module, nn.Sequential
    )


def inputs_of(module: nn.Module, call: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The names of forward's arguments that are x or its parts, and the values of the others."""
    arguments = arguments_of(module)
    parts, fixed = call if isinstance(call, tuple) else (None, {})
    if parts is None:
        parts = tuple([name for name, each in arguments.items() if each.default is each.empty])
    unknown = [name for name in (*parts, *fixed) if name not in arguments]
    if unknown or not parts:
        raise Refused(f"its forward takes {list(arguments)}, not {unknown}")
    rest = {
        name: fixed.get(name, each.default) for name, each in arguments.items() if name not in parts
    }
    missing = [name for name, value in rest.items() if value is arguments[name].empty]
    if missing:
        raise Refused(f"its forward needs {missing}, which are not among the inputs {list(parts)}")
    return parts, rest


def tensor_at(module: nn.Module, target: str) -> Any:
    """The parameter or buffer at a dotted path."""
    owner, _, name = target.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def in_order(children: Mapping[Any, Layer], module: nn.Module) -> dict[Any, Layer]:
    """The children as they are in the module, after its own leaves."""
    paths = [path for path, _ in module.named_modules(remove_duplicate=False)]
    order = {path: place for place, path in enumerate(paths)}

    def place(child: Any) -> int:
        return -1 if isinstance(child, tuple) else order.get(child, len(order))

    return {child: children[child] for child in sorted(children, key=place)}


def snake_case(name: str) -> str:
    """The name of a class as that of a constructor.

    >>> snake_case("BasicBlock"), snake_case("ViT"), snake_case("GPT")
    ('basic_block', 'vi_t', 'gpt')
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
