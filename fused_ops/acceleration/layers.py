"""Which stock modules there is an operator for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from fused_ops.acceleration.exchange import stock_type, type_name
from fused_ops.core.batch_norm import BatchNormState
from fused_ops.core.hooks import is_hooked

if TYPE_CHECKING:
    from fused_ops.acceleration.flow import Flow

_TIMM_NORM_ACT = "timm.layers.norm_act."
PLAIN_BATCH_NORMS = {
    "torch.nn.modules.batchnorm.BatchNorm2d",
    "torch.nn.modules.batchnorm.SyncBatchNorm",
}
BATCH_NORMS = PLAIN_BATCH_NORMS | {
    _TIMM_NORM_ACT + "BatchNormAct2d",
    _TIMM_NORM_ACT + "SyncBatchNormAct",
}
FROZEN_NORMS = {"torchvision.ops.misc.FrozenBatchNorm2d", _TIMM_NORM_ACT + "FrozenBatchNormAct2d"}
# LayerNorm over the last dimension of tokens, and over the channels of maps.
TOKEN_NORMS = {"torch.nn.modules.normalization.LayerNorm", "timm.layers.norm.LayerNorm"}
MAP_NORMS = {"timm.layers.norm.LayerNorm2d", "torchvision.models.convnext.LayerNorm2d"}
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


def activation_of(module: nn.Module | None) -> str | None:
    """The operator's name for an activation module; None for what it has none for."""
    if module is None or "forward" in module.__dict__:
        return None
    if stock_type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    return _ACTIVATIONS.get(type_name(module))


# What multiplies by factors per channel or per image, moves dimensions, or does nothing.
_SCALES = {
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.dropout.Dropout",
    "timm.layers.layer_scale.LayerScale",
    "timm.layers.layer_scale.LayerScale2d",
    "timm.layers.drop.DropPath",
    "timm.models.swiftformer.LayerScale2d",
    "torchvision.ops.misc.Permute",
    "torchvision.ops.stochastic_depth.StochasticDepth",
}


def only_scales(module: nn.Module) -> bool:
    return type_name(module) in _SCALES and "forward" not in module.__dict__


def is_norm(module: nn.Module | None) -> bool:
    known = BATCH_NORMS | FROZEN_NORMS
    return module is not None and type_name(module) in known and "forward" not in module.__dict__


def holds_activation(norm: nn.Module) -> bool:
    return type_name(norm).startswith(_TIMM_NORM_ACT)


def is_fully_connected(module: nn.Module | None) -> bool:
    """Whether a module is fully connected over channels: of tokens, or of maps."""
    if module is None:
        return False
    if stock_type(module) is nn.Linear:
        return True
    plain = stock_type(module) is nn.Conv2d and module.groups == 1 and module.padding in ((0, 0), "valid")
    return plain and set(module.kernel_size) == {1} and set(module.stride) == {1}


def width_in(layer: nn.Module) -> int:
    return layer.weight.shape[1]


def width_out(layer: nn.Module) -> int:
    return layer.weight.shape[0]


def norm_before(
    module: nn.Module, channels: int, is_map: bool, flow: Flow, claimed: set[int]
) -> tuple[nn.Module | None, str]:
    """The norm over ``channels`` whose output certainly goes to ``module`` alone, or why it stays outside."""
    norm = flow.leader(module)
    name = "" if norm is None else type_name(norm)
    known = name in (MAP_NORMS if is_map else TOKEN_NORMS)
    if is_map and name in PLAIN_BATCH_NORMS:
        known = True
    elif known:
        known = tuple(norm.normalized_shape) == (channels,)
    if not known or "forward" in norm.__dict__ or id(norm) in claimed:
        return None, ""
    if is_hooked(norm):
        return None, "its norm has hooks, and stays outside"
    return norm, ""


def frozen_state(norm: nn.Module) -> BatchNormState:
    statistics = (norm.running_mean, norm.running_var)
    return BatchNormState(norm.weight, norm.bias, *statistics, False, 0.0, norm.eps)
