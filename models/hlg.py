"""HLG: hierarchical local-global transformer.

Zhang et al., "Vision Transformers: From Semantic Segmentation to Dense Prediction", IJCV 2024 (arXiv
2207.09339). Public code: fudan-zvg/SETR (PyTorch), which in its released state does not run, in none of its
three copies.

What the released code says: everything in the layers, see :class:`Layer`. Where it refers to things that it
never defines, this does what the copies together say; the recorded numbers that it is tested with come from
the dense copy with four repairs, and nobody can say that the authors trained that.

What is inferred:

* Depths of medium and large: 18 layers in the third stage. The released configurations say 14
  (``hlg_medium_14``, ``hlg_large_14``). With 18 the published multiply-accumulates of all four sizes come
  out, if the two convolutions of the stem are left out of the count, and the published parameters of tiny,
  small and large. The 43 M of medium are NOT reproduced by either.
* Hidden width of the layers' MLP: four times the channels that come in, as in the dense copies. The copy for
  classification takes the channels that go out (``mlp_width_of="output"``) and smooths in the last stage too
  (``smooth_last=True``); with these tiny and small miss their published sizes.
* Maps whose sides are no multiples of the window are padded with zeros for the attention, and cut again.

The position bias of window tokens is switchable (``window_positions``): the released code treats the window
with index i as if it sat at the i-th position of the map (``raster``), which the published weights must
have learnt to live with; ``centre`` puts it where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from fused_ops import BatchNormState, depthwise_conv
from fused_ops.blocks.layout import PointwiseConv2d, map_to_tokens, to_channels_last, tokens_to_map
from fused_ops.core.checks import check_choice
from fused_ops.core.drop_path import DropPath
from fused_ops.core.initialise import init_linear
from fused_ops.models.arguments import check_lengths
from fused_ops.models.common import (
    ChannelLayerNorm,
    StagedBackbone,
    build_backbone,
    check_heads,
    classification_cfg,
    drop_path_rates,
)
from fused_ops.models.layouts import same_names_layout
from fused_ops.models.registry import ModelInfo, System, register_system

__all__ = ["HLG"]

WINDOW_POSITIONS = ("raster", "centre")
MLP_WIDTHS = ("input", "output")
_EPS = 1e-6
# The released code takes PyTorch's own here.
_POSITION_EPS = 1e-5


class DynamicPositionBias(nn.Module):
    """Bias of every head for pairs of positions, by a small network on their offset (dy, dx)."""

    def __init__(self, dim: int, num_heads: int, **factory: Any) -> None:
        super().__init__()
        width = max(dim // 16, 1)
        self.pos_proj = nn.Linear(2, width, **factory)

        def step(out: int) -> nn.Sequential:
            norm = nn.LayerNorm(width, eps=_POSITION_EPS, **factory)
            return nn.Sequential(norm, nn.ReLU(), nn.Linear(width, out, **factory))

        self.pos1 = step(width)
        self.pos2 = step(width)
        self.pos3 = step(num_heads)

    def forward(self, size: tuple[int, int], keys: tuple[Tensor, Tensor]) -> Tensor:
        """Bias (heads, H·W, M) of all positions of a map for M keys, at rows and columns ``keys``."""
        height, width = size
        weight = self.pos_proj.weight
        rows = torch.arange(1 - height, height, device=weight.device)
        columns = torch.arange(1 - width, width, device=weight.device)
        offsets = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
        table = self.pos3(self.pos2(self.pos1(self.pos_proj(offsets.to(weight.dtype)))))
        down = torch.arange(height, device=weight.device)[:, None, None] - keys[0] + height - 1
        right = torch.arange(width, device=weight.device)[None, :, None] - keys[1] + width - 1
        index = down * (2 * width - 1) + right
        return table[index.flatten(0, 1)].permute(2, 0, 1)


class DepthwiseMlp(nn.Module):
    """1x1, 3x3 depthwise (with a stride), 1x1 convolution; BatchNorm and exact GELU after the first two."""

    def __init__(self, in_dim: int, hidden_dim: int, dim: int, stride: int, **factory: Any) -> None:
        super().__init__()
        self.fc1 = PointwiseConv2d(in_dim, hidden_dim, **factory)
        self.norm1 = nn.BatchNorm2d(hidden_dim, **factory)
        self.fc2 = nn.Conv2d(hidden_dim, hidden_dim, 3, stride, padding=1, groups=hidden_dim, **factory)
        self.norm2 = nn.BatchNorm2d(hidden_dim, **factory)
        self.fc3 = PointwiseConv2d(hidden_dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(self.fc1(x)))
        conv = self.fc2
        if isinstance(self.norm2, nn.BatchNorm2d | nn.SyncBatchNorm):
            state = BatchNormState.from_module(self.norm2)
            x = depthwise_conv(
                x, conv.weight, conv.bias, stride=conv.stride, padding=1, norm=state, activation="gelu"
            )
        else:
            # A converter (a frozen norm) has put another layer here.
            x = F.gelu(self.norm2(depthwise_conv(x, conv.weight, conv.bias, stride=conv.stride, padding=1)))
        return self.fc3(x)


class DownProjection(nn.Module):
    """Shortcut of a layer that halves the map: grouped strided 3x3 convolution, BatchNorm, exact GELU."""

    def __init__(self, in_dim: int, dim: int, **factory: Any) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, groups=in_dim, **factory),
            nn.BatchNorm2d(dim, **factory),
            nn.GELU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class OutputProjection(nn.Module):
    """The output projection of the attention over windows or positions."""

    def __init__(self, dim: int, **factory: Any) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def _smoothing(dim: int, **factory: Any) -> nn.Sequential:
    """Bottleneck of 1x1, 3x3 and 1x1 convolutions, each with BatchNorm, the first two with exact GELU."""
    hidden_dim = dim // 4
    return nn.Sequential(
        nn.Sequential(
            PointwiseConv2d(dim, hidden_dim, **factory),
            nn.BatchNorm2d(hidden_dim, **factory),
            nn.GELU(),
            nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, **factory),
            nn.BatchNorm2d(hidden_dim, **factory),
            nn.GELU(),
            PointwiseConv2d(hidden_dim, dim, **factory),
            nn.BatchNorm2d(dim, **factory),
        )
    )


class Layer(nn.Module):
    """Convolutional MLP, then attention, on maps: (B, in_dim, H, W) to (B, dim, H/stride, W/stride),
    rounded up.

    x = shortcut + DropPath(LN(MLP(x))) with the MLP :class:`DepthwiseMlp`. Smoothing: z = GELU(x + S(x)).

    With a window P: attention inside windows of P x P positions, whose keys are its queries, q, giving p
    without an output projection, and w = z + p. One token per window, the normed mean of its w. Then all
    positions, with queries q + DW3x3(LN(p)), attend to the window tokens, whose values use the projection
    of the local ones; the result, projected, is added to w. Even layers have contiguous windows, odd ones
    (``dilated``) windows whose positions are H/P rows and W/P columns apart.

    Without a window (last stage): x + DropPath(LN(attention(x))) over all positions.

    Both attentions have a :class:`DynamicPositionBias` each.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        num_heads: int,
        hidden_dim: int,
        stride: int,
        window: int | None,
        dilated: bool,
        smooth: bool,
        window_positions: str,
        qkv_bias: bool,
        drop_path: float,
        **factory: Any,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.window = window
        self.dilated = dilated
        self.window_positions = window_positions
        self.mlp = DepthwiseMlp(in_dim, hidden_dim, dim, stride, **factory)
        if stride > 1 or in_dim != dim:
            self.down_proj = DownProjection(in_dim, dim, **factory)
        self.norm2 = ChannelLayerNorm(dim, eps=_EPS, **factory)
        if smooth:
            self.spatial_smooth = _smoothing(dim, **factory)
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.k = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.v = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.norm1 = nn.LayerNorm(dim, eps=_EPS, **factory)
        if window is not None:
            self.norm0 = nn.LayerNorm(dim, eps=_EPS, **factory)
            self.h0_norm = nn.LayerNorm(dim, eps=_EPS, **factory)
            self.aux_q = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)
            self.pos_local = DynamicPositionBias(dim, num_heads, **factory)
        self.pos_global = DynamicPositionBias(dim, num_heads, **factory)
        self.global_attn = OutputProjection(dim, **factory)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.down_proj(x) if hasattr(self, "down_proj") else x
        x = shortcut + self.drop_path(self.norm2(self.mlp(x)))
        if hasattr(self, "spatial_smooth"):
            x = F.gelu(x + self.spatial_smooth(x))
        return self._attend_everywhere(x) if self.window is None else self._attend(x)

    def _attend_everywhere(self, x: Tensor) -> Tensor:
        size = (x.shape[-2], x.shape[-1])
        tokens = map_to_tokens(x)
        bias = self.pos_global(size, _raster(size[0] * size[1], size[1], x.device))
        out = self._attention(self.q(tokens), self.k(tokens), self.v(tokens), bias)
        return x + self.drop_path(tokens_to_map(self.norm1(self.global_attn(out)), size))

    def _attend(self, x: Tensor) -> Tensor:
        window, (height, width) = self.window, x.shape[-2:]
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, -width % window, 0, -height % window))
        size = (x.shape[1], x.shape[2])
        grid = (size[0] // window, size[1] // window)

        windows = self._windows(x, grid)
        normed = self.norm0(windows)
        query, value = self.q(normed), self.v(normed)
        square = (window, window)
        bias = self.pos_local(square, _raster(window * window, window, x.device))
        local = self._attention(query.flatten(0, 1), query.flatten(0, 1), value.flatten(0, 1), bias)
        local = local.unflatten(0, windows.shape[:2])
        windows = windows + local
        tokens = self.h0_norm(windows.mean(2))

        x, query, local = (self._map(part, grid) for part in (windows, query, local))
        local = self.norm1(local).permute(0, 3, 1, 2)
        query = query + depthwise_conv(local, self.aux_q.weight, self.aux_q.bias, padding=1).permute(
            0, 2, 3, 1
        )
        bias = self.pos_global(size, self._window_places(grid, size[1], x.device))
        out = self._attention(query.flatten(1, 2), self.k(tokens), self.v(tokens), bias)
        x = x + self.drop_path(self.global_attn(out).unflatten(1, size))
        return x[:, :height, :width].permute(0, 3, 1, 2)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """softmax(Q Kᵀ / sqrt(d) + bias) V of (B, N, C), heads as [head][d]; bias (heads, Nq, Nk)."""
        query, key, value = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, value)
        )
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias[None].to(query.dtype))
        return out.transpose(1, 2).flatten(2)

    def _windows(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, H, W, C) to (B, windows, P·P, C), windows and their positions row-major."""
        window = self.window
        if self.dilated:
            x = x.unflatten(2, (window, grid[1])).unflatten(1, (window, grid[0])).permute(0, 2, 4, 1, 3, 5)
        else:
            x = x.unflatten(2, (grid[1], window)).unflatten(1, (grid[0], window)).transpose(2, 3)
        return x.flatten(3, 4).flatten(1, 2)

    def _map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """The inverse of :meth:`_windows`."""
        x = x.unflatten(2, (self.window, self.window)).unflatten(1, grid)
        x = x.permute(0, 3, 1, 4, 2, 5) if self.dilated else x.transpose(2, 3)
        return x.flatten(3, 4).flatten(1, 2)

    def _window_places(
        self, grid: tuple[int, int], width: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Rows and columns at which the position bias takes the window tokens to be."""
        if self.window_positions == "raster":
            return _raster(grid[0] * grid[1], width, device)
        rows, columns = _raster(grid[0] * grid[1], grid[1], device)
        middle = self.window // 2
        if self.dilated:
            return rows + middle * grid[0], columns + middle * grid[1]
        return rows * self.window + middle, columns * self.window + middle


def _raster(count: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of the first ``count`` positions of a map of some width."""
    index = torch.arange(count, device=device)
    return index // width, index % width


class HLG(StagedBackbone):
    """HLG backbone with a classifier.

    Images (B, in_chans, H, W) of any size from the total stride (32) on; NCHW or channels_last. Feature
    maps come back in the layout of the image; inside, maps are channels_last.

    Args:
        in_chans: channels of the image.
        num_classes: 0 for no classifier.
        global_pool: ``avg``, ``max``, ``avgmax``, ``catavgmax``, or ``""`` for none (then ``num_classes``
            must be 0).
        depths, dims, num_heads: per stage: layers, channels, heads.
        window: side of the windows in all stages but the last.
        mlp_ratio: hidden width of the layers' MLP, as a multiple of the channels named by ``mlp_width_of``.
        mlp_width_of: ``input`` or ``output``; they differ in the first layer of a stage.
        smooth_last: smoothing in the last stage too.
        window_positions: ``raster`` or ``centre``; where the position bias takes window tokens to be.
        qkv_bias: biases of queries, keys and values.
        output_norm: a LayerNorm at the end of every stage but the last, whose map gets the final norm, as
            in the dense form of the public code. The next stage takes the normed map, so this is another
            network.
        drop_rate: dropout before the classifier.
        drop_path_rate: largest stochastic depth probability, rising linearly over all layers; 0.2 in the
            released configurations.

    Raises:
        ValueError: for arguments that do not fit together and for images that are too small.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        window: int = 7,
        mlp_ratio: float = 4.0,
        mlp_width_of: str = "input",
        smooth_last: bool = False,
        window_positions: str = "raster",
        qkv_bias: bool = True,
        output_norm: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_chans)
        factory = {"device": device, "dtype": dtype}
        check_lengths(len(depths), "stage", dims=dims, num_heads=num_heads)
        for before, dim in pairwise(dims):
            if dim % before:
                raise ValueError(f"dims must each be a multiple of the one before, got {tuple(dims)}")
        check_choice("mlp_width_of", mlp_width_of, MLP_WIDTHS)
        check_choice("window_positions", window_positions, WINDOW_POSITIONS)
        self.output_norm = output_norm

        def conv3x3(channels: int, stride: int) -> nn.Sequential:
            conv = nn.Conv2d(channels, dims[0], 3, stride, padding=1, bias=False, **factory)
            return nn.Sequential(conv, nn.BatchNorm2d(dims[0], **factory), nn.GELU())

        self.s0_conv = nn.Sequential(conv3x3(in_chans, 2), conv3x3(dims[0], 1))
        rates = drop_path_rates(drop_path_rate, depths, "cumulative")
        channels, last = dims[0], len(depths) - 1
        for i, dim in enumerate(dims):
            layers = []
            for j, rate in enumerate(rates[i]):
                in_dim = dim if j else channels
                layer = Layer(
                    in_dim,
                    dim,
                    num_heads[i],
                    int(mlp_ratio * (in_dim if mlp_width_of == "input" else dim)),
                    stride=1 if j else 2,
                    window=None if i == last else window,
                    dilated=j % 2 == 1,
                    smooth=i < last or smooth_last,
                    window_positions=window_positions,
                    qkv_bias=qkv_bias,
                    drop_path=rate,
                    **factory,
                )
                layers.append(layer)
            self.add_module(f"block{i + 1}", nn.Sequential(*layers))
            self._add_stage(dim, 2 if i else 4, f"block{i + 1}")
            channels = dim
        self.norm = ChannelLayerNorm(channels, eps=_EPS, **factory)
        if output_norm:
            for i in range(last):
                self.add_module(f"norm_out_{i}", ChannelLayerNorm(dims[i], eps=_EPS, **factory))
        self.head_drop = nn.Dropout(drop_rate)
        self._init_weights()
        self._set_classifier(num_classes, global_pool, factory)

    def _init_weights(self) -> None:
        for module in self.modules():
            init_linear(module)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise rates: per stage if ``coarse``, otherwise per layer."""
        block = (r"^block(\d+)\." if coarse else r"^block(\d+)\.(\d+)\.", None)
        return {"stem": r"^s0_conv\.", "blocks": [block, (r"^norm(?:_out_\d+)?\.", (99999,))]}

    def _begin(self, x: Tensor) -> Tensor:
        return self.s0_conv(x)

    def _stage(self, x: Tensor, index: int) -> Tensor:
        x = self._run_blocks(self.get_submodule(f"block{index + 1}"), x)
        is_last = index == len(self.feature_info) - 1
        if self.output_norm and not is_last:
            x = self.get_submodule(f"norm_out_{index}")(x)
        return to_channels_last(x)

    def _stage_map(self, x: Tensor, index: int) -> Tensor:
        is_last = index == len(self.feature_info) - 1
        return self.norm(x) if self.output_norm and is_last else x

    def _stage_modules(self, index: int) -> tuple[str, ...]:
        is_last = index == len(self.feature_info) - 1
        norms = (f"norm_out_{index}",) if self.output_norm and not is_last else ()
        return (f"block{index + 1}", *norms)

    def _tail_modules(self) -> tuple[str, ...]:
        """With output norms the final one belongs to the last map and goes with its stage alone."""
        return () if self.output_norm else ("norm",)


def _create_hlg(
    variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]
) -> nn.Module:
    return build_backbone(HLG, variant, pretrained, defaults, kwargs)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return classification_cfg(first_conv="s0_conv.0.0", **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "hlg_mobile.untrained": _cfg(),
        "hlg_tiny.untrained": _cfg(),
        "hlg_small.untrained": _cfg(),
        "hlg_medium.untrained": _cfg(),
        "hlg_medium_14.untrained": _cfg(),
        "hlg_large.untrained": _cfg(),
        "hlg_large_14.untrained": _cfg(),
        "hlg_test.untrained": _cfg(num_classes=10, input_size=(3, 64, 64), pool_size=(2, 2), crop_pct=1.0),
    }
)

_MEDIUM = {"dims": (96, 192, 384, 768), "num_heads": (3, 6, 12, 24)}
_LARGE = {"dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)}


@register_model
def hlg_mobile(pretrained: bool = False, **kwargs: Any) -> HLG:
    """HLG-Mobile: a configuration in the released code, without published results."""
    defaults = {"depths": (2, 2, 2, 2), "dims": (32, 64, 192, 384), "num_heads": (2, 4, 6, 12)}
    return _create_hlg("hlg_mobile", pretrained, defaults, kwargs)


@register_model
def hlg_tiny(pretrained: bool = False, **kwargs: Any) -> HLG:
    """HLG-Tiny."""
    return _create_hlg("hlg_tiny", pretrained, {"depths": (2, 2, 6, 2)}, kwargs)


@register_model
def hlg_small(pretrained: bool = False, **kwargs: Any) -> HLG:
    """HLG-Small."""
    return _create_hlg("hlg_small", pretrained, {**_MEDIUM, "depths": (2, 2, 6, 2)}, kwargs)


@register_model
def hlg_medium(pretrained: bool = False, **kwargs: Any) -> HLG:
    """HLG-Medium with 18 layers in the third stage, which give the published work. Inferred."""
    return _create_hlg("hlg_medium", pretrained, {**_MEDIUM, "depths": (2, 2, 18, 2)}, kwargs)


@register_model
def hlg_medium_14(pretrained: bool = False, **kwargs: Any) -> HLG:
    """HLG-Medium with the depths of the released configurations."""
    return _create_hlg("hlg_medium_14", pretrained, {**_MEDIUM, "depths": (2, 2, 14, 2)}, kwargs)


@register_model
def hlg_large(pretrained: bool = False, **kwargs: Any) -> HLG:
    """HLG-Large with 18 layers in the third stage, which give the published size and work. Inferred."""
    return _create_hlg("hlg_large", pretrained, {**_LARGE, "depths": (2, 2, 18, 2)}, kwargs)


@register_model
def hlg_large_14(pretrained: bool = False, **kwargs: Any) -> HLG:
    """HLG-Large with the depths of most released configurations."""
    return _create_hlg("hlg_large_14", pretrained, {**_LARGE, "depths": (2, 2, 14, 2)}, kwargs)


@register_model
def hlg_test(pretrained: bool = False, **kwargs: Any) -> HLG:
    """A very small HLG for 64x64 images, to test training with. Not published."""
    defaults = {
        "depths": (2, 1, 1, 1),
        "dims": (16, 32, 64, 64),
        "num_heads": (1, 2, 4, 4),
        "mlp_ratio": 2.0,
        "window": 4,
        "drop_path_rate": 0.0,
    }
    return _create_hlg("hlg_test", pretrained, defaults, kwargs)


_NOTE = "the released code does not run; published MACs come out without the two convolutions of the stem"


def _info(params: int, macs: int, published: tuple[float, float, float], note: str = "") -> ModelInfo:
    millions, billions, top1 = published
    return ModelInfo(
        params=params,
        macs=macs,
        published_params=millions * 1e6,
        published_macs=billions * 1e9,
        published_top1=top1,
        source="arXiv 2207.09339, ImageNet table",
        note=f"{_NOTE}; {note}" if note else _NOTE,
    )


def _unpublished(params: int, macs: int, note: str) -> ModelInfo:
    return ModelInfo(params=params, macs=macs, note=note)


SYSTEM = register_system(
    System(
        name="HLG",
        paper="Zhang et al., Vision Transformers: From Semantic Segmentation to Dense Prediction, IJCV 2024, "
        "arXiv 2207.09339",
        model_class=HLG,
        preset="hlg",
        fused=("depthwise",),
        models={
            "hlg_mobile": _unpublished(
                4_140_904, 702_970_560, "a configuration of the released code; no results are published"
            ),
            "hlg_tiny": _info(11_035_824, 2_627_784_064, (11, 2.1, 81.1)),
            "hlg_small": _info(
                24_273_004,
                5_748_265_848,
                (24, 4.7, 82.3),
                "24 M is rounded, and not reproduced to another digit",
            ),
            "hlg_medium": _info(
                47_831_116,
                10_098_308_856,
                (43, 9.0, 83.6),
                "depths inferred from the published MACs; the size is not reproduced",
            ),
            "hlg_medium_14": _unpublished(
                39_978_412, 8_648_294_520, "hlg_medium with the depths of the released configurations"
            ),
            "hlg_large": _info(
                84_355_640,
                17_745_708_096,
                (84, 15.9, 84.1),
                "depths inferred from the published size and MACs",
            ),
            "hlg_large_14": _unpublished(
                70_455_992, 15_188_185_664, "hlg_large with the depths of most released configurations"
            ),
            "hlg_test": ModelInfo(
                params=85_534,
                macs=6_451_580,
                input_size=(3, 64, 64),
                note="not published: a very small model for tests",
            ),
        },
        layouts=(same_names_layout("fudan-zvg/SETR"),),
    )
)
