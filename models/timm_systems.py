"""Systems that timm has: its models, with what is recognised in them run as fused operators.

``fused_ops.models.create_model(name)`` builds timm's model and hands it to :func:`fused_ops.accelerate`,
which keeps every parameter under its name; ``timm.create_model(name)`` stays the untouched one. Checkpoints
of the authors' own code are read and written through the names below, timm's as they are.

Published figures are the authors'; counts are of timm's models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from fused_ops.models import focalnet  # noqa: F401 (registers its models)
from fused_ops.models.layouts import OfficialLayout, same_names_layout
from fused_ops.models.registry import ModelInfo, System, register_system

_TIMM = same_names_layout("huggingface/pytorch-image-models")


def renamed_layout(
    source: str,
    official_name: Callable[[str, nn.Module], str],
    linear: str = "$^",
    left_out: str = "$^",
) -> OfficialLayout:
    """Layout of a PyTorch repository with other names, and linear layers where ours are 1x1 convolutions.

    Args:
        source: the repository.
        official_name: ``(our name, model) -> official name``.
        linear: pattern of our names whose official weight is that of a linear layer, (out, in).
        left_out: pattern of official names that have no counterpart, since they have no effect.
    """

    def official_to_ours(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        own = model.state_dict()
        names = {official_name(name, model): name for name in own}
        converted = {}
        for official, value in state.items():
            if re.search(left_out, official):
                continue
            name = names.get(official, official)
            if name in own and re.search(linear, name) and value.numel() == own[name].numel():
                value = value.reshape(own[name].shape)
            converted[name] = value
        return converted

    def ours_to_official(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        return {
            official_name(name, model): value.flatten(1) if re.search(linear, name) else value
            for name, value in state.items()
        }

    return OfficialLayout("pytorch", source, official_to_ours, ours_to_official)


def _substitute(*rules: tuple[str, str | Callable[[re.Match[str]], str]]) -> Callable[[str, nn.Module], str]:
    """Names by the first rule (pattern, replacement) that fits."""

    def official_name(name: str, model: nn.Module) -> str:
        for pattern, replacement in rules:
            renamed, count = re.subn(pattern, replacement, name, count=1)
            if count:
                return renamed
        return name

    return official_name


def _focalnet_name(name: str, model: nn.Module) -> str:
    rename = _substitute(
        (r"^stem\.", "patch_embed."),
        (r"^head\.fc\.", "head."),
        (r"^layers\.(\d+)\.downsample\.", lambda match: f"layers.{int(match[1]) - 1}.downsample."),
        (r"\.norm(\d)_post\.", r".norm\1."),
        (r"\.ls(\d)\.gamma$", r".gamma_\1"),
        (r"\.modulation\.norm\.", ".modulation.ln."),
    )
    return rename(name, model)


def _next_vit_name(name: str, model: nn.Module) -> str:
    starts = [0]
    for stage in model.stages:
        starts.append(starts[-1] + len(stage.blocks))
    name = re.sub(
        r"^stages\.(\d+)\.blocks\.(\d+)\.",
        lambda match: f"features.{starts[int(match[1])] + int(match[2])}.",
        name,
    )
    name = re.sub(r"\.mlp\.fc(\d)\.", r".mlp.conv\1.", name)
    return re.sub(r"^head\.fc\.", "proj_head.0.", name)


def _pvt_v2_name(name: str, model: nn.Module) -> str:
    def one_up(word: str) -> Callable[[re.Match[str]], str]:
        return lambda match: f"{word}{int(match[1]) + 1}{match[2]}"

    name = re.sub(r"\.mlp\.dwconv\.", ".mlp.dwconv.dwconv.", name)
    rename = _substitute(
        (r"^patch_embed\.", "patch_embed1."),
        (r"^stages\.(\d+)\.downsample(\.)", one_up("patch_embed")),
        (r"^stages\.(\d+)\.blocks(\.)", one_up("block")),
        (r"^stages\.(\d+)\.norm(\.)", one_up("norm")),
    )
    return rename(name, model)


def _davit_name(name: str, model: nn.Module) -> str:
    name = re.sub(r"\.cpe(\d)\.", lambda match: f".cpe.{int(match[1]) - 1}.", name)
    rename = _substitute(
        (r"^stem\.conv\.", "patch_embeds.0.proj."),
        (r"^stem\.norm\.", "patch_embeds.0.norm."),
        (r"^stages\.(\d+)\.downsample\.conv\.", r"patch_embeds.\1.proj."),
        (r"^stages\.(\d+)\.downsample\.norm\.", r"patch_embeds.\1.norm."),
        (r"^stages\.(\d+)\.blocks\.", r"main_blocks.\1."),
        (r"^head\.norm\.", "norms."),
        (r"^head\.fc\.", "head."),
    )
    return rename(name, model)


def _convnext_name(name: str, model: nn.Module) -> str:
    name = re.sub(r"\.mlp\.fc(\d)\.", r".pwconv\1.", name)
    name = re.sub(r"\.conv_dw\.", ".dwconv.", name)
    rename = _substitute(
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
        (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
        (r"^head\.norm\.", "norm."),
        (r"^head\.fc\.", "head."),
    )
    return rename(name, model)


def _infos(
    source: str, rows: Sequence[tuple], *, size: int = 224, notes: Mapping[str, str] | None = None
) -> dict[str, ModelInfo]:
    """Models from rows (name, params, MACs, published params in M, MACs in G, top-1[, input size])."""
    notes = notes or {}
    infos = {}
    for name, params, macs, millions, billions, top1, *own_size in rows:
        side = own_size[0] if own_size else size
        infos[name] = ModelInfo(
            params=params,
            macs=macs,
            input_size=(3, side, side),
            published_params=None if millions is None else millions * 1e6,
            published_macs=None if billions is None else billions * 1e9,
            published_top1=top1,
            source=source if millions is not None else "",
            note=notes.get(name, notes.get("", "")),
        )
    return infos


def _register(
    name: str,
    paper: str,
    preset: str,
    card: str,
    models: Mapping[str, ModelInfo],
    layouts: Sequence[OfficialLayout] = (),
    defaults: Mapping[str, Mapping[str, object]] | None = None,
    fused: tuple[str, ...] = (),
    side_multiple: int = 1,
) -> System:
    return register_system(
        System(
            name=name,
            paper=paper,
            model_class=None,
            models=models,
            layouts=(*layouts, _TIMM),
            defaults=defaults or {},
            preset=preset,
            fused=fused,
            side_multiple=side_multiple,
            card=card,
        )
    )


_UNUSED = (
    "without the three projections of the public code that have no effect: its size is not reproduced, and "
    "for an unknown reason neither are its multiply-accumulates"
)
RES2NET = _register(
    "Res2Net",
    "Gao et al., Res2Net: A New Multi-scale Backbone Architecture, TPAMI 2021, arXiv 1904.01169",
    "res2net",
    "The paper's: the split block and its widths; the stem and the shortcuts are ResNet's, DLA's or "
    "ResNeXt's. The released code's: the last split of a stage's first block passes a 3x3 average "
    'pooling; res2net50d and res2net101d ("v1b") are the code\'s alone, with a deeper stem and pooled '
    "shortcuts, and so is their accuracy. timm leaves out three projections of the DLA models that "
    "have no effect. Nothing in the models is inferred.",
    _infos(
        "Res2Net-PretrainedModels README",
        [
            ("res2net50_48w_2s", 25_287_304, 4_159_832_064, 25.29, 4.2, 77.32),
            ("res2net50_26w_4s", 25_699_120, 4_255_166_464, 25.70, 4.2, 77.99),
            ("res2net50_14w_8s", 25_059_816, 4_178_898_944, 25.06, 4.2, 78.14),
            ("res2net50_26w_6s", 37_051_448, 6_295_523_328, 37.05, 6.3, 78.58),
            ("res2net50_26w_8s", 48_403_776, 8_335_880_192, 48.40, 8.3, 79.20),
            ("res2net101_26w_4s", 45_206_688, 8_066_974_464, 45.21, 8.1, 79.19),
            ("res2next50", 24_671_464, 4_172_677_120, 24.67, 4.2, 78.24),
            ("dla60_res2net", 20_848_072, 4_122_681_344, 21.15, 4.2, 78.47),
            ("dla60_res2next", 17_032_984, 3_458_752_512, 17.33, 3.6, 78.45),
            ("res2net50d", 25_718_352, 4_494_807_040, 25.72, 4.5, 80.27),
            ("res2net101d", 45_225_920, 8_306_615_040, 45.23, 8.3, 81.23),
        ],
        notes={
            "res2net50_26w_4s": "published with the multiply-accumulates of all Res2Net-50 of its complexity",
            "dla60_res2net": _UNUSED,
            "dla60_res2next": _UNUSED,
            "res2net50d": "the v1b form of the public code",
            "res2net101d": "the v1b form of the public code",
        },
    ),
    [
        renamed_layout(
            "Res2Net/Res2Net-PretrainedModels",
            lambda name, model: name,
            left_out=r"^level3\.project\.|^level4\.(tree1\.)?project\.",
        )
    ],
)

_1000_CLASSES = "with a classifier for ImageNet-1k; the released weights are for 21,842 classes"
FOCALNET = _register(
    "FocalNet",
    "Yang et al., Focal Modulation Networks, NeurIPS 2022, arXiv 2203.11926",
    "focalnet",
    "The paper's: focal modulation, sizes and recipe. It counts parameters of a modulation without "
    "its output projection; the code has it, and it is counted here. The released code's: normalised "
    "modulators of focalnet_large_fl4 (its configuration file says so, that of focalnet_xlarge_fl4 "
    "does not; timm sets it for neither), post-norms and layer scales of the large models and of "
    "focalnet_base_iso. timm has no isotropic models: they are its class with another stem. Weights of "
    "large, xlarge and huge are for 22k classes; a classifier for 1,000 here is this project's. "
    "Nothing else is inferred.",
    _infos(
        "microsoft/FocalNet README",
        [
            ("focalnet_tiny_srf", 28_427_116, 4_403_335_680, 28.4, 4.4, 82.1),
            ("focalnet_tiny_lrf", 28_647_928, 4_474_836_480, 28.6, 4.5, 82.3),
            ("focalnet_small_srf", 49_891_216, 8_598_551_040, 49.9, 8.6, 83.4),
            ("focalnet_small_lrf", 50_342_440, 8_715_210_240, 50.3, 8.7, 83.5),
            ("focalnet_base_srf", 88_148_144, 15_241_181_184, 88.1, 15.3, 83.7),
            ("focalnet_base_lrf", 88_749_768, 15_396_726_784, 88.7, 15.4, 83.9),
            ("focalnet_large_fl3", 207_100_744, 104_873_275_392, 207, None, None, 384),
            ("focalnet_large_fl4", 207_281_248, 105_010_409_472, 207, None, None, 384),
            ("focalnet_xlarge_fl3", 366_082_120, 185_356_009_472, 366, None, None, 384),
            ("focalnet_xlarge_fl4", 366_322_784, 185_538_854_912, 366, None, None, 384),
            ("focalnet_huge_fl3", 686_564_424, 118_061_098_496, 687, None, None),
            ("focalnet_huge_fl4", 689_277_664, 118_762_609_152, 689, None, None),
            ("focalnet_tiny_iso", 5_880_280, 1_108_830_720, 5.9, 1.1, 74.1),
            ("focalnet_small_iso", 22_376_344, 4_298_560_512, 22.4, 4.3, 80.9),
            ("focalnet_base_iso", 87_237_400, 16_920_717_312, 87.2, 16.9, 82.4),
        ],
        notes={
            **{
                f"focalnet_{size}": _1000_CLASSES
                for size in ("large_fl3", "xlarge_fl3", "xlarge_fl4", "huge_fl3", "huge_fl4")
            },
            "focalnet_large_fl4": f"{_1000_CLASSES}; modulators are normalised, as the public file says",
        },
    ),
    [
        renamed_layout(
            "microsoft/FocalNet", _focalnet_name, linear=r"\.(modulation\.(f|proj)|mlp\.fc[12])\.weight$"
        )
    ],
    defaults={
        "focalnet_large_fl3": {"num_classes": 1000},
        "focalnet_large_fl4": {"num_classes": 1000, "normalize_modulator": True},
        "focalnet_xlarge_fl3": {"num_classes": 1000},
        "focalnet_xlarge_fl4": {"num_classes": 1000},
        "focalnet_huge_fl3": {"num_classes": 1000},
        "focalnet_huge_fl4": {"num_classes": 1000},
    },
    fused=("depthwise", "feed_forward"),
)

NEXT_VIT = _register(
    "Next-ViT",
    "Li et al., Next-ViT, arXiv 2207.05501",
    "next_vit",
    "The paper's: blocks, their pattern and sizes. The released code's: keys and values are pooled "
    "over runs of tokens in raster order, where the paper only names an average pooling; attention "
    "between convolution groups has ReLU and BatchNorm and a projection without bias. Nothing is "
    "inferred.",
    _infos(
        "arXiv 2207.05501, ImageNet table",
        [
            ("nextvit_small", 31_763_368, 5_794_420_224, 31.7, 5.8, 82.5),
            ("nextvit_base", 44_818_856, 8_273_817_088, 44.8, 8.3, 83.2),
            ("nextvit_large", 57_874_344, 10_753_213_952, 57.8, 10.8, 83.6),
        ],
    ),
    [renamed_layout("bytedance/Next-ViT", _next_vit_name)],
    fused=("attention", "attention_block", "feed_forward"),
)

PVT_V2 = _register(
    "PVTv2",
    "Wang et al., PVT v2: Improved Baselines with Pyramid Vision Transformer, CVMJ 2022, arXiv 2106.13797",
    "pvt_v2",
    "The paper's: overlapping patch embedding, convolutional feed-forward, linear attention, sizes. "
    "The released code's: LayerNorm has eps 1e-5 in the patch embedding and after the reduction, 1e-6 "
    "elsewhere; the linear form has a further ReLU before its depthwise convolution. Published "
    "multiply-accumulates leave out attention's products. Nothing is inferred.",
    _infos(
        "whai362/PVT README; multiply-accumulates: PaddleClas, without attention's products",
        [
            ("pvt_v2_b0", 3_666_760, 566_065_664, 3.7, 0.53, 70.5),
            ("pvt_v2_b1", 14_009_000, 2_108_355_584, 14.0, 2.0, 78.7),
            ("pvt_v2_b2", 25_362_856, 4_026_734_592, 25.4, 3.9, 82.0),
            ("pvt_v2_b2_li", 22_553_512, 3_888_850_944, 22.6, 3.8, 82.1),
            ("pvt_v2_b3", 45_238_696, 6_897_303_552, 45.2, 6.7, 83.1),
            ("pvt_v2_b4", 62_556_072, 10_101_116_416, 62.6, 9.8, 83.6),
            ("pvt_v2_b5", 81_956_008, 11_717_260_288, 82.0, 11.4, 83.8),
        ],
    ),
    [renamed_layout("whai362/PVT", _pvt_v2_name)],
    fused=("attention", "attention_block", "feed_forward_conv"),
)

DAVIT = _register(
    "DaViT",
    "Ding et al., DaViT: Dual Attention Vision Transformers, ECCV 2022, arXiv 2204.03645",
    "davit",
    "The paper's: window and channel attention in turn, sizes. The released code's: channel attention "
    "divides keys by the square root of a head's width; windows are padded with zeros that take part "
    "in the softmax; LayerNorm comes after the stem's convolution and before the others. In the "
    "recipe alone, stochastic depth of the small and base models is inferred.",
    _infos(
        "arXiv 2204.03645, ImageNet table",
        [
            ("davit_tiny", 28_360_168, 4_521_801_216, 28.3, 4.5, 82.8),
            ("davit_small", 49_745_896, 8_773_012_992, 49.7, 8.8, 84.2),
            ("davit_base", 87_954_408, 15_473_797_120, 87.9, 15.5, 84.6),
        ],
    ),
    [renamed_layout("dingmyu/davit", _davit_name)],
    fused=("depthwise", "feed_forward"),
)

HRNET = _register(
    "HRNet",
    "Wang et al., Deep High-Resolution Representation Learning for Visual Recognition, TPAMI 2020, "
    "arXiv 1908.07919",
    "hrnet",
    "The paper's: four resolutions side by side, widths. The released code's: each new branch starts "
    "from the lowest resolution; a coarser map is enlarged by nearest neighbours after its 1x1 "
    "convolution and BatchNorm; convolutions of the classifier's head have biases. Sides must be "
    "multiples of 32. hrnet_w18_small and hrnet_w18_small_v2 are the code's. Nothing is inferred.",
    _infos(
        "HRNet/HRNet-Image-Classification README",
        [
            ("hrnet_w18_small", 13_187_464, 1_601_508_352, 13.2, 1.49, 72.3),
            ("hrnet_w18_small_v2", 15_597_464, 2_595_712_864, 15.6, 2.42, 75.1),
            ("hrnet_w18", 21_299_004, 4_283_537_072, 21.3, 3.99, 76.8),
            ("hrnet_w32", 41_232_680, 8_921_133_056, 41.2, 8.31, 78.5),
            ("hrnet_w48", 77_469_864, 17_277_996_032, 77.5, 16.1, 79.3),
        ],
        notes={"": "published multiply-accumulates are divided by 2**30"},
    ),
    [same_names_layout("HRNet/HRNet-Image-Classification")],
    side_multiple=32,
)

CONVNEXT = _register(
    "ConvNeXt",
    "Liu et al., A ConvNet for the 2020s, CVPR 2022, arXiv 2201.03545",
    "convnext",
    "The paper's: block, sizes and recipe. The released code's: layer scales start at 1e-6 and the "
    "average of the weights is evaluated. Nothing is inferred.",
    _infos(
        "arXiv 2201.03545, ImageNet-1K table",
        [
            ("convnext_tiny", 28_589_128, 4_455_531_264, 28.6, 4.5, 82.1),
            ("convnext_small", 50_223_688, 8_683_712_256, 50.2, 8.7, 83.1),
            ("convnext_base", 88_591_464, 15_354_729_472, 88.6, 15.4, 83.8),
            ("convnext_large", 197_767_336, 34_361_433_600, 197.8, 34.4, 84.3),
        ],
    ),
    [renamed_layout("facebookresearch/ConvNeXt", _convnext_name)],
    fused=("depthwise", "feed_forward"),
)

_ROUNDED = "published in whole millions; not reproduced to a percent"
_OTHER_FLOPS = "published FLOPs are 2 to 4 % less, for an unknown reason"
EFFICIENTNET = _register(
    "EfficientNet",
    "Tan and Le, EfficientNet: Rethinking Model Scaling for CNNs, ICML 2019, arXiv 1905.11946",
    "efficientnet",
    "The paper's: base network, scaling and input sizes. timm's: its own default input sizes (b2 to "
    "b5 are smaller than the paper's; the preset and the counts take the paper's) and symmetric "
    "padding, where the released TensorFlow code pads as TensorFlow does (those are timm's "
    "tf_efficientnet models). Nothing is inferred.",
    _infos(
        "arXiv 1905.11946, table 2",
        [
            ("efficientnet_b0", 5_288_548, 385_814_752, 5.3, 0.39, 77.1),
            ("efficientnet_b1", 7_794_184, 686_802_832, 7.8, 0.70, 79.1, 240),
            ("efficientnet_b2", 9_109_994, 993_561_872, 9.2, 1.0, 80.1, 260),
            ("efficientnet_b3", 12_233_232, 1_827_141_392, 12, 1.8, 81.6, 300),
            ("efficientnet_b4", 19_341_616, 4_393_771_024, 19, 4.2, 82.9, 380),
            ("efficientnet_b5", 30_389_784, 10_266_384_752, 30, 9.9, 83.6, 456),
            ("efficientnet_b6", 43_040_704, 19_067_593_536, 43, 19, 84.0, 528),
            ("efficientnet_b7", 66_347_960, 37_745_884_192, 66, 37, 84.3, 600),
        ],
        notes={
            "efficientnet_b3": _ROUNDED,
            "efficientnet_b4": f"{_ROUNDED}; {_OTHER_FLOPS}",
            "efficientnet_b5": f"{_ROUNDED}; {_OTHER_FLOPS}",
            "efficientnet_b7": _OTHER_FLOPS,
        },
    ),
    fused=("depthwise", "pool_channels", "gate_scale"),
)

MOBILENET_V3 = _register(
    "MobileNetV3",
    "Howard et al., Searching for MobileNetV3, ICCV 2019, arXiv 1905.02244",
    "mobilenetv3",
    "The paper's: the two networks and their width multipliers. timm's: symmetric padding, where the "
    "released TensorFlow code pads as TensorFlow does (those are timm's tf_mobilenetv3 models). In "
    "the recipe alone, number of epochs, warm-up and label smoothing are inferred.",
    _infos(
        "arXiv 1905.02244, floating point table",
        [
            ("mobilenetv3_large_100", 5_483_032, 216_589_760, 5.4, 0.219, 75.2),
            ("mobilenetv3_large_075", 3_993_528, 154_560_624, 4.0, 0.155, 73.3),
            ("mobilenetv3_small_100", 2_542_856, 56_510_400, 2.5, 0.056, 67.4),
            ("mobilenetv3_small_075", 2_041_872, 43_399_344, 2.0, 0.044, 65.4),
        ],
        notes={
            "": "published in tenths of a million; not reproduced to a percent, nor are the published MACs"
        },
    ),
    fused=("depthwise", "pool_channels", "gate_scale"),
)

_OF_TIMM = "timm's own variant, not published in a paper"
GATED_RESNETS_OF_TIMM = _register(
    "ResNets with gates, timm's",
    "Wang et al., ECA-Net, CVPR 2020, arXiv 1910.03151; Cao et al., GCNet, ICCV Workshops 2019, "
    "arXiv 1904.11492",
    "resnet_gates",
    "The papers': the gates. timm's: everything around them, deep stems, pooled shortcuts, light and "
    "tiered variants; kernel sizes of ECA follow the paper's formula, while the released code's "
    "checkpoints do not. The recipe is inferred: that of ECA-Net. Models as in the papers' own code "
    "are eca_resnet_* and gcnet_resnet_*.",
    _infos(
        "",
        [
            ("ecaresnet26t", 16_011_916, 3_330_405_888, None, None, None, 256),
            ("ecaresnet50t", 25_573_814, 5_612_148_480, None, None, None, 256),
            ("ecaresnet50d", 25_576_350, 4_328_912_640, None, None, None),
            ("ecaresnet101d", 44_568_563, 8_041_220_864, None, None, None),
            ("gcresnet33ts", 19_880_698, 4_735_307_776, None, None, None, 256),
            ("gcresnet50t", 25_897_080, 5_389_487_104, None, None, None, 256),
            ("gcresnext26ts", 10_476_600, 2_407_655_424, None, None, None, 256),
            ("gcresnext50ts", 15_667_320, 3_719_105_536, None, None, None, 256),
        ],
        notes={"": _OF_TIMM},
    ),
    fused=("pool_channels", "context_pool", "gate_scale"),
)
