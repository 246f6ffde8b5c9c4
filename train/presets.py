"""Sets of defaults by name: what `--preset` of `fused-ops train` chooses among.

Those named after a system hold the recipe that its authors trained with: their numbers, wherever a setting
exists for them, and in words what the program does otherwise. What nobody published is marked INFERRED. The
number format (`--amp`) is left to the device in all of them, and warm-up and cosine change the rate at every
update, where the authors' programs mostly change it once per epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """Defaults of a training run.

    Attributes:
        settings: by the names of `Settings`; what is missing keeps the program's own default.
        source: whose numbers they are.
        notes: what the source does and this program does not, or does otherwise; what is INFERRED.
        by_model: further settings for single models of the zoo.
    """

    settings: Mapping[str, Any]
    source: str
    notes: tuple[str, ...] = ()
    by_model: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def settings_of(self, model: str) -> dict[str, Any]:
        """The settings for a model by its name, with or without `timm/`."""
        return {**self.settings, **self.by_model.get(model.removeprefix("timm/"), {})}


# DeiT's recipe is what the program's own defaults are; these are the changes that several systems share.
_NO_REPEATS = {"repeats": 1, "ema_decay": 0.0}
_NO_EMA = {"ema_decay": 0.0}

# The classical recipe of ResNets: random crops and flips, nothing else. 0.1 at 256 images.
_SGD = {
    "optimizer": "momentum",
    "batch_size": 256,
    "lr": 0.2,
    "min_lr": 0.0,
    "warmup_lr": 0.0,
    "warmup_epochs": 0.0,
    "epochs": 100,
    "weight_decay": 1e-4,
    "rand_augment": "none",
    "random_erasing": 0.0,
    "repeats": 1,
    "mixup": 0.0,
    "cutmix": 0.0,
    "label_smoothing": 0.0,
    "drop_path": 0.0,
    "ema_decay": 0.0,
}
_EVERY_30 = {"schedule": "step", "decay_epochs": 30.0}
_AFTER_30_60_90 = {"schedule": "multistep", "decay_milestones": "30,60,90"}
_DECAYS_ALL = "weight decay is on every parameter; here not on biases and one-dimensional ones"

_FOCALNET_22K = {"epochs": 90, "warmup_epochs": 5.0, "batch_size": 4096, "lr": 1.25e-4, "drop_path": 0.2}
_FOCALNET_PRETRAINED = [
    f"focalnet_{size}_{levels}" for size in ("large", "xlarge", "huge") for levels in ("fl3", "fl4")
]
# Input of the paper; the crop is the public code's, an image 32 pixels larger.
_EFFICIENTNET_SIZES = (224, 240, 260, 300, 380, 456, 528, 600)

PRESETS: dict[str, Preset] = {
    "imagenet": Preset({}, "DS-Net: SteveTsui/DS-Net, main.py and run_train.sh"),
    "digits": Preset(
        {
            "model": "dsnet_test",
            "data": "digits",
            "img_size": 32,
            "crop_scale": 0.7,
            "crop_pct": 1.0,
            "hflip": 0.0,
            "rand_augment": "none",
            "random_erasing": 0.0,
            "repeats": 1,
            "mixup": 0.0,
            "cutmix": 0.0,
            "workers": 0,
            # The model is so small that a second thread gains nothing, and loses much when cores are shared.
            "threads": 1,
            "epochs": 12,
            "batch_size": 64,
            "lr": 1.6e-2,
            "warmup_epochs": 2.0,
            "ema_decay": 0.99,
            "ema_warmup": True,
            "drop_path": 0.0,
        },
        "for a first try: half a minute on a CPU",
    ),
    "synthetic": Preset(
        {
            "data": "synthetic",
            "epochs": 1,
            "warmup_epochs": 0.0,
            # No rate is too small for a run that measures speed, whatever the batch.
            "min_lr": 0.0,
            "batch_size": 128,
            "repeats": 1,
        },
        "for measuring speed",
    ),
    "pvt": Preset(
        {"model": "pvt_small", **_NO_EMA},
        "whai362/PVT, classification/main.py and configs/pvt",
        by_model={name: {"drop_path": 0.3, "clip_grad": 1.0} for name in ("pvt_medium", "pvt_large")},
    ),
    "pvt_v2": Preset(
        {"model": "pvt_v2_b2", **_NO_EMA},
        "whai362/PVT, classification/main.py and configs/pvt_v2",
        by_model={f"pvt_v2_b{n}": {"drop_path": 0.3, "clip_grad": 1.0} for n in (3, 4, 5)},
    ),
    "fcvit": Preset(
        {"model": "fcvit_b12", "min_lr": 1e-6, "cooldown_epochs": 10, "crop_pct": 0.9, **_NO_REPEATS},
        "ma-xu/FCViT, README (which says that --lr 1e-3 is sometimes better)",
        by_model={"fcvit_b24": {"crop_pct": 0.95}, "fcvit_b48": {"crop_pct": 0.95, "drop_path": 0.2}},
    ),
    "vip": Preset(
        {
            "model": "vip_small",
            "warmup_epochs": 20.0,
            "cooldown_epochs": 10,
            "random_erasing": 0.0,
            "repeats": 1,
        },
        "kevin-ssy/ViP",
        # The public code sets stochastic depth in each model, whatever its command line says.
        by_model={
            "vip_mobile": {"drop_path": 0.0},
            "vip_tiny": {"weight_decay": 0.03},
            "vip_medium": {"drop_path": 0.2},
            "vip_base": {"drop_path": 0.3},
        },
    ),
    "hlg": Preset(
        {"model": "hlg_small", "warmup_epochs": 20.0, "clip_grad": 5.0, "drop_path": 0.2, "repeats": 1},
        "fudan-zvg/SETR, hlg-classification",
        ("the batch of 1024 and the warm-up from 1e-6 are INFERRED",),
    ),
    "fishnet": Preset(
        {**_SGD, **_EVERY_30, "model": "fishnet_150"},
        "kevin-ssy/FishNet, README and cfgs",
        (
            _DECAYS_ALL,
            "colours are shifted along their principal components (0.1); here not",
            "its better rows have 200 epochs of cosine with label smoothing: --schedule cosine --epochs 200 "
            "--label-smoothing 0.1 (the amount is INFERRED)",
        ),
    ),
    "resnet_gates": Preset(
        {**_SGD, **_EVERY_30, "model": "eca_resnet_50"},
        "Jongchan/attention-module (CBAM) and BangguWu/ECANet; for GCNet, CAT, SEM on ImageNet and timm's "
        "own variants INFERRED, none being published",
        (_DECAYS_ALL,),
    ),
    "sem_cifar": Preset(
        {
            **_SGD,
            "model": "sem_resnet_164_cifar",
            "batch_size": 128,
            "lr": 0.4,
            "epochs": 164,
            "schedule": "multistep",
            "decay_milestones": "81,122",
            "crop_scale": 0.75,
            "crop_pct": 1.0,
        },
        "Qrange-group/SEM, README, for CIFAR",
        (
            _DECAYS_ALL,
            "images are shifted by up to 4 pixels; here 3/4 of one or more is cropped and resized (INFERRED)",
        ),
    ),
    "sda": Preset(
        {**_SGD, **_AFTER_30_60_90, "model": "sda_resnet_86", "epochs": 120, "label_smoothing": 0.1},
        "QingbeiGuo/SDA-xNet",
        (_DECAYS_ALL,),
    ),
    "dcdc": Preset(
        {
            **_SGD,
            "model": "dcdc_resnet_50",
            "optimizer": "sgd",
            "batch_size": 2048,
            "epochs": 130,
            "warmup_lr": 0.2,
            "warmup_epochs": 5.0,
        },
        "INFERRED: none is published; this is that of the related d-li14/involution",
        (_DECAYS_ALL,),
    ),
    "res2net": Preset(
        {**_SGD, **_EVERY_30, "model": "res2net50_26w_4s", "label_smoothing": 0.1},
        "Res2Net/Res2Net-PretrainedModels and the paper; for res2net50d and res2net101d (v1b) INFERRED",
        (_DECAYS_ALL,),
    ),
    "hrnet": Preset(
        {**_SGD, **_AFTER_30_60_90, "model": "hrnet_w18", "optimizer": "sgd", "batch_size": 128},
        "HRNet/HRNet-Image-Classification, experiments",
        (_DECAYS_ALL,),
    ),
    "focalnet": Preset(
        {
            "model": "focalnet_tiny_lrf",
            "warmup_epochs": 20.0,
            "clip_grad": 5.0,
            "cutmix": 0.8,
            "drop_path": 0.2,
            **_NO_REPEATS,
        },
        "arXiv 2203.11926, appendix; microsoft/FocalNet's files have 5 epochs of warm-up and CutMix 1.0",
        (
            "the large, xlarge and huge models are for the 22k classes of ImageNet, with the paper's recipe "
            "for large (INFERRED for the two others)",
        ),
        by_model={
            **{f"focalnet_small_{field}": {"drop_path": 0.3} for field in ("srf", "lrf")},
            **{f"focalnet_base_{field}": {"drop_path": 0.5} for field in ("srf", "lrf")},
            "focalnet_base_iso": {"drop_path": 0.3},
            **dict.fromkeys(_FOCALNET_PRETRAINED, _FOCALNET_22K),
        },
    ),
    "next_vit": Preset(
        {
            "model": "nextvit_small",
            "batch_size": 2048,
            "weight_decay": 0.1,
            "warmup_epochs": 20.0,
            "clip_grad": 5.0,
            **_NO_REPEATS,
        },
        "bytedance/Next-ViT, classification",
        by_model={name: {"drop_path": 0.2} for name in ("nextvit_base", "nextvit_large")},
    ),
    "davit": Preset(
        {"model": "davit_tiny", "clip_grad": 1.0, "crop_pct": 0.9, **_NO_REPEATS},
        "dingmyu/davit, train.py and README",
        ("stochastic depth of davit_small and davit_base (0.2, 0.4) is INFERRED",),
        by_model={"davit_small": {"drop_path": 0.2}, "davit_base": {"drop_path": 0.4}},
    ),
    "convnext": Preset(
        {
            "model": "convnext_tiny",
            "batch_size": 4096,
            "min_lr": 1e-6,
            "warmup_lr": 0.0,
            "warmup_epochs": 20.0,
            "repeats": 1,
            "ema_decay": 0.9999,
        },
        "facebookresearch/ConvNeXt, TRAINING.md and main.py",
        by_model={
            "convnext_small": {"drop_path": 0.4},
            "convnext_base": {"drop_path": 0.5},
            "convnext_large": {"drop_path": 0.5},
        },
    ),
    "efficientnet": Preset(
        {
            "model": "efficientnet_b0",
            "optimizer": "rmsproptf",
            "batch_size": 4096,
            "lr": 0.032,
            "schedule": "step",
            "decay_epochs": 2.4,
            "decay_rate": 0.97,
            "min_lr": 0.0,
            "warmup_lr": 0.0,
            "epochs": 350,
            "weight_decay": 1e-5,
            "rand_augment": "v0",
            "random_erasing": 0.0,
            "repeats": 1,
            "mixup": 0.0,
            "cutmix": 0.0,
            "drop_path": 0.2,
            "ema_decay": 0.9999,
        },
        "arXiv 1905.11946, section 5.2; batch, epochs, warm-up, smoothing and averaging: tensorflow/tpu, "
        "models/official/efficientnet",
        (
            "the classifier's dropout grows from 0.2 (b0) to 0.5 (b7); here it is 0",
            "RMSprop's epsilon is 1e-3; here timm's 1e-10",
        ),
        by_model={
            f"efficientnet_b{number}": {"img_size": size, "crop_pct": round(size / (size + 32), 3)}
            for number, size in enumerate(_EFFICIENTNET_SIZES)
        },
    ),
    "mobilenetv3": Preset(
        {
            "model": "mobilenetv3_large_100",
            "optimizer": "rmsproptf",
            "batch_size": 4096,
            "lr": 0.0125,
            "schedule": "step",
            "decay_epochs": 3.0,
            "decay_rate": 0.99,
            "min_lr": 0.0,
            "warmup_lr": 0.0,
            "epochs": 350,
            "weight_decay": 1e-5,
            "crop_scale": 0.05,
            "rand_augment": "none",
            "random_erasing": 0.0,
            "repeats": 1,
            "mixup": 0.0,
            "cutmix": 0.0,
            "label_smoothing": 0.1,
            "drop_path": 0.0,
            "ema_decay": 0.9999,
        },
        "arXiv 1905.02244, section on training; epochs, warm-up and label smoothing are INFERRED "
        "(EfficientNet's), none being published",
        (
            "the classifier's dropout keeps 0.8; here it is 0",
            "colours are distorted as Inception's; here not",
            "RMSprop's epsilon is TensorFlow's; here timm's 1e-10",
        ),
    ),
    "hiri_vit": Preset(
        {
            "model": "hiri_vit_small",
            "crop_pct": 1.0,
            "repeats": 1,
            "ema_decay": 0.9999,
            "ema_warmup": True,
            "ema_warmup_form": "ratio",
            "ema_distillation": 0.5,
        },
        "arXiv 2403.11999, section 5.1, for 448 pixels, and for 224 with the four-stage models",
        (
            "strengths of augmentation, label smoothing, stochastic depth, averaging, the weight of EMA "
            "distillation, clipping, the first and the last rate are INFERRED (those of the authors' "
            "Wave-ViT and Dual-ViT where these have them); for the lifted backbones all is",
        ),
        by_model={
            "hiri_vit_small_224": {"crop_pct": 0.875},
            "hiri_vit_base": {"drop_path": 0.15},
            "hiri_vit_base_224": {"drop_path": 0.15, "crop_pct": 0.875},
            "hiri_vit_large": {"drop_path": 0.3, "clip_grad": 1.0},
            "hiri_vit_large_224": {"drop_path": 0.3, "clip_grad": 1.0, "crop_pct": 0.875},
            # No stochastic depth; and a norm behind the pooling, which the distillation cannot look behind.
            **{f"hrnet_w{width}_lift_a": {"drop_path": 0.0} for width in (18, 32, 48)},
            **{
                f"davit_{size}_lift_{lift}": {"ema_distillation": 0.0}
                for size in ("tiny", "small", "base")
                for lift in ("a", "b")
            },
        },
    ),
    "hiri_vit_768": Preset(
        {
            "model": "hiri_vit_large",
            "img_size": 768,
            "crop_pct": 1.0,
            "epochs": 30,
            "batch_size": 512,
            "lr": 1e-5,
            "min_lr": 0.0,
            "warmup_epochs": 0.0,
            "weight_decay": 1e-8,
            "repeats": 1,
            "ema_decay": 0.9999,
            "ema_warmup": True,
            "ema_warmup_form": "ratio",
        },
        "arXiv 2403.11999, section 5.1: fine-tuning at 768 pixels; give weights of 448 with --finetune",
        (
            "the text gives optimizer, rate, weight decay, epochs and the cosine; batch, augmentation (that "
            "of hiri_vit), the last rate, no warm-up, averaging and no distillation are INFERRED",
        ),
        by_model={
            "hiri_vit_base": {"drop_path": 0.15},
            "hiri_vit_large": {"drop_path": 0.3, "clip_grad": 1.0},
        },
    ),
}


def data_preset(data: str) -> str:
    """The preset that belongs to what `--data` names: that of built-in data, else imagenet."""
    preset = PRESETS.get(data)
    return data if preset and preset.settings.get("data") == data else "imagenet"
