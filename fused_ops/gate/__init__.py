"""Channel and spatial gates: poolings of a map, its scaling by what a network makes of them, sums of maps."""

from fused_ops.gate.module import squeeze_excite
from fused_ops.gate.op import (
    attentive_fusion,
    context_pool,
    gate_scale,
    multi_level_fusion,
    pool_channels,
    pool_map,
    pool_positions,
    render_scales,
    weighted_sum,
)

__all__ = [
    "attentive_fusion",
    "context_pool",
    "gate_scale",
    "multi_level_fusion",
    "pool_channels",
    "pool_map",
    "pool_positions",
    "render_scales",
    "squeeze_excite",
    "weighted_sum",
]
