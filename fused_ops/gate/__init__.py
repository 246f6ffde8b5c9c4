"""Channel and spatial gates: poolings of a map, and the scaling by what a small network makes of them."""

from fused_ops.gate.module import squeeze_excite
from fused_ops.gate.op import context_pool, gate_scale, pool_channels, pool_map, pool_positions

__all__ = [
    "context_pool",
    "gate_scale",
    "pool_channels",
    "pool_map",
    "pool_positions",
    "squeeze_excite",
]
