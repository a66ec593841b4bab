"""`from_module`: an ``nn.Module`` as a layer with its params and state."""

from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from funcnet.combinators.combine import combine
from funcnet.combinators.freeze import freeze
from funcnet.combinators.serial import serial_backward, serial_forward
from funcnet.combinators.tie import tie
from funcnet.combinators.weight_norm import spectral_norm, weight_norm
from funcnet.core import Layer, Params, join_paths
from funcnet.errors import require
from funcnet.interop.classes import MAY_ALIAS, class_of, layer_for
from funcnet.interop.forwards import CONSTANTS, Builder, Converted, with_leaves
from funcnet.interop.graph import graph
from funcnet.interop.layer_module import LayerModule
from funcnet.interop.leaf_layers import constants, kept, kept_module, leaves
from funcnet.interop.module_facts import (
    PARAMETRIZED,
    Unparametrized,
    in_order,
    inputs_of,
    is_abstract,
    own_tensors,
    repeats_state,
    saved_buffers,
    snake_case,
    tensor_at,
    what_it_has,
)
from funcnet.interop.state_dicts import FROZEN
from funcnet.interop.tracing import Refused, trace
from funcnet.interop.unknown_modules import unknown_module


def from_module(
    module: nn.Module,
    *,
    inputs: tuple[str, ...] | None = None,
    unknown: Literal["refuse", "autodiff"] = "refuse",
) -> tuple[Layer, Params, Params]:
    """An ``nn.Module`` as a layer, and the params and state that the module has now.

    The layer gives what the module gives, and its pullback what autograd gives, to rounding. A
    module of a class of torch.nn becomes the layer of its name, a Sequential a `funcnet.serial`.
    The forward of any other class is traced with torch.fx: it may call modules and the functions of
    torch in any order, add, multiply, concatenate, reshape, index, and read sizes.

    Args:
        module: not changed. Its submodules must all be in one mode, train or eval. The layer's
            mode is the argument ``train`` of each call, whatever the module's is.
        inputs: the names of forward's arguments that are x: one, or those that are the parts of
            a tuple x. The others have their default values. Default those without a default.
        unknown: what to do with a module that has no layer and cannot be traced. "refuse" raises;
            "autodiff" makes a layer of it by `autodiff`: autograd computes its pullback, and
            random numbers in it are torch's, of a seed from the layer's key, in eager mode alone.

    Returns:
        ``(layer, params, state)``. Params and state are copies; their dotted paths are the keys of
        ``module.state_dict()``, so `from_state_dict` loads other ones, and `to_state_dict` gives
        what the module loads. Parameters with ``requires_grad=False`` are in ``state["frozen"]``,
        as `funcnet.freeze` has them, and so are those that forward does not use. Tied parameters
        are one, by `funcnet.tie`, under the first of their names; ``init`` of the layer makes new
        params, but for those that forward reads itself, which start as they are in the module.

    Raises:
        ValueError: it names all that cannot be converted, each with its path, its class and
            why: a class without a layer, a hook, a parametrization but weight_norm and
            spectral_norm, forward's control flow by values, in-place operations on inputs,
            parameters or buffers, modules with running statistics at several places, submodules in
            different modes.

    >>> import torch
    >>> import funcnet as fn
    >>> class Block(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.body = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    ...     def forward(self, x):
    ...         return torch.cat([x, self.body(x)], 1)
    >>> layer, params, state = from_module(Block())
    >>> layer, list(fn.tree.to_dotted(params))
    (block(body=serial(linear(4), relu())), ['body.0.weight', 'body.0.bias'])
    >>> layer.apply(params, torch.ones(2, 4))[0].shape
    torch.Size([2, 8])
    >>> from_module(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.CTCLoss()))
    Traceback (most recent call last):
    ...
    ValueError: from_module: cannot convert 1 module:
      '1' (CTCLoss): torch.nn's CTCLoss has no layer
    """
    wrong = f"from_module: expects an nn.Module, got {type(module).__name__}"
    require(isinstance(module, nn.Module), wrong, TypeError)
    known = unknown in ("refuse", "autodiff")
    require(known, f"from_module: unknown must be 'refuse' or 'autodiff', got {unknown!r}")
    _check_modes(module)
    work = _Conversion(unknown == "autodiff")
    made = work.convert(module, "", None if inputs is None else (tuple(inputs), {}))
    if made.mutates:
        work.fault("", module, "changes its input in place")
    if work.faults:
        number = "1 module" if len(work.faults) == 1 else f"{len(work.faults)} modules"
        lines = "".join([f"\n  {path!r} ({kind}): {why}" for path, kind, why in work.faults])
        raise ValueError(f"from_module: cannot convert {number}:{lines}")
    return work.finished(made.layer)


def _check_modes(module: nn.Module) -> None:
    others = [path for path, each in module.named_modules() if each.training != module.training]
    mode = "train" if module.training else "eval"
    wrong = f"from_module: the module is in {mode} mode, and {others} are not"
    require(not others, f"{wrong}; call module.train() or module.eval()")


class _Entry(NamedTuple):
    """A tensor of the module: its key, and where the layer has it."""

    key: str
    kind: str
    path: tuple[str, ...]
    tensor: Tensor
    is_used: bool
    is_alias: bool


_NOTHING = Converted(Layer(lambda key, x: ({}, {}), lambda *args: None, lambda *args: None))  # type: ignore[arg-type]
"""What stands for a module that cannot be converted, until all are found."""


class _Conversion:
    """Converts a module and all below it, and collects its tensors and what is wrong."""

    def __init__(self, by_autograd: bool) -> None:
        self.by_autograd = by_autograd
        self.faults: list[tuple[str, str, str]] = []
        self.entries: list[_Entry] = []

    def fault(self, path: str, module: nn.Module, why: str) -> Converted:
        """Note what cannot be converted."""
        found = (path, type(module).__name__, why)
        if found not in self.faults:
            self.faults.append(found)
        return _NOTHING

    def register(self, module: nn.Module, path: str, used: bool = True, own: bool = False) -> None:
        """Note the tensors of a module, or of all modules below it."""
        for name, parameter in module.named_parameters(recurse=not own, remove_duplicate=False):
            self._enter(join_paths(path, name), "params", parameter, used)
        for key, buffer in saved_buffers(module, own).items():
            self._enter(join_paths(path, key), "state", buffer, used)

    def _enter(
        self, key: str, kind: str, tensor: Tensor, used: bool = True, alias: bool = False
    ) -> None:
        self.entries.append(_Entry(key, kind, tuple(key.split(".")), tensor, used, alias))

    def convert(self, module: nn.Module, path: str, call: Any) -> Converted:
        """The layer of a module at a path, for a call with these options."""
        number, before = len(self.faults), len(self.entries)
        try:
            made = self._converted(module, path, call)
        except Refused as error:
            made = self.fault(path, module, str(error))
        if self.by_autograd and len(self.faults) > number:
            del self.faults[number:], self.entries[before:]
            return self._by_autograd(module, path, call)
        return made

    def _converted(self, module: nn.Module, path: str, call: Any) -> Converted:
        if why := what_it_has(module):
            return self.fault(path, module, why)
        if isinstance(module, LayerModule):
            return self._layer_module(module, path)
        if hasattr(module, "parametrizations"):
            return self._parametrized(module, path, call)
        if class_of(module) is not None:
            return self._known(module, path, call)
        if type(module).forward is nn.Sequential.forward and not repeats_state(module):
            return self._sequential(module, path)
        if is_abstract(module):
            return self.fault(path, module, f"torch.nn's {type(module).__name__} has no layer")
        return self._traced(module, path, call)

    def _by_autograd(self, module: nn.Module, path: str, call: Any) -> Converted:
        self.register(module, path)
        parts, fixed = call if isinstance(call, tuple) else (None, call or {})
        return Converted(unknown_module(module, parts, fixed))

    def _known(self, module: nn.Module, path: str, call: Any) -> Converted:
        kind = str(class_of(module))
        options = call if isinstance(call, dict) else {}
        try:
            layer = layer_for(module, options)
        except (ValueError, TypeError) as error:
            return self.fault(path, module, str(error))
        self.register(module, path)
        in_place = bool(getattr(module, "inplace", False))
        return Converted(layer, in_place or kind in MAY_ALIAS, in_place)

    def _layer_module(self, module: LayerModule, path: str) -> Converted:
        told, parents = module._funcnet, tuple(path.split(".")) if path else ()
        places = zip(told.keys, told.kinds, told.paths, module.tensors(), strict=True)
        for key, kind, where, tensor in places:
            entry = join_paths(path, key), kind, (*parents, *where), tensor, True, False
            self.entries.append(_Entry(*entry))
        return Converted(told.layer)

    def _parametrized(self, module: Any, path: str, call: Any) -> Converted:
        """weight_norm and spectral_norm, whose params have the same paths here."""
        plain = next(kind for kind in type(module).__mro__ if kind.__name__ in PARAMETRIZED)
        layer = layer_for(Unparametrized(module, plain), call if isinstance(call, dict) else {})
        for name, parts in module.parametrizations.items():
            kinds = [type(part).__name__ for part in parts]
            if kinds == ["_WeightNorm"]:
                layer = weight_norm(layer, name, parts[0].dim)
            elif kinds == ["_SpectralNorm"]:
                part = parts[0]
                layer = spectral_norm(layer, name, part.n_power_iterations, part.eps, part.dim)
            else:
                return self.fault(path, module, f"has the parametrization {', '.join(kinds)}")
        self.register(module, path)
        return Converted(layer, False)

    def _sequential(self, module: nn.Module, path: str) -> Converted:
        made = {
            name: self.convert(child, join_paths(path, name), None)
            for name, child in module._modules.items()
            if child is not None
        }
        may_alias, mutates = True, False
        for each in made.values():
            mutates = mutates or (may_alias and each.mutates)
            may_alias = may_alias and each.may_alias
        children = {name: each.layer for name, each in made.items()}
        layer = combine("serial", children, serial_forward, serial_backward)
        return Converted(layer, may_alias, mutates)

    def _traced(self, module: nn.Module, path: str, call: Any) -> Converted:
        parts, fixed = inputs_of(module, call)
        found: dict[str, tuple[Any, Converted]] = {}
        aliases: dict[str, str] = {}

        def child(target: str, options: Any) -> Converted:
            below = module.get_submodule(target)
            if target not in found:
                found[target] = (options, self.convert(below, join_paths(path, target), options))
            same = found[target][0] == options
            require(same, f"calls {target!r} with different options: {found[target][0]}, {options}")
            return found[target][1]

        def leaf(target: str) -> str | None:
            owner, _, name = target.rpartition(".")
            holder = module.get_submodule(owner)
            if name in holder._non_persistent_buffers_set:
                return None
            wrong = f"reads the buffer {target!r} of another module"
            require(not owner or name in holder._parameters, wrong)
            known = target.replace(".", ":")
            if known not in aliases:
                aliases[known] = target
                kind = "params" if name in holder._parameters else "state"
                tensor = getattr(holder, name)
                self._enter(join_paths(path, known), kind, tensor, alias=bool(owner))
            return known

        builders, programs = [], []
        for train in (False, True):
            traced, tracer = trace(module, fixed, train)
            builder = Builder(module, parts, child, leaf)
            programs.append(builder.build(traced, tracer, train))
            builders.append(builder)
            for why in builder.faults:
                self.fault(path, module, why)
        own = tuple(aliases)
        inside = {name: tensor_at(module, target) for name, target in aliases.items()}
        children: dict[Any, Layer] = {name: made.layer for name, (_, made) in found.items()}
        for builder in builders:
            children.update(builder.layers)
        made_inside = self._constants(builders, children)
        unused = self._unused(module, path, set(found), set(aliases))
        if own:
            split = [
                {name: leaf for name, leaf in inside.items() if isinstance(leaf, nn.Parameter) is p}
                for p in (True, False)
            ]
            children[own] = leaves(*split)
        children.update(unused)
        whole = [
            with_leaves(program, own, has, tuple(unused))
            for program, has in zip(programs, made_inside, strict=True)
        ]
        name = snake_case(type(module).__name__)
        ordered = in_order(children, module)
        layer = graph(ordered, whole[1], whole[0], name)
        return Converted(layer, any([builder.may_alias for builder in builders]))

    def _constants(self, builders: list[Builder], children: dict[Any, Layer]) -> list[str]:
        """A child for the tensors that are made in forward, one for each mode if they differ."""
        names = []
        for builder, name in zip(builders, (CONSTANTS, f"{CONSTANTS} train"), strict=True):
            names.append(name if builder.constants else "")
            if builder.constants:
                children[name] = constants(tuple(builder.constants))
        return names

    def _unused(
        self, module: nn.Module, path: str, called: set[str], read: set[str]
    ) -> dict[Any, Layer]:
        """Layers of the tensors that forward does not use, so that they are not lost."""
        shared = {id(module.get_submodule(target)) for target in called}
        found: dict[Any, Layer] = {}

        def look(below: nn.Module, prefix: str) -> None:
            for name, child in below._modules.items():
                target = join_paths(prefix, name)
                if child is None or target in called or id(child) in shared:
                    continue
                if any([each.startswith(f"{target}.") for each in called]):
                    look(child, target)
                elif any(True for _ in child.parameters()) or saved_buffers(child, False):
                    self.register(child, join_paths(path, target), used=False)
                    found[target] = kept_module(child, own_tensors)
            own: dict[str, Any] = dict(below.named_parameters(recurse=False))
            own = {n: p for n, p in own.items() if n not in read}
            state = {n: b for n, b in saved_buffers(below, True).items() if n not in read}
            if prefix and (own or state):
                self.fault(join_paths(path, prefix), below, "is not called, and parts of it are")
            elif own or state:
                for name, leaf in own.items():
                    self._enter(join_paths(path, name), "params", leaf, used=False)
                for name, leaf in state.items():
                    self._enter(join_paths(path, name), "state", leaf, used=False)
                found[(*own, *state)] = kept(own, state)

        look(module, "")
        return found

    def finished(self, layer: Layer) -> tuple[Layer, Params, Params]:
        """The layer with tied and frozen leaves, and its params and state."""
        by_tensor: dict[int, list[_Entry]] = {}
        for entry in self.entries:
            by_tensor.setdefault(id(entry.tensor), []).append(entry)
        ties: dict[str, str] = {}
        frozen: list[str] = []
        whole: dict[str, dict[str, Any]] = {"params": {}, "state": {}}
        for entries in by_tensor.values():
            first, *others = sorted(entries, key=lambda entry: entry.is_alias)
            keys = [each.key for each in entries]
            stateful = others and first.kind != "params"
            what = f"from_module: {keys} are one buffer"
            require(not stateful, f"{what}: a module with state can be at one place alone")
            ties.update({each.key: first.key for each in others})
            learns = first.tensor.requires_grad and any([each.is_used for each in entries])
            path, kind = first.path, "state" if first.kind != "params" else "params"
            if kind == "params" and not learns:
                frozen.append(first.key)
                path, kind = (FROZEN, *path), "state"
            node = whole[kind]
            for name in path[:-1]:
                node = node.setdefault(name, {})
            node[path[-1]] = first.tensor.detach().clone()
        if ties:
            layer = tie(layer, ties)
        if frozen:
            layer = freeze(layer, frozen)
        return layer, whole["params"], whole["state"]
