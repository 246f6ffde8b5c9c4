"""The DS-Block as one operator: what it keeps, torch operators, autograd, operations.

Its backward keeps what no chain of operators can leave out: of the maps between two families' operators those
alone that cannot be had again from others in one pass, and no normalised map at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_ops.blocks.ds_block import triton
from fused_ops.blocks.ds_block.reference import grid_size
from fused_ops.core import library
from fused_ops.core.backends import Backend, reference_can_run

# In the order of the operators' arguments; the names of the public code.
PARAMETERS = tuple(
    f"{layer}.{kind}"
    for layer in (
        "pos_embed",
        "norm1",
        "conv1",
        "conv2",
        "norm_conv1",
        "conv",
        "attn_down",
        "norm_sa1",
        "channel_up",
        "norm_conv2",
        "norm_sa2",
        "cross_channel_up_conv",
        "cross_channel_up_sa",
        "fuse_channel_conv",
        "fuse_channel_sa",
        "norm2",
        "mlp.fc1",
        "mlp.fc2",
    )
    for kind in ("weight", "bias")
)
BATCH_NORMS = ("norm1", "norm_conv1", "norm_conv2", "norm2")
LAYER_NORMS = ("norm_sa1", "norm_sa2")
# What forward keeps for backward, see allocate_forward.
KEPT = (
    "x1",
    "local_input",
    "mixed",
    "x2",
    "hidden",
    "local_qkv",
    "local_lse",
    "tokens",
    "global_tokens",
    "global_qkv",
    "global_out",
    "global_lse",
    "last_tokens",
    "entry_weight",
    "mixed_matrix",
)


@dataclass
class DSBlockCall:
    """One call: what ``can_run`` and the launchers see.

    Attributes:
        x: (B, dim, H, W), dense channels_last.
        parameters: by the names of :data:`PARAMETERS`; None where the block has none.
        running: mean and variance of each BatchNorm that normalises with its running statistics, by name.
        drop_path: factors per image (B) of both branches, or None.
        seeds: of the dropout of self-attention and of co-attention, or None.
        num_global: channels of the global stream.
        batch_stats, eps, groups: of each BatchNorm, in the order of :data:`BATCH_NORMS`; ``eps`` of the
            LayerNorms behind them.
        dropout: of all attention weights.
        keep: backward will follow.
    """

    x: Tensor
    parameters: Mapping[str, Tensor | None]
    running: Mapping[str, tuple[Tensor | None, Tensor | None]]
    drop_path: tuple[Tensor | None, Tensor | None]
    seeds: tuple[Tensor | None, Tensor | None]
    num_heads: int
    downsample: int
    num_global: int
    align: bool
    global_down: str
    batch_stats: Sequence[bool]
    eps: Sequence[float]
    groups: Sequence[str]
    dropout: float
    keep: bool

    @property
    def num_local(self) -> int:
        return self.x.shape[1] - self.num_global

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the global stream's tokens."""
        height, width = self.x.shape[2:]
        if self.global_down == "dwconv":
            return (height - 1) // self.downsample + 1, (width - 1) // self.downsample + 1
        return grid_size(height, width, self.downsample)

    @property
    def needs_grad(self) -> bool:
        return self.keep

    def uses_batch(self, norm: str) -> bool:
        return self.batch_stats[BATCH_NORMS.index(norm)]

    def group_of(self, norm: str) -> str:
        return self.groups[BATCH_NORMS.index(norm)]

    def eps_of(self, norm: str) -> float:
        return self.eps[(*BATCH_NORMS, *LAYER_NORMS).index(norm)]

    def tensors(self) -> tuple[Tensor | None, ...]:
        statistics = (self.running.get(name, (None, None)) for name in BATCH_NORMS)
        return (
            self.x,
            *(self.parameters[name] for name in PARAMETERS),
            *(tensor for pair in statistics for tensor in pair),
            *self.drop_path,
            *self.seeds,
        )

    def options(self) -> tuple[Any, ...]:
        return (
            self.num_heads,
            self.downsample,
            self.num_global,
            self.align,
            self.global_down,
            list(self.batch_stats),
            list(self.eps),
            list(self.groups),
            self.dropout,
            self.keep,
        )

    def kind(self) -> dict[str, Any]:
        """What measurements of one call say about another depends on, apart from sizes."""
        return {
            "training": self.keep,
            "dtype": str(self.x.dtype),
            "align": self.align,
            "global_down": self.global_down,
            "batch_stats": all(self.batch_stats),
        }

    def sizes(self) -> tuple[int, ...]:
        """Channels, height and width of the map, tokens of the global stream."""
        grid = self.grid
        return (*self.x.shape[1:], grid[0] * grid[1])

    def __str__(self) -> str:
        dtype = str(self.x.dtype).removeprefix("torch.")
        grid = self.grid
        streams = "with" if self.align else "without"
        return (
            f"DS-Block on {tuple(self.x.shape)} {dtype}, {grid[0]}x{grid[1]} global tokens, {streams} "
            f"alignment, {self.num_heads} heads"
        )


_TENSORS = ("x", *PARAMETERS)
_STATISTICS = tuple(f"{norm}.{kind}" for norm in BATCH_NORMS for kind in ("mean", "var"))
_EXTRAS = ("first_drop_path", "second_drop_path", "self_seed", "co_seed")
_INPUTS = (*_TENSORS, *_STATISTICS, *_EXTRAS)


def call_of(inputs: Sequence[Any]) -> DSBlockCall:
    """The call of the operators' tensors and options."""
    tensors, options = inputs[: len(_INPUTS)], inputs[len(_INPUTS) :]
    x, parameters = tensors[0], tensors[1 : len(_TENSORS)]
    statistics = tensors[len(_TENSORS) : -len(_EXTRAS)]
    pairs = zip(BATCH_NORMS, zip(statistics[::2], statistics[1::2], strict=True), strict=True)
    extras = tensors[-len(_EXTRAS) :]
    return DSBlockCall(
        x, dict(zip(PARAMETERS, parameters, strict=True)), dict(pairs), extras[:2], extras[2:], *options
    )


def _schema_names(names: Sequence[str], optional: bool = True) -> str:
    return ", ".join(f"Tensor{'?' if optional else ''} {name.replace('.', '_')}" for name in names)


_OPTIONS = (
    "int num_heads, int downsample, int num_global, bool align, str global_down, bool[] batch_stats, "
    "float[] eps, str[] groups, float dropout, bool keep"
)
_ARGUMENTS = f"Tensor x, {_schema_names(_INPUTS[1:])}"
_FORWARD_SCHEMA = (
    f"ds_block_forward({_ARGUMENTS}, {_OPTIONS}, str backend) -> (Tensor out, "
    f"{_schema_names(KEPT, False)}, {_schema_names([f'{name}_statistics' for name in BATCH_NORMS], False)})"
)
# What was kept as one list: PyTorch takes no more than 64 arguments.
_BACKWARD_SCHEMA = (
    f"ds_block_backward(Tensor grad, {_ARGUMENTS}, Tensor[] kept, {_OPTIONS}, bool[] needs, str backend) "
    f"-> ({_schema_names([f'{name}_grad' for name in _TENSORS], False)})"
)


def allocate_forward(call: DSBlockCall) -> dict[str, Tensor]:
    """The result, all of :data:`KEPT` and the statistics (3, C) of each BatchNorm: mean and both variances.

    x1 and x2: the map behind the first depthwise convolution and before the MLP. local_input: what the local
    stream's convolution gets, with a depthwise down-sampler the global stream's half beside it. mixed: the
    local stream behind it, and beside it what the local tokens get from the global ones. hidden: what fc1
    gives. tokens, global_tokens, last_tokens: the global stream before and behind self-attention, and behind
    co-attention. entry_weight: the positional convolution with its identity as one tap. mixed_matrix: the
    second 1x1 convolution's for ``mixed``, where that is no part of its weight. The rest is what attention's
    operators keep.

    Absent: what the block has not, and where nothing is kept what no later step reads.
    """
    x = call.x
    batch, channels, height, width = x.shape
    tokens, grid, heads = height * width, call.grid, call.num_heads
    count = grid[0] * grid[1]
    shapes: dict[str, tuple[int, ...]] = {}
    if call.num_local:
        wide = call.global_down == "dwconv" and call.num_global
        shapes["local_input"] = (batch, tokens, channels if wide else call.num_local)
        shapes["mixed"] = (batch, tokens, call.num_local * (1 + call.align))
    if call.num_global:
        if call.global_down == "dwconv" and not call.num_local:
            shapes["local_input"] = (batch, tokens, channels)
        shapes["tokens"] = shapes["global_tokens"] = (batch, count, call.num_global)
    if call.align:
        shapes["mixed_matrix"] = (channels, 2 * call.num_local)
        shapes["local_qkv"] = (batch, tokens, 3 * call.num_local)
        shapes["global_qkv"] = (batch, count, 3 * call.num_global)
        shapes["global_out"] = shapes["last_tokens"] = (batch, count, call.num_global)
    hidden = call.parameters["mlp.fc1.weight"].shape[0]
    if call.keep and not triton.hidden_stays_on_chip(call):
        shapes["hidden"] = (batch * tokens, hidden)
    made = {name: x.new_empty(shapes.get(name, 0)) for name in KEPT}
    made["out"], made["x1"], made["x2"] = (torch.empty_like(x) for _ in range(3))
    made["entry_weight"] = x.new_empty((channels, 1, 3, 3), dtype=torch.float32)
    if call.align:
        made["global_lse"] = x.new_empty((batch, count, heads), dtype=torch.float32)
        if call.keep and not triton.keys_in_one_block(call):
            made["local_lse"] = x.new_empty((batch, tokens, heads), dtype=torch.float32)
    widths = dict(zip(BATCH_NORMS, (channels, call.num_local, call.num_local, channels), strict=True))
    for name in BATCH_NORMS:
        there = call.uses_batch(name) and (name != "norm_conv2" or call.align)
        made[name] = x.new_empty((3, widths[name] if there else 0), dtype=torch.float32)
    return made


def _outputs(made: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    return tuple(made[name] for name in ("out", *KEPT, *BATCH_NORMS))


def _forward(*inputs):
    *inputs, backend = inputs
    call = call_of(inputs)
    made = allocate_forward(call)
    triton.forward(call, made, backend)
    return _outputs(made)


def _forward_fake(*inputs):
    return _outputs(allocate_forward(call_of(inputs[:-1])))


def _split_backward(inputs):
    """The call, what was kept, which gradients are needed, the backend."""
    *tensors, kept = inputs[: len(_INPUTS) + 1]
    *options, needs, backend = inputs[len(_INPUTS) + 1 :]
    return call_of((*tensors, *options)), dict(zip(KEPT, kept, strict=True)), list(needs), backend


def _backward(grad, *inputs):
    call, kept, needs, backend = _split_backward(inputs)
    gradients = triton.backward(call, grad, kept, dict(zip(_TENSORS, needs, strict=True)), backend)
    return tuple(
        gradients[name].to(source.dtype).view(source.shape)
        if needed and source is not None
        else library.absent(call.x)
        for name, source, needed in zip(_TENSORS, call.tensors(), needs, strict=False)
    )


def _backward_fake(grad, *inputs):
    call, _, needs, _ = _split_backward(inputs)
    return tuple(
        library.empty(source.shape, source) if needed and source is not None else library.absent(call.x)
        for source, needed in zip(call.tensors(), needs, strict=False)
    )


def _setup_context(ctx, inputs, output) -> None:
    *ctx.options, ctx.backend = inputs[len(_INPUTS) :]
    tensors = list(inputs[: len(_INPUTS)])
    # What a norm by the batch's statistics normalised with.
    for name, statistics in zip(BATCH_NORMS, output[1 + len(KEPT) :], strict=True):
        if statistics.numel():
            place = _INPUTS.index(f"{name}.mean")
            tensors[place : place + 2] = statistics[0], statistics[1]
    ctx.save_for_backward(*tensors, *output[1 : 1 + len(KEPT)])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad, *_):
    inputs = len(_INPUTS) + len(ctx.options) + 1
    needs = [bool(needed) for needed in ctx.needs_input_grad[: len(_TENSORS)]]
    if grad is None or not any(needs):
        return (None,) * inputs
    tensors, kept = ctx.saved_tensors[: len(_INPUTS)], list(ctx.saved_tensors[len(_INPUTS) :])
    gradients = DIFFERENTIABLE.run_backward(grad, *tensors, kept, *ctx.options, needs, ctx.backend)
    return (*gradients, *(None,) * (inputs - len(_TENSORS)))


def _layer_flops(call: DSBlockCall) -> dict[str, int]:
    """Of each matrix product and convolution forward, by the layer or the attention that it belongs to."""
    batch, channels, height, width = call.x.shape
    rows, tokens = batch * height * width, batch * call.grid[0] * call.grid[1] if call.num_global else 0
    num_global, num_local = call.num_global, call.num_local
    wide = call.global_down == "dwconv" and num_global > 0
    first = rows * channels if wide else rows * num_local + tokens * num_global
    found = {
        "pos_embed": 9 * rows * channels,
        "conv1": first * channels,
        "conv": 9 * rows * num_local,
        "attn_down": tokens * num_global * (2 * call.downsample + 1) ** 2 if wide else 0,
        "channel_up": 3 * tokens * num_global**2,
        "self-attention": 2 * tokens * tokens // max(batch, 1) * num_global,
        "conv2": (rows * num_local * (1 + call.align) + tokens * num_global) * channels,
        "mlp": 2 * rows * channels * call.parameters["mlp.fc1.weight"].shape[0],
    }
    if call.align:
        found["cross_channel_up"] = 3 * (rows + tokens) * num_global**2
        found["fuse_channel_sa"] = tokens * num_global**2
        found["co-attention"] = 4 * rows * tokens // max(batch, 1) * num_global
    return {name: 2 * count for name, count in found.items()}


class _Shape(tuple):
    """A shape in a tensor's place, as PyTorch's FLOP counter has it."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self


def _forward_flops(*inputs, out_shape=None, **_) -> int:
    shapes = [None if shape is None else _Shape(shape) for shape in inputs[: len(_INPUTS)]]
    return sum(_layer_flops(call_of((*shapes, *inputs[len(_INPUTS) : -1]))).values())


def _backward_flops(grad_shape, *inputs, out_shape=None, **_) -> int:
    """Each product and convolution has two gradients, and attention's scores are computed again."""
    shapes = [None if shape is None else _Shape(shape) for shape in inputs[: len(_INPUTS)]]
    forward = _layer_flops(call_of((*shapes, *inputs[len(_INPUTS) + 1 : -2])))
    again = sum(forward.get(name, 0) for name in ("self-attention", "co-attention")) // 2
    return 2 * sum(forward.values()) + again


BACKENDS = (
    Backend("triton", triton.can_run),
    Backend("reference", reference_can_run),
)
DIFFERENTIABLE = library.DifferentiableOperator(
    _FORWARD_SCHEMA,
    _BACKWARD_SCHEMA,
    forward=_forward,
    forward_fake=_forward_fake,
    forward_flops=_forward_flops,
    backward=_backward,
    backward_fake=_backward_fake,
    backward_flops=_backward_flops,
    setup_context=_setup_context,
    autograd=_autograd,
    once_differentiable="has no derivative of its own; for second derivatives run the block inside "
    'fused_ops.backend("reference")',
)
