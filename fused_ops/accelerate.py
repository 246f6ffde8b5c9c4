"""Fused operators inside any model: ``accelerate(model)`` puts them in, ``restore(model)`` takes them out.

What is exchanged keeps its place. A depthwise convolution, the norm and the activation after it stay the same
module objects with the same parameters, buffers and names; only their classes change, to subclasses of their
own: the convolution computes the whole chain in one operator, the other two hand their input through. So do
the modules of an MLP, whose first layer computes the norm before it and all that follows. A
squeeze-and-excitation module pools and scales by operators, and calls its own layers in between. So
optimizers, checkpoints, EMA copies, DistributedDataParallel and weight sharing notice nothing.

Whether a chain runs fused is decided at every call from what is there then: each of its modules asks whether
all of them are still in their places and whether somebody hooked into one. If not, all run as stock modules.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import random
import textwrap
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from fused_ops.core.checks import FLOAT_TYPES
from fused_ops.core.explain import explain
from fused_ops.depthwise.op import (
    BatchNormState,
    DepthwiseCall,
    checked_call,
    depthwise_conv,
    least_bytes,
)
from fused_ops.feed_forward import op as feed_forward
from fused_ops.feed_forward.module import mlp_on_modules, norm_state
from fused_ops.feed_forward.triton import LARGEST_NARROW
from fused_ops.gate import gate_scale, pool_channels

# Attribute, outside of parameters, buffers and submodules, by which an exchanged module knows its chain.
_ATTRIBUTE = "_fused_ops_chain"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Hooks of this package look on and change nothing, so they need no stock path.
_OWN_HOOKS = ("fused_ops.core.explain", __name__)

_TIMM_NORM_ACT = "timm.layers.norm_act."
_PLAIN_BATCH_NORMS = {
    "torch.nn.modules.batchnorm.BatchNorm2d",
    "torch.nn.modules.batchnorm.SyncBatchNorm",
}
_BATCH_NORMS = _PLAIN_BATCH_NORMS | {
    _TIMM_NORM_ACT + "BatchNormAct2d",
    _TIMM_NORM_ACT + "SyncBatchNormAct",
}
_FROZEN_NORMS = {"torchvision.ops.misc.FrozenBatchNorm2d", _TIMM_NORM_ACT + "FrozenBatchNormAct2d"}
# By name, since neither timm nor torchvision need be installed.
_ACTIVATIONS = {
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.ReLU6": "relu6",
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.Hardswish": "hardswish",
    "timm.layers.activations.Swish": "silu",
    "timm.layers.activations.HardSwish": "hardswish",
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
}


class _ChannelGate(NamedTuple):
    """A stock module ``x * gate(network(mean of x over the positions))``; names of its submodules."""

    network: tuple[str, ...]
    gate: str


_CHANNEL_GATES = {
    "timm.models._efficientnet_blocks.SqueezeExcite": _ChannelGate(
        ("conv_reduce", "act1", "conv_expand"), "gate"
    ),
    "timm.layers.squeeze_excite.SEModule": _ChannelGate(("fc1", "bn", "act", "fc2"), "gate"),
    "timm.layers.squeeze_excite.EffectiveSEModule": _ChannelGate(("fc",), "gate"),
    "torchvision.ops.misc.SqueezeExcitation": _ChannelGate(("fc1", "activation", "fc2"), "scale_activation"),
}
_GATES = {
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.modules.activation.Hardsigmoid": "hard_sigmoid",
    "timm.layers.activations.Sigmoid": "sigmoid",
    "timm.layers.activations.HardSigmoid": "hard_sigmoid",
}


# LayerNorm over the last dimension of tokens, and over the channels of maps.
_TOKEN_NORMS = {"torch.nn.modules.normalization.LayerNorm", "timm.layers.norm.LayerNorm"}
_MAP_NORMS = {"timm.layers.norm.LayerNorm2d", "torchvision.models.convnext.LayerNorm2d"}


def _stock_type(module: nn.Module) -> type[nn.Module]:
    return module._stock if isinstance(module, _Exchanged) else type(module)


def _type_name(module: nn.Module) -> str:
    stock = _stock_type(module)
    return f"{stock.__module__}.{stock.__qualname__}"


def _activation_of(module: nn.Module | None) -> str | None:
    """The operator's name for an activation module; None for what it has none for."""
    if module is None or "forward" in module.__dict__:
        return None
    if _stock_type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    return _ACTIVATIONS.get(_type_name(module))


def _is_norm(module: nn.Module | None) -> bool:
    known = _BATCH_NORMS | _FROZEN_NORMS
    return module is not None and _type_name(module) in known and "forward" not in module.__dict__


def _holds_activation(norm: nn.Module) -> bool:
    return _type_name(norm).startswith(_TIMM_NORM_ACT)


def _hooked(module: nn.Module) -> bool:
    """Whether somebody would see, or could change, what goes into or comes out of ``module``."""
    for name in _HOOKS:
        hooks = getattr(module, name)
        if hooks and any(getattr(hook, "__module__", "") not in _OWN_HOOKS for hook in hooks.values()):
            return True
    return False


class _Chain:
    """Modules that one operator computes, found from an ancestor that holds them all.

    Attributes:
        ancestor: the module that the paths begin at; None in a copy of a part that left it behind.
        paths: of the module that computes, the norm and the activation, and of an MLP its second layer and
            dropouts, as attribute names; None for what there isn't.
        activation: name of the activation that the operator computes.
        frozen: the norm has buffers where others have parameters, and never uses the batch's statistics.
    """

    def __init__(
        self,
        ancestor: nn.Module | None,
        paths: tuple[tuple[str, ...] | None, ...],
        activation: str,
        frozen: bool,
    ) -> None:
        self.ancestor = ancestor
        self.paths = paths
        self.activation = activation
        self.frozen = frozen

    def __deepcopy__(self, memo: dict[int, Any]) -> _Chain:
        # Whoever copies the ancestor has it in the memo by now. Whoever copies a part of the chain gets
        # modules that do what each says of itself, rather than a convolution that also normalises.
        return _Chain(memo.get(id(self.ancestor)), self.paths, self.activation, self.frozen)

    def members(self) -> tuple[nn.Module | None, ...] | None:
        """The modules of ``paths``; None unless every one is in its place and belongs here."""
        if self.ancestor is None:
            return None
        found: list[nn.Module | None] = []
        for path in self.paths:
            module = None
            if path is not None:
                module = self.ancestor
                for name in path:
                    module = module._modules.get(name)
                    if module is None:
                        return None
                if getattr(module, _ATTRIBUTE, None) is not self:
                    return None
            found.append(module)
        return tuple(found)


def _active(caller: nn.Module, role: int) -> tuple[nn.Module | None, ...] | None:
    """The chain's modules where it runs fused; None where each of them does its stock work.

    Every module of a chain asks this at every call, and all get the same answer: it looks at nothing that one
    of them changes.
    """
    chain = getattr(caller, _ATTRIBUTE, None)
    members = None if chain is None else chain.members()
    if members is None or members[role] is not caller:
        return None
    if torch.nn.modules.module._global_forward_hooks:
        return None
    for module in members:
        if module is not None and _hooked(module):
            return None
        if isinstance(module, nn.Dropout) and module.training and module.p > 0.0:
            return None
    if chain.frozen and torch.is_autocast_enabled(members[1].running_mean.device.type):
        # There torchvision's norm returns float32, whatever the convolution gave it.
        return None
    return members


def _is_linked(module: nn.Module) -> bool:
    chain = getattr(module, _ATTRIBUTE, None)
    members = None if chain is None else chain.members()
    return members is not None and members[module._role] is module


def _new_instance(stock: type[nn.Module], mixin: type[_Exchanged], role: int) -> nn.Module:
    cls = _exchanged_class(stock, mixin, role)
    return cls.__new__(cls)


class _Exchanged:
    """Put before a module's own class, whose ``forward`` stays the way out."""

    _stock: type[nn.Module]
    _mixin: type[_Exchanged]
    _role: int

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        # The class is made at run time, so that copy and pickle must make it again.
        return (_new_instance, (self._stock, self._mixin, self._role), *super().__reduce_ex__(protocol)[2:])


class _Convolution(_Exchanged):
    def forward(self, x: Tensor) -> Tensor:
        members = _active(self, 0)
        if members is None:
            return super().forward(x)
        _, norm, activation = members
        if x.dim() != 4 or x.dtype not in FLOAT_TYPES:
            return _run_stock((self, norm, activation), x)
        chain = getattr(self, _ATTRIBUTE)
        state = None
        if norm is not None:
            state = _frozen_state(norm) if chain.frozen else BatchNormState.from_module(norm)
        return depthwise_conv(
            x,
            self.weight,
            self.bias,
            stride=self.stride,
            padding=0 if self.padding == "valid" else self.padding,
            dilation=self.dilation,
            norm=state,
            activation=chain.activation,
        )


def _run_stock(modules: Sequence[nn.Module | None], x: Tensor) -> Tensor:
    """The stock work of a chain whose other modules hand through what they get."""
    for module in modules:
        x = x if module is None else module._stock.forward(module, x)
    return x


class _FirstLayer(_Exchanged):
    """Of an MLP: computes the norm before it and everything up to the second layer."""

    def forward(self, x: Tensor) -> Tensor:
        members = _active(self, 0)
        if members is None:
            return super().forward(x)
        _, norm, activation, fc2, *dropouts = members
        suited = x.dim() == 4 if isinstance(self, nn.Conv2d) else x.dim() > 1
        if not suited or x.dtype not in FLOAT_TYPES:
            return _run_stock((norm, self, activation, *dropouts, fc2), x)
        return mlp_on_modules(x, norm, self, fc2, activation=getattr(self, _ATTRIBUTE).activation)


class _HandsThrough(_Exchanged):
    def forward(self, x: Tensor) -> Tensor:
        return x if _active(self, self._role) is not None else super().forward(x)


class _NormAct(_Exchanged):
    def forward(self, x: Tensor) -> Tensor:
        members = _active(self, 1)
        if members is None:
            return super().forward(x)
        return x if members[2] is self.act else self.act(self.drop(x))


class _SqueezeExcite(_Exchanged):
    _layout: _ChannelGate

    def forward(self, x: Tensor) -> Tensor:
        gate = getattr(self, self._layout.gate)
        # Tracers see the stock module.
        suited = not isinstance(x, fx.Proxy) and x.dim() == 4 and x.dtype in FLOAT_TYPES
        if not suited or _active(self, 0) is None or _hooked(gate) or _type_name(gate) not in _GATES:
            return super().forward(x)
        logits = pool_channels(x)[:, 0, :, None, None]
        for name in self._layout.network:
            logits = getattr(self, name)(logits)
        return gate_scale(x, logits.flatten(1), gate=_GATES[_type_name(gate)])


def _frozen_state(norm: nn.Module) -> BatchNormState:
    statistics = (norm.running_mean, norm.running_var)
    return BatchNormState(norm.weight, norm.bias, *statistics, False, 0.0, norm.eps)


@cache
def _exchanged_class(stock: type[nn.Module], mixin: type[_Exchanged], role: int) -> type[nn.Module]:
    # The stock class's module, since tracers tell by it which modules to leave whole.
    names = {"__module__": stock.__module__, "__doc__": stock.__doc__}
    body = {"_stock": stock, "_mixin": mixin, "_role": role, **names}
    if mixin is _SqueezeExcite:
        body["_layout"] = _CHANNEL_GATES[f"{stock.__module__}.{stock.__qualname__}"]
    return type(f"Accelerated{stock.__name__}", (mixin, stock), body)


# What the rows of a report are about.
KINDS = {
    "depthwise": "depthwise convolutions",
    "mlp": "MLPs",
    "squeeze_excite": "squeeze-and-excitation modules",
}


@dataclass(frozen=True)
class Row:
    """What was decided about one module.

    Attributes:
        module: dotted name of the convolution, of an MLP's first layer, or of the squeeze-and-excitation
            module.
        kind: depthwise, mlp or squeeze_excite.
        pattern: what stands there.
        exchanged: whether it is computed by a fused operator now (with ``dry_run``: would be).
        reason: why not, or what else stays outside of the operator and why.
        members: names of the modules that the operator computes.
        stock_bytes, fused_bytes: expected bytes through memory per step, in separate passes and fused; None
            where no example was given.
    """

    module: str
    pattern: str
    exchanged: bool
    kind: str = "depthwise"
    reason: str = ""
    members: tuple[str, ...] = ()
    stock_bytes: int | None = None
    fused_bytes: int | None = None

    @property
    def saved_bytes(self) -> int | None:
        return None if self.stock_bytes is None else self.stock_bytes - self.fused_bytes


@dataclass(frozen=True)
class Report:
    """What :func:`accelerate` did, a row per module that it looked at. ``str()`` gives a table."""

    results: tuple[Row, ...]
    note: str = ""

    @property
    def exchanged(self) -> int:
        return sum(row.exchanged for row in self.results)

    @property
    def saved_bytes(self) -> int | None:
        """Expected bytes saved per step by everything exchanged; None where no example was given."""
        saved = [row.saved_bytes for row in self.results if row.exchanged and row.saved_bytes is not None]
        return sum(saved) if saved else None

    def rows(self) -> list[dict[str, Any]]:
        return [asdict(row) | {"saved_bytes": row.saved_bytes} for row in self.results]

    COLUMNS = ("module", "pattern", "exchanged", "saved MB", "reason")

    def lines(self) -> list[tuple[str, ...]]:
        """Cells of :attr:`COLUMNS`."""
        return [
            (
                row.module or "(top)",
                row.pattern,
                "yes" if row.exchanged else "no",
                "-" if row.saved_bytes is None else f"{row.saved_bytes / 1e6:.1f}",
                row.reason,
            )
            for row in self.results
        ]

    def summary(self) -> str:
        counts = []
        for kind, words in KINDS.items():
            rows = [row for row in self.results if row.kind == kind]
            if rows:
                counts.append(f"{sum(row.exchanged for row in rows)} of {len(rows)} {words}")
        *others, last = KINDS.values()
        text = f"{', '.join(counts)} exchanged" if counts else f"no {', '.join(others)} or {last}"
        if self.saved_bytes is not None:
            text += f", {self.saved_bytes / 1e6:.1f} MB of memory traffic saved per step (expected)"
        return f"{text}. {self.note}" if self.note else text

    def __str__(self) -> str:
        lines = [self.COLUMNS, *self.lines()] if self.results else []
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([*table, *([""] if table else []), self.summary()])


@dataclass
class _Plan:
    """What could be exchanged at one module, which then computes for all ``members``."""

    family: type[_Family]
    name: str
    module: nn.Module
    pattern: str = ""
    norm: nn.Module | None = None
    activation: nn.Module | None = None
    others: tuple[nn.Module, ...] = ()
    operation: str = "none"
    declined: str = ""
    remark: str = ""
    already: bool = False

    @property
    def members(self) -> tuple[nn.Module | None, ...]:
        return (self.module, self.norm, self.activation, *self.others)


class _Family(Protocol):
    """Modules that are exchanged alike.

    Attributes:
        kind: what the rows of a report say.
    """

    kind: str

    @staticmethod
    def plans(model: nn.Module, flow: _Flow, claimed: set[int]) -> list[_Plan]:
        """What there is in ``model``; adds the ids of the modules that it takes to ``claimed``."""

    @staticmethod
    def mixin(role: int, module: nn.Module) -> type[_Exchanged]:
        """What the member in place ``role`` becomes."""

    @staticmethod
    def weigh(module: nn.Module, x: Tensor) -> tuple[int, int]:
        """Bytes of a call of the exchanged module: in separate passes, and fused."""


@dataclass
class _Call:
    """One call of a module in a trace: whose output it alone uses, and who alone uses its own."""

    producer: nn.Module | None
    consumer: nn.Module | None


@dataclass
class _Flow:
    """Data flow between the modules of a model.

    Attributes:
        calls: by ``id`` of a module, its calls in every trace.
        unknown: ids of modules that may also be called in ways that no trace shows.
    """

    calls: dict[int, list[_Call]] = field(default_factory=dict)
    unknown: set[int] = field(default_factory=set)

    def follower(self, module: nn.Module) -> nn.Module | None:
        """The module that every output of ``module`` goes to, and only there, and that takes nothing else."""
        calls = self.calls.get(id(module), [])
        following = calls[0].consumer if calls else None
        if following is None or id(module) in self.unknown or id(following) in self.unknown:
            return None
        certain = all(call.consumer is following for call in calls)
        certain = certain and all(call.producer is module for call in self.calls[id(following)])
        return following if certain else None

    def leader(self, module: nn.Module) -> nn.Module | None:
        """The module whose :meth:`follower` is ``module``."""
        calls = self.calls.get(id(module), [])
        leading = calls[0].producer if calls else None
        return leading if leading is not None and self.follower(leading) is module else None


def _is_ours(module: nn.Module) -> bool:
    """Whether a module is one of the fused ones of this package; the zoo's models are made of them."""
    return type(module).__module__.startswith("fused_ops.") and not type(module).__module__.startswith(
        "fused_ops.models."
    )


def _inside_ours(model: nn.Module) -> set[int]:
    """Ids of the modules inside of fused ones of this package."""
    ours = (module for module in model.modules() if _is_ours(module))
    return {id(inner) for module in ours for inner in module.modules() if inner is not module}


class _Skeleton:
    """A copy of a model's structure without its data: what tracing does to it cannot harm the model."""

    def __init__(self, model: nn.Module, training: bool) -> None:
        self._tensors: dict[int, Tensor] = {}
        self.copy_of: dict[int, nn.Module] = {}
        self.original_of: dict[int, nn.Module] = {}
        originals = list(model.modules())
        for original in originals:
            scripted = isinstance(original, (torch.jit.ScriptModule, torch.jit.RecursiveScriptModule))
            copy = original if scripted else original.__class__.__new__(original.__class__)
            self.copy_of[id(original)] = copy
            self.original_of[id(copy)] = original
        for original in originals:
            copy = self.copy_of[id(original)]
            if copy is not original:
                copy.__dict__.update({k: self._attribute(v) for k, v in original.__dict__.items()})
                for name in ("_parameters", "_buffers"):
                    tensors = original.__dict__[name].items()
                    copy.__dict__[name] = {key: self._without_data(tensor) for key, tensor in tensors}
                copy.__dict__["_modules"] = {
                    key: None if child is None else self.copy_of[id(child)]
                    for key, child in original._modules.items()
                }
                for name in _HOOKS:
                    copy.__dict__[name] = OrderedDict()
                copy.__dict__["training"] = training

    def _without_data(self, tensor: Tensor | None) -> Tensor | None:
        if type(tensor) not in (Tensor, nn.Parameter):
            return tensor
        if id(tensor) not in self._tensors:
            empty = torch.empty_like(tensor, device="meta", requires_grad=False)
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            self._tensors[id(tensor)] = empty
        return self._tensors[id(tensor)]

    def _attribute(self, value: Any) -> Any:
        """Containers are copied, and what refers to a module of the model refers to the copy's."""
        if isinstance(value, nn.Module):
            return self.copy_of.get(id(value), value)
        if inspect.ismethod(value) and id(value.__self__) in self.copy_of:
            return types.MethodType(value.__func__, self.copy_of[id(value.__self__)])
        if type(value) in (list, tuple, set):
            return type(value)(self._attribute(entry) for entry in value)
        if type(value) in (dict, OrderedDict):
            return type(value)((key, self._attribute(entry)) for key, entry in value.items())
        return value


class _Tracer(fx.Tracer):
    """Traces what it can: a module whose forward does not trace becomes one node, listed in ``opaque``."""

    def __init__(self) -> None:
        super().__init__()
        self.opaque: list[nn.Module] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if next(m.children(), None) is None or _is_norm(m) or _is_ours(m):
            return True
        stock = m.__module__.startswith(("torch.nn.", "torch.ao.")) and not isinstance(m, nn.Sequential)
        return stock or isinstance(m, torch.jit.ScriptModule)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        before = next(iter(reversed(self.graph.nodes)), None)
        stack = list(self.module_stack.items())
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.module_stack.clear()
            self.module_stack.update(stack)
            for node in reversed(self.graph.nodes):
                if node is before:
                    break
                # The tracer remembers parameters that it has fetched.
                if node.op != "get_attr":
                    self.graph.erase_node(node)
            self.opaque.append(m)
            return self.create_proxy("call_module", path, args, kwargs)


def _driver(count: int) -> type[nn.Module]:
    """A module that calls another with ``count`` arguments, the rest by default."""
    calls = (
        lambda self: self.results(self.module()),
        lambda self, a: self.results(self.module(a)),
        lambda self, a, b: self.results(self.module(a, b)),
        lambda self, a, b, c: self.results(self.module(a, b, c)),
        lambda self, a, b, c, d: self.results(self.module(a, b, c, d)),
    )

    class Driver(nn.Module):
        forward = calls[count]

        def results(self, value: Any) -> list[fx.Proxy]:
            leaves = tree_leaves(value)
            known = (fx.Proxy, Tensor, int, float, str, type(None))
            if any(not isinstance(leaf, known) for leaf in leaves):
                raise TypeError("an output may hold tensors that cannot be seen")
            return [leaf for leaf in leaves if isinstance(leaf, fx.Proxy)]

    return Driver


def _count_arguments(module: nn.Module) -> int:
    parameters = inspect.signature(module.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters)
    return max(required, int(any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)))


# What may be asked of a tensor without using its values; the same for every tensor of a chain.
_METADATA = ("shape", "dtype", "device", "ndim", "size", "dim")


def _reads_metadata(node: fx.Node) -> bool:
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in _METADATA
    return node.op == "call_method" and node.target in _METADATA


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Leave random states as they were."""
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(state)


def _trace(root: nn.Module, skeleton: _Skeleton, flow: _Flow) -> list[nn.Module]:
    """Add the calls inside ``root`` (of the skeleton) to ``flow``; the modules that did not trace."""
    tracer = _Tracer()
    try:
        driver = _driver(_count_arguments(root))()
        driver.module = root
        with _undisturbed():
            graph = tracer.trace(driver)
    except Exception:
        return [root]

    def module_of(node: fx.Node) -> nn.Module | None:
        if node.op != "call_module":
            return None
        return skeleton.original_of[id(driver.get_submodule(node.target))]

    kept = {
        id(value.node)
        for module in root.modules()
        for value in tree_leaves(list(module.__dict__.values()))
        if isinstance(value, fx.Proxy)
    }

    def only_user(node: fx.Node) -> fx.Node | None:
        users = [user for user in node.users if not _reads_metadata(user)]
        if len(users) != 1 or id(node) in kept:
            return None
        plain = users[0].op == "call_module" and users[0].args == (node,) and not users[0].kwargs
        return users[0] if plain else None

    for node in graph.nodes:
        module = module_of(node)
        if module is None:
            continue
        source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        alone = isinstance(source, fx.Node) and only_user(source) is node
        user = only_user(node)
        call = _Call(module_of(source) if alone else None, None if user is None else module_of(user))
        flow.calls.setdefault(id(module), []).append(call)
    return tracer.opaque


def _handling(module: nn.Module) -> tuple[set[str], set[str]] | None:
    """How a class's code handles attributes; None where its source cannot be had.

    Returns:
        Names taken from objects other than ``self``, and names taken from ``self`` for more than a call.
    """
    reached: set[str] = set()
    uncalled: set[str] = set()
    for cls in type(module).__mro__:
        if cls in (nn.Module, object):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
        except (OSError, TypeError, SyntaxError):
            return None
        for method in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            called = {id(node.func) for node in ast.walk(method) if isinstance(node, ast.Call)}
            for node in ast.walk(method):
                if not isinstance(node, ast.Attribute) or method.name == "__init__":
                    continue
                if not (isinstance(node.value, ast.Name) and node.value.id == "self"):
                    reached.add(node.attr)
                elif id(node) not in called:
                    uncalled.add(node.attr)
    return reached, uncalled


def _is_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _follow(root: nn.Module, skeleton: _Skeleton, flow: _Flow, seen: set[int], reached: set[str]) -> None:
    """Trace ``root``, and on their own the children of every module inside it that does not trace.

    ``reached`` holds the names that code which cannot be followed takes from inside other modules.
    """
    if id(root) in seen:
        return
    seen.add(id(root))
    for name, module in root.named_modules():
        if name.rpartition(".")[2] in reached:
            flow.unknown.add(id(skeleton.original_of[id(module)]))
    # Outer ones first: what their code reaches for holds for everything inside.
    for opaque in reversed(_trace(root, skeleton, flow)):
        if opaque is not root and id(opaque) in seen:
            continue
        seen.add(id(opaque))
        handling = _handling(opaque)
        further, uncalled = handling or (set(), set())
        _children(opaque, opaque, handling is not None, reached | further, uncalled, skeleton, flow, seen)


def _children(
    holder: nn.Module,
    opaque: nn.Module,
    readable: bool,
    reached: set[str],
    uncalled: set[str],
    skeleton: _Skeleton,
    flow: _Flow,
    seen: set[int],
) -> None:
    """Trace the children of ``holder``, whose calls are up to the code of ``opaque``."""
    for name, child in holder.named_children():
        # A list of modules is not called as one, and a Sequential may be taken apart.
        taken_apart = type(child) in (nn.ModuleList, nn.ModuleDict)
        if _is_sequence(child):
            taken_apart = holder is not opaque or not readable or name in uncalled
        if taken_apart:
            _children(child, opaque, readable, reached, uncalled, skeleton, flow, seen)
        elif next(child.children(), None) is None or _is_norm(child):
            for module in child.modules():
                flow.unknown.add(id(skeleton.original_of[id(module)]))
        elif readable:
            _follow(child, skeleton, flow, seen, reached)
        else:
            for module in child.modules():
                flow.unknown.add(id(skeleton.original_of[id(module)]))


def _data_flow(model: nn.Module) -> _Flow:
    flow = _Flow()
    # What a forward does may depend on the mode, and a chain must hold in both.
    for training in (True, False):
        skeleton = _Skeleton(model, training)
        _follow(skeleton.copy_of[id(model)], skeleton, flow, set(), set())
    return flow


def _conv_obstacle(conv: nn.Conv2d) -> str:
    """Why the operator cannot stand for ``conv``; empty if it can."""
    stock = _stock_type(conv)
    if stock.__module__.startswith("fused_ops."):
        return "is a fused module already"
    same = stock.forward is nn.Conv2d.forward and stock._conv_forward is nn.Conv2d._conv_forward
    if not same or "forward" in conv.__dict__:
        return f"{stock.__name__} has a forward of its own"
    if parametrize.is_parametrized(conv):
        return "has parametrizations"
    if conv.out_channels != conv.in_channels:
        return f"makes {conv.out_channels} of {conv.in_channels} channels; the operator keeps their number"
    if any(size % 2 == 0 for size in conv.kernel_size):
        return f"kernel size {conv.kernel_size} is even"
    if conv.padding_mode != "zeros":
        return f"padding_mode is {conv.padding_mode}"
    if conv.padding == "same" and any(step != 1 for step in conv.stride):
        return "padding='same' with a stride"
    if conv.weight.dtype not in FLOAT_TYPES:
        return f"parameters are {conv.weight.dtype}"
    if _hooked(conv):
        return "has hooks, which would see the whole chain's output"
    return ""


def _describe(plan: _Plan) -> str:
    conv = plan.module
    kernel = "x".join(map(str, conv.kernel_size))
    stride = "" if set(conv.stride) == {1} else f" stride {'x'.join(map(str, conv.stride))}"
    parts = [f"depthwise {kernel}{stride}{'' if conv.bias is None else ' + bias'}"]
    if plan.norm is not None:
        parts.append(_stock_type(plan.norm).__name__.removesuffix("Act2d").removesuffix("2d"))
    if plan.operation != "none":
        parts.append(plan.operation)
    return " -> ".join(parts)


class _Depthwise(_Family):
    """Depthwise convolutions, alone or with the norm and the activation after them."""

    kind = "depthwise"

    @staticmethod
    def mixin(role: int, module: nn.Module) -> type[_Exchanged]:
        if role == 0:
            return _Convolution
        return _NormAct if role == 1 and _holds_activation(module) else _HandsThrough

    @staticmethod
    def plans(model: nn.Module, flow: _Flow, claimed: set[int]) -> list[_Plan]:
        owners: dict[int, int] = {}
        for module in model.modules():
            for child in module._modules.values():
                if child is not None:
                    owners[id(child)] = owners.get(id(child), 0) + 1
        fused = _inside_ours(model)
        plans = []
        for name, conv in model.named_modules():
            if not isinstance(conv, nn.Conv2d) or conv.groups == 1 or conv.groups != conv.in_channels:
                continue
            plan = _Plan(_Depthwise, name, conv)
            plans.append(plan)
            chain = conv.__dict__.get(_ATTRIBUTE)
            if chain is not None:
                _, plan.norm, plan.activation = chain.members()
                plan.operation, plan.already = chain.activation, True
                plan.remark = "exchanged before"
            elif id(conv) in fused:
                plan.declined = "belongs to a fused module already"
            else:
                plan.declined = _conv_obstacle(conv)
                if not plan.declined:
                    _extend(plan, flow, claimed, owners)
            claimed.update(id(module) for module in plan.members if module is not None)
            plan.pattern = _describe(plan)
        return plans

    @staticmethod
    def weigh(conv: nn.Module, x: Tensor) -> tuple[int, int]:
        chain = getattr(conv, _ATTRIBUTE)
        _, norm, _ = chain.members()
        state = None
        if norm is not None:
            state = _frozen_state(norm)
            if not chain.frozen:
                state = state._replace(batch_stats=norm.training or norm.running_mean is None)
        padding = 0 if conv.padding == "valid" else conv.padding
        options = (conv.stride, padding, conv.dilation, state, "post", chain.activation)
        call = checked_call(x, conv.weight, conv.bias, *options, None, "after", False)
        directions = ("forward", "backward") if call.needs_grad else ("forward",)
        return (
            sum(separate_bytes(call, direction) for direction in directions),
            sum(least_bytes(call, direction) for direction in directions),
        )


class _SqueezeExcites(_Family):
    """Modules that scale every channel by what a small network makes of all channels' means."""

    kind = "squeeze_excite"

    @staticmethod
    def mixin(role: int, module: nn.Module) -> type[_Exchanged]:
        return _SqueezeExcite

    @staticmethod
    def plans(model: nn.Module, flow: _Flow, claimed: set[int]) -> list[_Plan]:
        plans = []
        for name, module in model.named_modules():
            layout = _CHANNEL_GATES.get(_type_name(module))
            if layout is None:
                continue
            gate = _GATES.get(_type_name(getattr(module, layout.gate)))
            plan = _Plan(_SqueezeExcites, name, module, f"squeeze-excite -> {gate or 'other gate'}")
            if module.__dict__.get(_ATTRIBUTE) is not None:
                plan.already, plan.remark = True, "exchanged before"
            elif "forward" in module.__dict__:
                plan.declined = "has a forward of its own"
            elif gate is None:
                plan.declined = f"its gate is a {type(getattr(module, layout.gate)).__name__}"
            elif getattr(module, "add_maxpool", False):
                plan.declined = "pools the maximum too"
            elif _hooked(module):
                plan.declined = "has hooks"
            plans.append(plan)
        return plans

    @staticmethod
    def weigh(module: nn.Module, x: Tensor) -> tuple[int, int]:
        """Bytes of a call; what there is one of per channel is left out.

        Forward: the map is read for the mean, and read and written to be scaled, both ways. Backward, in
        separate passes: the gradient times the gate (2), times the map (3) and summed (1), the mean's
        gradient spread out (1) and added (3); fused: one pass (3), and the mean's gradient, which is one
        value per channel, added (2).
        """
        size = x.element_size() * x.numel()
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters())):
            return 13 * size, 8 * size
        return 3 * size, 3 * size


class _Mlps(_Family):
    """Two fully connected layers with an activation between them, and the norm before them."""

    kind = "mlp"

    @staticmethod
    def mixin(role: int, module: nn.Module) -> type[_Exchanged]:
        return _FirstLayer if role == 0 else _HandsThrough

    @staticmethod
    def plans(model: nn.Module, flow: _Flow, claimed: set[int]) -> list[_Plan]:
        fused = _inside_ours(model)
        plans = []
        for name, fc1 in model.named_modules():
            if not _is_layer(fc1) or id(fc1) in claimed or id(fc1) in fused:
                continue
            plan = _Plan(_Mlps, name, fc1)
            chain = fc1.__dict__.get(_ATTRIBUTE)
            if chain is not None:
                _, plan.norm, plan.activation, *others = chain.members()
                plan.others, plan.operation, plan.already = tuple(others), chain.activation, True
                plan.remark = "exchanged before"
            elif not _complete_mlp(plan, flow, claimed):
                continue
            else:
                plan.declined = _mlp_obstacle(plan)
                if not plan.declined:
                    plan.norm, plan.remark = _norm_before(fc1, flow, claimed)
            claimed.update(id(module) for module in plan.members if module is not None)
            widths = (_width_in(fc1), _width_out(fc1), _width_in(fc1))
            norm = "" if plan.norm is None else f"{_stock_type(plan.norm).__name__.removesuffix('2d')} -> "
            plan.pattern = f"{norm}MLP {'-'.join(map(str, widths))} {plan.operation}"
            plans.append(plan)
        return plans

    @staticmethod
    def weigh(module: nn.Module, x: Tensor) -> tuple[int, int]:
        """Bytes of a call; parameters are left out.

        In separate passes, forward: the norm and both layers read and write, the activation too, on the
        hidden map. Backward: each layer's two gradients, the activation's (3), the norm's (3).
        """
        _, norm, _, fc2, *_ = getattr(module, _ATTRIBUTE).members()
        tokens = x.permute(0, 2, 3, 1) if isinstance(module, nn.Conv2d) else x
        state = norm_state(norm) if isinstance(norm, nn.LayerNorm) else None
        if norm is not None and state is None:
            state = _frozen_state(norm)._replace(batch_stats=norm.training or norm.running_mean is None)
        call = feed_forward.checked_call(
            tokens, module.weight.flatten(1), fc2.weight.flatten(1), state, module.bias, fc2.bias
        )
        size = x.element_size() * x.numel()
        hidden = size * _width_out(module) // _width_in(module)
        stock = 2 * size + 4 * hidden + (norm is not None) * 2 * size
        if not call.needs_grad:
            return stock, feed_forward.least_bytes(call, "forward")
        stock += 4 * size + 7 * hidden + (norm is not None) * 3 * size
        return stock, sum(feed_forward.least_bytes(call, way) for way in ("forward", "backward"))


def _is_layer(module: nn.Module | None) -> bool:
    """Whether a module is fully connected over channels: of tokens, or of maps."""
    if module is None:
        return False
    if _stock_type(module) is nn.Linear:
        return True
    plain = _stock_type(module) is nn.Conv2d and module.groups == 1 and module.padding in ((0, 0), "valid")
    return plain and set(module.kernel_size) == {1} and set(module.stride) == {1}


def _width_in(layer: nn.Module) -> int:
    return layer.weight.shape[1]


def _width_out(layer: nn.Module) -> int:
    return layer.weight.shape[0]


def _complete_mlp(plan: _Plan, flow: _Flow, claimed: set[int]) -> bool:
    """Whether an activation and a second layer, back to the same width, certainly follow; notes them."""
    fc1, dropouts = plan.module, []
    activation = flow.follower(fc1)
    while type(activation) is nn.Identity:
        activation = flow.follower(activation)
    plan.operation = _activation_of(activation) or "none"
    if plan.operation == "none" or id(activation) in claimed:
        return False
    fc2 = flow.follower(activation)
    while type(fc2) in (nn.Identity, nn.Dropout):
        dropouts += [fc2] if type(fc2) is nn.Dropout else []
        fc2 = flow.follower(fc2)
    if not _is_layer(fc2) or _stock_type(fc2) is not _stock_type(fc1) or id(fc2) in claimed:
        return False
    # Networks that narrow first are gates: their inputs are pooled maps.
    widths = (_width_in(fc1), _width_out(fc1))
    if widths != (_width_out(fc2), _width_in(fc2)) or widths[0] > widths[1]:
        return False
    plan.activation, plan.others = activation, (fc2, *dropouts)
    return True


def _mlp_obstacle(plan: _Plan) -> str:
    """Why the operator cannot stand for an MLP; empty if it can."""
    channels = _width_in(plan.module)
    if channels > LARGEST_NARROW:
        # The operator would save memory there, but no time.
        return f"{channels} channels; up to {LARGEST_NARROW}, hidden values stay on chip"
    layers = (plan.module, plan.others[0])
    if any("forward" in layer.__dict__ for layer in layers):
        return "a layer has a forward of its own"
    if any(layer.weight.dtype not in FLOAT_TYPES for layer in layers):
        return f"parameters are {plan.module.weight.dtype}"
    if any(_hooked(module) for module in plan.members if module is not None):
        return "has hooks, which would see the whole chain's output"
    return ""


def _norm_before(fc1: nn.Module, flow: _Flow, claimed: set[int]) -> tuple[nn.Module | None, str]:
    """The norm whose output certainly goes to ``fc1`` alone, or why it stays outside."""
    norm = flow.leader(fc1)
    name = "" if norm is None else _type_name(norm)
    is_map = isinstance(fc1, nn.Conv2d)
    known = name in (_MAP_NORMS if is_map else _TOKEN_NORMS)
    if is_map and name in (
        "torch.nn.modules.batchnorm.BatchNorm2d",
        "torch.nn.modules.batchnorm.SyncBatchNorm",
    ):
        known = True
    elif known:
        known = tuple(norm.normalized_shape) == (_width_in(fc1),)
    if not known or "forward" in norm.__dict__ or id(norm) in claimed:
        return None, ""
    if _hooked(norm):
        return None, "its norm has hooks, and stays outside"
    return norm, ""


# Further families are added here: each makes plans from the data flow and what others have claimed.
_FAMILIES = (_Depthwise, _SqueezeExcites, _Mlps)


def _extend(plan: _Plan, flow: _Flow, claimed: set[int], owners: dict[int, int]) -> None:
    """Add the norm and the activation that certainly follow, or a remark on why not."""
    last = plan.module
    following = flow.follower(last)
    if following is None and id(plan.module) in flow.unknown:
        plan.remark = "alone: what follows it cannot be traced"
    if _is_norm(following):
        remark = _norm_obstacle(plan.module, following, claimed)
        if remark:
            plan.remark = f"alone: {remark}"
            return
        plan.norm = last = following
        if _holds_activation(following):
            inner = following.act
            plan.operation = _activation_of(inner) or "none"
            if plan.operation != "none":
                shared = owners[id(inner)] > 1 or id(inner) in flow.calls or id(inner) in flow.unknown
                if shared or _hooked(inner) or type(following.drop) is not nn.Identity:
                    plan.operation = "none"
                    plan.remark = "its activation is shared, hooked or after a dropout, and stays outside"
                else:
                    plan.activation = inner
                return
            if type(inner) is not nn.Identity:
                plan.remark = f"{type(inner).__name__} stays outside: the operator has no such activation"
            if type(inner) is not nn.Identity or type(following.drop) is not nn.Identity:
                return
        following = flow.follower(last)
    operation = _activation_of(following)
    if operation is None:
        return
    if id(following) in claimed or _hooked(following):
        plan.remark = "the activation after it is hooked or belongs to another chain, and stays outside"
        return
    plan.activation, plan.operation = following, operation


def _norm_obstacle(conv: nn.Module, norm: nn.Module, claimed: set[int]) -> str:
    if id(norm) in claimed:
        return "its norm belongs to another chain"
    if _hooked(norm):
        return "its norm has hooks"
    if parametrize.is_parametrized(norm):
        return "its norm has parametrizations"
    channels = norm.num_features if hasattr(norm, "num_features") else norm.running_mean.numel()
    return "" if channels == conv.out_channels else "its norm has another number of channels"


def _put_in(model: nn.Module, plan: _Plan, names: dict[int, str]) -> None:
    if plan.already or plan.declined:
        return
    given = [module for module in plan.members if module is not None]
    paths: list[list[str]] = [names[id(module)].split(".") for module in given]
    # A convolution alone finds itself wherever it is moved to.
    common = len(paths[0]) if len(given) == 1 else 0
    if len(given) > 1:
        while len({path[common] for path in paths}) == 1:
            common += 1
    ancestor = plan.module if len(given) == 1 else model.get_submodule(".".join(paths[0][:common]))
    frozen = plan.norm is not None and _type_name(plan.norm) in _FROZEN_NORMS
    tails = iter(tuple(path[common:]) for path in paths)
    located = tuple(None if module is None else next(tails) for module in plan.members)
    chain = _Chain(ancestor, located, plan.operation, frozen)
    for role, module in enumerate(plan.members):
        if module is not None:
            module.__class__ = _exchanged_class(type(module), plan.family.mixin(role, module), role)
            module.__dict__[_ATTRIBUTE] = chain


def _take_out(module: nn.Module) -> None:
    if type(module) is _exchanged_class(module._stock, module._mixin, module._role):
        module.__class__ = module._stock
    module.__dict__.pop(_ATTRIBUTE, None)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of the wrappers of torch.compile and of data parallelism."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._orig_mod
        else:
            return model


def _example(model: nn.Module, example: Any) -> tuple[Any, ...]:
    """The arguments that ``example`` says."""
    if isinstance(example, Tensor):
        return (example,)
    example = tuple(example)
    if not example or not all(isinstance(size, int) for size in example):
        return example
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    image = torch.empty(example, device="meta", dtype=like.dtype)
    channels_last = any(
        p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
        for p in model.parameters()
    )
    image = torch.empty_like(image, device=like.device)
    if channels_last and image.dim() == 4:
        image = image.contiguous(memory_format=torch.channels_last)
    return (image,)


def separate_bytes(call: DepthwiseCall, direction: str) -> int:
    """Bytes through memory of the stock modules' passes, each of which reads and writes whole maps.

    Forward: the convolution; the norm, with one more read for the batch's statistics; the activation.
    Backward: the activation (gradient, saved map, result); the norm's sums and its input gradient; the
    convolution's two gradients. Per-channel vectors are left out, as in ``least_bytes``.
    """
    size = call.x.element_size()
    x, out = size * call.x.numel(), size * torch.Size(call.output_shape).numel()
    norm, activation = call.norm != "none", call.activation != "none"
    if direction == "forward":
        return x + out + norm * (2 + call.batch_stats) * out + activation * 2 * out
    affine = call.norm_weight is not None and call.norm_weight.requires_grad
    sums = 2 * out if call.batch_stats or affine else 0
    return 2 * (x + out) + norm * ((2 + call.batch_stats) * out + sums) + activation * 3 * out


def _weigh(
    model: nn.Module, plans: Sequence[_Plan], arguments: tuple[Any, ...]
) -> dict[str, tuple[int, int, str]]:
    """By name of the module: bytes of the stock modules, bytes fused, why stock PyTorch is chosen."""
    calls: dict[str, list[tuple[int, int]]] = {plan.name: [] for plan in plans}
    on_gpu: set[str] = set()

    def observe(plan: _Plan) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            calls[plan.name].append(plan.family.weigh(module, inputs[0]))
            if inputs[0].is_cuda:
                on_gpu.add(plan.name)

        return hook

    handles = [plan.module.register_forward_pre_hook(observe(plan)) for plan in plans]
    try:
        choices = explain(model, *arguments).choices
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, made in calls.items():
        declined = ""
        for choice in choices:
            # On a CPU both ways are the same PyTorch calls, and the model may yet be moved to a GPU.
            if choice.module == name and choice.backend == "reference" and name in on_gpu:
                why = "; ".join(f"{backend}: {reason}" for backend, reason in choice.rejected.items())
                declined = choice.reason if "measured" in choice.reason else why or choice.reason
        if made:
            stock, fused = map(sum, zip(*made, strict=True))
            found[name] = (stock, fused, declined)
    return found


def accelerate(model: nn.Module, *, dry_run: bool = False, example: Any = None) -> Report:
    """Have fused operators compute what they can of ``model``, in place; :func:`restore` undoes it.

    Exchanged are depthwise convolutions together with the BatchNorm and the activation that certainly follow
    them: the convolution's output goes nowhere but into the norm, the norm's nowhere but into the activation,
    in training and in evaluation mode. Where that cannot be seen, the convolution is exchanged alone.
    MLPs of narrow tokens or maps (two layers, Linear or 1x1 convolutions, and the activation between them)
    are exchanged together with the LayerNorm or BatchNorm that certainly comes before them.
    Squeeze-and-excitation modules of timm and torchvision pool and scale by operators.
    Parameters, buffers, names and module objects stay as they are. A chain with a hook on one of its modules
    runs as stock modules for as long as the hook is there.

    Inside an exchanged chain the convolution's output is that of the whole chain: call :func:`restore` before
    taking single modules out of a model.

    Args:
        model: any module; compiled and DataParallel ones too.
        dry_run: only report.
        example: what the model will be called with: a tensor, a tuple of arguments, or the shape of an image
            batch. With it the report has bytes, and what would run on stock PyTorch on the GPU (because that
            was measured faster, or no kernel can run it) is not exchanged. Nothing is computed.

    Returns:
        A row per depthwise convolution, MLP and squeeze-and-excitation module: exchanged or not, and why.
    """
    model = _unwrapped(model)
    for module in list(model.modules()):
        # Part of a chain that somebody took apart, which runs as stock modules anyway.
        if isinstance(module, _Exchanged) and not _is_linked(module):
            _take_out(module)
    flow = _data_flow(model)
    claimed: set[int] = set()
    plans = [plan for family in _FAMILIES for plan in family.plans(model, flow, claimed)]
    names = {id(module): name for name, module in model.named_modules()}
    open_plans = [plan for plan in plans if not plan.declined]
    for plan in open_plans:
        _put_in(model, plan, names)
    note, weights = "", {}
    if example is not None:
        try:
            weights = _weigh(model, open_plans, _example(model, example))
        except Exception as error:
            text = (str(error).splitlines() or [type(error).__name__])[0]
            note = f"The example was not used: the model does not run without data ({text})"
    rows = []
    for plan in plans:
        reason = plan.declined or plan.remark
        members = tuple(names[id(m)] for m in plan.members if m is not None) if not plan.declined else ()
        row = Row(plan.name, plan.pattern, not plan.declined, plan.family.kind, reason, members)
        if plan.name in weights:
            stock, fused, declined = weights[plan.name]
            row = replace(row, stock_bytes=stock, fused_bytes=fused)
            if declined:
                row = replace(row, exchanged=False, reason=declined, members=())
        rows.append(row)
        if not plan.already and not plan.declined and (dry_run or not row.exchanged):
            for module in plan.members:
                if module is not None:
                    _take_out(module)
    return Report(tuple(rows), note)


def restore(model: nn.Module) -> int:
    """Undo :func:`accelerate`: the identical modules, of their own classes, with no attribute left.

    Args:
        model: a module, or a part or a copy of one, that may hold exchanged modules.

    Returns:
        How many modules were set back.
    """
    exchanged = [module for module in model.modules() if isinstance(module, _Exchanged)]
    for module in exchanged:
        _take_out(module)
    return len(exchanged)
