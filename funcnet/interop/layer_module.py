"""`to_module`: a layer as an ``nn.Module``, for models and training loops of PyTorch."""

from collections.abc import Iterator, Sequence
from typing import Any

import optree
import torch
from torch import Tensor, nn

from funcnet import runtime, tree
from funcnet.checks import check_kind
from funcnet.core import EMPTY, Layer, Params, Tree
from funcnet.errors import require
from funcnet.interop.state_dicts import leaves_of


def to_module(layer: Layer, params: Params, state: Params = EMPTY) -> nn.Module:
    """An ``nn.Module`` whose forward is a layer's, and whose backward is the layer's pullback.

    Args:
        layer: any layer.
        params, state: of the layer. They are copied: the module owns its parameters and buffers.

    The module:

    - has the parameters and buffers of `to_state_dict`, so that ``state_dict()`` has the dotted
      paths as keys. What `funcnet.freeze` keeps are parameters with ``requires_grad=False``.
    - takes x as its argument; a tuple x as several arguments, and a dict x by name, too.
    - runs the layer with ``train=self.training``. The new state goes into the buffers.
    - draws the key of a call in training mode from torch's generator for the device, as
      ``nn.Dropout`` draws: ``torch.manual_seed`` decides it.
    - backward runs the layer's pullback, of the residuals that ``layer.vjp`` left. With
      ``create_graph=True`` it is computed again under autograd, so that it has a derivative
      itself.
    - can be copied, be part of other modules, and run under ``torch.func``, ``torch.compile``
      (which does not look into it) and DistributedDataParallel. It cannot be pickled: a layer is
      made of functions. Save its ``state_dict()``.

    `from_module` gives the layer back, with the parameters and buffers of the time.

    Raises:
        TypeError: what is not a layer.
        ValueError: a name among the paths is that of an attribute of ``nn.Module``, such as
            "forward".

    >>> import funcnet as fn
    >>> net = fn.serial(fn.linear(3), fn.tanh())
    >>> params, state = net.init(fn.key(0), torch.ones(4, 2))
    >>> model = torch.nn.Sequential(fn.interop.to_module(net, params, state), torch.nn.ReLU())
    >>> model(torch.ones(4, 2)).sum().backward()
    >>> {key: tuple(leaf.grad.shape) for key, leaf in model.named_parameters()}
    {'0.0.weight': (3, 2), '0.0.bias': (3,)}
    """
    check_kind("to_module", layer, Layer)
    return LayerModule(layer, params, state)


class _Constant:
    """What copies of a module share: its layer, and where the layer has each of its tensors."""

    def __init__(self, layer: Layer, leaves: Sequence[Any]) -> None:
        self.layer = layer
        self.kinds = [leaf.kind for leaf in leaves]
        self.keys = [leaf.key for leaf in leaves]
        self.paths = [leaf.path for leaf in leaves]

    def __deepcopy__(self, memo: Any) -> "_Constant":
        return self

    def __reduce__(self) -> Any:
        what = f"the module of {self.layer.name} cannot be pickled: a layer is made of functions"
        raise TypeError(f"to_module: {what}; save its state_dict()")


class LayerModule(nn.Module):
    """What `to_module` makes."""

    def __init__(self, layer: Layer, params: Params, state: Params) -> None:
        super().__init__()
        leaves = leaves_of(params, state)
        self._funcnet = _Constant(layer, leaves)
        for leaf in leaves:
            _register(self, leaf.key, leaf.kind, leaf.tensor.detach().clone())

    def extra_repr(self) -> str:
        return repr(self._funcnet.layer)

    def tensors(self) -> list[Tensor]:
        """The parameters and buffers, in the order of `to_state_dict`."""
        return [_owner(self, key)[key.rpartition(".")[2]] for key in self._funcnet.keys]

    def params_and_state(self) -> tuple[Params, Params]:
        """The params and state of the layer, which are the module's own tensors."""
        return _nested(self._funcnet, self.tensors())

    @runtime.left_alone_by_compile
    def forward(self, *args: Tree, **kwargs: Tree) -> Tree:
        layer, tensors = self._funcnet.layer, self.tensors()
        x = _input(layer.name, args, kwargs)
        inputs, treedef = optree.tree_flatten(x)
        wrong = f"{layer.name}: expects tensors, got {tree.describe(x)}"
        require(all([isinstance(leaf, Tensor) for leaf in inputs]), wrong, TypeError)
        key = None
        if self.training and layer.takes_key:
            device = inputs[0].device if inputs else None
            key = torch.randint(2**32, (2,), dtype=torch.int64, device=device)
        # Forward mode has no pullback: it differentiates the layer's formulas.
        learns = not runtime.is_forward_mode() and (torch.is_grad_enabled() or runtime.is_batched())
        learns = learns and runtime.is_differentiated(*tensors, *inputs)
        call = _Call(self._funcnet, treedef, len(tensors), key is not None, self.training)
        leaves = [*tensors, *inputs] if key is None else [*tensors, *inputs, key]
        if not learns:
            if not runtime.is_forward_mode():
                leaves = [leaf.detach() for leaf in leaves]
            y, new_state = call.apply(leaves)
        else:
            outputs = _LayerFunction.apply(call, *leaves)
            y, new_state = call.results(leaves, outputs)
        self._update(leaves, tensors, new_state)
        return y

    def _update(self, given: list[Tensor], tensors: list[Tensor], new_state: Params) -> None:
        """Write a new state into the buffers, those of it that are not what was given."""
        told = self._funcnet
        with torch.no_grad():
            for kind, path, old, buffer in zip(
                told.kinds, told.paths, given, tensors, strict=False
            ):
                if kind != "params":
                    new = _at(path, new_state)
                    if new is not old:
                        buffer.copy_(new)


def _register(module: nn.Module, key: str, kind: str, value: Tensor) -> None:
    """Register a tensor at a dotted path; modules in between are made where they are missing."""
    *parents, name = key.split(".")
    node = module
    for parent in parents:
        below = node._modules.get(parent)
        if below is None:
            _check_name(node, key, parent)
            below = nn.Module()
            node.add_module(parent, below)
        node = below
    _check_name(node, key, name)
    if kind == "state":
        node.register_buffer(name, value)
    else:
        learns = kind == "params" and value.is_floating_point()
        node.register_parameter(name, nn.Parameter(value, requires_grad=learns))


def _check_name(node: nn.Module, key: str, name: str) -> None:
    taken = hasattr(node, name) or not name
    require(not taken, f"to_module: {key!r}: nn.Module has an attribute {name!r}; rename the layer")


def _owner(module: nn.Module, key: str) -> dict[str, Any]:
    """The parameters or buffers among which a module has the tensor of a dotted path."""
    *parents, name = key.split(".")
    for parent in parents:
        module = module._modules[parent]  # type: ignore[assignment]
    return module._parameters if name in module._parameters else module._buffers


def _input(name: str, args: tuple[Tree, ...], kwargs: dict[str, Tree]) -> Tree:
    """The x of a layer: one argument, a tuple of several, or a dict of those by name."""
    both = f"{name}: expects x by position or its parts by name, not both or nothing"
    require(bool(args) != bool(kwargs), both, TypeError)
    return kwargs or (args[0] if len(args) == 1 else args)


def _at(path: tuple[str, ...], node: Any) -> Any:
    """What is at a path of a nested dict."""
    for name in path:
        node = node[name]
    return node


def _nested(told: _Constant, tensors: Sequence[Tensor]) -> tuple[Params, Params]:
    """Params and state of tensors in the order of `to_state_dict`."""
    whole: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for kind, path, tensor in zip(told.kinds, told.paths, tensors, strict=True):
        node = whole[kind != "params"]
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = tensor
    return whole


class _Call:
    """One forward pass of a module: a function of a flat list of tensors.

    The list has the module's tensors, then those of x, and then the key, if there is one.
    """

    def __init__(
        self, told: _Constant, x_treedef: Any, number: int, has_key: bool, train: bool
    ) -> None:
        self.told, self.x_treedef, self.number = told, x_treedef, number
        self.has_key, self.train = has_key, train

    def arguments(self, leaves: Sequence[Tensor]) -> tuple[Any, ...]:
        """Params, x, state and key."""
        params, state = _nested(self.told, leaves[: self.number])
        stop = len(leaves) - self.has_key
        x = self.x_treedef.unflatten(leaves[self.number : stop])
        return params, x, state, leaves[-1] if self.has_key else None

    def apply(self, leaves: Sequence[Tensor]) -> tuple[Tree, Params]:
        """y and the new state."""
        params, x, state, key = self.arguments(leaves)
        return self.told.layer.apply(params, x, state, key=key, train=self.train)

    def vjp(self, leaves: Sequence[Tensor]) -> tuple[Tree, Any, Params]:
        """y, the pullback and the new state."""
        params, x, state, key = self.arguments(leaves)
        return self.told.layer.vjp(params, x, state, key=key, train=self.train)

    def forward(self, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """y, what the pullback keeps and the new state, less what is among ``leaves`` already."""
        results, self.treedef = tree.flatten(self.vjp(leaves))
        known = {id(leaf): ("given", place) for place, leaf in enumerate(leaves)}
        outputs: list[Tensor] = []
        self.places: list[tuple[str, int]] = []
        self.y_number = self.treedef.child(0).num_leaves
        for index, leaf in enumerate(results):
            if id(leaf) not in known or index < self.y_number:
                known[id(leaf)] = ("made", len(outputs))
                outputs.append(leaf)
            self.places.append(known[id(leaf)])
        state = self.restored(range(len(leaves)), [None] * len(outputs))[2]
        self.changed = {
            place
            for place, (kind, path) in enumerate(zip(self.told.kinds, self.told.paths, strict=True))
            if kind != "params" and _at(path, state) is None
        }
        return tuple(outputs)

    def results(self, leaves: Sequence[Tensor], outputs: Sequence[Tensor]) -> tuple[Tree, Params]:
        """y and the new state, of what the function returned."""
        y, _, state = self.restored(leaves, outputs)
        return y, state

    def restored(self, leaves: Sequence[Any], outputs: Sequence[Any]) -> tuple[Any, ...]:
        """y, the pullback and the new state, as ``vjp`` gave them."""
        found = [(leaves if kind == "given" else outputs)[place] for kind, place in self.places]
        return self.treedef.unflatten(found)

    def cotangents(self, dparams: Tree, dx: Tree) -> Iterator[Tensor | None]:
        """Of each leaf; None for state, integers and the key."""
        for kind, path in zip(self.told.kinds, self.told.paths, strict=True):
            yield _at(path, dparams) if kind == "params" and dparams is not None else None
        number = self.x_treedef.num_leaves
        yield from [None] * number if dx is None else self.x_treedef.flatten_up_to(dx)
        yield from [None] * self.has_key


class _LayerFunction(torch.autograd.Function):
    """The forward pass of a layer, whose backward pass is the layer's pullback."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: _Call, *leaves: Tensor) -> tuple[Tensor, ...]:
        return call.forward([leaf.detach() for leaf in leaves])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        call, *leaves = inputs
        ctx.call, ctx.number = call, len(leaves)
        # The module writes new state to its buffers.
        kept = [each.clone() if i in call.changed else each for i, each in enumerate(leaves)]
        ctx.save_for_backward(*kept, *output)
        rest = output[call.y_number :]
        constants = [leaf for leaf in output[: call.y_number] if not leaf.is_floating_point()]
        ctx.mark_non_differentiable(*constants, *rest)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> Any:
        call, saved = ctx.call, ctx.saved_tensors
        leaves, outputs = saved[: ctx.number], saved[ctx.number :]
        if torch.is_grad_enabled():  # create_graph: a function of the leaves, by autograd
            y, pullback, _ = call.vjp(leaves)
        else:
            # Fused kernels are for tensors that need no gradient.
            y, pullback, _ = call.restored([leaf.detach() for leaf in leaves], outputs)
        given = dys[: call.y_number]
        dy = tree.flatten(y)[1].unflatten(
            [
                None
                if not leaf.is_floating_point()
                else torch.zeros_like(leaf)
                if cotangent is None
                else cotangent
                for leaf, cotangent in zip(tree.leaves(y), given, strict=True)
            ]
        )
        wants = ctx.needs_input_grad[1:]
        of_params, of_x = any(wants[: call.number]), any(wants[call.number :])
        dparams, dx = pullback(dy, params=of_params, x=of_x)
        return None, *call.cotangents(dparams, dx)
