"""PVT: pyramid vision transformer, first version.

Wang et al., "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions",
ICCV 2021 (arXiv 2102.12122). Public code: whai362/PVT (PyTorch).

Where paper and public code differ, this follows the code: PVT-Small and PVT-Medium have four blocks in the
second stage (the table of the paper prints three, with which their sizes do not come out); one reduction
feeds both keys and values; LayerNorm has eps 1e-5 in the patch embedding and after the reduction, 1e-6
elsewhere.

Position tables are resized to the map of their own stage. The public code compares with the first stage's
number of tokens instead, so that it stops with an error at some sizes (448 pixels); at all others the
results are equal. Nothing is inferred.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from fused_ops.attention import SpatialReductionAttention
from fused_ops.attention.module import residual_attention
from fused_ops.blocks.layout import map_to_tokens, tokens_to_map
from fused_ops.core.drop_path import DropPath
from fused_ops.core.initialise import init_linear
from fused_ops.feed_forward.module import residual_mlp
from fused_ops.models.arguments import check_lengths
from fused_ops.models.common import (
    BlockSequence,
    Mlp,
    StagedBackbone,
    TokenPool,
    build_backbone,
    classification_cfg,
    drop_path_rates,
    resize_position_table,
)
from fused_ops.models.layouts import same_names_layout
from fused_ops.models.registry import ModelInfo, System, register_system

__all__ = ["PVT"]

_BLOCK_EPS = 1e-6
_EMBED_EPS = 1e-5


class PatchEmbed(nn.Module):
    """Non-overlapping convolution and LayerNorm: (B, C, H, W) to tokens (B, N, dim) and their grid."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, **factory: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, **factory)
        self.norm = nn.LayerNorm(dim, eps=_EMBED_EPS, **factory)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.proj(x)
        return self.norm(map_to_tokens(x)), (x.shape[-2], x.shape[-1])


class Block(nn.Module):
    """Spatial-reduced attention and a feed-forward network, each behind a LayerNorm and with an identity.

    Tokens (B, N, dim) with the grid ``size`` of those that are not a class token.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        reduction_ratio: int,
        mlp_ratio: float,
        qkv_bias: bool,
        attn_drop: float,
        proj_drop: float,
        drop_path: float,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_BLOCK_EPS, **factory)
        self.attn = SpatialReductionAttention(
            dim,
            num_heads,
            reduction_ratio,
            qkv_bias=qkv_bias,
            norm_eps=_EMBED_EPS,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            **factory,
        )
        self.norm2 = nn.LayerNorm(dim, eps=_BLOCK_EPS, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), proj_drop, **factory)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = residual_attention(x, self.norm1, self.attn, size, self.drop_path)
        return residual_mlp(x, self.norm2, self.mlp, self.drop_path)


class PVT(StagedBackbone):
    """PVT backbone with a classifier.

    Images (B, in_chans, H, W) of any size from the total stride (32) on; NCHW or channels_last. The position
    tables belong to ``img_size`` and are resized to other sizes.

    ``forward_features`` returns tokens (B, 1 + H/32·W/32, dim) after the final norm, the class token first.
    Feature maps (B, dim, H/s, W/s) have no norm and no class token. The dense form of the public code
    (``features_only=True`` builds it) has no class token at all, so its last map differs from the
    classifier's.

    Args:
        in_chans: channels of the image.
        num_classes: 0 for no classifier.
        global_pool: ``token`` (the class token), ``avg``, or ``""`` for none (then ``num_classes`` must be
            0). None is ``token``, or ``avg`` without a class token.
        img_size: height and width that the position tables are for.
        depths, dims, num_heads, reduction_ratios, mlp_ratios, patch_sizes: per stage: blocks, channels,
            heads, the R of :class:`~fused_ops.attention.SpatialReductionAttention`,
            hidden width of the MLP as a multiple of the channels, kernel and stride of the patch embedding.
        qkv_bias: biases of queries, keys and values.
        class_token: put a class token in front of the last stage's tokens.
        drop_rate: dropout before the classifier.
        pos_drop_rate: dropout after the positions are added.
        proj_drop_rate: dropout of the blocks' projections and MLPs.
        attn_drop_rate: dropout of the softmax outputs.
        drop_path_rate: largest stochastic depth probability, rising linearly over all blocks; published:
            0.1 for tiny and small, 0.3 for medium and large.

    Raises:
        ValueError: for arguments that do not fit together and for images that are too small.
    """

    pools = ("token", "avg", "")

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        img_size: int | tuple[int, int] = 224,
        depths: Sequence[int] = (3, 4, 6, 3),
        dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        reduction_ratios: Sequence[int] = (8, 4, 2, 1),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        patch_sizes: Sequence[int] = (4, 2, 2, 2),
        qkv_bias: bool = True,
        class_token: bool = True,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_chans)
        factory = {"device": device, "dtype": dtype}
        check_lengths(
            len(depths),
            "stage",
            dims=dims,
            num_heads=num_heads,
            reduction_ratios=reduction_ratios,
            mlp_ratios=mlp_ratios,
            patch_sizes=patch_sizes,
        )
        if class_token and reduction_ratios[-1] != 1:
            raise ValueError(
                "class_token needs a last stage without reduction, got reduction_ratios="
                f"{tuple(reduction_ratios)}"
            )
        self.has_class_token = class_token
        self.grids: list[tuple[int, int]] = []
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        rates = drop_path_rates(drop_path_rate, depths, "cumulative")
        channels = in_chans
        for i, dim in enumerate(dims):
            stage = i + 1
            self.add_module(f"patch_embed{stage}", PatchEmbed(channels, dim, patch_sizes[i], **factory))
            blocks = [
                Block(
                    dim,
                    num_heads[i],
                    reduction_ratios[i],
                    mlp_ratios[i],
                    qkv_bias,
                    attn_drop_rate,
                    proj_drop_rate,
                    rate,
                    **factory,
                )
                for rate in rates[i]
            ]
            self.add_module(f"block{stage}", BlockSequence(*blocks))
            height, width = height // patch_sizes[i], width // patch_sizes[i]
            self.grids.append((height, width))
            # The last table has a slot for the class token also where there is none, as the public code has.
            slots = height * width + (stage == len(dims))
            self.register_parameter(f"pos_embed{stage}", nn.Parameter(torch.empty(1, slots, dim, **factory)))
            self._add_stage(dim, patch_sizes[i], f"block{stage}")
            channels = dim
        if class_token:
            self.cls_token = nn.Parameter(torch.empty(1, 1, channels, **factory))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.norm = nn.LayerNorm(channels, eps=_BLOCK_EPS, **factory)
        self.head_drop = nn.Dropout(drop_rate)
        self._init_weights()
        if global_pool is None:
            global_pool = "token" if class_token else "avg"
        self._set_classifier(num_classes, global_pool, factory)

    def _init_weights(self) -> None:
        for module in self.modules():
            init_linear(module)
        for name, parameter in self.named_parameters(recurse=False):
            assert name.startswith(("pos_embed", "cls_token"))
            nn.init.trunc_normal_(parameter, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The class token, as in the public code, which decays the position tables."""
        return {"cls_token"} if self.has_class_token else set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise rates: per stage if ``coarse``, otherwise per block."""
        stem = r"^(?:patch_embed1\.|pos_embed1$)"
        if coarse:
            last = len(self.feature_info)
            return {
                "stem": stem,
                "blocks": [
                    (r"^(?:patch_embed|pos_embed|block)(\d+)", None),
                    (r"^(?:cls_token|norm)", (last,)),
                ],
            }
        blocks = [
            (r"^(?:patch_embed|pos_embed)(\d+)", None),
            (r"^block(\d+)\.(\d+)\.", None),
            (r"^(?:cls_token|norm)", (99999,)),
        ]
        return {"stem": stem, "blocks": blocks}

    def _create_pool(self, global_pool: str) -> nn.Module:
        if global_pool == "token" and not self.has_class_token:
            raise ValueError("global_pool='token' needs a class token, and class_token is False")
        return TokenPool(global_pool, prefix=int(self.has_class_token))

    def _begin(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        return x, (x.shape[-2], x.shape[-1])

    def _stage(self, state: tuple[Tensor, tuple[int, int]], index: int) -> tuple[Tensor, tuple[int, int]]:
        """From tokens with their grid (before the first stage: the image) to tokens with their grid."""
        x, size = state
        if index:
            x = tokens_to_map(x, size)
        x, size = self.get_submodule(f"patch_embed{index + 1}")(x)
        table = getattr(self, f"pos_embed{index + 1}")
        is_last = index == len(self.feature_info) - 1
        positions = resize_position_table(table[:, 1:] if is_last else table, self.grids[index], size)
        x = x + positions
        if is_last and self.has_class_token:
            token = (self.cls_token + table[:, :1]).expand(x.shape[0], -1, -1)
            x = torch.cat([token, x], dim=1)
        x = self.pos_drop(x)
        return self._run_blocks(self.get_submodule(f"block{index + 1}"), x, size), size

    def _stage_map(self, state: tuple[Tensor, tuple[int, int]], index: int) -> Tensor:
        x, size = state
        return tokens_to_map(x[:, x.shape[1] - size[0] * size[1] :], size)

    def _final(self, state: tuple[Tensor, tuple[int, int]]) -> Tensor:
        return self.norm(state[0])

    def _normed_map(self, state: tuple[Tensor, tuple[int, int]], index: int) -> Tensor:
        if index == len(self.feature_info) - 1:
            state = (self._final(state), state[1])
        return self._stage_map(state, index)

    def _stage_modules(self, index: int) -> tuple[str, ...]:
        names = (f"patch_embed{index + 1}", f"pos_embed{index + 1}", f"block{index + 1}")
        is_last = index == len(self.feature_info) - 1
        return (*names, "cls_token") if is_last and self.has_class_token else names


def _create_pvt(
    variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]
) -> nn.Module:
    if kwargs.get("features_only"):
        defaults = {**defaults, "class_token": False}
    return build_backbone(PVT, variant, pretrained, defaults, kwargs)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return classification_cfg(first_conv="patch_embed1.proj", license="apache-2.0", **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "pvt_tiny.untrained": _cfg(crop_pct=0.9),
        "pvt_small.untrained": _cfg(crop_pct=0.9),
        "pvt_medium.untrained": _cfg(crop_pct=0.9),
        "pvt_large.untrained": _cfg(crop_pct=0.9),
        "pvt_test.untrained": _cfg(num_classes=10, input_size=(3, 64, 64), pool_size=(2, 2), crop_pct=1.0),
    }
)


@register_model
def pvt_tiny(pretrained: bool = False, **kwargs: Any) -> PVT:
    """PVT-Tiny as in whai362/PVT."""
    return _create_pvt("pvt_tiny", pretrained, {"depths": (2, 2, 2, 2), "drop_path_rate": 0.1}, kwargs)


@register_model
def pvt_small(pretrained: bool = False, **kwargs: Any) -> PVT:
    """PVT-Small as in whai362/PVT."""
    return _create_pvt("pvt_small", pretrained, {"depths": (3, 4, 6, 3), "drop_path_rate": 0.1}, kwargs)


@register_model
def pvt_medium(pretrained: bool = False, **kwargs: Any) -> PVT:
    """PVT-Medium as in whai362/PVT."""
    return _create_pvt("pvt_medium", pretrained, {"depths": (3, 4, 18, 3), "drop_path_rate": 0.3}, kwargs)


@register_model
def pvt_large(pretrained: bool = False, **kwargs: Any) -> PVT:
    """PVT-Large as in whai362/PVT."""
    return _create_pvt("pvt_large", pretrained, {"depths": (3, 8, 27, 3), "drop_path_rate": 0.3}, kwargs)


@register_model
def pvt_test(pretrained: bool = False, **kwargs: Any) -> PVT:
    """A very small PVT for 64x64 images, to test training with. Not published."""
    defaults = {
        "img_size": 64,
        "depths": (1, 1, 1, 1),
        "dims": (16, 32, 48, 64),
        "num_heads": (1, 2, 3, 4),
        "mlp_ratios": (4, 4, 2, 2),
        "drop_path_rate": 0.0,
    }
    return _create_pvt("pvt_test", pretrained, defaults, kwargs)


def _info(params: int, macs: int, published: tuple[float, float, float]) -> ModelInfo:
    millions, billions, top1 = published
    return ModelInfo(
        params=params,
        macs=macs,
        published_params=millions * 1e6,
        published_macs=billions * 1e9,
        published_top1=top1,
        source="arXiv 2102.12122, ImageNet table",
    )


SYSTEM = register_system(
    System(
        name="PVT",
        paper="Wang et al., Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without "
        "Convolutions, ICCV 2021, arXiv 2102.12122",
        model_class=PVT,
        preset="pvt",
        fused=("attention", "attention_block", "feed_forward"),
        models={
            "pvt_tiny": _info(13_229_288, 1_932_911_616, (13.2, 1.9, 75.1)),
            "pvt_small": _info(24_485_864, 3_815_701_504, (24.5, 3.8, 79.8)),
            "pvt_medium": _info(44_208_104, 6_659_175_424, (44.2, 6.7, 81.2)),
            "pvt_large": _info(61_369_320, 9_813_765_632, (61.4, 9.8, 81.7)),
            "pvt_test": ModelInfo(
                params=140_490,
                macs=2_426_624,
                input_size=(3, 64, 64),
                note="not published: a very small model for tests",
            ),
        },
        layouts=(same_names_layout("whai362/PVT"),),
    )
)
