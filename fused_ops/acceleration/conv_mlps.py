"""MLPs with a depthwise convolution inside, of PVTv2, with the norm before them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from fused_ops.acceleration.deferred import SCALES, computed_or_deferred
from fused_ops.acceleration.exchange import (
    ATTRIBUTE,
    Exchanged,
    HandsThrough,
    active_members,
    obstacle_to_whole,
    run_stock,
    type_name,
)
from fused_ops.acceleration.flow import Flow
from fused_ops.acceleration.layers import activation_of, norm_before
from fused_ops.acceleration.plan import Family, Plan
from fused_ops.core.autocast import result_dtype
from fused_ops.core.checks import FLOAT_TYPES
from fused_ops.core.hooks import is_hooked
from fused_ops.feed_forward import op as feed_forward
from fused_ops.feed_forward.module import check_conv, conv_mlp_on_modules, norm_state

_CLASSES = {"timm.models.pvt_v2.MlpWithDepthwiseConv"}
# Read and not called.
_PARTS = ("fc1", "relu", "dwconv", "act", "fc2")


def _activations(module: nn.Module) -> tuple[str, str] | None:
    """Names of the activations before and behind the convolution; None for what there is no operator for."""
    if any(is_hooked(part) or "forward" in part.__dict__ for part in map(module.get_submodule, _PARTS)):
        return None
    layers = type(module.fc1) is type(module.fc2) is nn.Linear and type(module.dwconv) is nn.Conv2d
    first = "none" if type(module.relu) is nn.Identity else activation_of(module.relu)
    second = activation_of(module.act)
    return (first, second) if layers and first is not None and second is not None else None


class _ConvMlp(Exchanged):
    def forward(self, x: Tensor, *size: Any, **named: Any) -> Tensor:
        members = active_members(self, 0)
        if members is None:
            return super().forward(x, *size, **named)
        norm = members[1]
        activations = _activations(self)
        dropped = self.drop.training and self.drop.p > 0.0
        # Tracers see the stock module.
        suited = not isinstance(x, fx.Proxy) and x.dim() == 3 and x.dtype in FLOAT_TYPES and len(size) == 1
        if activations is None or dropped or is_hooked(self.drop) or not suited:
            return super().forward(run_stock((norm,), x), *size, **named)

        def compute(**options: Tensor) -> Tensor:
            return conv_mlp_on_modules(
                x,
                norm,
                self.fc1,
                self.dwconv,
                self.fc2,
                size=tuple(size[0]),
                activation=activations[0],
                conv_activation=activations[1],
                **options,
            )

        dtypes = (result_dtype(x), x.dtype, torch.float32)
        return computed_or_deferred(getattr(self, ATTRIBUTE), compute, x, dtypes, SCALES, 2)


class ConvMlps(Family):
    """Two fully connected layers with a depthwise convolution between them, and the norm before them."""

    kind = "mlp"
    whole = _CLASSES

    @staticmethod
    def mixin(role: int, module: nn.Module) -> type[Exchanged]:
        return _ConvMlp if role == 0 else HandsThrough

    @staticmethod
    def plans(model: nn.Module, flow: Flow, claimed: set[int]) -> list[Plan]:
        plans = []
        for name, module in model.named_modules():
            if type_name(module) not in _CLASSES:
                continue
            plan, activations = Plan(ConvMlps, name, module), _activations(module)
            chain = module.__dict__.get(ATTRIBUTE)
            if chain is not None:
                plan.norm = chain.members()[1]
                plan.mark_exchanged(chain)
            else:
                plan.declined = _obstacle(module, activations)
                if not plan.declined:
                    channels = module.fc1.in_features
                    plan.norm, plan.remark = norm_before(module, channels, False, flow, claimed)
                    plan.tail = flow.tail(module)
            if not plan.declined:
                claimed.update(id(inner) for inner in module.modules())
                claimed.update(id(member) for member in plan.members if member is not None)
            widths = f"{module.fc1.in_features}-{module.fc1.out_features}-{module.fc2.out_features}"
            norm = "" if plan.norm is None else "LayerNorm -> "
            plan.pattern = f"{norm}MLP {widths} depthwise {activations[1] if activations else ''}".rstrip()
            plans.append(plan)
        return plans

    @staticmethod
    def weigh(module: nn.Module, x: Tensor) -> tuple[int, int]:
        """Bytes of a call, of both layers' products and everything between.

        In separate passes, forward: the norm, both layers, the convolution and the activations read and
        write. Backward: two gradients of each layer and of the convolution, the activations' and the norm's
        (3).
        """
        chain = getattr(module, ATTRIBUTE)
        norm, (first, second) = chain.members()[1], _activations(module)
        side = (1, x.shape[1])
        call = feed_forward.checked_call(
            x,
            module.fc1.weight,
            module.fc2.weight,
            None if norm is None else norm_state(norm),
            module.fc1.bias,
            module.fc2.bias,
            first,
            conv_weight=module.dwconv.weight,
            conv_bias=module.dwconv.bias,
            conv_activation=second,
            size=side,
        )
        size = x.element_size() * x.numel()
        hidden = size * module.fc1.out_features // module.fc1.in_features
        adds, passes = chain.tail is not None, 1 + (first != "none")
        # Each product reads or writes its matrix, both ways.
        matrix = x.element_size() * module.fc1.weight.numel()
        stock = (2 * (norm is not None) + 2 + 3 * adds) * size + (4 + 2 * passes) * hidden + 2 * matrix
        fused = feed_forward.least_bytes(call, "forward") + adds * size
        if call.needs_grad and torch.is_grad_enabled():
            stock += (4 + 3 * (norm is not None)) * size + (8 + 3 * passes) * hidden + 4 * matrix
            fused += feed_forward.least_bytes(call, "backward")
        return stock, fused


def _obstacle(module: nn.Module, activations: tuple[str, str] | None) -> str:
    """Why the operator cannot stand for a module; empty if it can."""
    obstacle = obstacle_to_whole(module)
    if obstacle:
        return obstacle
    if activations is None:
        return "a part of it has hooks or is of another kind"
    if module.fc1.in_features != module.fc2.out_features:
        return f"makes {module.fc2.out_features} of {module.fc1.in_features} channels"
    try:
        check_conv(module.dwconv)
    except ValueError as error:
        return str(error)
    return ""
