"""Self-attention on a reduced map, of PVTv2, Twins and Next-ViT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from fused_ops.acceleration.deferred import computed_or_deferred
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
from fused_ops.acceleration.layers import norm_before
from fused_ops.acceleration.plan import Family, Plan
from fused_ops.attention.block import AttentionBlockCall, least_bytes
from fused_ops.attention.module import POOLED_SIZE, attention_branch
from fused_ops.attention.triton_block import fits_sizes
from fused_ops.core.autocast import result_dtype
from fused_ops.core.checks import FLOAT_TYPES
from fused_ops.core.hooks import is_hooked
from fused_ops.core.layer_norm import LayerNormState

_CLASSES = {
    "timm.models.pvt_v2.Attention",
    "timm.models.twins.GlobalSubSampleAttn",
    "timm.models.nextvit.EfficientAttention",
}


def _is_unwatched(module: nn.Module, kind: type[nn.Module]) -> bool:
    return type(module) is kind and not is_hooked(module) and "forward" not in module.__dict__


def _form(module: nn.Module) -> tuple[str, int] | None:
    """The reduction and its ratio, as ``attention_branch`` takes them; None for what it cannot do.

    Parts that are read and not called, or called with other dimensions, must be stock ones without hooks.
    """
    if hasattr(module, "k"):
        if module.sr is None:
            return "token_pool", 1
        norm = _is_unwatched(module.norm, nn.BatchNorm1d) or _is_unwatched(module.norm, nn.Identity)
        pooled = _is_unwatched(module.sr, nn.AvgPool1d) and norm
        return ("token_pool", module.sr_ratio) if pooled else None
    if getattr(module, "pool", None) is not None:
        pooled = _is_unwatched(module.pool, nn.AdaptiveAvgPool2d) and module.pool.output_size == POOLED_SIZE
        gelu = _is_unwatched(module.act, nn.GELU) and module.act.approximate == "none"
        return ("pool", 1) if pooled and gelu else None
    return ("conv", 1) if module.sr is None else ("conv", module.sr.stride[0])


class _Attention(Exchanged):
    def forward(self, x: Tensor, *size: Any, **named: Any) -> Tensor:
        members = active_members(self, 0)
        if members is None:
            return super().forward(x, *size, **named)
        norm = members[1]
        # Tracers see the stock module.
        suited = not isinstance(x, fx.Proxy) and x.dim() == 3 and x.dtype in FLOAT_TYPES and not named
        form = _form(self) if suited else None
        if form is None:
            return super().forward(run_stock((norm,), x), *size, **named)

        def compute(**options: Tensor) -> Tensor:
            state = None if norm is None else LayerNormState.from_module(norm)
            return attention_branch(self, x, size[0] if size else None, *form, norm=state, **options)

        dtypes = (result_dtype(x), x.dtype)
        return computed_or_deferred(getattr(self, ATTRIBUTE), compute, x, dtypes, ("drop_path",), 2)


class Attentions(Family):
    """Modules whose keys and values come from a reduced map."""

    kind = "attention"
    whole = _CLASSES

    @staticmethod
    def mixin(role: int, module: nn.Module) -> type[Exchanged]:
        return _Attention if role == 0 else HandsThrough

    @staticmethod
    def plans(model: nn.Module, flow: Flow, claimed: set[int]) -> list[Plan]:
        plans = []
        for name, module in model.named_modules():
            if type_name(module) not in _CLASSES:
                continue
            plan, form = Plan(Attentions, name, module), _form(module)
            chain = module.__dict__.get(ATTRIBUTE)
            if chain is not None:
                plan.norm = chain.members()[1]
                plan.mark_exchanged(chain)
            elif obstacle := obstacle_to_whole(module):
                plan.declined = obstacle
            elif form is None:
                plan.declined = "its reduction has hooks or parts of another kind"
            else:
                plan.norm, plan.remark = norm_before(module, module.q.in_features, False, flow, claimed)
                if module.proj.out_features == module.q.in_features:
                    plan.tail = flow.tail(module)
            reduction = "" if form is None else f", {form[0].replace('_', ' ')} {form[1]}"
            claimed.update(id(member) for member in plan.members if member is not None)
            norm = "" if plan.norm is None else "LayerNorm -> "
            plan.pattern = f"{norm}attention of {module.num_heads} heads{reduction}"
            plans.append(plan)
        return plans

    @staticmethod
    def weigh(module: nn.Module, x: Tensor) -> tuple[int, int]:
        """Bytes of a call; the reduction, parameters and what there is one of per query are left out.

        In separate passes, forward: the norm, both projections and the attention read and write, the addition
        takes 3. Backward: two gradients of each projection, the attention's own (the output and its gradient
        for their products, then everything), the norm's. Fused where the whole branch is one operator: its
        own, beside the norm for keys and values and the sum of both gradients of the tokens; else only the
        attention saves something.
        """
        chain = getattr(module, ATTRIBUTE)
        reduction, ratio = _form(module)
        query = x.element_size() * x.shape[0] * x.shape[1] * module.q.out_features
        tokens = POOLED_SIZE**2 if reduction == "pool" else x.shape[1] // ratio**2
        key = query // max(x.shape[1], 1) * tokens
        norm, adds = chain.members()[1] is not None, chain.tail is not None
        trained = x.requires_grad or any(p.requires_grad for p in module.parameters())
        training = torch.is_grad_enabled() and trained
        around = (2 * norm + 4 + 3 * adds + training * (8 + 3 * norm)) * query
        core = 2 * query + 2 * key + training * (5 * query + 4 * key)
        whole = module.proj.out_features == x.shape[2] == module.q.out_features
        if not (whole and fits_sizes(x.shape[2], tokens, training, x.dtype)[0]):
            return around + core, around + core - training * 2 * query
        wide = torch.empty((x.shape[0], module.num_heads, tokens, x.shape[2]), dtype=x.dtype, device="meta")
        call = AttentionBlockCall(x, wide, wide, *[None] * 6, 1.0, norm, 0.0, adds, training)
        directions = ("forward", "backward")[: 1 + training]
        fused = sum(least_bytes(call, direction) for direction in directions)
        beside = norm * (2 + training * 6) * query
        return around + core, fused + beside
