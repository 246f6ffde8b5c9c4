"""The DS-Block as a module that owns stock submodules under the names of the public code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_ops.blocks.ds_block import op
from fused_ops.blocks.ds_block.reference import GLOBAL_DOWN, grid_size, split_channels
from fused_ops.blocks.layout import (
    PointwiseConv2d,
    is_channels_last,
    like_input,
    map_to_tokens,
    to_channels_last,
    tokens_to_map,
)
from fused_ops.co_attention.module import align
from fused_ops.core import library
from fused_ops.core.autocast import autocast_dtype, autocast_off, cast
from fused_ops.core.backends import choose_whole
from fused_ops.core.batch_norm import call_norm
from fused_ops.core.cases import Case
from fused_ops.core.checks import any_requires_grad, check_values_per_channel
from fused_ops.core.drop_path import DropPath
from fused_ops.core.dropout import draw_seed
from fused_ops.core.hooks import all_hooked, is_hooked
from fused_ops.core.initialise import init_linear
from fused_ops.depthwise import BatchNormState, depthwise_conv
from fused_ops.feed_forward.module import residual_mlp
from fused_ops.resample import resample_map

_EPS = 1e-5


class _Mlp(nn.Module):
    """1x1 conv, exact GELU, 1x1 conv on maps (B, C, H, W)."""

    def __init__(self, dim: int, hidden_dim: int, drop: float, **factory: object) -> None:
        super().__init__()
        self.fc1 = PointwiseConv2d(dim, hidden_dim, **factory)
        self.act = nn.GELU()
        self.fc2 = PointwiseConv2d(hidden_dim, dim, **factory)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class DSBlock(nn.Module):
    """Dual-stream block: local convolution and global attention, mixed by co-attention.

    Input and output are maps (B, dim, H, W) of any size in float16, bfloat16, float32 or float64. The
    working layout is channels_last, in which no permuted copy is made; NCHW input is converted once at the
    entry and once at the exit. The output layout follows the input's.

    Parameter names and shapes are those of SteveTsui/DS-Net (``MixBlock``) and PaddleClas. With kernels the
    block runs as one operator while every layer is of the constructor's kind and has no hook; otherwise as a
    chain of operators, which reads the parameters of ``pos_embed``, ``conv``, ``norm_conv1``, ``attn_down``,
    ``norm2`` and ``mlp`` instead of calling them: hooks on these are not called, hooks on the block and on
    all other submodules are.

    Args:
        dim: channels of the map.
        num_heads: heads of the self-attention and of both directions of the co-attention; must divide the
            channels of the global stream.
        downsample: s; the global stream works on a grid of floor(H/s) x floor(W/s) tokens, at least 1 x 1.
        alpha: share of the channels given to the global stream, in [0, 1].
        mlp_ratio: hidden width of the MLP as a multiple of ``dim``.
        align: inter-scale alignment (the starred models of the paper); needs ``alpha=0.5``.
        global_down: ``"bilinear"``, or ``"dwconv"``: a depthwise convolution with kernel 2s+1 and stride s.
            Inferred, see the README of this folder; its grid is floor((H-1)/s)+1.
        attn_drop: dropout of the three softmax outputs in training. The public code has 0.1 hard-wired.
        proj_drop: dropout after the last 1x1 convolution and inside the MLP.
        drop_path: stochastic depth, drawn for each of the two residual branches on its own.

    Raises:
        ValueError: for arguments that do not fit together, or an input that is not (B, dim, H, W).

    Source: Mao et al., "Dual-stream Network for Visual Recognition", NeurIPS 2021 (arXiv 2105.14734).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        downsample: int,
        alpha: float = 0.5,
        mlp_ratio: float = 4.0,
        align: bool = True,
        global_down: str = "bilinear",
        attn_drop: float = 0.1,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_arguments(dim, num_heads, downsample, alpha, mlp_ratio, align, global_down)
        factory = {"device": device, "dtype": dtype}
        num_global, num_local = split_channels(dim, alpha)
        self.dim = dim
        self.num_heads = num_heads
        self.downsample = downsample
        self.alpha = alpha
        self.align = align
        self.global_down = global_down
        self.num_global, self.num_local = num_global, num_local

        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)
        self.norm1 = nn.BatchNorm2d(dim, eps=_EPS, **factory)
        self.conv1 = PointwiseConv2d(dim, dim, **factory)
        self.conv2 = PointwiseConv2d(dim, dim, **factory)
        if num_local:
            self.norm_conv1 = nn.BatchNorm2d(num_local, eps=_EPS, **factory)
            self.conv = nn.Conv2d(num_local, num_local, 3, padding=1, groups=num_local, **factory)
        if num_global:
            if global_down == "dwconv":
                self.attn_down = nn.Conv2d(
                    num_global,
                    num_global,
                    2 * downsample + 1,
                    stride=downsample,
                    padding=downsample,
                    groups=num_global,
                    **factory,
                )
            self.norm_sa1 = nn.LayerNorm(num_global, eps=_EPS, **factory)
            self.channel_up = nn.Linear(num_global, 3 * num_global, **factory)
        if align:
            self.norm_conv2 = nn.BatchNorm2d(num_local, eps=_EPS, **factory)
            self.norm_sa2 = nn.LayerNorm(num_global, eps=_EPS, **factory)
            self.cross_channel_up_conv = PointwiseConv2d(num_local, 3 * num_local, **factory)
            self.cross_channel_up_sa = nn.Linear(num_global, 3 * num_global, **factory)
            self.fuse_channel_conv = nn.Linear(num_local, num_local, **factory)
            self.fuse_channel_sa = nn.Linear(num_global, num_global, **factory)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj_drop = nn.Dropout(proj_drop)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.BatchNorm2d(dim, eps=_EPS, **factory)
        self.mlp = _Mlp(dim, int(dim * mlp_ratio), proj_drop, **factory)
        for module in self.modules():
            init_linear(module)

    def reset_parameters(self) -> None:
        """Initialise all parameters and statistics again, for instance after ``to_empty``.

        Linear layers: truncated normal with standard deviation 0.02, zero bias. All else: PyTorch's defaults.
        """
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()
            init_linear(module)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.dim:
            raise ValueError(f"x must be (B, {self.dim}, H, W), got {tuple(x.shape)}")
        channels_last = is_channels_last(x)
        x = to_channels_last(x)
        call = self._whole_call(x)
        if call is not None and (kernels := choose_whole("ds_block", op.BACKENDS, call)) is not None:
            return like_input(self._run_whole(call, kernels), channels_last)

        x1 = depthwise_conv(x, self.pos_embed.weight, self.pos_embed.bias, padding=1, residual=x)
        y = self.conv1(call_norm(self.norm1, x1))
        streams = []
        if self.num_local:
            local = self._local(y[:, self.num_global :])
        if self.num_global:
            tokens, grid = self._global(y[:, : self.num_global])
        if self.align:
            local, tokens = self._co_attention(local, tokens)
        if self.num_local:
            streams.append(local)
        if self.num_global:
            streams.append(_resize(tokens_to_map(tokens, grid), (x.shape[-2], x.shape[-1])))
        # The order is local, global: the reverse of the split.
        z = torch.cat(streams, dim=1) if len(streams) > 1 else streams[0]
        x2 = x1 + self.drop_path(self.proj_drop(self.conv2(z)))
        out = residual_mlp(x2, self.norm2, self.mlp, self.drop_path)
        return like_input(out, channels_last)

    def _whole_call(self, x: Tensor) -> op.DSBlockCall | None:
        """What the block is as one operator on a dense channels_last map; None where it is not stock.

        Dropout's seeds and what the norms need are filled in where it runs.
        """
        parameters = self._stock_parameters(x)
        if parameters is None:
            return None
        norms = [getattr(self, name, None) for name in op.BATCH_NORMS]
        layer_norms = [getattr(self, name, None) for name in op.LAYER_NORMS]
        dropout = self.attn_drop.p if self.training else 0.0
        return op.DSBlockCall(
            cast(x, autocast_dtype(x) or x.dtype),
            parameters,
            {},
            (None, None),
            (None, None),
            self.num_heads,
            self.downsample,
            self.num_global,
            self.align,
            self.global_down,
            [norm is not None and (norm.training or norm.running_mean is None) for norm in norms],
            [1e-5 if norm is None else norm.eps for norm in (*norms, *layer_norms)],
            [""] * len(norms),
            dropout,
            any_requires_grad(x, *parameters.values()),
        )

    def _stock_parameters(self, x: Tensor) -> dict[str, Tensor | None] | None:
        """All parameters by name, where every layer is of the constructor's kind and no hook watches it."""
        if all_hooked():
            return None
        parameters: dict[str, Tensor | None] = dict.fromkeys(op.PARAMETERS)
        for name, layer in self.named_modules():
            if name == "":
                continue
            expected = _STOCK.get(name)
            if (
                expected is None
                or type(layer) not in expected
                or is_hooked(layer)
                or "forward" in layer.__dict__
            ):
                return None
            for kind in ("weight", "bias"):
                parameter = layer._parameters.get(kind)
                if parameter is None:
                    if f"{name}.{kind}" in parameters and not isinstance(layer, _NORMS):
                        return None
                    continue
                if parameter.device != x.device or parameter.dtype not in (x.dtype, torch.float32):
                    return None
                parameters[f"{name}.{kind}"] = parameter
        for dropout in (self.proj_drop, self.mlp.drop):
            if dropout.training and dropout.p > 0.0:
                return None
        return None if self.mlp.act.approximate != "none" else parameters

    def _run_whole(self, call: op.DSBlockCall, backend: str) -> Tensor:
        """The block as one operator; updates the norms' running statistics."""
        x = call.x
        states = {}
        for index, name in enumerate(op.BATCH_NORMS):
            if (norm := getattr(self, name, None)) is None:
                continue
            state = states[name] = BatchNormState.from_module(norm)
            call.groups[index] = state.group if state.batch_stats else ""
            if not state.batch_stats:
                call.running[name] = (state.running_mean, state.running_var)
            elif not state.group:
                check_values_per_channel(tuple(x.shape))
        call.drop_path = (self.drop_path.factors(x), self.drop_path.factors(x))
        if call.dropout and self.num_global:
            call.seeds = (draw_seed(x), draw_seed(x) if self.align else None)
        with autocast_off(x):
            out, *kept = op.DIFFERENTIABLE.run(call.keep, *call.tensors(), *call.options(), backend)
        for name, statistics in zip(op.BATCH_NORMS, kept[len(op.KEPT) :], strict=True):
            if name in states and statistics.numel():
                states[name].update_running(statistics[0], statistics[2])
        return out

    def _local(self, x: Tensor) -> Tensor:
        """l1 = l0 + DW3x3(BN(l0)) of a channel slice (B, num_local, H, W)."""
        norm = self.norm_conv1
        if isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            state = BatchNormState.from_module(norm)
            return depthwise_conv(
                x, self.conv.weight, self.conv.bias, padding=1, norm=state, norm_placement="pre", residual=x
            )
        # A converter (to a frozen norm) has put another layer here.
        return depthwise_conv(norm(x), self.conv.weight, self.conv.bias, padding=1, residual=x)

    def _global(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Down-sampling and self-attention of (B, num_global, H, W): tokens (B, M, num_global) and grid."""
        if self.global_down == "dwconv":
            weight, bias, step = self.attn_down.weight, self.attn_down.bias, self.downsample
            x = depthwise_conv(x, weight, bias, stride=step, padding=step)
        else:
            x = _resize(x, grid_size(x.shape[-2], x.shape[-1], self.downsample))
        tokens = map_to_tokens(x)
        query, key, value = self._heads(self.channel_up(self.norm_sa1(tokens)))
        return tokens + self._attention(query, key, value), (x.shape[-2], x.shape[-1])

    def _co_attention(self, local: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Both directions at once, from the same inputs: maps (B, h, H, W) and tokens (B, M, h)."""
        dropout = self.attn_drop.p if self.training else 0.0
        return align(self, local, tokens, self.num_heads, dropout)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, 3·C) in the order [q | k | v], each [head][d_h], to three views (B, heads, N, d_h)."""
        heads = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return heads[0], heads[1], heads[2]

    def _attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """softmax(Q Kᵀ / sqrt(d_h)) V of (B, heads, N, d_h); returns (B, Nq, heads·d_h)."""
        dropout = self.attn_drop.p if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return out.transpose(1, 2).flatten(2)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, downsample={self.downsample}, "
            f"alpha={self.alpha:g}, align={self.align}, global_down={self.global_down!r}"
        )


_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_NORMS = (*_BATCH_NORMS, nn.LayerNorm)
# The layers whose parameters say all that they do, by name.
_STOCK: dict[str, tuple[type[nn.Module], ...]] = {
    **dict.fromkeys(op.BATCH_NORMS, _BATCH_NORMS),
    **dict.fromkeys(op.LAYER_NORMS, (nn.LayerNorm,)),
    **dict.fromkeys(("pos_embed", "conv", "attn_down"), (nn.Conv2d,)),
    **dict.fromkeys(("conv1", "conv2", "cross_channel_up_conv", "mlp.fc1", "mlp.fc2"), (PointwiseConv2d,)),
    **dict.fromkeys(
        ("channel_up", "cross_channel_up_sa", "fuse_channel_conv", "fuse_channel_sa"), (nn.Linear,)
    ),
    **dict.fromkeys(("attn_drop", "proj_drop", "mlp.drop"), (nn.Dropout,)),
    "drop_path": (DropPath,),
    "mlp": (_Mlp,),
    "mlp.act": (nn.GELU,),
}


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize without corner alignment and antialiasing; the identity for the same size."""
    return x if (x.shape[-2], x.shape[-1]) == size else resample_map(x, size)


def _check_arguments(
    dim: int, num_heads: int, downsample: int, alpha: float, mlp_ratio: float, align: bool, global_down: str
) -> None:
    for name, value in (("dim", dim), ("num_heads", num_heads), ("downsample", downsample)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    if int(dim * mlp_ratio) < 1:
        raise ValueError(f"mlp_ratio must give a hidden channel or more, got {mlp_ratio} with dim={dim}")
    if global_down not in GLOBAL_DOWN:
        raise ValueError(f"global_down must be one of {', '.join(GLOBAL_DOWN)}, got {global_down!r}")
    num_global, num_local = split_channels(dim, alpha)
    if align and num_global != num_local:
        raise ValueError(
            f"align=True needs streams of equal width (alpha=0.5 and an even dim), got alpha={alpha} and "
            f"dim={dim}, which give {num_global} global and {num_local} local channels"
        )
    if num_global % num_heads:
        raise ValueError(
            f"num_heads must divide the {num_global} channels of the global stream (dim={dim}, "
            f"alpha={alpha}), got {num_heads}"
        )


def _run_case(block: DSBlock, x: Tensor) -> Tensor:
    return block(x)


def _cases() -> list[Case]:
    # The samples are made of the module above.
    from fused_ops.blocks.ds_block.cases import CASES

    return CASES


library.register_block(
    library.Block(
        "ds_block",
        _run_case,
        _cases,
        ("depthwise", "attention", "co_attention", "feed_forward", "resample"),
    )
)
