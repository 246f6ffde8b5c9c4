"""What could be exchanged at a module, and what every kind of exchanged module says about itself."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from fused_ops.acceleration.exchange import ATTRIBUTE, Chain, Exchanged, exchanged_class, type_name
from fused_ops.acceleration.flow import Flow, Tail
from fused_ops.acceleration.layers import FROZEN_NORMS


@dataclass
class Plan:
    """What could be exchanged at one module, which then computes for all ``members``.

    Attributes:
        operation: name of the activation that the operator computes.
        tail: the addition that certainly follows.
        options: what else the operator has to do.
        declined: why nothing is exchanged.
        remark: what stays outside of the operator, and why.
        already: it was exchanged before.
    """

    family: type[Family]
    name: str
    module: nn.Module
    pattern: str = ""
    norm: nn.Module | None = None
    activation: nn.Module | None = None
    others: tuple[nn.Module | None, ...] = ()
    operation: str = "none"
    tail: Tail | None = None
    options: dict[str, bool] = field(default_factory=dict)
    declined: str = ""
    remark: str = ""
    already: bool = False

    @property
    def members(self) -> tuple[nn.Module | None, ...]:
        return (self.module, self.norm, self.activation, *self.others)

    @property
    def adds(self) -> bool:
        """Whether an addition joins the operator."""
        chain = self.module.__dict__.get(ATTRIBUTE)
        return self.tail is not None or (chain is not None and chain.tail is not None)

    @property
    def words(self) -> str:
        """What stands there, for the report."""
        return self.pattern + " -> + residual" * self.adds

    def mark_exchanged(self, chain: Chain) -> None:
        self.operation, self.already, self.remark = chain.activation, True, "exchanged before"

    def put_in(self, model: nn.Module, names: dict[int, str]) -> None:
        """Exchange the members; ``names`` of all modules by their id."""
        given = [module for module in self.members if module is not None]
        paths = [_path(names[id(module)]) for module in given]
        tail, holders = (), [path[:-1] for path in paths]
        if self.tail is not None:
            tail = tuple((_path(names[id(module)]), type(module)) for module in self.tail.modules)
            holders += [_path(names[id(self.tail.adder)]), *(path[:-1] for path, _ in tail)]
        # A convolution alone finds itself wherever it is moved to.
        alone = len(given) == 1 and self.tail is None
        common = len(paths[0]) if alone else 0
        while not alone and len({path[: common + 1] for path in holders}) == 1 and common < len(holders[0]):
            common += 1
        located = iter(path[common:] for path in paths)
        chain = Chain(
            model.get_submodule(".".join(paths[0][:common])),
            tuple(None if module is None else next(located) for module in self.members),
            self.operation,
            self.norm is not None and type_name(self.norm) in FROZEN_NORMS,
            None if self.tail is None else tuple((path[common:], kind) for path, kind in tail),
            self.options,
        )
        for role, module in enumerate(self.members):
            if module is not None:
                module.__class__ = exchanged_class(type(module), self.family.mixin(role, module), role)
                module.__dict__[ATTRIBUTE] = chain


def _path(name: str) -> tuple[str, ...]:
    return tuple(name.split(".")) if name else ()


class Family(Protocol):
    """Modules that are exchanged alike.

    Attributes:
        kind: what the rows of a report say.
        whole: names of classes that are exchanged as a whole, whatever is inside.
    """

    kind: str
    whole: Set[str] = frozenset()

    @staticmethod
    def plans(model: nn.Module, flow: Flow, claimed: set[int]) -> list[Plan]:
        """What there is in ``model``; adds the ids of the modules that it takes to ``claimed``."""

    @staticmethod
    def mixin(role: int, module: nn.Module) -> type[Exchanged]:
        """What the member in place ``role`` becomes."""

    @staticmethod
    def weigh(module: nn.Module, x: Tensor) -> tuple[int, int]:
        """Bytes of a call of the exchanged module: in separate passes, and fused."""
