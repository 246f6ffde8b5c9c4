"""MLPs with the norm before them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fused_ops.acceleration.deferred import SCALES, computed_or_deferred
from fused_ops.acceleration.exchange import (
    ATTRIBUTE,
    Exchanged,
    HandsThrough,
    active_members,
    run_stock,
    stock_type,
)
from fused_ops.acceleration.flow import Flow, inside_fused
from fused_ops.acceleration.layers import (
    activation_of,
    frozen_state,
    is_fully_connected,
    norm_before,
    width_in,
    width_out,
)
from fused_ops.acceleration.plan import Family, Plan
from fused_ops.core.autocast import result_dtype
from fused_ops.core.checks import FLOAT_TYPES
from fused_ops.core.hooks import is_hooked
from fused_ops.feed_forward import op as feed_forward
from fused_ops.feed_forward.module import mlp_on_modules, norm_state
from fused_ops.feed_forward.triton import LARGEST_NARROW


class _FirstLayer(Exchanged):
    """Of an MLP: computes the norm before it and everything up to the second layer."""

    def forward(self, x: Tensor) -> Tensor:
        members = active_members(self, 0)
        if members is None:
            return super().forward(x)
        _, norm, activation, fc2, *dropouts = members
        suited = x.dim() == 4 if isinstance(self, nn.Conv2d) else x.dim() > 1
        if not suited or x.dtype not in FLOAT_TYPES:
            return run_stock((norm, self, activation, *dropouts, fc2), x)
        chain = getattr(self, ATTRIBUTE)

        def compute(**options: Tensor) -> Tensor:
            return mlp_on_modules(x, norm, self, fc2, activation=chain.activation, **options)

        dtypes = (result_dtype(x), x.dtype, torch.float32)
        channel_dim = 1 if isinstance(self, nn.Conv2d) else x.dim() - 1
        return computed_or_deferred(chain, compute, x, dtypes, SCALES, channel_dim)


class Mlps(Family):
    """Two fully connected layers with an activation between them, and the norm before them."""

    kind = "mlp"

    @staticmethod
    def mixin(role: int, module: nn.Module) -> type[Exchanged]:
        return _FirstLayer if role == 0 else HandsThrough

    @staticmethod
    def plans(model: nn.Module, flow: Flow, claimed: set[int]) -> list[Plan]:
        fused = inside_fused(model)
        plans = []
        for name, fc1 in model.named_modules():
            if not is_fully_connected(fc1) or id(fc1) in claimed or id(fc1) in fused:
                continue
            plan = Plan(Mlps, name, fc1)
            chain = fc1.__dict__.get(ATTRIBUTE)
            if chain is not None:
                _, plan.norm, plan.activation, *others = chain.members()
                plan.others = tuple(others)
                plan.mark_exchanged(chain)
            elif not _complete_mlp(plan, flow, claimed):
                continue
            else:
                plan.declined = _mlp_obstacle(plan)
                if not plan.declined:
                    plan.norm, plan.remark = norm_before(
                        fc1, width_in(fc1), isinstance(fc1, nn.Conv2d), flow, claimed
                    )
                    plan.tail = flow.tail(plan.others[0])
            claimed.update(id(module) for module in plan.members if module is not None)
            widths = (width_in(fc1), width_out(fc1), width_in(fc1))
            norm = "" if plan.norm is None else f"{stock_type(plan.norm).__name__.removesuffix('2d')} -> "
            plan.pattern = f"{norm}MLP {'-'.join(map(str, widths))} {plan.operation}"
            plans.append(plan)
        return plans

    @staticmethod
    def weigh(module: nn.Module, x: Tensor) -> tuple[int, int]:
        """Bytes of a call; parameters are left out.

        In separate passes, forward: the norm and both layers read and write, the activation too, on the
        hidden map. Backward: each layer's two gradients, the activation's (3), the norm's (3). Layer scale
        and drop path are left out.
        """
        _, norm, _, fc2, *_ = getattr(module, ATTRIBUTE).members()
        tokens = x.permute(0, 2, 3, 1) if isinstance(module, nn.Conv2d) else x
        state = norm_state(norm) if isinstance(norm, nn.LayerNorm) else None
        if norm is not None and state is None:
            state = frozen_state(norm)._replace(batch_stats=norm.training or norm.running_mean is None)
        call = feed_forward.checked_call(
            tokens, module.weight.flatten(1), fc2.weight.flatten(1), state, module.bias, fc2.bias
        )
        size = x.element_size() * x.numel()
        hidden = size * width_out(module) // width_in(module)
        # The addition in a pass of its own; fused it costs a read.
        adds = getattr(module, ATTRIBUTE).tail is not None
        stock = 2 * size + 4 * hidden + (norm is not None) * 2 * size + adds * 3 * size
        fused = feed_forward.least_bytes(call, "forward") + adds * size
        if call.needs_grad:
            stock += 4 * size + 7 * hidden + (norm is not None) * 3 * size
            fused += feed_forward.least_bytes(call, "backward")
        return stock, fused


def _complete_mlp(plan: Plan, flow: Flow, claimed: set[int]) -> bool:
    """Whether an activation and a second layer, back to the same width, certainly follow; notes them."""
    fc1, dropouts = plan.module, []
    activation = flow.follower(fc1)
    while type(activation) is nn.Identity:
        activation = flow.follower(activation)
    plan.operation = activation_of(activation) or "none"
    if plan.operation == "none" or id(activation) in claimed:
        return False
    fc2 = flow.follower(activation)
    while type(fc2) in (nn.Identity, nn.Dropout):
        dropouts += [fc2] if type(fc2) is nn.Dropout else []
        fc2 = flow.follower(fc2)
    if not is_fully_connected(fc2) or stock_type(fc2) is not stock_type(fc1) or id(fc2) in claimed:
        return False
    # Networks that narrow first are gates: their inputs are pooled maps.
    widths = (width_in(fc1), width_out(fc1))
    if widths != (width_out(fc2), width_in(fc2)) or widths[0] > widths[1]:
        return False
    plan.activation, plan.others = activation, (fc2, *dropouts)
    return True


def _mlp_obstacle(plan: Plan) -> str:
    """Why the operator cannot stand for an MLP; empty if it can."""
    channels = width_in(plan.module)
    if channels > LARGEST_NARROW:
        # The operator would save memory there, but no time.
        return f"{channels} channels; up to {LARGEST_NARROW}, hidden values stay on chip"
    layers = (plan.module, plan.others[0])
    if any("forward" in layer.__dict__ for layer in layers):
        return "a layer has a forward of its own"
    if any(layer.weight.dtype not in FLOAT_TYPES for layer in layers):
        return f"parameters are {plan.module.weight.dtype}"
    if any(is_hooked(module) for module in plan.members if module is not None):
        return "has hooks, which would see the whole chain's output"
    return ""
