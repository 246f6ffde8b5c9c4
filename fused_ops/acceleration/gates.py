"""Gates: modules that scale a map by what a small network makes of the pooled map."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fused_ops.acceleration.deferred import computed_or_deferred
from fused_ops.acceleration.exchange import ATTRIBUTE, Exchanged, active_members, obstacle_to_whole, type_name
from fused_ops.acceleration.flow import Flow
from fused_ops.acceleration.plan import Family, Plan
from fused_ops.core.checks import FLOAT_TYPES
from fused_ops.core.hooks import is_hooked
from fused_ops.gate import context_pool, gate_scale, pool_channels, pool_positions

_GATES = {
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.modules.activation.Hardsigmoid": "hard_sigmoid",
    "timm.layers.activations.Sigmoid": "sigmoid",
    "timm.layers.activations.HardSigmoid": "hard_sigmoid",
}


def _mean_and_max(module: nn.Module) -> tuple[str, ...]:
    return ("mean", "max") if getattr(module, "add_maxpool", False) else ("mean",)


def _half_of_each(pooled: Tensor) -> Tensor:
    """The mean, or half of the mean and half of the maximum, where both are there."""
    return pooled[:, 0] if pooled.shape[1] == 1 else 0.5 * pooled[:, 0] + 0.5 * pooled[:, 1]


def _squeeze_excite(*network: str) -> Callable[[nn.Module, Tensor, str], dict[str, Tensor]]:
    """``x * gate(network(pooled x))``, the submodules of the network by name."""

    def arguments(module: nn.Module, x: Tensor, gate: str) -> dict[str, Tensor]:
        logits = _half_of_each(pool_channels(x, _mean_and_max(module)))[:, :, None, None]
        for name in network:
            logits = getattr(module, name)(logits)
        return {"channel_gate": logits.flatten(1)}

    return arguments


def _channel_convolution(module: nn.Module, x: Tensor, gate: str) -> dict[str, Tensor]:
    logits = module.conv(pool_channels(x))
    if module.conv2 is not None:
        logits = module.conv2(module.act(logits))
    return {"channel_gate": logits.flatten(1)}


def _circular_convolution(module: nn.Module, x: Tensor, gate: str) -> dict[str, Tensor]:
    pooled = F.pad(pool_channels(x), (module.padding, module.padding), mode="circular")
    return {"channel_gate": module.conv(pooled).flatten(1)}


def _channel_logits(module: nn.Module, pooled: Tensor) -> Tensor:
    return module.fc2(module.act(module.fc1(pooled[:, :, None, None]))).flatten(1)


def _cbam(module: nn.Module, x: Tensor, gate: str) -> dict[str, Tensor]:
    mean, largest = pool_channels(x, ("mean", "max")).unbind(1)
    channel = _channel_logits(module.channel, mean) + _channel_logits(module.channel, largest)
    pooled = pool_positions(x, ("mean", "max"), channel_gate=channel, gate=gate)
    return {"channel_gate": channel, "position_gate": module.spatial.conv(pooled)}


def _light_cbam(module: nn.Module, x: Tensor, gate: str) -> dict[str, Tensor]:
    channel = _channel_logits(module.channel, _half_of_each(pool_channels(x, ("mean", "max"))))
    pooled = pool_positions(x, ("mean", "max"), channel_gate=channel, gate=gate)
    return {"channel_gate": channel, "position_gate": module.spatial.conv(_half_of_each(pooled)[:, None])}


def _global_context(module: nn.Module, x: Tensor, gate: str) -> dict[str, Tensor]:
    if module.conv_attn is None:
        context = pool_channels(x)[:, 0]
    else:
        context = context_pool(x, module.conv_attn.weight, module.conv_attn.bias)
    networks = {"channel_gate": module.mlp_scale, "channel_add": module.mlp_add}
    return {
        name: network(context[:, :, None, None]).flatten(1)
        for name, network in networks.items()
        if network is not None
    }


class _Form(NamedTuple):
    """What a stock module computes.

    Attributes:
        words: for the report.
        arguments: those of ``gate_scale`` by name, for a module, its input and the gate's name.
        gates: paths of the modules that stand for the sigmoid.
        fixed: name of a gate that is no module.
        inner: paths of further modules that are not called any more.
        stock, fused: passes over the map, forward and backward, in separate passes and fused. The gradient of
            a pooling is written and added to that of the scaling.
    """

    words: str
    arguments: Callable[[nn.Module, Tensor, str], dict[str, Tensor]]
    gates: tuple[str, ...] = ("gate",)
    fixed: str | None = None
    inner: tuple[str, ...] = ()
    stock: tuple[int, int] = (3, 10)
    fused: tuple[int, int] = (3, 5)


_CBAM = {
    "inner": ("channel", "spatial"),
    "stock": (8, 30),
    "fused": (4, 12),
}
_FORMS = {
    "timm.models._efficientnet_blocks.SqueezeExcite": _Form(
        "squeeze-excite", _squeeze_excite("conv_reduce", "act1", "conv_expand")
    ),
    "timm.layers.squeeze_excite.SEModule": _Form(
        "squeeze-excite", _squeeze_excite("fc1", "bn", "act", "fc2")
    ),
    "timm.layers.squeeze_excite.EffectiveSEModule": _Form("squeeze-excite", _squeeze_excite("fc")),
    "torchvision.ops.misc.SqueezeExcitation": _Form(
        "squeeze-excite",
        _squeeze_excite("fc1", "activation", "fc2"),
        ("scale_activation",),
        inner=("avgpool",),
    ),
    "timm.layers.eca.EcaModule": _Form("ECA", _channel_convolution),
    "timm.layers.eca.CecaModule": _Form("circular ECA", _circular_convolution),
    "timm.layers.cbam.CbamModule": _Form("CBAM", _cbam, ("channel.gate", "spatial.gate"), **_CBAM),
    "timm.layers.cbam.LightCbamModule": _Form(
        "light CBAM", _light_cbam, ("spatial.gate",), "sigmoid", **_CBAM
    ),
    "timm.layers.global_context.GlobalContext": _Form(
        "global context", _global_context, inner=("conv_attn",), stock=(6, 16), fused=(3, 8)
    ),
}
_PARTS = {
    "channel": ("timm.layers.cbam.ChannelAttn", "timm.layers.cbam.LightChannelAttn"),
    "spatial": ("timm.layers.cbam.SpatialAttn", "timm.layers.cbam.LightSpatialAttn"),
    "conv_attn": ("torch.nn.modules.conv.Conv2d",),
    "avgpool": ("torch.nn.modules.pooling.AdaptiveAvgPool2d",),
}


def _gate_of(module: nn.Module, form: _Form) -> str | None:
    """The gate's name, if there is an operator for it and nobody watches what is not called any more."""
    names = set() if form.fixed is None else {form.fixed}
    for path in form.gates:
        gate = module.get_submodule(path)
        names.add(None if is_hooked(gate) else _GATES.get(type_name(gate)))
    for path in form.inner:
        part = getattr(module, path)
        if part is not None and (is_hooked(part) or type_name(part) not in _PARTS[path]):
            return None
    return names.pop() if len(names) == 1 else None


class _Gate(Exchanged):
    def forward(self, x: Tensor) -> Tensor:
        # Tracers see the stock module.
        suited = not isinstance(x, fx.Proxy) and x.dim() == 4 and x.dtype in FLOAT_TYPES
        form = _FORMS[type_name(self)]
        gate = _gate_of(self, form) if suited and active_members(self, 0) is not None else None
        if gate is None:
            return super().forward(x)

        def compute(residual: Tensor | None = None) -> Tensor:
            return gate_scale(x, **form.arguments(self, x, gate), gate=gate, residual=residual)

        return computed_or_deferred(getattr(self, ATTRIBUTE), compute, x, (x.dtype, x.dtype))


class Gates(Family):
    """Modules that scale a map, by channels or by positions, by what a network makes of the pooled map."""

    kind = "gate"
    whole = _FORMS.keys()

    @staticmethod
    def mixin(role: int, module: nn.Module) -> type[Exchanged]:
        return _Gate

    @staticmethod
    def plans(model: nn.Module, flow: Flow, claimed: set[int]) -> list[Plan]:
        plans = []
        for name, module in model.named_modules():
            form = _FORMS.get(type_name(module))
            if form is None:
                continue
            gate = _gate_of(module, form)
            plan = Plan(Gates, name, module)
            chain = module.__dict__.get(ATTRIBUTE)
            if chain is not None:
                plan.mark_exchanged(chain)
            elif obstacle := obstacle_to_whole(module):
                plan.declined = obstacle
            elif gate is None:
                others = [
                    part for path in form.gates if type_name(part := module.get_submodule(path)) not in _GATES
                ]
                plan.declined = "a part of it has hooks or is of another kind"
                if others:
                    plan.declined = f"its gate is a {type(others[0]).__name__}"
            else:
                tail = flow.tail(module)
                if tail is not None and all(type(scale) is nn.Identity for scale in tail.modules):
                    plan.tail = tail
            plan.pattern = f"{form.words} -> {gate or 'other gate'}"
            plans.append(plan)
        return plans

    @staticmethod
    def weigh(module: nn.Module, x: Tensor) -> tuple[int, int]:
        """Bytes of a call; what there is one of per channel or per position is left out."""
        size, form = x.element_size() * x.numel(), _FORMS[type_name(module)]
        trained = x.requires_grad or any(p.requires_grad for p in module.parameters())
        passes = slice(2 if torch.is_grad_enabled() and trained else 1)
        adds = getattr(module, ATTRIBUTE).tail is not None
        return (sum(form.stock[passes]) + 3 * adds) * size, (sum(form.fused[passes]) + adds) * size
