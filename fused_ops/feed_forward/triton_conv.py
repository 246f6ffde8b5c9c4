"""The convolution of the feed-forward chain, by the depthwise family's Triton kernels on the hidden map.

One pass forward: the activation before, the convolution, the activation behind, the identity. One pass
backward, with the gradient of fc1's bias. The hidden map is (rows, hidden), rows in the order of (B, H, W).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_ops.depthwise import triton as depthwise
from fused_ops.depthwise.op import DepthwiseCall
from fused_ops.feed_forward import triton_products

# Nothing normalises here.
_NO_STATISTICS = (None, None, None)


def tiles(kernel: str, sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Tiles worth measuring for a kernel of a chain with a convolution."""
    if kernel in triton_products.TUNED.values():
        return triton_products.tiles()
    return depthwise.tiles(kernel, sizes)


def _as_map(values: Tensor, call: Any) -> Tensor:
    """(B, hidden, H, W), a channels_last view."""
    return values.view(call.x.shape[0], *call.size, values.shape[-1]).permute(0, 3, 1, 2)


def _depthwise_call(call: Any, values: Tensor, activation: str, identity: bool) -> DepthwiseCall:
    return DepthwiseCall(
        _as_map(values, call),
        call.conv_weight,
        call.conv_bias,
        *(None,) * 5,
        stride=(1, 1),
        padding=(1, 1),
        dilation=(1, 1),
        norm="none",
        batch_stats=False,
        eps=0.0,
        activation=activation,
        residual_mode="after" if identity else "none",
        identity=identity,
        input_activation=call.activation,
    )


def can_run(call: Any) -> tuple[bool, str]:
    """Whether the kernels can run the convolution of ``call``; one sentence says why not."""
    # Offsets within a row of the hidden map are 32-bit, its padding included.
    span = (call.size[1] + 2) * call.fc1_weight.shape[0]
    if span >= 2**31:
        return False, f"one row of the hidden map has {span} values; fewer than 2**31 are allowed"
    return True, ""


def convolve(call: Any, value: Tensor, out: Tensor, raw: Tensor | None = None) -> None:
    """Fill ``out`` with what fc2 gets, from what fc1 gave; ``raw`` with the convolution's own output.

    All are (rows, hidden) in the dtype of the products.
    """
    made = _depthwise_call(call, value, call.conv_activation, call.conv_identity)
    made.keep_raw = raw is not None
    depthwise.forward(made, _as_map(out, call), None if raw is None else _as_map(raw, call), *_NO_STATISTICS)


def convolve_again(
    call: Any, value: Tensor, wants_out: bool, to_value: bool
) -> tuple[Tensor | None, Tensor | None]:
    """What fc2 got, where it is wanted, and the convolution's own output, where :func:`backward` needs it."""
    out = torch.empty_like(value) if wants_out else None
    raw = torch.empty_like(value) if to_value and call.conv_activation != "none" else None
    if out is not None:
        convolve(call, value, out, raw)
    elif raw is not None:
        depthwise.forward(
            _depthwise_call(call, value, "none", False), _as_map(raw, call), None, *_NO_STATISTICS
        )
    return out, raw


def backward(
    call: Any,
    grad: Tensor,
    value: Tensor,
    raw: Tensor | None,
    value_grad: Tensor | None,
    fc1_bias_grad: Tensor | None,
    conv_weight_grad: Tensor | None,
    conv_bias_grad: Tensor | None,
) -> None:
    """Fill the gradients that are not None.

    Args:
        grad: of what fc2 got, (rows, hidden).
        value: what fc1 gave.
        raw: the convolution's own output, see :func:`convolve_again`.
        value_grad: of ``value``.
        fc1_bias_grad, conv_weight_grad, conv_bias_grad: (hidden), (hidden, 1, 3, 3) and (hidden).
    """
    gradients = (
        None if value_grad is None else _as_map(value_grad, call),
        conv_weight_grad,
        conv_bias_grad,
        None,
        fc1_bias_grad,
        None,
    )
    depthwise.backward(
        _depthwise_call(call, value, call.conv_activation, call.conv_identity),
        _as_map(grad, call),
        None if raw is None else _as_map(raw, call),
        [gradient is not None for gradient in gradients],
        *gradients,
    )
