"""DS-Net: dual-stream network for visual recognition.

Mao et al., "Dual-stream Network for Visual Recognition", NeurIPS 2021 (arXiv 2105.14734). Public code:
SteveTsui/DS-Net (PyTorch; T* and S*) and PaddlePaddle/PaddleClas (Paddle; T*, S* and B*); the repository that
the paper names was never filled. Starred models have inter-scale alignment and are as in the public code.

What is inferred, because no public code has it:

* The models without star are the starred ones less the alignment, with the global stream down-sampled by a
  depthwise convolution (kernel 2s+1, stride s). The second part rests on one digit of the published size of
  DS-Net-S (19.7 M; with bilinear down-sampling it would be 19.6 M).
* ``dsnet_base`` has the depths of ``dsnet_base_star`` (3, 4, 28, 3). Counted, it has 42.0 M parameters and
  7.2 GMAC; the published 48.8 M and 7.6 G are NOT reproduced. Removing the alignment from B* takes away
  7.3 M parameters, as it takes 1.4 M from T* and 3.3 M from S*, but the table takes 0.5 M. 48.83 M is what
  B* has without its classifier, and the published throughput ratios of star to no star are alike in all three
  sizes, so the table entry is probably a slip.
* ``dsnet_base_fit`` has depths (3, 4, 29, 5), found by searching for the published 48.8 M and 7.6 G. No
  source names them. It is for users who need a model of that budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from fused_ops.blocks import DSBlock
from fused_ops.blocks.layout import to_channels_last
from fused_ops.models.arguments import check_lengths
from fused_ops.models.common import (
    StagedBackbone,
    build_backbone,
    classification_cfg,
    drop_path_rates,
)
from fused_ops.models.layouts import paddle_layout, same_names_layout
from fused_ops.models.registry import ModelInfo, System, register_system

__all__ = ["DSNet"]


class PatchEmbed(nn.Module):
    """Non-overlapping convolution (B, C, H, W) to (B, dim, H/patch, W/patch), without a norm."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, **factory: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class DSNet(StagedBackbone):
    """DS-Net backbone with a classifier.

    Images (B, in_chans, H, W) of any size from the total stride (32) on; NCHW or channels_last. Feature maps
    come back in the layout of the image; inside, maps are channels_last.

    Args:
        in_chans: channels of the image.
        num_classes: 0 for no classifier.
        global_pool: ``avg``, ``max``, ``avgmax``, ``catavgmax``, or ``""`` for none (then ``num_classes``
            must be 0).
        depths, dims, num_heads, downsamples, patch_sizes: per stage: blocks, channels, heads, the s of
            :class:`~fused_ops.blocks.DSBlock`, kernel and stride of the patch embedding before it.
        alpha, mlp_ratio, align, global_down: see :class:`~fused_ops.blocks.DSBlock`.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout of the blocks' projections and MLPs.
        attn_drop_rate: dropout of the softmax outputs; the public code has 0.1 hard-wired.
        drop_path_rate: largest stochastic depth probability; 0.1 in the published recipe.
        drop_path_schedule: ``restart`` or ``cumulative``, see :func:`drop_path_rates`.

    Raises:
        ValueError: for arguments that do not fit together and for images that are too small.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 4, 1),
        dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        downsamples: Sequence[int] = (8, 4, 2, 2),
        patch_sizes: Sequence[int] = (4, 2, 2, 2),
        alpha: float = 0.5,
        mlp_ratio: float = 4.0,
        align: bool = True,
        global_down: str = "bilinear",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.1,
        drop_path_rate: float = 0.1,
        drop_path_schedule: str = "restart",
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
            downsamples=downsamples,
            patch_sizes=patch_sizes,
        )
        rates = drop_path_rates(drop_path_rate, depths, drop_path_schedule)
        channels = in_chans
        for i, dim in enumerate(dims):
            stage = i + 1
            self.add_module(f"patch_embed{stage}", PatchEmbed(channels, dim, patch_sizes[i], **factory))
            blocks = [
                DSBlock(
                    dim,
                    num_heads[i],
                    downsamples[i],
                    alpha=alpha,
                    mlp_ratio=mlp_ratio,
                    align=align,
                    global_down=global_down,
                    attn_drop=attn_drop_rate,
                    proj_drop=proj_drop_rate,
                    drop_path=rate,
                    **factory,
                )
                for rate in rates[i]
            ]
            self.add_module(f"blocks{stage}", nn.Sequential(*blocks))
            self._add_stage(dim, patch_sizes[i], f"blocks{stage}")
            channels = dim
        self.norm = nn.BatchNorm2d(channels, **factory)

        self.head_drop = nn.Dropout(drop_rate)
        self._set_classifier(num_classes, global_pool, factory)

    def reset_parameters(self) -> None:
        for i in range(1, self.num_stages + 1):
            self.get_submodule(f"patch_embed{i}.proj").reset_parameters()
            for block in self.get_submodule(f"blocks{i}"):
                block.reset_parameters()
        if isinstance(self.norm, nn.BatchNorm2d):
            self.norm.reset_parameters()
        if self.num_classes:
            self._init_classifier(self.head)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise rates: per stage if ``coarse``, otherwise per block."""
        if coarse:
            return {"stem": r"^patch_embed1\.", "blocks": r"^(?:patch_embed|blocks)(\d+)\."}
        blocks = [
            (r"^patch_embed(\d+)\.", None),
            (r"^blocks(\d+)\.(\d+)\.", None),
            (r"^norm\.", (99999,)),
        ]
        return {"stem": r"^patch_embed1\.", "blocks": blocks}

    def _stage(self, x: Tensor, index: int) -> Tensor:
        x = to_channels_last(self.get_submodule(f"patch_embed{index + 1}")(x))
        return self._run_blocks(self.get_submodule(f"blocks{index + 1}"), x)

    def _stage_modules(self, index: int) -> tuple[str, ...]:
        return f"patch_embed{index + 1}", f"blocks{index + 1}"


def _create_dsnet(
    variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]
) -> nn.Module:
    return build_backbone(DSNet, variant, pretrained, defaults, kwargs)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return classification_cfg(first_conv="patch_embed1.proj", license="apache-2.0", **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "dsnet_tiny.untrained": _cfg(),
        "dsnet_tiny_star.untrained": _cfg(),
        "dsnet_small.untrained": _cfg(),
        "dsnet_small_star.untrained": _cfg(),
        "dsnet_base.untrained": _cfg(),
        "dsnet_base_fit.untrained": _cfg(),
        "dsnet_base_star.untrained": _cfg(),
        "dsnet_test.untrained": _cfg(num_classes=10, input_size=(3, 32, 32), pool_size=(2, 2), crop_pct=1.0),
    }
)

_TINY = {"depths": (2, 2, 4, 1)}
_SMALL = {"depths": (3, 4, 8, 3)}
_BASE = {"depths": (3, 4, 28, 3)}
_NO_STAR = {"align": False, "global_down": "dwconv"}


@register_model
def dsnet_tiny(pretrained: bool = False, **kwargs: Any) -> DSNet:
    """DS-Net-T. Without star: inferred, see the module's docstring."""
    return _create_dsnet("dsnet_tiny", pretrained, {**_TINY, **_NO_STAR}, kwargs)


@register_model
def dsnet_tiny_star(pretrained: bool = False, **kwargs: Any) -> DSNet:
    """DS-Net-T* as in SteveTsui/DS-Net ``ds_net_tiny`` and PaddleClas ``DSNet_tiny``."""
    return _create_dsnet("dsnet_tiny_star", pretrained, _TINY, kwargs)


@register_model
def dsnet_small(pretrained: bool = False, **kwargs: Any) -> DSNet:
    """DS-Net-S. Without star: inferred, see the module's docstring."""
    return _create_dsnet("dsnet_small", pretrained, {**_SMALL, **_NO_STAR}, kwargs)


@register_model
def dsnet_small_star(pretrained: bool = False, **kwargs: Any) -> DSNet:
    """DS-Net-S* as in SteveTsui/DS-Net ``ds_net_small`` and PaddleClas ``DSNet_small``."""
    return _create_dsnet("dsnet_small_star", pretrained, _SMALL, kwargs)


@register_model
def dsnet_base(pretrained: bool = False, **kwargs: Any) -> DSNet:
    """DS-Net-B with the depths of B*. Inferred; the published 48.8 M and 7.6 G are not reproduced."""
    return _create_dsnet("dsnet_base", pretrained, {**_BASE, **_NO_STAR}, kwargs)


@register_model
def dsnet_base_fit(pretrained: bool = False, **kwargs: Any) -> DSNet:
    """DS-Net-B with depths fitted to the published 48.8 M and 7.6 G; no source names these depths."""
    return _create_dsnet("dsnet_base_fit", pretrained, {"depths": (3, 4, 29, 5), **_NO_STAR}, kwargs)


@register_model
def dsnet_base_star(pretrained: bool = False, **kwargs: Any) -> DSNet:
    """DS-Net-B* as in PaddleClas ``DSNet_base``."""
    return _create_dsnet("dsnet_base_star", pretrained, _BASE, kwargs)


@register_model
def dsnet_test(pretrained: bool = False, **kwargs: Any) -> DSNet:
    """A very small DS-Net with alignment for 32x32 images, to test training with. Not published."""
    defaults = {
        "depths": (1, 1, 1),
        "dims": (32, 64, 128),
        "num_heads": (1, 2, 4),
        "downsamples": (2, 2, 1),
        "patch_sizes": (4, 2, 2),
    }
    return _create_dsnet("dsnet_test", pretrained, defaults, kwargs)


_PAPER_TABLE = "arXiv 2105.14734, ImageNet table"
_NO_STAR_NOTE = "no public code: starred model without alignment, global down-sampling inferred"


def _info(params: int, macs: int, published: tuple[float, float, float], note: str = "") -> ModelInfo:
    millions, billions, top1 = published
    return ModelInfo(
        params=params,
        macs=macs,
        published_params=millions * 1e6,
        published_macs=billions * 1e9,
        published_top1=top1,
        source=_PAPER_TABLE,
        note=note,
    )


SYSTEM = register_system(
    System(
        name="DS-Net",
        paper="Mao et al., Dual-stream Network for Visual Recognition, NeurIPS 2021, arXiv 2105.14734",
        model_class=DSNet,
        preset="imagenet",
        fused=("co_attention", "depthwise", "feed_forward", "resample"),
        models={
            "dsnet_tiny": _info(9_148_200, 1_583_114_944, (9.1, 1.6, 78.1), _NO_STAR_NOTE),
            "dsnet_tiny_star": _info(10_534_312, 1_832_336_768, (10.5, 1.8, 79.0)),
            "dsnet_small": _info(
                19_710_920,
                3_066_419_744,
                (19.7, 3.0, 81.9),
                f"{_NO_STAR_NOTE}; the published MACs are 2 % less",
            ),
            "dsnet_small_star": _info(23_004_552, 3_546_689_472, (23.0, 3.5, 82.3)),
            "dsnet_base": _info(
                41_998_920,
                7_191_984_544,
                (48.8, 7.6, 82.8),
                f"{_NO_STAR_NOTE}; depths of dsnet_base_star; the published size and MACs are not reproduced",
            ),
            "dsnet_base_fit": ModelInfo(
                params=48_792_936,
                macs=7_662_599_680,
                note=f"{_NO_STAR_NOTE}; depths (3, 4, 29, 5) fitted to 48.8 M and 7.6 G, not sourced",
            ),
            "dsnet_base_star": _info(
                49_343_752, 8_293_025_472, (49.3, 8.4, 83.1), "the published MACs are 1 % more"
            ),
            "dsnet_test": ModelInfo(
                params=326_394,
                macs=2_833_920,
                input_size=(3, 32, 32),
                note="not published: a very small model for tests",
            ),
        },
        layouts=(same_names_layout("SteveTsui/DS-Net"), paddle_layout("PaddlePaddle/PaddleClas")),
    )
)
