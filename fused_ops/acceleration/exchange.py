"""How modules that one operator computes are exchanged in place, and set back.

Every exchanged module keeps its object and changes its class, to a subclass of its own whose ``forward``
computes a whole chain or hands its input through, or does its stock work: that is decided at every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fused_ops.core.hooks import all_hooked, is_hooked

# Attribute names from an ancestor to a module.
Path = tuple[str, ...]
# Attribute, outside of parameters, buffers and submodules, by which an exchanged module knows its chain.
ATTRIBUTE = "_fused_ops_chain"


def stock_type(module: nn.Module) -> type[nn.Module]:
    return module._stock if isinstance(module, Exchanged) else type(module)


def type_name(module: nn.Module) -> str:
    stock = stock_type(module)
    return f"{stock.__module__}.{stock.__qualname__}"


class Chain:
    """Modules that one operator computes, found from an ancestor that holds them all.

    Attributes:
        ancestor: the module that the paths begin at; None in a copy of a part that left it behind.
        paths: of the module that computes, the norm and the activation, and of an MLP its second layer and
            dropouts, as attribute names; None for what there isn't.
        activation: name of the activation that the operator computes.
        frozen: the norm has buffers where others have parameters, and never uses the batch's statistics.
        tail: paths and types of the modules that only scale the chain's result until something is added to
            it; None where nothing certainly is.
        options: what else the data flow says that the operator has to do, by name.
    """

    def __init__(
        self,
        ancestor: nn.Module | None,
        paths: tuple[Path | None, ...],
        activation: str,
        frozen: bool,
        tail: tuple[tuple[Path, type[nn.Module]], ...] | None,
        options: dict[str, bool],
    ) -> None:
        self.ancestor = ancestor
        self.paths = paths
        self.activation = activation
        self.frozen = frozen
        self.tail = tail
        self.options = options

    def __deepcopy__(self, memo: dict[int, Any]) -> Chain:
        # Whoever copies the ancestor has it in the memo by now. Whoever copies a part of the chain gets
        # modules that do what each says of itself, rather than a convolution that also normalises.
        given = (self.paths, self.activation, self.frozen, self.tail, self.options)
        return Chain(memo.get(id(self.ancestor)), *given)

    def _along(self, path: Path) -> list[nn.Module]:
        """The modules from below the ancestor to the end of ``path``; none if the end is not there."""
        module = self.ancestor
        found = [] if path else [module]
        for name in path:
            module = module._modules.get(name)
            if module is None:
                return []
            found.append(module)
        return found

    def members(self, unwatched: bool = False) -> tuple[nn.Module | None, ...] | None:
        """The modules of ``paths``; None unless every one is in its place and belongs here.

        With ``unwatched`` also None where somebody hooked into one, or into a module around some of them.
        """
        if self.ancestor is None:
            return None
        found: list[nn.Module | None] = []
        for path in self.paths:
            if path is None:
                found.append(None)
                continue
            modules = self._along(path)
            if not modules or getattr(modules[-1], ATTRIBUTE, None) is not self:
                return None
            if unwatched and any(is_hooked(module) for module in modules):
                return None
            found.append(modules[-1])
        return tuple(found)

    def awaits_addition(self) -> bool:
        """Whether the result may be a :class:`~fused_ops.acceleration.deferred.Deferred`."""
        if self.tail is None:
            return False
        for path, kind in self.tail:
            modules = self._along(path)
            if not modules or any(is_hooked(module) for module in modules):
                return False
            if type(modules[-1]) is not kind or "forward" in modules[-1].__dict__:
                return False
        return True


def active_members(caller: nn.Module, role: int) -> tuple[nn.Module | None, ...] | None:
    """The chain's modules where it runs fused; None where each of them does its stock work.

    Every module of a chain asks this at every call, and all get the same answer: it looks at nothing that one
    of them changes.
    """
    chain = getattr(caller, ATTRIBUTE, None)
    members = None if chain is None else chain.members(unwatched=True)
    if members is None or members[role] is not caller:
        return None
    if all_hooked():
        return None
    if any(isinstance(module, nn.Dropout) and module.training and module.p > 0.0 for module in members):
        return None
    if chain.frozen and torch.is_autocast_enabled(members[1].running_mean.device.type):
        # There torchvision's norm returns float32, whatever the convolution gave it.
        return None
    return members


def is_linked(module: nn.Module) -> bool:
    chain = getattr(module, ATTRIBUTE, None)
    members = None if chain is None else chain.members()
    return members is not None and members[module._role] is module


def _new_instance(stock: type[nn.Module], mixin: type[Exchanged], role: int) -> nn.Module:
    cls = exchanged_class(stock, mixin, role)
    return cls.__new__(cls)


class Exchanged:
    """Put before a module's own class, whose ``forward`` stays the way out."""

    _stock: type[nn.Module]
    _mixin: type[Exchanged]
    _role: int

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        # The class is made at run time, so that copy and pickle must make it again.
        return (_new_instance, (self._stock, self._mixin, self._role), *super().__reduce_ex__(protocol)[2:])


class HandsThrough(Exchanged):
    def forward(self, x: Tensor) -> Tensor:
        return x if active_members(self, self._role) is not None else super().forward(x)


@cache
def exchanged_class(stock: type[nn.Module], mixin: type[Exchanged], role: int) -> type[nn.Module]:
    # The stock class's module, since tracers tell by it which modules to leave whole.
    names = {"__module__": stock.__module__, "__doc__": stock.__doc__}
    body = {"_stock": stock, "_mixin": mixin, "_role": role, **names}
    return type(f"Accelerated{stock.__name__}", (mixin, stock), body)


def obstacle_to_whole(module: nn.Module) -> str:
    """Why a module that is exchanged as a whole cannot be, whatever is inside; empty if it can."""
    if "forward" in module.__dict__:
        return "has a forward of its own"
    return "has hooks" if is_hooked(module) else ""


def run_stock(modules: Sequence[nn.Module | None], x: Tensor) -> Tensor:
    """The stock work of a chain whose other modules hand through what they get."""
    for module in modules:
        x = x if module is None else module._stock.forward(module, x)
    return x


def take_out(module: nn.Module) -> None:
    if type(module) is exchanged_class(module._stock, module._mixin, module._role):
        module.__class__ = module._stock
    module.__dict__.pop(ATTRIBUTE, None)
