"""HIRI-ViT's HR chain, in whatever module computes it: recognised by its data flow alone."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fused_ops.acceleration.deferred import Deferred
from fused_ops.acceleration.exchange import (
    ATTRIBUTE,
    Exchanged,
    active_members,
    obstacle_to_whole,
    stock_type,
    type_name,
)
from fused_ops.acceleration.flow import (
    SUMS,
    SUMS_INTO,
    Flow,
    count_owners,
    graphs_of,
    inside_fused,
    is_fused,
    reads_metadata,
)
from fused_ops.acceleration.layers import (
    PLAIN_BATCH_NORMS,
    activation_of,
    frozen_state,
    is_fully_connected,
    width_in,
    width_out,
)
from fused_ops.acceleration.plan import Family, Plan
from fused_ops.core.activations import FUNCTIONS
from fused_ops.core.autocast import result_dtype
from fused_ops.core.batch_norm import BatchNormState
from fused_ops.core.checks import FLOAT_TYPES
from fused_ops.core.hooks import is_hooked
from fused_ops.hr_chain import op as hr_chain

_DROP_PATHS = {
    "fused_ops.core.drop_path.DropPath",
    "timm.layers.drop.DropPath",
    "torchvision.ops.stochastic_depth.StochasticDepth",
}
_FUNCTIONAL = {function: name for name, function in FUNCTIONS.items()} | {torch.relu: "relu", "relu": "relu"}
_TO_TOKENS, _TO_MAP = (0, 2, 3, 1), (0, 3, 1, 2)
# PyTorch's nearest neighbours of an odd size are those of a repetition up to here, for all sizes tried: it
# divides in float32.
_LARGEST_RESIZED = 4095


class _ObstacleError(Exception):
    """Why a module computes no HR chain, or one that the operator cannot."""


@dataclass
class _Found:
    """The modules of an HR chain.

    Attributes:
        passive: modules that change nothing, or that the operator stands for.
        identity: the input is added.
        cuts: the repeated map is cut to the input's size, so that this may be odd.
    """

    high: nn.Module
    low: nn.Module
    norm: nn.Module
    fc1: nn.Module
    fc2: nn.Module
    activation: nn.Module | None
    operation: str
    drop_path: nn.Module | None
    passive: tuple[nn.Module, ...]
    identity: bool
    cuts: bool


@dataclass
class _Walk:
    """A way through a graph, from its output to its input, that notes what it has passed.

    Attributes:
        tokens: channels are the last dimension at this place.
    """

    graph: fx.Graph
    module_of: Callable[[fx.Node], nn.Module | None]
    passive: list[nn.Module] = field(default_factory=list)
    passed: set[fx.Node] = field(default_factory=set)
    tokens: bool = False

    def find(self) -> _Found:
        (x,) = (node for node in self.graph.nodes if node.op == "placeholder")
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        terms = list(self._terms(output.args[0], x))
        identity = x in terms
        drop_path = None
        branches = [term for term in terms if term is not x]
        if len(branches) == 1 and type_name(self._module(branches[0])) in _DROP_PATHS:
            drop_path = self._module(branches[0])
            branches = list(self._terms(self._argument(branches[0]), x))
        if len(branches) != 2 or x in branches or len(terms) != len(set(terms)):
            raise _ObstacleError("it does not return the sum of two branches, with or without its input")
        highs = [node for node in branches if self._convolves(node, x)]
        if len(highs) != 1:
            raise _ObstacleError("no branch is one depthwise convolution of its input")
        high = self._module(highs[0])
        (node,) = (node for node in branches if node is not highs[0])
        self._argument(highs[0])
        node, cuts = self._before_growing(self._plain(node), (x, highs[0]))
        fc2 = self._module(node)
        node = self._plain(self._fully_connected(node))
        activation, operation, node = self._before_activation(node)
        fc1 = self._module(node)
        node = self._plain(self._fully_connected(node))
        norm = self._module(node)
        if type_name(norm) not in PLAIN_BATCH_NORMS or self.tokens:
            raise _ObstacleError("no BatchNorm comes before its fully connected layers")
        node = self._plain(self._argument(node))
        low = self._module(node)
        if self.tokens or not isinstance(low, nn.Conv2d) or self._plain(self._argument(node)) is not x:
            raise _ObstacleError("no convolution of its input comes before its norm")
        self._check_nothing_else(x, output)
        passive = tuple(dict.fromkeys(self.passive))
        return _Found(high, low, norm, fc1, fc2, activation, operation, drop_path, passive, identity, cuts)

    def _module(self, node: Any) -> nn.Module:
        module = self.module_of(node) if isinstance(node, fx.Node) else None
        # An nn.Module is none of the modules looked for.
        return nn.Module() if module is None else module

    def _argument(self, node: fx.Node) -> fx.Node:
        """What a module or a function of one tensor gets."""
        if not node.args or not isinstance(node.args[0], fx.Node):
            raise _ObstacleError("its data flow is another")
        if node.op == "call_module" and (len(node.args) > 1 or node.kwargs):
            raise _ObstacleError("a part of it gets further arguments")
        self.passed.add(node)
        return node.args[0]

    def _plain(self, node: fx.Node) -> fx.Node:
        """What comes before modules that do nothing, and before permutations."""
        while True:
            module = self._module(node)
            order = None
            if node.target in ("permute", torch.permute):
                order = node.args[1:] if isinstance(node.args[1], int) else tuple(node.args[1])
            elif type_name(module) == "torchvision.ops.misc.Permute":
                order = tuple(module.dims)
            elif type(module) not in (nn.Identity, nn.Dropout):
                return node
            if order is not None:
                order = tuple(dim % 4 if isinstance(dim, int) else dim for dim in order)
                if order != (_TO_TOKENS if self.tokens else _TO_MAP):
                    raise _ObstacleError("its data flow is another")
                self.tokens = not self.tokens
            if node.op == "call_module":
                self.passive.append(module)
            node = self._argument(node)

    def _terms(self, node: Any, x: fx.Node) -> Iterator[fx.Node]:
        """What is added up to make ``node``."""
        if not isinstance(node, fx.Node):
            raise _ObstacleError("it returns something else than a map")
        node = self._plain(node)
        if self.tokens:
            raise _ObstacleError("its data flow is another")
        if node.target not in (*SUMS, *SUMS_INTO):
            yield node
            return
        if len(node.args) != 2 or node.kwargs or not all(isinstance(arg, fx.Node) for arg in node.args):
            raise _ObstacleError("it adds something else than maps")
        self.passed.add(node)
        first = list(self._terms(node.args[0], x))
        if node.target in SUMS_INTO and first == [x]:
            raise _ObstacleError("it changes its input in place")
        yield from (*first, *self._terms(node.args[1], x))

    def _convolves(self, node: fx.Node, x: fx.Node) -> bool:
        return isinstance(self._module(node), nn.Conv2d) and node.args == (x,)

    def _before_growing(self, node: fx.Node, alike: tuple[fx.Node, ...]) -> tuple[fx.Node, bool]:
        """What is repeated 2x2 times, and whether the result is cut to the size of the maps ``alike``."""
        cuts = False
        if node.target is operator.getitem and not self.tokens:
            cuts = _is_cut(node.args[1], alike)
            node = self._plain(self._argument(node))
        module, dims = self._module(node), set()
        while node.target in ("repeat_interleave", torch.repeat_interleave) and len(dims) < 2:
            named = dict(zip(("repeats", "dim"), node.args[1:], strict=False)) | node.kwargs
            if named.keys() != {"repeats", "dim"} or named["repeats"] != 2:
                raise _ObstacleError("its low-resolution map is not repeated 2x2 times")
            # In a map, whatever the order of the dimensions here is.
            dims.add(named["dim"] % 4 + self.tokens)
            node = self._plain(self._argument(node))
        if dims == {2, 3}:
            return node, cuts
        if not dims and stock_type(module) in (nn.Upsample, nn.UpsamplingNearest2d) and not self.tokens:
            given = {"size": module.size, "scale_factor": module.scale_factor, "mode": module.mode}
            self.passive.append(module)
        elif not dims and node.target is F.interpolate and not self.tokens:
            bound = inspect.signature(F.interpolate).bind(*node.args, **node.kwargs)
            bound.apply_defaults()
            given = bound.arguments
        else:
            raise _ObstacleError("its low-resolution map is not repeated 2x2 times")
        if given["mode"] not in ("nearest", "nearest-exact"):
            raise _ObstacleError(f"its low-resolution map is enlarged by {given['mode']} interpolation")
        if given["size"] is not None:
            if _size(given["size"], alike) != ("H", "W"):
                raise _ObstacleError("its low-resolution map is enlarged to another size")
            # The exact kind takes other neighbours there.
            cuts = cuts or given["mode"] == "nearest"
        elif _pair(given["scale_factor"]) != (2, 2):
            raise _ObstacleError(f"its low-resolution map is enlarged by {given['scale_factor']}")
        return self._plain(self._argument(node)), cuts

    def _fully_connected(self, node: fx.Node) -> fx.Node:
        module = self._module(node)
        if not is_fully_connected(module) or isinstance(module, nn.Linear) != self.tokens:
            raise _ObstacleError("no two fully connected layers make its low-resolution map")
        return self._argument(node)

    def _before_activation(self, node: fx.Node) -> tuple[nn.Module | None, str, fx.Node]:
        module = self._module(node)
        if is_fully_connected(module):
            return None, "none", node
        if node.op == "call_module":
            operation = activation_of(module)
            if operation is None:
                raise _ObstacleError(f"the operator has no activation {type(module).__name__}")
            return module, operation, self._plain(self._argument(node))
        operation, named = _FUNCTIONAL.get(node.target), {**node.kwargs}
        named.pop("inplace", None)
        if operation == "gelu" and named.pop("approximate", "none") == "tanh":
            operation = "gelu_tanh"
        if operation is None or named or len(node.args) != 1:
            name = getattr(node.target, "__name__", node.target)
            raise _ObstacleError(f"the operator has no activation {name}, or not with its arguments")
        return None, operation, self._plain(self._argument(node))

    def _check_nothing_else(self, x: fx.Node, output: fx.Node) -> None:
        """Everything that runs belongs to the chain, or only asks for sizes."""
        sizes: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node in self.passed or node is x or node is output:
                continue
            asked = bool(node.all_input_nodes) and sizes.issuperset(node.all_input_nodes)
            if not (reads_metadata(node) or asked) or node.op == "call_module":
                raise _ObstacleError("it computes something else, too")
            sizes.add(node)


def _pair(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value, value)


def _size(value: Any, alike: tuple[fx.Node, ...]) -> Any:
    """A size, or a tuple of them, as a name ("H") where it is that of the maps ``alike``; None for others."""
    if isinstance(value, tuple | list):
        return tuple(_size(entry, alike) for entry in value)
    if not isinstance(value, fx.Node):
        return None
    names = ("B", "C", "H", "W")
    if reads_metadata(value) and value.args[0] in alike:
        if value.args[1:] == ("shape",) or (value.target == "size" and len(value.args) == 1):
            return names
        return names[value.args[1]] if value.target == "size" and isinstance(value.args[1], int) else None
    if value.target is operator.getitem and isinstance(value.args[1], int | slice):
        sizes = _size(value.args[0], alike)
        return sizes[value.args[1]] if isinstance(sizes, tuple) else None
    return None


def _is_cut(index: Any, alike: tuple[fx.Node, ...]) -> bool:
    """Whether an index cuts a map to the size of the maps ``alike``; it does nothing to one of that size."""
    index = index if isinstance(index, tuple) else (index,)
    if index[:1] == (Ellipsis,):
        index = (slice(None),) * (5 - len(index)) + index[1:]
    index += (slice(None),) * (4 - len(index))
    names = (None, None, "H", "W")
    if len(index) != 4 or not all(isinstance(part, slice) for part in index):
        raise _ObstacleError("its low-resolution map is indexed")
    for part, name in zip(index, names, strict=True):
        ends = part.stop is None or (name is not None and _size(part.stop, alike) == name)
        if part.start not in (None, 0) or part.step not in (None, 1) or not ends:
            raise _ObstacleError("its low-resolution map is cut to another size")
    return all(part.stop is not None for part in index[2:])


def _find(module: nn.Module, flow: Flow, owners: dict[int, int]) -> _Found:
    """The chain that ``module`` certainly computes.

    Raises:
        _ObstacleError: it doesn't, or the operator cannot stand for it.
    """
    if obstacle := obstacle_to_whole(module):
        raise _ObstacleError(obstacle)
    graphs = graphs_of(module, flow.whole)
    if not graphs:
        raise _ObstacleError("its forward cannot be traced")
    try:
        found, *others = [_Walk(graph, module_of).find() for graph, module_of in graphs]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        # Arguments by name, computed numbers: whatever stands where the walk looks for something else.
        raise _ObstacleError("its data flow is another") from None
    cuts = found.cuts and all(other.cuts for other in others)
    if any(replace(other, cuts=found.cuts) != found for other in others):
        raise _ObstacleError("what it computes depends on its mode or on its input")
    _check_parts(found, owners)
    if any(is_hooked(inner) for inner in module.modules()):
        raise _ObstacleError("a part of it has hooks")
    return replace(found, cuts=cuts)


def _check_parts(found: _Found, owners: dict[int, int]) -> None:
    channels = found.high.in_channels
    for words, conv, stride in (("high", found.high, 1), ("low", found.low, 2)):
        for name, *allowed in (
            ("kernel_size", (3, 3)),
            ("stride", (stride, stride)),
            # PyTorch has "same" without a stride only.
            ("padding", (1, 1), "same"),
            ("dilation", (1, 1)),
            ("padding_mode", "zeros"),
            ("in_channels", channels),
        ):
            if (value := getattr(conv, name)) not in allowed:
                raise _ObstacleError(
                    f"its {words}-resolution convolution has {name}={value!r}, not {allowed[0]!r}"
                )
    if found.low.bias is not None:
        raise _ObstacleError("its low-resolution convolution has a bias, for which the operator has no place")
    widths = (width_in(found.fc1), width_out(found.fc1), width_out(found.fc2), found.norm.num_features)
    if widths != (channels, width_in(found.fc2), channels, channels):
        raise _ObstacleError("its layers do not fit together")
    layers = (found.high, found.low, found.fc1, found.fc2)
    if any(layer.weight.dtype not in FLOAT_TYPES for layer in layers):
        raise _ObstacleError(f"parameters are {found.high.weight.dtype}")
    parts = (*layers, found.norm, found.activation, found.drop_path, *found.passive)
    for part in parts:
        if part is None:
            continue
        if "forward" in part.__dict__ or (part in layers[:2] and stock_type(part) is not nn.Conv2d):
            raise _ObstacleError("a part of it has a forward of its own")
        if owners[id(part)] > 1 or ATTRIBUTE in part.__dict__:
            raise _ObstacleError("a part of it belongs to other modules too")


class _Chain(Exchanged):
    """Computes the whole chain, whose modules are read and, but for drop path, not called."""

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        members = active_members(self, 0)
        x = inputs[0] if len(inputs) == 1 and not named else None
        # Tracers see the stock module.
        if members is None or not isinstance(x, Tensor) or x.dim() != 4 or x.dtype not in FLOAT_TYPES:
            return super().forward(*inputs, **named)
        chain = getattr(self, ATTRIBUTE)
        odd = x.shape[2] % 2 or x.shape[3] % 2
        if odd and (not chain.options["cuts"] or max(x.shape[2:]) > _LARGEST_RESIZED):
            return super().forward(*inputs, **named)
        _, norm, _, high, low, fc1, fc2, drop_path, *_ = members

        def compute(residual: Tensor | None = None, drop_path: Tensor | None = None) -> Tensor:
            return hr_chain.hr_block(
                x,
                high.weight,
                low.weight,
                fc1.weight.flatten(1),
                fc2.weight.flatten(1),
                BatchNormState.from_module(norm),
                high_bias=high.bias,
                fc1_bias=fc1.bias,
                fc2_bias=fc2.bias,
                activation=chain.activation,
                # Nothing but x is added to it, here.
                identity=residual is not None,
                drop_path=drop_path,
            )

        # What drop path multiplies by is up to its module.
        dtype = result_dtype(x)
        branch = Deferred(compute, x, (dtype, dtype), ("drop_path",), 1)
        if drop_path is not None:
            branch = drop_path(branch)
        if chain.options["identity"]:
            return x + branch
        return branch.value() if isinstance(branch, Deferred) else branch


class _Read(Exchanged):
    """Part of a chain that it doesn't call; called by others, it is the stock module."""


class HRChains(Family):
    """Modules that compute HIRI-ViT's HR-block, whatever they and their parts are called."""

    kind = "hr_chain"

    @staticmethod
    def mixin(role: int, module: nn.Module) -> type[Exchanged]:
        return _Chain if role == 0 else _Read

    @staticmethod
    def plans(model: nn.Module, flow: Flow, claimed: set[int]) -> list[Plan]:
        owners = count_owners(model)
        plans = []
        for candidates in _candidates(model):
            plan = _exchanged_before(candidates) or _plan(candidates, flow, owners)
            if not plan.declined:
                claimed.update(id(member) for member in plan.members if member is not None)
            plans.append(plan)
        return plans

    @staticmethod
    def weigh(module: nn.Module, x: Tensor) -> tuple[int, int]:
        """Bytes of a call; parameters are left out.

        In separate passes, forward: both convolutions, the norm (statistics once more), both layers, the
        activation and the repetition read and write; either addition takes 3. Backward: two gradients of each
        convolution and layer, the norm's (5), the activation's (3), the repetition's; the input's gradient is
        added up from two parts, or three.
        """
        chain = getattr(module, ATTRIBUTE)
        _, norm, _, high, low, fc1, fc2, *_ = chain.members()
        state = frozen_state(norm)._replace(batch_stats=norm.training or norm.running_mean is None)
        call = hr_chain.checked_call(
            x,
            high.weight,
            low.weight,
            fc1.weight.flatten(1),
            fc2.weight.flatten(1),
            state,
            high.bias,
            fc1.bias,
            fc2.bias,
            chain.activation,
            chain.options["identity"],
            None,
        )
        size, activates = x.element_size(), chain.activation != "none"
        full, small = size * x.numel(), size * call.values_per_channel * x.shape[1]
        hidden = small * width_out(fc1) // width_in(fc1)
        stock = (7 + 3 * call.identity) * full + 2 * small  # convolutions, repetition, additions
        stock += (2 + call.batch_stats) * small + 2 * (small + hidden) + 2 * activates * hidden
        fused = hr_chain.least_bytes(call, "forward")
        if call.needs_grad:
            stock += (10 + 3 * call.identity) * full + 3 * small
            stock += 5 * small + 4 * (small + hidden) + 3 * activates * hidden
            fused += hr_chain.least_bytes(call, "backward")
        return stock, fused


def _candidates(model: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
    """Modules, each inside the one before, whose layers are those of one HR chain, whatever they do."""
    fused = inside_fused(model)
    found: dict[frozenset[int], list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        layers = [inner for inner in module.modules() if inner._parameters or inner._buffers]
        if len(layers) != 5 or is_fused(module) or any(id(layer) in fused for layer in layers):
            continue
        norms = sum(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in layers)
        convs = sum(map(_is_depthwise, layers))
        if (norms, convs) == (1, 2) and sum(map(is_fully_connected, layers)) == 2:
            found.setdefault(frozenset(map(id, layers)), []).append((name, module))
    yield from found.values()


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels == layer.out_channels


def _exchanged_before(candidates: list[tuple[str, nn.Module]]) -> Plan | None:
    for name, module in candidates:
        if isinstance(module, _Chain):
            chain = getattr(module, ATTRIBUTE)
            _, norm, activation, *others = chain.members()
            plan = Plan(HRChains, name, module, "", norm, activation, tuple(others), options=chain.options)
            plan.mark_exchanged(chain)
            plan.pattern = _describe(plan)
            return plan
    return None


def _plan(candidates: list[tuple[str, nn.Module]], flow: Flow, owners: dict[int, int]) -> Plan:
    """The outermost module that computes a chain; the innermost with the reason where none does."""
    for name, module in candidates:
        plan = Plan(HRChains, name, module, "HR chain")
        try:
            found = _find(module, flow, owners)
        except _ObstacleError as reason:
            plan.declined = str(reason)
            continue
        plan.norm, plan.activation, plan.operation = found.norm, found.activation, found.operation
        layers = (found.high, found.low, found.fc1, found.fc2)
        plan.others = (*layers, found.drop_path, *found.passive)
        plan.options = {"identity": found.identity, "cuts": found.cuts}
        plan.pattern = _describe(plan)
        return plan
    return plan


def _describe(plan: Plan) -> str:
    _, _, fc1, fc2, drop_path, *_ = plan.others
    widths = "-".join(str(width) for width in (width_in(fc1), width_out(fc1), width_out(fc2)))
    parts = [f"HR chain {widths} {plan.operation}"]
    if drop_path is not None:
        parts.append("drop path")
    if plan.options["identity"]:
        parts.append("+ input")
    return " -> ".join(parts)
