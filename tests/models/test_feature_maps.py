"""Maps for detection and segmentation: channels and strides of every backbone, from the publications.

That the maps have the shapes that are said of them is in each system's own tests.
"""

from __future__ import annotations

import fnmatch

import pytest
import timm

from fused_ops.models import list_models
from fused_ops.models.registry import find_system

RESNET = (256, 512, 1024, 2048)
BASIC = (64, 128, 256, 512)
PYRAMID = (64, 128, 320, 512)
NARROW, WIDE = (96, 192, 384, 768), (128, 256, 512, 1024)
# Channels of the four maps at strides 4, 8, 16 and 32; the first pattern that fits counts. Extractors of timm
# may give a map of stride 2 before them.
CHANNELS = {
    "dsnet_test": None,
    "dsnet_*": PYRAMID,
    "pvt_test": None,
    "pvt_v2_b0": (32, 64, 160, 256),
    "pvt_*": PYRAMID,
    "fcvit_test": None,
    "fcvit_tiny": (32, 64, 160, 320),
    "fcvit_*": PYRAMID,
    "vip_test": None,
    "vip_mobile": (48, 96, 192, 384),
    "vip_tiny": BASIC,
    "vip_base": WIDE,
    "vip_*": NARROW,
    "hlg_test": None,
    "hlg_mobile": (32, 64, 192, 384),
    "hlg_tiny": BASIC,
    "hlg_large*": WIDE,
    "hlg_*": NARROW,
    "fishne*": (320, 832, 1600, 2112),
    "sem_resnet_164_cifar": None,
    "???_resnet_18": BASIC,
    "cbam_resnet_18": BASIC,
    "???*_resnet_34": BASIC,
    "sda_*": RESNET,
    "*_resnet_*": RESNET,
    "dla60_*": (128, 256, 512, 1024),
    "res2ne*": RESNET,
    # One stage, of stride 16.
    "focalnet_*_iso": None,
    "focalnet_base_*": WIDE,
    "focalnet_large_*": (192, 384, 768, 1536),
    "focalnet_xlarge_*": (256, 512, 1024, 2048),
    "focalnet_huge_*": (352, 704, 1408, 2816),
    "focalnet_*": NARROW,
    "nextvit_*": (96, 256, 512, 1024),
    "davit_base": WIDE,
    "davit_*": NARROW,
    "hrnet_*": WIDE,
    "convnext_base": WIDE,
    "convnext_large": (192, 384, 768, 1536),
    "convnext_*": NARROW,
    "efficientnet_b[01]": (24, 40, 112, 320),
    "efficientnet_b2": (24, 48, 120, 352),
    "efficientnet_b3": (32, 48, 136, 384),
    "efficientnet_b4": (32, 56, 160, 448),
    "efficientnet_b5": (40, 64, 176, 512),
    "efficientnet_b6": (40, 72, 200, 576),
    "efficientnet_b7": (48, 80, 224, 640),
    # The last convolution before the pooling, not the last block: timm's choice.
    "mobilenetv3_large_100": (24, 40, 112, 960),
    "mobilenetv3_large_075": (24, 32, 88, 720),
    "mobilenetv3_small_100": (16, 24, 48, 576),
    "mobilenetv3_small_075": (16, 24, 40, 432),
    "gcresnet33ts": (256, 512, 1536, 1280),
    "ecaresnet*": RESNET,
    "gcresne*": RESNET,
}
# HIRI-ViT and what is lifted with it have maps of their own, and tests of them.
NAMES = [name for name in list_models() if not find_system(name).name.startswith("HIRI-ViT")]


def expected(name):
    return next(channels for pattern, channels in CHANNELS.items() if fnmatch.fnmatch(name, pattern))


KNOWN = [name for name in NAMES if expected(name)]
# One of each system; building them all takes a minute.
ONE_EACH = list({find_system(name).name: name for name in reversed(KNOWN)}.values())


@pytest.mark.parametrize(
    "name", [name if name in ONE_EACH else pytest.param(name, marks=pytest.mark.extended) for name in KNOWN]
)
def test_channels_and_strides(name):
    # accelerate() leaves this as it is, and takes its time.
    info = timm.create_model(name, features_only=True, device="meta").feature_info
    assert tuple(info.channels()[-4:]) == expected(name)
    assert tuple(info.reduction()[-4:]) == (4, 8, 16, 32)
    assert info.reduction()[:-4] in ([], [2])
