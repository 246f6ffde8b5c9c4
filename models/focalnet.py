"""Isotropic FocalNets, which timm has not: its classes with a stem of 16 x 16 patches and one stage.

Yang et al., "Focal Modulation Networks", NeurIPS 2022 (arXiv 2203.11926). Public code: microsoft/FocalNet,
where the base model has norms behind its branches and layer scales.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.layers import LayerNorm2d
from timm.models import generate_default_cfgs, register_model
from timm.models.focalnet import Downsample, FocalNet

from fused_ops.models.common import build_backbone, classification_cfg

__all__ = ["IsotropicFocalNet"]

_PATCH = 16
_NORM = partial(LayerNorm2d, eps=1e-5)


class IsotropicFocalNet(FocalNet):
    """One stage of focal modulation on patches of 16 x 16 pixels.

    Args:
        in_chans: channels of the image.
        embed_dim: channels of the patches.
        norm_layer, **kwargs: see timm's class.
    """

    def __init__(
        self,
        in_chans: int = 3,
        embed_dim: int = 192,
        norm_layer: Any = _NORM,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(in_chans=in_chans, embed_dim=embed_dim, norm_layer=norm_layer, **factory, **kwargs)
        self.stem = Downsample(in_chans, embed_dim, stride=_PATCH, norm_layer=norm_layer, **factory)
        self.feature_info[0]["reduction"] = _PATCH


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    common = {"depths": (12,), "focal_levels": (3,), "focal_windows": (3,)}
    return build_backbone(IsotropicFocalNet, variant, pretrained, {**common, **defaults}, kwargs)


default_cfgs = generate_default_cfgs(
    {
        f"focalnet_{size}_iso.untrained": classification_cfg(
            first_conv="stem.proj", classifier="head.fc", pool_size=(14, 14), license="mit"
        )
        for size in ("tiny", "small", "base")
    }
)


@register_model
def focalnet_tiny_iso(pretrained: bool = False, **kwargs: Any) -> IsotropicFocalNet:
    """Isotropic FocalNet of 192 channels."""
    return _create("focalnet_tiny_iso", pretrained, {"embed_dim": 192}, kwargs)


@register_model
def focalnet_small_iso(pretrained: bool = False, **kwargs: Any) -> IsotropicFocalNet:
    """Isotropic FocalNet of 384 channels."""
    return _create("focalnet_small_iso", pretrained, {"embed_dim": 384}, kwargs)


@register_model
def focalnet_base_iso(pretrained: bool = False, **kwargs: Any) -> IsotropicFocalNet:
    """Isotropic FocalNet of 768 channels, with norms behind its branches and layer scales."""
    flags = {"embed_dim": 768, "use_post_norm": True, "layerscale_value": 1e-4}
    return _create("focalnet_base_iso", pretrained, flags, kwargs)
