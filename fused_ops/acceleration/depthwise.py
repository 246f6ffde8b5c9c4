"""Depthwise convolutions, with the norm and the activation after them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fused_ops.acceleration.deferred import computed_or_deferred
from fused_ops.acceleration.exchange import (
    ATTRIBUTE,
    Exchanged,
    HandsThrough,
    active_members,
    run_stock,
    stock_type,
)
from fused_ops.acceleration.flow import Flow, Tail, count_owners, inside_fused
from fused_ops.acceleration.layers import activation_of, frozen_state, holds_activation, is_norm
from fused_ops.acceleration.plan import Family, Plan
from fused_ops.core.autocast import result_dtype
from fused_ops.core.batch_norm import BatchNormState
from fused_ops.core.checks import FLOAT_TYPES
from fused_ops.core.hooks import is_hooked
from fused_ops.depthwise.op import DepthwiseCall, checked_call, depthwise_conv, least_bytes


class _Convolution(Exchanged):
    def forward(self, x: Tensor) -> Tensor:
        members = active_members(self, 0)
        if members is None:
            return super().forward(x)
        _, norm, activation = members
        if x.dim() != 4 or x.dtype not in FLOAT_TYPES:
            return run_stock((self, norm, activation), x)
        chain = getattr(self, ATTRIBUTE)

        def compute(residual: Tensor | None = None) -> Tensor:
            state = None
            if norm is not None:
                state = frozen_state(norm) if chain.frozen else BatchNormState.from_module(norm)
            return depthwise_conv(
                x,
                self.weight,
                self.bias,
                stride=self.stride,
                padding=0 if self.padding == "valid" else self.padding,
                dilation=self.dilation,
                norm=state,
                activation=chain.activation,
                residual=residual,
            )

        dtype = result_dtype(x)
        return computed_or_deferred(chain, compute, x, (dtype, dtype))


class _NormAct(Exchanged):
    def forward(self, x: Tensor) -> Tensor:
        members = active_members(self, 1)
        if members is None:
            return super().forward(x)
        return x if members[2] is self.act else self.act(self.drop(x))


def _conv_obstacle(conv: nn.Conv2d) -> str:
    """Why the operator cannot stand for ``conv``; empty if it can."""
    stock = stock_type(conv)
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
    if is_hooked(conv):
        return "has hooks, which would see the whole chain's output"
    return ""


def _describe(plan: Plan) -> str:
    conv = plan.module
    kernel = "x".join(map(str, conv.kernel_size))
    stride = "" if set(conv.stride) == {1} else f" stride {'x'.join(map(str, conv.stride))}"
    parts = [f"depthwise {kernel}{stride}{'' if conv.bias is None else ' + bias'}"]
    if plan.norm is not None:
        parts.append(stock_type(plan.norm).__name__.removesuffix("Act2d").removesuffix("2d"))
    if plan.operation != "none":
        parts.append(plan.operation)
    return " -> ".join(parts)


def _extend(plan: Plan, flow: Flow, claimed: set[int], owners: dict[int, int]) -> None:
    """Add the norm and the activation that certainly follow, or a remark on why not."""
    last = plan.module
    following = flow.follower(last)
    if following is None and id(plan.module) in flow.unknown:
        plan.remark = "alone: what follows it cannot be traced"
    if is_norm(following):
        remark = _norm_obstacle(plan.module, following, claimed)
        if remark:
            plan.remark = f"alone: {remark}"
            return
        plan.norm = last = following
        if holds_activation(following):
            inner = following.act
            plan.operation = activation_of(inner) or "none"
            if plan.operation != "none":
                shared = owners[id(inner)] > 1 or id(inner) in flow.calls or id(inner) in flow.unknown
                if shared or is_hooked(inner) or type(following.drop) is not nn.Identity:
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
    operation = activation_of(following)
    if operation is None:
        return
    if id(following) in claimed or is_hooked(following):
        plan.remark = "the activation after it is hooked or belongs to another chain, and stays outside"
        return
    plan.activation, plan.operation = following, operation


def _keeps_size(conv: nn.Conv2d) -> bool:
    if conv.padding == "same":
        return True
    sizes = zip(conv.kernel_size, conv.dilation, conv.padding, strict=True) if conv.padding != "valid" else ()
    even = [2 * padding == dilation * (size - 1) for size, dilation, padding in sizes]
    return set(conv.stride) == {1} and bool(even) and all(even)


def _tail(plan: Plan, flow: Flow) -> Tail | None:
    """The addition after the chain, if nothing stands in between that the operator cannot do."""
    last = plan.activation or plan.norm or plan.module
    if plan.norm is not None and holds_activation(plan.norm):
        if plan.operation == "none" and type(plan.norm.act) is not nn.Identity:
            return None
        last = plan.norm if plan.activation is plan.norm.act else last
    tail = flow.tail(last)
    return tail if tail is not None and all(type(m) is nn.Identity for m in tail.modules) else None


def _norm_obstacle(conv: nn.Module, norm: nn.Module, claimed: set[int]) -> str:
    if id(norm) in claimed:
        return "its norm belongs to another chain"
    if is_hooked(norm):
        return "its norm has hooks"
    if parametrize.is_parametrized(norm):
        return "its norm has parametrizations"
    channels = norm.num_features if hasattr(norm, "num_features") else norm.running_mean.numel()
    return "" if channels == conv.out_channels else "its norm has another number of channels"


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


class Depthwise(Family):
    """Depthwise convolutions, alone or with the norm and the activation after them."""

    kind = "depthwise"

    @staticmethod
    def mixin(role: int, module: nn.Module) -> type[Exchanged]:
        if role == 0:
            return _Convolution
        return _NormAct if role == 1 and holds_activation(module) else HandsThrough

    @staticmethod
    def plans(model: nn.Module, flow: Flow, claimed: set[int]) -> list[Plan]:
        owners = count_owners(model)
        fused = inside_fused(model)
        plans = []
        for name, conv in model.named_modules():
            if not isinstance(conv, nn.Conv2d) or conv.groups == 1 or conv.groups != conv.in_channels:
                continue
            if id(conv) in claimed:
                continue
            plan = Plan(Depthwise, name, conv)
            plans.append(plan)
            chain = conv.__dict__.get(ATTRIBUTE)
            if chain is not None:
                _, plan.norm, plan.activation = chain.members()
                plan.mark_exchanged(chain)
            elif id(conv) in fused:
                plan.declined = "belongs to a fused module already"
            else:
                plan.declined = _conv_obstacle(conv)
                if not plan.declined:
                    _extend(plan, flow, claimed, owners)
                    if _keeps_size(conv):
                        plan.tail = _tail(plan, flow)
            claimed.update(id(module) for module in plan.members if module is not None)
            plan.pattern = _describe(plan)
        return plans

    @staticmethod
    def weigh(conv: nn.Module, x: Tensor) -> tuple[int, int]:
        chain = getattr(conv, ATTRIBUTE)
        _, norm, _ = chain.members()
        state = None
        if norm is not None:
            state = frozen_state(norm)
            if not chain.frozen:
                state = state._replace(batch_stats=norm.training or norm.running_mean is None)
        padding = 0 if conv.padding == "valid" else conv.padding
        options = (conv.stride, padding, conv.dilation, state, "post", chain.activation)
        call = checked_call(x, conv.weight, conv.bias, *options, None, "after", False)
        directions = ("forward", "backward") if call.needs_grad else ("forward",)
        # The addition in a pass of its own; fused it costs a read.
        residual = 0 if chain.tail is None else x.element_size() * torch.Size(call.output_shape).numel()
        return (
            sum(separate_bytes(call, direction) for direction in directions) + 3 * residual,
            sum(least_bytes(call, direction) for direction in directions) + residual,
        )
