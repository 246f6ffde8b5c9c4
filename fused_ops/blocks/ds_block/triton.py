"""The DS-Block's launches: the families' kernels, PyTorch's matrix products, and passes between them.

Against the chain of family operators: BatchNorm's affine parts are multiplied into the matrices behind them,
and its backward's sums come from those matrices' gradients; both halves of the 1x1 convolutions that belong
to the global stream run on its few tokens, since a 1x1 convolution commutes with bilinear resizing (the
weights of which add up to 1); the co-attention's local output projection is multiplied into the last 1x1
convolution, so that neither it nor the concatenation is in memory; and what one pass over a kept map gives
back is not kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_ops.attention import op as attention
from fused_ops.blocks.layout import map_to_tokens, tokens_to_map
from fused_ops.co_attention import op as co_attention
from fused_ops.co_attention import triton as co_attention_triton
from fused_ops.core import backends, distributed, library
from fused_ops.depthwise import op as depthwise
from fused_ops.feed_forward import op as feed_forward
from fused_ops.feed_forward import triton as feed_forward_triton
from fused_ops.feed_forward import triton_norm, triton_wide
from fused_ops.resample import triton as resample
from fused_ops.resample.op import ResampleCall

_PLAIN = ((1, 1), (1, 1), (1, 1))


def can_run(call: Any) -> tuple[bool, str]:
    """Whether the launches below can run ``call``; one sentence says why not."""
    x = call.x
    ok, reason = backends.triton_takes("x", x)
    if not ok:
        return False, reason
    if x.numel() == 0:
        return False, f"x is empty, {tuple(x.shape)}"
    if x.shape[1] > feed_forward_triton.LARGEST_CHANNELS:
        return False, f"x has more than {feed_forward_triton.LARGEST_CHANNELS} channels"
    if not call.num_global:
        return True, ""
    height, width = call.grid
    tokens = x.new_empty((1, 1, 1, 1)).expand(x.shape[0], height * width, call.num_heads, -1)
    tokens = tokens.expand(-1, -1, -1, call.num_global // call.num_heads)
    ok, reason = attention.triton.can_run(_attention_call(call, tokens, tokens, tokens))
    if ok and call.align:
        local = tokens[:, :1].expand(-1, x.shape[2] * x.shape[3], -1, -1)
        ok, reason = co_attention_triton.can_run(
            _co_attention_call(call, (local, local, local), (tokens, tokens, tokens))
        )
    return ok, reason


def hidden_stays_on_chip(call: Any) -> bool:
    """Whether the MLP's hidden values are never in memory."""
    return feed_forward_triton.is_narrow(call.x.shape[1])


def keys_in_one_block(call: Any) -> bool:
    """Whether one block of the co-attention's kernels holds all global tokens."""
    height, width = call.grid
    return height * width <= co_attention_triton.largest_block(call.num_global // call.num_heads)


def _attention_call(call: Any, query: Tensor, key: Tensor, value: Tensor) -> attention.AttentionCall:
    scale = query.shape[-1] ** -0.5
    seed = call.seeds[0] if call.dropout else None
    return attention.AttentionCall(query, key, value, None, None, seed, scale, call.dropout, call.keep)


def _co_attention_call(
    call: Any, local: tuple[Tensor, ...], tokens: tuple[Tensor, ...]
) -> co_attention.CoAttentionCall:
    """Of queries, keys and values of both streams, (B, N or M, heads, d)."""
    seed = call.seeds[1] if call.dropout else None
    scale = local[0].shape[-1] ** -0.5
    return co_attention.CoAttentionCall(
        local[0], local[2], tokens[1], tokens[2], local[1], tokens[0], seed, scale, call.dropout, call.keep
    )


def _heads(call: Any, qkv: Tensor) -> tuple[Tensor, ...]:
    """(B, N, 3 C) in the order [q | k | v], each [head][d], to three views (B, N, heads, d)."""
    return qkv.unflatten(-1, (3, call.num_heads, -1)).unbind(2)


def _depthwise_kernels(depthwise_call: depthwise.DepthwiseCall, backend: str) -> Any:
    """The kernels of one of the block's convolutions; None where it takes stock PyTorch.

    ``backend``: triton, or auto for the first that can run.
    """
    for candidate in depthwise.BACKENDS:
        runs = candidate.forward is not None and backend in ("auto", candidate.name)
        if runs and candidate.can_run(depthwise_call)[0]:
            return candidate
    return None


def _matrix(weight: Tensor) -> Tensor:
    """A 1x1 convolution's or linear layer's weight as a matrix."""
    return weight.flatten(1)


def _cast(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(like.dtype)


class _Block:
    """Parameters and sizes of one call, in the forms that its launches take."""

    def __init__(self, call: Any, backend: str) -> None:
        self.call, self.backend = call, backend
        self.x = call.x
        self.batch, self.channels, self.height, self.width = call.x.shape
        self.tokens = self.height * self.width
        self.rows = self.batch * self.tokens
        self.parameters = call.parameters
        # Both halves of the first 1x1 convolution at once, on all pixels.
        self.full_width = call.global_down == "dwconv" and call.num_global > 0

    def matrix(self, layer: str) -> Tensor:
        """A layer's weight as PyTorch's products take it."""
        return _matrix(self.parameters[f"{layer}.weight"]).to(self.x.dtype)

    def linear(self, layer: str, values: Tensor, out: Tensor | None = None) -> Tensor:
        """A linear layer on (B, M, C)."""
        bias = _cast(self.parameters[f"{layer}.bias"], self.x)
        if out is None:
            out = values.new_empty((*values.shape[:-1], bias.shape[0]))
        torch.addmm(bias, values.flatten(0, -2), self.matrix(layer).t(), out=out.view(-1, bias.shape[0]))
        return out

    def affine(self, norm: str) -> tuple[Tensor | None, Tensor | None]:
        return self.parameters[f"{norm}.weight"], self.parameters[f"{norm}.bias"]

    def fold(self, layer: str, norm: str) -> tuple[Tensor, Tensor]:
        """A layer's matrix and bias behind a BatchNorm without an affine part."""
        weight, bias = (self.parameters[f"{layer}.{kind}"] for kind in ("weight", "bias"))
        return triton_norm.fold(_matrix(weight), bias, *self.affine(norm), self.x)

    def layer_norm(self, norm: str, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Result, mean and one over the spread."""
        width = [tokens.shape[-1]]
        return torch.native_layer_norm(tokens, width, *self.affine(norm), self.call.eps_of(norm))

    def map(self, tokens: Tensor) -> Tensor:
        """(B, N, C) as a map (B, C, H, W), a view."""
        return tokens_to_map(tokens, (self.height, self.width))

    def entry_convolution(self, weight: Tensor, norm: bool) -> depthwise.DepthwiseCall:
        """The positional convolution by its ``entry_weight``; ``norm``: and norm1 without its affine part."""
        return self._convolution(self.x, weight, "pos_embed", "norm1" if norm else "", "post")

    def local_convolution(self, x: Tensor) -> depthwise.DepthwiseCall:
        """The local stream's, behind its BatchNorm and with its identity."""
        call = self._convolution(x, self.parameters["conv.weight"], "conv", "norm_conv1", "pre")
        call.norm_weight, call.norm_bias = self.affine("norm_conv1")
        call.identity, call.residual_mode = True, "after"
        return call

    def _convolution(
        self, x: Tensor, weight: Tensor, layer: str, norm: str, placement: str
    ) -> depthwise.DepthwiseCall:
        call = self.call
        statistics = call.running.get(norm, (None, None))
        return depthwise.DepthwiseCall(
            x,
            weight,
            self.parameters[f"{layer}.bias"],
            None,
            None,
            *statistics,
            None,
            *_PLAIN,
            placement if norm else "none",
            bool(norm) and call.uses_batch(norm),
            call.eps_of(norm) if norm else 1e-5,
            "none",
            "none",
            False,
            call.group_of(norm) if norm else "",
        )

    def down_convolution(self, x: Tensor) -> depthwise.DepthwiseCall:
        """The global stream's depthwise down-sampler."""
        step = (self.call.downsample,) * 2
        weight, bias = self.parameters["attn_down.weight"], self.parameters["attn_down.bias"]
        return depthwise.DepthwiseCall(
            x, weight, bias, *(None,) * 5, step, step, (1, 1), "none", False, 1e-5, "none", "none", False
        )

    def last_bias(self, mixed_matrix: Tensor) -> Tensor:
        """The second 1x1 convolution's bias, with what goes through it; fills ``mixed_matrix`` first.

        That is the local half, and beside it that half times the co-attention's local projection.
        """
        bias = _cast(self.parameters["conv2.bias"], self.x)
        if not self.call.align:
            return bias
        num_local = self.call.num_local
        local = mixed_matrix[:, :num_local].copy_(self.local_matrix())
        torch.mm(local, self.matrix("fuse_channel_conv"), out=mixed_matrix[:, num_local:])
        return torch.addmv(bias, local, _cast(self.parameters["fuse_channel_conv.bias"], self.x))

    def local_matrix(self) -> Tensor:
        """The second 1x1 convolution's half on the local stream."""
        return _matrix(self.parameters["conv2.weight"])[:, : self.call.num_local].to(self.x.dtype)

    def tokens_matrix(self) -> Tensor:
        """The second 1x1 convolution's half on the global tokens."""
        return _matrix(self.parameters["conv2.weight"])[:, self.call.num_local :].to(self.x.dtype)

    def mlp(self, x2: Tensor, statistics: tuple[Tensor | None, Tensor | None]) -> Any:
        """The MLP with its norm and residual as the feed-forward family's call."""
        call = self.call
        weights = (_matrix(self.parameters[f"mlp.{layer}.weight"]) for layer in ("fc1", "fc2"))
        biases = (self.parameters[f"mlp.{layer}.bias"] for layer in ("fc1", "fc2"))
        (fc1, fc2), (fc1_bias, fc2_bias) = weights, biases
        return feed_forward.FeedForwardCall(
            map_to_tokens(x2),
            fc1,
            fc1_bias,
            fc2,
            fc2_bias,
            *self.affine("norm2"),
            None,
            None,
            None,
            *statistics,
            None,
            call.drop_path[1],
            "batch",
            call.uses_batch("norm2"),
            call.eps_of("norm2"),
            "gelu",
            True,
            self.x.dtype,
            call.group_of("norm2"),
            call.keep and not hidden_stays_on_chip(call),
        )

    def scaled(self, value: Tensor, residual: Tensor | None, out: Tensor) -> Tensor:
        """``out`` = value (B, N, C) times the first branch's drop path, plus the residual."""
        triton_wide.scale_and_add(value, self.call.drop_path[0], residual, out)
        return out


def _resampled(
    x: Tensor,
    size: tuple[int, int],
    add: Tensor | None,
    drop_path: Tensor | None,
    out: Tensor,
    base: Tensor | None,
) -> Tensor:
    """``base + drop_path (resized x + add)``, see :func:`fused_ops.resample.triton.forward`."""
    return resample.forward(ResampleCall(x, add, drop_path, size, "bilinear"), out, base)


def forward(call: Any, made: Mapping[str, Tensor], backend: str) -> None:
    """Launch the forward pass of a call that :func:`can_run`; fills what ``allocate_forward`` made.

    ``backend``: triton, or auto where the depthwise convolutions may take CUDA's kernels.
    """
    with backends.device_of(call.x):
        _forward(_Block(call, backend), made)


def _forward(block: _Block, made: Mapping[str, Tensor]) -> None:
    call, rows, num_local = block.call, block.rows, block.call.num_local
    x1, x2 = made["x1"], made["x2"]
    weight = made["entry_weight"].copy_(block.parameters["pos_embed.weight"])
    # The identity.
    weight[:, :, 1, 1].add_(1.0)
    entry = block.entry_convolution(weight, norm=True)
    entry.keep_raw = True
    z = torch.empty_like(x1)
    _depthwise_kernels(entry, block.backend).forward(entry, z, x1, *made["norm1"])
    z_rows = map_to_tokens(z).view(rows, block.channels)
    weight, bias = block.fold("conv1", "norm1")

    if num_local:
        columns = slice(None) if block.full_width else slice(call.num_global, None)
        wide = made["local_input"].view(rows, -1)
        torch.addmm(bias[columns], z_rows, weight[columns].t(), out=wide)
        mixed = made["mixed"]
        source = block.map(made["local_input"])[:, -num_local:]
        local = block.local_convolution(source)
        target = block.map(mixed)[:, :num_local]
        empty = library.absent(block.x)
        _depthwise_kernels(local, block.backend).forward(local, target, empty, *made["norm_conv1"])
    elif block.full_width:
        torch.addmm(bias, z_rows, weight.t(), out=made["local_input"].view(rows, -1))

    global_tokens = None
    if call.num_global:
        _start_tokens(block, made, z, weight[: call.num_global], bias[: call.num_global])
        global_tokens = _self_attention(block, made)
    if call.align:
        global_tokens = _align(block, made, global_tokens)

    bias = block.last_bias(made["mixed_matrix"])
    on_mixed = made["mixed_matrix"] if call.align else block.local_matrix()
    residual = map_to_tokens(x1)
    if not call.num_global:
        branch = torch.addmm(bias, made["mixed"].view(rows, -1), on_mixed.t())
        block.scaled(branch.view(residual.shape), residual, map_to_tokens(x2))
    else:
        up = torch.nn.functional.linear(global_tokens, block.tokens_matrix(), bias)
        branch = None
        if num_local:
            branch = made["mixed"].view(rows, -1) @ on_mixed.t()
            branch = block.map(branch.view(residual.shape))
        size = (block.height, block.width)
        _resampled(tokens_to_map(up, call.grid), size, branch, call.drop_path[0], x2, x1)

    mean, var, unbiased = made["norm2"]
    statistics = (None, None) if call.uses_batch("norm2") else call.running["norm2"]
    absent = library.absent(block.x)
    feed_forward_triton.forward(
        block.mlp(x2, statistics), map_to_tokens(made["out"]), absent, made["hidden"], mean, var, unbiased
    )


def _start_tokens(block: _Block, made: Mapping[str, Tensor], z: Tensor, weight: Tensor, bias: Tensor) -> None:
    """The tokens of the global stream: down-sampled, and through its half of the first 1x1 convolution."""
    call, tokens = block.call, made["tokens"]
    if not block.full_width:
        torch.addmm(bias, _down(block, z), weight.t(), out=tokens.view(-1, call.num_global))
        return
    source = block.map(made["local_input"])[:, : call.num_global]
    down = block.down_convolution(source)
    target, kernels = tokens_to_map(tokens, call.grid), _depthwise_kernels(down, block.backend)
    if kernels is not None:
        absent = library.absent(block.x)
        kernels.forward(down, target, absent, *(absent.float() for _ in range(3)))
    else:
        weight, bias = (_cast(tensor, block.x) for tensor in (down.weight, down.bias))
        target.copy_(
            torch.nn.functional.conv2d(
                source, weight, bias, down.stride, down.padding, groups=call.num_global
            )
        )


def _down(block: _Block, z: Tensor) -> Tensor:
    """A map (B, C, H, W) resized to the grid of the global tokens, packed (B M, C)."""
    height, width = block.call.grid
    out = z.new_empty((block.batch, height * width, block.channels))
    _resampled(z, (height, width), None, None, tokens_to_map(out, (height, width)), None)
    return out.view(-1, block.channels)


def _self_attention(block: _Block, made: Mapping[str, Tensor]) -> Tensor:
    """The global tokens behind self-attention and its residual (B, M, C)."""
    call, tokens = block.call, made["tokens"]
    normed, _, _ = block.layer_norm("norm_sa1", tokens)
    qkv = block.linear("channel_up", normed)
    attended = attention.triton.forward(
        _attention_call(call, *_heads(call, qkv)),
        tokens.new_empty((*tokens.shape[:2], call.num_heads, tokens.shape[2] // call.num_heads)),
    )
    return torch.add(tokens, attended.flatten(2), out=made["global_tokens"])


def _align(block: _Block, made: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """Co-attention: fills the second half of ``mixed``; the global tokens behind it and its residual."""
    call, num_local = block.call, block.call.num_local
    local = made["mixed"][..., :num_local]
    mean, var, unbiased = made["norm_conv2"]
    if call.uses_batch("norm_conv2"):
        triton_norm.batch_statistics(local, mean, var, unbiased, call.group_of("norm_conv2"))
    else:
        mean, var = call.running["norm_conv2"]
    z = _standardised(block, local, (mean, var), "norm_conv2")
    weight, bias = block.fold("cross_channel_up_conv", "norm_conv2")
    torch.addmm(bias, z, weight.t(), out=made["local_qkv"].view(block.rows, -1))
    normed, _, _ = block.layer_norm("norm_sa2", tokens)
    block.linear("cross_channel_up_sa", normed, made["global_qkv"])
    streams = (_heads(call, made[name]) for name in ("local_qkv", "global_qkv"))
    to_local = made["mixed"][..., num_local:].unflatten(-1, (call.num_heads, -1))
    to_global = made["global_out"].unflatten(-1, (call.num_heads, -1))
    co_attention_triton.forward(
        _co_attention_call(call, *streams), to_local, to_global, made["local_lse"], made["global_lse"]
    )
    return torch.add(tokens, block.linear("fuse_channel_sa", made["global_out"]), out=made["last_tokens"])


def _standardised(
    block: _Block, tokens: Tensor, statistics: tuple[Tensor | None, Tensor | None], norm: str
) -> Tensor:
    """Tokens (B, N, C) behind a BatchNorm without affine part, packed (rows, C)."""
    out = tokens.new_empty((block.rows, tokens.shape[2]))
    return triton_norm.normalised(tokens, "batch", (None, None), statistics, block.call.eps_of(norm), out)


class _Stages:
    """Which gradients are asked for, and how far back the chain has to go for them."""

    ORDER = (
        ("norm2", "mlp"),
        ("conv2", "fuse_channel_conv", "fuse_channel_sa"),
        ("norm_conv2", "norm_sa2", "cross_channel_up_conv", "cross_channel_up_sa"),
        ("norm_conv1", "conv", "norm_sa1", "channel_up", "attn_down"),
        ("norm1", "conv1"),
        ("x", "pos_embed"),
    )

    def __init__(self, needs: Mapping[str, bool]) -> None:
        self.needs = needs
        wanted = [self.any(*layers) for layers in self.ORDER]
        self.last = max((index for index, one in enumerate(wanted) if one), default=-1)

    def any(self, *layers: str) -> bool:
        """Whether any parameter of these layers gets a gradient."""
        return any(
            needed and (name == layer or name.startswith(f"{layer}."))
            for name, needed in self.needs.items()
            for layer in layers
        )


def backward(
    call: Any, grad: Tensor, kept: Mapping[str, Tensor], needs: Mapping[str, bool], backend: str
) -> dict[str, Tensor]:
    """Launch the backward pass.

    Args:
        call: forward's, with the statistics that each BatchNorm normalised with as its running ones.
        grad: of the result (B, C, H, W), in any layout.
        kept: what forward kept, by the names of ``KEPT``.
        needs: whether x and each parameter get a gradient.

    Returns:
        The gradients that are needed, and perhaps others, some of them in other shapes and dtypes of the same
        values.
    """
    with backends.device_of(call.x):
        return _Backward(_Block(call, backend), kept, _Stages(needs)).run(grad)


class _Backward:
    def __init__(self, block: _Block, kept: Mapping[str, Tensor], stages: _Stages) -> None:
        self.block, self.kept, self.stages = block, kept, stages
        self.call = block.call
        self.gradients: dict[str, Tensor] = {}

    def run(self, grad: Tensor) -> dict[str, Tensor]:
        call, block, last = self.call, self.block, self.stages.last
        x2_grad = self._mlp(grad.contiguous(memory_format=torch.channels_last))
        if last < 1:
            return self.gradients
        mixed_grad, tokens_grad, attended_grad = self._last_convolution(x2_grad)
        if last < 2:
            return self.gradients
        local_grad = mixed_grad
        if call.align:
            local_grad, tokens_grad = self._align(mixed_grad, tokens_grad, attended_grad)
        if last < 3:
            return self.gradients
        wide_grad = None
        if block.full_width:
            wide_grad = block.x.new_empty((block.batch, block.tokens, block.channels))
        if call.num_global:
            tokens_grad = self._self_attention(tokens_grad)
            if block.full_width:
                self._down_convolution(tokens_grad, wide_grad)
        if call.num_local:
            local_grad = self._local_convolution(local_grad, wide_grad)
        if last < 4:
            return self.gradients
        x1_grad = self._first_convolution(
            x2_grad, local_grad if wide_grad is None else wide_grad, tokens_grad
        )
        if last == 5:
            self._entry(x1_grad)
        return self.gradients

    def _product(self, out_grad: Tensor, values: Tensor) -> Tensor:
        """Gradient of a matrix from that of its result and its operand, both (rows, ...)."""
        return out_grad.t() @ values

    def _total(self, out_grad: Tensor) -> Tensor:
        return out_grad.sum(0, dtype=torch.float32)

    def _linear(self, layer: str, out_grad: Tensor, values: Tensor) -> Tensor:
        """A linear layer's gradients; returns its input's. All (rows, ...)."""
        if self.stages.needs[f"{layer}.weight"]:
            self.gradients[f"{layer}.weight"] = self._product(out_grad, values)
        if self.stages.needs[f"{layer}.bias"]:
            self.gradients[f"{layer}.bias"] = self._total(out_grad)
        return out_grad @ self.block.matrix(layer)

    def _layer_norm(self, norm: str, out_grad: Tensor, tokens: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        """A LayerNorm's gradients; returns its input's."""
        weight, bias = self.block.affine(norm)
        needs = [True, *(self.stages.needs[f"{norm}.{kind}"] for kind in ("weight", "bias"))]
        x_grad, weight_grad, bias_grad = torch.ops.aten.native_layer_norm_backward(
            out_grad.view(tokens.shape), tokens, [tokens.shape[-1]], mean, rstd, weight, bias, needs
        )
        self.gradients[f"{norm}.weight"], self.gradients[f"{norm}.bias"] = weight_grad, bias_grad
        return x_grad

    def _folded(self, layer: str, norm: str, out_grads: Sequence[tuple[Tensor, Tensor]]) -> Tensor | None:
        """Gradients of a 1x1 convolution and the BatchNorm before it; returns that norm's sums (2, C).

        ``out_grads``: by groups of outputs, their gradient and the normalised values, (rows, ...) each.
        """
        uses_batch, needs = self.call.uses_batch(norm), self.stages.needs
        names = (f"{layer}.weight", f"{norm}.weight", f"{norm}.bias")
        # Frozen with running statistics: nobody reads them.
        if not (uses_batch or any(needs[name] for name in names) or needs[f"{layer}.bias"]):
            return None
        weight = self.block.parameters[f"{layer}.weight"]
        product = self.block.x.new_empty(_matrix(weight).shape)
        totals = product.new_empty(product.shape[0], dtype=torch.float32)
        start = 0
        for grad, values in out_grads:
            rows = slice(start, start + grad.shape[1])
            torch.mm(grad.t(), values, out=product[rows])
            torch.sum(grad, 0, dtype=torch.float32, out=totals[rows])
            start = rows.stop
        self.gradients[f"{layer}.bias"] = totals
        affine = self.block.affine(norm)
        made = [
            torch.empty_like(product, dtype=weight.dtype) if needs[names[0]] else None,
            *(
                torch.empty_like(one) if needs[name] and one is not None else None
                for one, name in zip(affine, names[1:], strict=True)
            ),
        ]
        sums = totals.new_empty((2, product.shape[1])) if uses_batch else None
        triton_norm.folded_gradients(product, totals, _matrix(weight), *affine, tuple(made), sums)
        self.gradients.update({name: one for name, one in zip(names, made, strict=True) if one is not None})
        if sums is not None and (group := self.call.group_of(norm)):
            distributed.exchange_sums(sums, self.block.rows, group)
        return sums

    def _norm_input(
        self, norm: str, z_grad: Tensor, x: Tensor, residual_grad: Tensor, sums: Tensor | None
    ) -> Tensor:
        """The gradient of a BatchNorm's input (B, N, C), with that of the residual, in ``z_grad``'s place."""
        return triton_norm.input_gradient(
            z_grad,
            x,
            residual_grad,
            "batch",
            self.block.affine(norm)[0],
            self.call.running[norm],
            sums,
            self.call.eps_of(norm),
            z_grad.view(x.shape),
        )

    def _mlp(self, grad: Tensor) -> Tensor:
        """The MLP's gradients; returns that of x2 (B, C, H, W)."""
        block, needs = self.block, self.stages.needs
        mlp = block.mlp(self.kept["x2"], self.call.running["norm2"])
        names = (
            "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias", "norm2.weight", "norm2.bias",
        )  # fmt: skip
        wanted = [self.stages.last >= 1, *(needs[name] for name in names), False, False, False]
        made = feed_forward.allocate_backward(mlp, wanted)
        feed_forward_triton.backward(
            mlp, map_to_tokens(grad), library.absent(block.x), self.kept["hidden"], wanted, *made
        )
        self.gradients.update(zip(names, made[1:], strict=False))
        return block.map(made[0]) if wanted[0] else made[0]

    def _last_convolution(self, x2_grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of the second 1x1 convolution and of the global tokens' projection before it.

        Returns those of ``mixed``, of the global tokens, and of what they get from the local ones.
        """
        call, block, needs, kept = self.call, self.block, self.stages.needs, self.kept
        branch_grad = map_to_tokens(x2_grad)
        factors = call.drop_path[0]
        if factors is not None and call.num_local:
            branch_grad = block.scaled(branch_grad, None, torch.empty_like(branch_grad))
        branch_grad = branch_grad.view(block.rows, block.channels)
        weight_grad = block.x.new_empty((block.channels, block.channels)) if needs["conv2.weight"] else None
        mixed_grad = tokens_grad = attended_grad = None
        if call.num_global:
            up_grad = block.x.new_empty((block.batch, call.grid[0] * call.grid[1], block.channels))
            resample.backward(x2_grad, factors, "bilinear", tokens_to_map(up_grad, call.grid))
            up_grad = up_grad.flatten(0, 1)
            # Resizing keeps sums, so these few tokens have that of all pixels.
            totals = self._total(up_grad)
            tokens = kept["last_tokens" if call.align else "global_tokens"]
            tokens_grad = (up_grad @ block.tokens_matrix()).view(tokens.shape)
            if weight_grad is not None:
                torch.mm(up_grad.t(), tokens.flatten(0, 1), out=weight_grad[:, call.num_local :])
            if call.align:
                to_tokens, rows = kept["global_out"].flatten(0, 1), tokens_grad.flatten(0, 1)
                attended_grad = self._linear("fuse_channel_sa", rows, to_tokens)
        else:
            totals = self._total(branch_grad)
        if call.num_local:
            projection = self.stages.any("fuse_channel_conv")
            if weight_grad is not None or projection:
                product = self._product(branch_grad, kept["mixed"].view(block.rows, -1))
                self._local_weights(product, totals, weight_grad)
            on_mixed = kept["mixed_matrix"] if call.align else block.local_matrix()
            mixed_grad = (branch_grad @ on_mixed).view(kept["mixed"].shape)
        if weight_grad is not None:
            self.gradients["conv2.weight"] = weight_grad
        self.gradients["conv2.bias"] = totals
        return mixed_grad, tokens_grad, attended_grad

    def _local_weights(self, product: Tensor, totals: Tensor, weight_grad: Tensor | None) -> None:
        """The local half of the second 1x1 convolution, and the projection that is multiplied into it.

        Args:
            product: gradient of ``mixed_matrix``.
            totals: of the bias.
            weight_grad: of the convolution, filled where it is given.
        """
        num_local = self.call.num_local
        of_local = product[:, :num_local]
        if self.call.align:
            of_attended = product[:, num_local:]
            local = self.kept["mixed_matrix"][:, :num_local]
            totals = totals.to(product.dtype)
            self.gradients["fuse_channel_conv.weight"] = local.t() @ of_attended
            self.gradients["fuse_channel_conv.bias"] = torch.mv(local.t(), totals)
            of_local.addmm_(of_attended, self.block.matrix("fuse_channel_conv").t())
            of_local.addr_(totals, _cast(self.block.parameters["fuse_channel_conv.bias"], product))
        if weight_grad is not None:
            weight_grad[:, :num_local].copy_(of_local)

    def _align(self, mixed_grad: Tensor, tokens_grad: Tensor, attended_grad: Tensor) -> tuple[Tensor, Tensor]:
        """Co-attention's gradients; returns those of the local stream before it and of the global tokens.

        ``attended_grad``: of what the global tokens get from the local ones, (B M, C).
        """
        call, block, kept = self.call, self.block, self.kept
        num_local, heads = call.num_local, call.num_heads
        streams = [_heads(call, kept[name]) for name in ("local_qkv", "global_qkv")]
        qkv_grad = torch.empty_like(kept["local_qkv"])
        local = _heads(call, qkv_grad)
        query, key, value = (
            qkv_grad.new_empty((*tokens_grad.shape[:2], heads, tokens_grad.shape[2] // heads))
            for _ in range(3)
        )
        whole = keys_in_one_block(call)
        attended = kept["mixed"][..., num_local:].unflatten(-1, (heads, -1))
        co_attention_triton.backward(
            _co_attention_call(call, *streams),
            mixed_grad[..., num_local:].unflatten(-1, (heads, -1)),
            attended_grad.view(query.shape),
            (
                None if whole else attended,
                None if whole else kept["local_lse"],
                kept["global_out"].unflatten(-1, (heads, -1)),
                kept["global_lse"],
            ),
            [True] * 6,
            local[0],
            local[2],
            key,
            value,
            local[1],
            query,
        )
        rows_grad = qkv_grad.view(block.rows, -1)
        source = kept["mixed"][..., :num_local]
        z = _standardised(block, source, call.running["norm_conv2"], "norm_conv2")
        sums = self._folded("cross_channel_up_conv", "norm_conv2", [(rows_grad, z)])
        z_grad = rows_grad @ block.matrix("cross_channel_up_conv")
        local_grad = self._norm_input("norm_conv2", z_grad, source, mixed_grad[..., :num_local], sums)
        qkv_grad = torch.cat([grad.flatten(2) for grad in (query, key, value)], dim=2)
        tokens = kept["global_tokens"]
        normed = block.layer_norm("norm_sa2", tokens)
        tokens_grad = self._tokens("cross_channel_up_sa", "norm_sa2", qkv_grad, tokens, normed, tokens_grad)
        return local_grad, tokens_grad

    def _tokens(
        self,
        layer: str,
        norm: str,
        qkv_grad: Tensor,
        tokens: Tensor,
        normed: tuple[Tensor, Tensor, Tensor],
        residual_grad: Tensor,
    ) -> Tensor:
        """Gradient of the tokens before a LayerNorm and a projection, with that of the residual.

        ``normed``: what :meth:`_Block.layer_norm` gives for the tokens.
        """
        normed_grad = self._linear(layer, qkv_grad.flatten(0, 1), normed[0].flatten(0, 1))
        return residual_grad + self._layer_norm(norm, normed_grad, tokens, *normed[1:])

    def _self_attention(self, tokens_grad: Tensor) -> Tensor:
        """Self-attention's gradients; returns that of the tokens that the global stream starts with."""
        call = self.call
        normed = self.block.layer_norm("norm_sa1", self.kept["tokens"])
        qkv = self.block.linear("channel_up", normed[0])
        attention_call = _attention_call(call, *_heads(call, qkv))
        needs = [True, True, True, False]
        made = attention.allocate_backward(attention_call, needs)
        grad = tokens_grad.unflatten(-1, (call.num_heads, -1))
        attention.triton.backward(attention_call, grad, needs, *made)
        qkv_grad = torch.cat([one.flatten(2) for one in made[:3]], dim=2)
        return self._tokens("channel_up", "norm_sa1", qkv_grad, self.kept["tokens"], normed, tokens_grad)

    def _down_convolution(self, tokens_grad: Tensor, wide_grad: Tensor) -> None:
        """The depthwise down-sampler's gradients; fills the first channels of ``wide_grad`` (B, N, C)."""
        call, block, needs = self.call, self.block, self.stages.needs
        down = block.down_convolution(block.map(self.kept["local_input"])[:, : call.num_global])
        grad = tokens_to_map(tokens_grad, call.grid)
        target = block.map(wide_grad)[:, : call.num_global]
        wanted = [True, needs["attn_down.weight"], needs["attn_down.bias"]]
        kernels = _depthwise_kernels(down, block.backend)
        if kernels is not None:
            made = depthwise.allocate_backward(down, [False, *wanted[1:], False, False, False])
            made = (target, *made[1:])
            kernels.backward(down, grad, None, [*wanted, False, False, False], *made)
        else:
            bias_sizes = [call.num_global]
            weight = _cast(down.weight, block.x)
            options = (down.stride, down.padding, (1, 1), False, [0, 0], call.num_global, wanted)
            made = torch.ops.aten.convolution_backward(grad, down.x, weight, bias_sizes, *options)
            target.copy_(made[0])
        self.gradients["attn_down.weight"], self.gradients["attn_down.bias"] = made[1], made[2]

    def _local_convolution(self, local_grad: Tensor, wide_grad: Tensor | None) -> Tensor:
        """The local stream's convolution; returns its input's gradient (B, N, C), or fills it in."""
        block, needs, num_local = self.block, self.stages.needs, self.call.num_local
        local = block.local_convolution(block.map(self.kept["local_input"])[:, -num_local:])
        names = ("conv.weight", "conv.bias", "norm_conv1.weight", "norm_conv1.bias")
        wanted = [self.stages.last >= 4, *(needs[name] for name in names), False]
        made = list(depthwise.allocate_backward(local, [False, *wanted[1:]]))
        x_grad = wide_grad
        if x_grad is None:
            x_grad = block.x.new_empty((block.batch, block.tokens, num_local))
        made[0] = block.map(x_grad)[:, -num_local:]
        kernels = _depthwise_kernels(local, block.backend)
        kernels.backward(local, block.map(local_grad), None, wanted, *made)
        self.gradients.update(zip(names, made[1:], strict=False))
        return x_grad

    def _first_convolution(
        self, x2_grad: Tensor, wide_grad: Tensor | None, tokens_grad: Tensor | None
    ) -> Tensor:
        """The first 1x1 convolution's and norm1's gradients; returns that of x1 (B, N, C).

        ``wide_grad``: of what the convolution gives at all pixels (B, N, C), or of its local half.
        """
        call, block = self.call, self.block
        x1 = map_to_tokens(self.kept["x1"])
        z = _standardised(block, x1, call.running["norm1"], "norm1")
        weight = block.matrix("conv1")
        parts = []
        z_grad = None
        if call.num_global and not block.full_width:
            rows = tokens_grad.flatten(0, 1)
            parts.append((rows, _down(block, block.map(z.view(x1.shape)))))
            down_grad = (rows @ weight[: call.num_global]).view(*tokens_grad.shape[:2], block.channels)
            z_grad = torch.empty_like(x1)
            resample.backward(tokens_to_map(down_grad, call.grid), None, "bilinear", block.map(z_grad))
            z_grad = z_grad.view(block.rows, -1)
            weight = weight[call.num_global :]
        if wide_grad is not None:
            rows = wide_grad.view(block.rows, -1)
            parts.append((rows, z))
            z_grad = rows @ weight if z_grad is None else z_grad.addmm_(rows, weight)
        sums = self._folded("conv1", "norm1", parts)
        return self._norm_input("norm1", z_grad, x1, map_to_tokens(x2_grad), sums)

    def _entry(self, x1_grad: Tensor) -> None:
        """The gradients of the input and of the positional convolution."""
        block, needs = self.block, self.stages.needs
        entry = block.entry_convolution(self.kept["entry_weight"], norm=False)
        names = ("x", "pos_embed.weight", "pos_embed.bias")
        wanted = [*(needs[name] for name in names), False, False, False]
        made = depthwise.allocate_backward(entry, wanted)
        _depthwise_kernels(entry, block.backend).backward(entry, block.map(x1_grad), None, wanted, *made)
        self.gradients.update(zip(names, made, strict=False))
