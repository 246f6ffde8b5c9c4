"""FCViT: fully convolutional vision transformer.

Ma et al., "A Close Look at Spatial Modeling: From Attention to Convolution", 2022 (arXiv 2212.12552).
Public code: ma-xu/FCViT (PyTorch), which this follows: the figure of the paper has LayerNorm in the block,
the code GroupNorm with one group. Published sizes count parameters in units of 2**20.

FCViT-S12 of the abstract is probably ``fcvit_b12``, of the same size (inferred).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from fused_ops import depthwise_conv
from fused_ops.blocks.layout import PointwiseConv2d, map_to_tokens, to_channels_last, tokens_to_map
from fused_ops.core.drop_path import DropPath
from fused_ops.core.initialise import init_linear
from fused_ops.models.arguments import check_lengths
from fused_ops.models.common import (
    StagedBackbone,
    build_backbone,
    check_heads,
    classification_cfg,
    drop_path_rates,
    init_conv_fan_out,
)
from fused_ops.models.layouts import same_names_layout
from fused_ops.models.registry import ModelInfo, System, register_system

__all__ = ["FCViT", "GlobalContext", "TokenMixer"]

_CONTEXT_EPS = 1e-5


class ConvEmbed(nn.Module):
    """Strided convolution and BatchNorm, without activation."""

    def __init__(self, in_chans: int, dim: int, kernel_size: int, stride: int, **factory: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride, padding=kernel_size // 2, **factory)
        self.norm = nn.BatchNorm2d(dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class GlobalContext(nn.Module):
    """Global context of a map (B, dim, H, W), weighted by the similarity of every position to it; shape kept.

    The context is the mean over positions. Similarities, one per head and position, are standardised over
    both together (unbiased deviation) and rescaled per head. They multiply the context after a bottleneck
    in which the larger of two halves goes on ("competition").

    Args:
        dim: channels; ``num_heads`` and ``reduction`` must divide them.
        num_heads: heads of the similarity.
        reduction: channels by width of the bottleneck.
    """

    def __init__(self, dim: int, num_heads: int = 8, reduction: int = 8, **factory: Any) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.rescale_weight = nn.Parameter(torch.ones(num_heads, **factory))
        self.rescale_bias = nn.Parameter(torch.zeros(num_heads, **factory))
        self.fc1 = nn.Linear(dim, 2 * (dim // reduction), **factory)
        self.fc2 = nn.Linear(dim // reduction, dim, **factory)

    def reset_parameters(self) -> None:
        """Scale 1 and shift 0 of every head; the linear layers are not touched."""
        nn.init.ones_(self.rescale_weight)
        nn.init.zeros_(self.rescale_bias)

    def forward(self, x: Tensor) -> Tensor:
        context = x.mean((2, 3))
        heads = map_to_tokens(x).unflatten(-1, (self.num_heads, -1))
        query = context.unflatten(-1, (self.num_heads, -1, 1)) * self.scale
        similarity = (heads.transpose(1, 2) @ query).squeeze(-1)
        mean = similarity.mean((1, 2), keepdim=True)
        deviation = similarity.std((1, 2), keepdim=True)
        similarity = (similarity - mean) / (deviation + _CONTEXT_EPS)
        similarity = torch.addcmul(self.rescale_bias[:, None], similarity, self.rescale_weight[:, None])
        first, second = self.fc1(context).chunk(2, dim=-1)
        context = self.fc2(torch.maximum(first, second)).unflatten(-1, (1, self.num_heads, -1))
        weighted = (similarity.transpose(1, 2).unsqueeze(-1) * context).flatten(2)
        return tokens_to_map(weighted, (x.shape[-2], x.shape[-1]))


class TokenMixer(nn.Module):
    """Twice: add the global context, 11x11 depthwise convolution, bottleneck of 1x1 convolutions, exact GELU.

    On maps (B, dim, H, W). The bottleneck is ``max(dim / 8, 16)`` wide.
    """

    def __init__(self, dim: int, kernel_size: int = 11, num_heads: int = 8, **factory: Any) -> None:
        super().__init__()
        hidden_dim = max(dim // 8, 16)
        for i in (1, 2):
            self.add_module(f"gc{i}", GlobalContext(dim, num_heads, **factory))
            self.add_module(
                f"dw{i}",
                nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, **factory),
            )
            bottleneck = nn.Sequential(
                PointwiseConv2d(dim, hidden_dim, **factory),
                nn.GELU(),
                PointwiseConv2d(hidden_dim, dim, **factory),
            )
            self.add_module(f"fc{i}", bottleneck)

    def forward(self, x: Tensor) -> Tensor:
        for context, depthwise, bottleneck in (
            (self.gc1, self.dw1, self.fc1),
            (self.gc2, self.dw2, self.fc2),
        ):
            x = x + context(x)
            x = depthwise_conv(x, depthwise.weight, depthwise.bias, padding=depthwise.padding)
            x = F.gelu(bottleneck(x))
        return x


class ChannelMixer(nn.Module):
    """1x1 convolution, 3x3 depthwise convolution, GELU (exact), 1x1 convolution on maps (B, dim, H, W)."""

    def __init__(self, dim: int, hidden_dim: int, drop: float, **factory: Any) -> None:
        super().__init__()
        self.fc1 = PointwiseConv2d(dim, hidden_dim, **factory)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **factory)
        self.fc2 = PointwiseConv2d(hidden_dim, dim, **factory)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = depthwise_conv(x, self.dwconv.weight, self.dwconv.bias, padding=1, activation="gelu")
        return self.drop(self.fc2(self.drop(x)))


class Block(nn.Module):
    """Token mixer and channel mixer, each behind a GroupNorm and scaled per channel, with identities."""

    def __init__(
        self,
        dim: int,
        mlp_ratio: float,
        kernel_size: int,
        num_heads: int,
        layer_scale_init: float,
        drop: float,
        drop_path: float,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.layer_scale_init = layer_scale_init
        self.norm1 = nn.GroupNorm(1, dim, **factory)
        self.token_mixer = TokenMixer(dim, kernel_size, num_heads, **factory)
        self.norm2 = nn.GroupNorm(1, dim, **factory)
        self.channel_mixer = ChannelMixer(dim, int(dim * mlp_ratio), drop, **factory)
        self.drop_path = DropPath(drop_path)
        self.layer_scale_1 = nn.Parameter(torch.empty(dim, **factory))
        self.layer_scale_2 = nn.Parameter(torch.empty(dim, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The two scales; the submodules are not touched."""
        nn.init.constant_(self.layer_scale_1, self.layer_scale_init)
        nn.init.constant_(self.layer_scale_2, self.layer_scale_init)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.token_mixer(to_channels_last(self.norm1(x)))
        x = x + self.drop_path(self.layer_scale_1[:, None, None] * mixed)
        mixed = self.channel_mixer(to_channels_last(self.norm2(x)))
        return x + self.drop_path(self.layer_scale_2[:, None, None] * mixed)


class FCViT(StagedBackbone):
    """FCViT backbone with a classifier.

    Images (B, in_chans, H, W) of any size from the total stride (32) on; NCHW or channels_last. Feature
    maps come back in the layout of the image; inside, maps are channels_last.

    Args:
        in_chans: channels of the image.
        num_classes: 0 for no classifier.
        global_pool: ``avg``, ``max``, ``avgmax``, ``catavgmax``, or ``""`` for none (then ``num_classes``
            must be 0).
        depths, dims, mlp_ratios: per stage: blocks, channels, hidden width of the channel mixer as a
            multiple.
        kernel_size: of the depthwise convolutions of the token mixer.
        num_heads: heads of the global context, in every stage.
        layer_scale_init: first value of the scales; 1e-5 for classification, 1e-6 in the dense models of the
            public code.
        output_norm: a GroupNorm on every stage's feature map, as in the dense models of the public code. It
            does not change what the classifier computes.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout of the channel mixers.
        drop_path_rate: largest stochastic depth probability, rising linearly over all blocks; published: 0.1,
            and 0.2 for ``fcvit_b48``.

    Raises:
        ValueError: for arguments that do not fit together and for images that are too small.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (64, 128, 320, 512),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        kernel_size: int = 11,
        num_heads: int = 8,
        layer_scale_init: float = 1e-5,
        output_norm: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_chans)
        factory = {"device": device, "dtype": dtype}
        check_lengths(len(depths), "stage", dims=dims, mlp_ratios=mlp_ratios)
        self.output_norm = output_norm
        self.patch_embed = ConvEmbed(in_chans, dims[0], 7, 4, **factory)
        # Even entries are stages, odd ones the down-samplings between them, as in the public code.
        self.network = nn.ModuleList()
        rates = drop_path_rates(drop_path_rate, depths, "cumulative")
        for i, dim in enumerate(dims):
            if i:
                self.network.append(ConvEmbed(dims[i - 1], dim, 3, 2, **factory))
            blocks = [
                Block(
                    dim,
                    mlp_ratios[i],
                    kernel_size,
                    num_heads,
                    layer_scale_init,
                    proj_drop_rate,
                    rate,
                    **factory,
                )
                for rate in rates[i]
            ]
            self.network.append(nn.Sequential(*blocks))
            if output_norm:
                self.add_module(f"norm{2 * i}", nn.GroupNorm(1, dim, **factory))
            self._add_stage(dim, 2 if i else 4, f"network.{2 * i}")
        self.norm = nn.GroupNorm(1, dims[-1], **factory)
        self.head_drop = nn.Dropout(drop_rate)
        self._init_weights()
        self._set_classifier(num_classes, global_pool, factory)

    def _init_weights(self) -> None:
        for module in self.modules():
            init_linear(module)
            init_conv_fan_out(module)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise rates: per stage if ``coarse``, otherwise per block."""
        block = [] if coarse else [(r"^network\.(\d+)\.(\d+)\.", None)]
        others = [(r"^network\.(\d+)\.", None), (r"^norm\d*\.", (99999,))]
        return {"stem": r"^patch_embed\.", "blocks": block + others}

    def _begin(self, x: Tensor) -> Tensor:
        return self.patch_embed(x)

    def _stage(self, x: Tensor, index: int) -> Tensor:
        if index:
            x = self.network[2 * index - 1](x)
        return self._run_blocks(self.network[2 * index], to_channels_last(x))

    def _stage_map(self, x: Tensor, index: int) -> Tensor:
        return self.get_submodule(f"norm{2 * index}")(x) if self.output_norm else x

    def _stage_modules(self, index: int) -> tuple[str, ...]:
        names = (f"network.{2 * index - 1}", f"network.{2 * index}")
        return (*names, f"norm{2 * index}") if self.output_norm else names


def _create_fcvit(
    variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]
) -> nn.Module:
    return build_backbone(FCViT, variant, pretrained, defaults, kwargs)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return classification_cfg(first_conv="patch_embed.proj", **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "fcvit_tiny.untrained": _cfg(crop_pct=0.9),
        "fcvit_b12.untrained": _cfg(crop_pct=0.9),
        "fcvit_b24.untrained": _cfg(crop_pct=0.95),
        "fcvit_b48.untrained": _cfg(crop_pct=0.95),
        "fcvit_test.untrained": _cfg(num_classes=10, input_size=(3, 64, 64), pool_size=(2, 2), crop_pct=1.0),
    }
)


@register_model
def fcvit_tiny(pretrained: bool = False, **kwargs: Any) -> FCViT:
    """FCViT-Tiny as in ma-xu/FCViT."""
    defaults = {"depths": (3, 3, 5, 2), "dims": (32, 64, 160, 320), "drop_path_rate": 0.1}
    return _create_fcvit("fcvit_tiny", pretrained, defaults, kwargs)


@register_model
def fcvit_b12(pretrained: bool = False, **kwargs: Any) -> FCViT:
    """FCViT-B12 as in ma-xu/FCViT."""
    return _create_fcvit("fcvit_b12", pretrained, {"depths": (2, 2, 6, 2), "drop_path_rate": 0.1}, kwargs)


@register_model
def fcvit_b24(pretrained: bool = False, **kwargs: Any) -> FCViT:
    """FCViT-B24 as in ma-xu/FCViT."""
    return _create_fcvit("fcvit_b24", pretrained, {"depths": (4, 4, 12, 4), "drop_path_rate": 0.1}, kwargs)


@register_model
def fcvit_b48(pretrained: bool = False, **kwargs: Any) -> FCViT:
    """FCViT-B48 as in ma-xu/FCViT."""
    return _create_fcvit("fcvit_b48", pretrained, {"depths": (8, 8, 24, 8), "drop_path_rate": 0.2}, kwargs)


@register_model
def fcvit_test(pretrained: bool = False, **kwargs: Any) -> FCViT:
    """A very small FCViT for 64x64 images, to test training with. Not published."""
    defaults = {
        "depths": (1, 1, 1, 1),
        "dims": (16, 24, 32, 64),
        "mlp_ratios": (2, 2, 2, 2),
        "kernel_size": 5,
        "layer_scale_init": 1.0,
        "drop_path_rate": 0.0,
    }
    return _create_fcvit("fcvit_test", pretrained, defaults, kwargs)


def _info(params: int, macs: int, published: tuple[float, float]) -> ModelInfo:
    millions, top1 = published
    return ModelInfo(
        params=params,
        macs=macs,
        published_params=millions * 1e6,
        published_top1=top1,
        source="README of ma-xu/FCViT",
        note=f"published in units of 2**20 parameters ({params / 2**20:.2f} counted so); in units of 10**6 "
        "the size is not reproduced",
    )


SYSTEM = register_system(
    System(
        name="FCViT",
        paper="Ma et al., A Close Look at Spatial Modeling: From Attention to Convolution, arXiv 2212.12552",
        model_class=FCViT,
        preset="fcvit",
        fused=("depthwise",),
        models={
            "fcvit_tiny": _info(4_784_752, 901_541_376, (4.6, 74.9)),
            "fcvit_b12": _info(14_701_832, 2_645_471_232, (14.0, 80.9)),
            "fcvit_b24": _info(26_960_232, 5_058_617_344, (25.7, 82.5)),
            "fcvit_b48": _info(51_477_032, 9_884_909_568, (49.1, 83.6)),
            "fcvit_test": ModelInfo(
                params=81_198,
                macs=2_410_992,
                input_size=(3, 64, 64),
                note="not published: a very small model for tests",
            ),
        },
        layouts=(same_names_layout("ma-xu/FCViT"),),
    )
)
