"""A layer of any ``nn.Module``: autograd computes its pullback."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from funcnet import tree
from funcnet.core import Applied, Key, Layer, Params, Tree
from funcnet.errors import require
from funcnet.interop.differentiated import Function, autodiff_of


def unknown_module(
    module: nn.Module, parts: tuple[str, ...] | None, fixed: Mapping[str, Any]
) -> Layer:
    """The layer of a module whose forward is called as it is, by `torch.func.functional_call`.

    Args:
        module: not changed, and not needed later.
        parts: the names of forward's arguments that are the parts of x; None for the first
            arguments in their order.
        fixed: other arguments of forward.

    With ``train=True`` random numbers are torch's, from a seed that the key gives; without a key
    it is an error if there are any.
    """
    shapes = {train: _without_data(module, train) for train in (False, True)}
    called = _Called(type(module).__name__, shapes, parts, fixed)
    function = Function(called, "stateful")
    params = tree.from_dotted({name: leaf.detach() for name, leaf in module.named_parameters()})
    state = tree.from_dotted(called.persistent(module))

    def init(key: Tensor, x: Tree) -> tuple[Params, Params]:
        device = tree.device_of(x)
        return tree.map(lambda leaf: leaf.to(device, copy=True), (params, state))

    return autodiff_of(function, init, False, type(module).__name__, takes_key=True)


def _without_data(module: nn.Module, train: bool) -> nn.Module:
    """A copy of a module whose parameters have no data, in a mode."""
    memo: dict[int, Any] = {
        id(each): nn.Parameter(torch.empty_like(each, device="meta"), each.requires_grad)
        for each in module.parameters()
    }
    return copy.deepcopy(module, memo).train(train)


class _Called:
    """The function ``(params, x, state, key, train) -> (y, state)`` of a module."""

    def __init__(
        self,
        name: str,
        modules: Mapping[bool, nn.Module],
        parts: tuple[str, ...] | None,
        fixed: Mapping[str, Any],
    ) -> None:
        self.name, self.modules, self.parts, self.fixed = name, modules, parts, fixed

    def persistent(self, module: nn.Module) -> dict[str, Tensor]:
        """The buffers that are in the module's ``state_dict()``."""
        return {
            name: leaf.detach()
            for name, leaf in module.named_buffers()
            if name in module.state_dict()
        }

    def __call__(self, params: Params, x: Tree, state: Params, key: Key, train: bool) -> Applied:
        module = self.modules[train]
        buffers = {name: leaf.clone() for name, leaf in tree.to_dotted(state).items()}
        args, kwargs = self._arguments(x)
        with _Seeded(self.name, key if train else None):
            leaves = {**tree.to_dotted(params), **buffers}
            y = torch.func.functional_call(module, leaves, args, kwargs)
        return _plain(y), tree.from_dotted(buffers)

    def _arguments(self, x: Tree) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.parts is None:
            return (x if type(x) is tuple else (x,)), dict(self.fixed)
        pieces = (x,) if len(self.parts) == 1 else x
        return (), {**dict(zip(self.parts, pieces, strict=True)), **self.fixed}


def _plain(y: Any) -> Tree:
    """A plain tuple in the place of a named one or a list."""
    if isinstance(y, (tuple, list)):
        return tuple([_plain(each) for each in y])
    return {name: _plain(each) for name, each in y.items()} if isinstance(y, Mapping) else y


class _Seeded:
    """A block in which torch's random numbers come from a key; afterwards the generator is as it
    was before.
    """

    def __init__(self, name: str, key: Key) -> None:
        self.name, self.key = name, key

    def __enter__(self) -> None:
        self.fork = torch.random.fork_rng(enabled=True)
        self.fork.__enter__()
        if self.key is not None:
            high, low = self.key.tolist()
            torch.manual_seed(high << 31 ^ low)
        self.before = torch.random.get_rng_state()

    def __exit__(self, kind: Any, error: Any, where: Any) -> None:
        drawn = not torch.equal(self.before, torch.random.get_rng_state())
        self.fork.__exit__(kind, error, where)
        what = f"{self.name}: draws random numbers, and has no key; pass key=fn.key(...)"
        require(kind is not None or self.key is not None or not drawn, what)
