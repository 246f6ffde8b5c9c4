"""ResNets whose residual branches end in a gate: CBAM, ECA-Net, GCNet, CAT and SEM.

Each system has a class, since each has a public layout and an initialisation of its own. The gates are in
:mod:`fused_ops.blocks.gates`; the ResNet around them is the usual one with the stride on the 3x3
convolutions, as all the public code has it. Publications that put it on the first 1x1 convolution count 0.23
GMAC less for a ResNet-50 or ResNet-101 and the same parameters.

CAT has no public code: see :class:`~fused_ops.blocks.gates.CollaborativeAttention` for what is reconstructed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from fused_ops.blocks.gates import (
    CBAM,
    ECA,
    CollaborativeAttention,
    GlobalContext,
    SwitchableExcitation,
)
from fused_ops.models.arguments import check_lengths
from fused_ops.models.common import build_backbone, classification_cfg
from fused_ops.models.layouts import OfficialLayout, same_names, same_names_layout
from fused_ops.models.registry import ModelInfo, System, register_system
from fused_ops.models.resnet import ResNetBackbone

__all__ = ["CATResNet", "CBAMResNet", "ECAResNet", "GCResNet", "SEMResNet"]

_DEPTHS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


class CBAMResNet(ResNetBackbone):
    """ResNet with CBAM at the end of every residual branch (Woo et al., ECCV 2018, section 3).

    The public code starts every convolution outside the shortcuts and the classifier from a normal
    distribution by fan-out; the shortcuts' convolutions and the MLPs keep PyTorch's own initialisation.

    Args:
        reduction: see :class:`~fused_ops.blocks.gates.CBAM`.
        **kwargs: see :class:`~fused_ops.models.resnet.ResNetBackbone`.
    """

    gate_name = "cbam"

    def __init__(self, depths: Sequence[int] = (3, 4, 6, 3), reduction: int = 16, **kwargs: Any) -> None:
        gate = partial(CBAM, reduction=reduction)
        super().__init__(depths=depths, block_arguments=[{"gate": gate}] * len(depths), **kwargs)

    def _init_weights(self) -> None:
        super()._init_weights()
        for name, module in self.named_modules():
            if name.endswith("downsample.0"):
                module.reset_parameters()

    def _init_classifier(self, head: nn.Module) -> None:
        if isinstance(head, nn.Linear):
            nn.init.kaiming_normal_(head.weight)
            nn.init.zeros_(head.bias)


class ECAResNet(ResNetBackbone):
    """ResNet with ECA at the end of every residual branch (Wang et al., CVPR 2020, section 3).

    Args:
        kernel_sizes: of the gates, per stage. The released checkpoints do not follow the paper's formula,
            which None stands for.
        **kwargs: see :class:`~fused_ops.models.resnet.ResNetBackbone`.
    """

    gate_name = "eca"

    def __init__(
        self,
        depths: Sequence[int] = (3, 4, 6, 3),
        kernel_sizes: Sequence[int | None] = (None, None, None, None),
        **kwargs: Any,
    ) -> None:
        check_lengths(len(depths), "stage", kernel_sizes=kernel_sizes)
        gates = [{"gate": partial(ECA, kernel_size=size)} for size in kernel_sizes]
        super().__init__(depths=depths, block_arguments=gates, **kwargs)


class GCResNet(ResNetBackbone):
    """ResNet with global context blocks (Cao et al., ICCV workshop 2019, section 3.3).

    The public code is for detection and has no classifier. That the published classification accuracies
    belong to blocks in the last three stages, as in the detectors, is inferred.

    Args:
        ratio, pooling, fusions: see :class:`~fused_ops.blocks.gates.GlobalContext`.
        stages_with_gate: per stage.
        **kwargs: see :class:`~fused_ops.models.resnet.ResNetBackbone`.
    """

    gate_name = "context_block"

    def __init__(
        self,
        depths: Sequence[int] = (3, 4, 6, 3),
        ratio: float = 1 / 16,
        pooling: str = "att",
        fusions: Sequence[str] = ("add",),
        stages_with_gate: Sequence[bool] = (False, True, True, True),
        **kwargs: Any,
    ) -> None:
        check_lengths(len(depths), "stage", stages_with_gate=stages_with_gate)
        gate = partial(GlobalContext, ratio=ratio, pooling=pooling, fusions=fusions)
        gates = [{"gate": gate if wanted else None} for wanted in stages_with_gate]
        super().__init__(depths=depths, block_arguments=gates, **kwargs)


class CATResNet(ResNetBackbone):
    """ResNet with a RECONSTRUCTION of CAT at the end of every residual branch, where CBAM has its module.

    No code and no layer table were published. Initialisation as in ECA-Net's ResNet (inferred).

    Args:
        reduction, normalise: see :class:`~fused_ops.blocks.gates.CollaborativeAttention`.
        **kwargs: see :class:`~fused_ops.models.resnet.ResNetBackbone`.
    """

    gate_name = "cat"

    def __init__(
        self,
        depths: Sequence[int] = (3, 4, 6, 3),
        reduction: int = 16,
        normalise: bool = True,
        **kwargs: Any,
    ) -> None:
        gate = partial(CollaborativeAttention, reduction=reduction, normalise=normalise)
        super().__init__(depths=depths, block_arguments=[{"gate": gate}] * len(depths), **kwargs)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The scalars that weigh poolings and branches (inferred)."""
        factors = (".interior_c", ".interior_s", ".exterior")
        return {name for name, _ in self.named_parameters() if name.endswith(factors)}


class SEMResNet(ResNetBackbone):
    """ResNet with switchable excitation at the end of every residual branch (Zhong et al., 2022).

    The public code has CIFAR models only; on ImageNet's ResNets it is this project's. The width of the gates'
    MLPs is a quarter of ``planes``, a sixteenth of the channels.

    Args:
        bottleneck: must be True; the public code's other blocks have no gate.
        **kwargs: see :class:`~fused_ops.models.resnet.ResNetBackbone`.

    Raises:
        ValueError: for other blocks, and as the base class does.
    """

    gate_name = "sem"

    def __init__(self, depths: Sequence[int] = (3, 4, 6, 3), bottleneck: bool = True, **kwargs: Any) -> None:
        if not bottleneck:
            raise ValueError("bottleneck must be True, since only such blocks have gates")
        gates = [{"gate": SwitchableExcitation}] * len(depths)
        super().__init__(depths=depths, block_arguments=gates, **kwargs)


def _gc_to_ours(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Detector checkpoints hold the backbone under a prefix, beside necks and heads that are not ours."""
    prefix = "backbone."
    if not any(isinstance(name, str) and name.startswith(prefix) for name in state):
        return dict(state)
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


# The public code has the gate's layers among the block's own.
_SEM_LAYERS = re.compile(r"^(layer\d+\.\d+)\.((?:switch_fc|fc1|fc2|conv)\.\w+|w1|b1)$")
_SEM_GATE = re.compile(r"^(layer\d+\.\d+)\.sem\.")


def _sem_to_ours(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return {_SEM_LAYERS.sub(r"\1.sem.\2", name): value for name, value in state.items()}


def _sem_to_official(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return {_SEM_GATE.sub(r"\1.", name): value for name, value in state.items()}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return classification_cfg(first_conv="conv1", classifier="fc", license="apache-2.0", **kwargs)


_ECA_KERNELS = {18: (3, 5, 7, 7), 34: (3, 3, 5, 7), 50: (3, 5, 5, 7), 101: (3, 3, 5, 7), 152: (3, 3, 5, 7)}
_CIFAR = {
    "input_size": (3, 32, 32),
    "pool_size": (8, 8),
    "num_classes": 10,
    "crop_pct": 1.0,
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2023, 0.1994, 0.2010),
}

_NAMES = {
    "cbam": (18, 34, 50, 101),
    "eca": (18, 34, 50, 101, 152),
    "cat": (50, 101),
    "sem": (50, 101),
}
default_cfgs = generate_default_cfgs(
    {f"{gate}_resnet_{depth}.untrained": _cfg() for gate, depths in _NAMES.items() for depth in depths}
    | {f"gcnet_resnet_{depth}_{ratio}.untrained": _cfg() for depth in (50, 101) for ratio in ("r16", "r4")}
    | {"sem_resnet_164_cifar.untrained": _cfg(**_CIFAR)}
)


def _create(
    model_class: type[ResNetBackbone],
    name: str,
    depth: int,
    pretrained: bool,
    kwargs: dict[str, Any],
    **gate: Any,
) -> Any:
    defaults = {"depths": _DEPTHS[depth], **({} if depth >= 50 else {"bottleneck": False}), **gate}
    return build_backbone(model_class, name, pretrained, defaults, kwargs)


@register_model
def cbam_resnet_18(pretrained: bool = False, **kwargs: Any) -> CBAMResNet:
    """ResNet-18 with CBAM as in Jongchan/attention-module."""
    return _create(CBAMResNet, "cbam_resnet_18", 18, pretrained, kwargs)


@register_model
def cbam_resnet_34(pretrained: bool = False, **kwargs: Any) -> CBAMResNet:
    """ResNet-34 with CBAM as in Jongchan/attention-module."""
    return _create(CBAMResNet, "cbam_resnet_34", 34, pretrained, kwargs)


@register_model
def cbam_resnet_50(pretrained: bool = False, **kwargs: Any) -> CBAMResNet:
    """ResNet-50 with CBAM as in Jongchan/attention-module."""
    return _create(CBAMResNet, "cbam_resnet_50", 50, pretrained, kwargs)


@register_model
def cbam_resnet_101(pretrained: bool = False, **kwargs: Any) -> CBAMResNet:
    """ResNet-101 with CBAM as in Jongchan/attention-module."""
    return _create(CBAMResNet, "cbam_resnet_101", 101, pretrained, kwargs)


@register_model
def eca_resnet_18(pretrained: bool = False, **kwargs: Any) -> ECAResNet:
    """ECA-Net18 as in BangguWu/ECANet, kernels of the released checkpoint."""
    return _create(ECAResNet, "eca_resnet_18", 18, pretrained, kwargs, kernel_sizes=_ECA_KERNELS[18])


@register_model
def eca_resnet_34(pretrained: bool = False, **kwargs: Any) -> ECAResNet:
    """ECA-Net34 as in BangguWu/ECANet, kernels of the released checkpoint."""
    return _create(ECAResNet, "eca_resnet_34", 34, pretrained, kwargs, kernel_sizes=_ECA_KERNELS[34])


@register_model
def eca_resnet_50(pretrained: bool = False, **kwargs: Any) -> ECAResNet:
    """ECA-Net50 as in BangguWu/ECANet, kernels of the released checkpoint."""
    return _create(ECAResNet, "eca_resnet_50", 50, pretrained, kwargs, kernel_sizes=_ECA_KERNELS[50])


@register_model
def eca_resnet_101(pretrained: bool = False, **kwargs: Any) -> ECAResNet:
    """ECA-Net101 as in BangguWu/ECANet, kernels of the released checkpoint."""
    return _create(ECAResNet, "eca_resnet_101", 101, pretrained, kwargs, kernel_sizes=_ECA_KERNELS[101])


@register_model
def eca_resnet_152(pretrained: bool = False, **kwargs: Any) -> ECAResNet:
    """ECA-Net152 as in BangguWu/ECANet, kernels of the released checkpoint."""
    return _create(ECAResNet, "eca_resnet_152", 152, pretrained, kwargs, kernel_sizes=_ECA_KERNELS[152])


@register_model
def gcnet_resnet_50_r16(pretrained: bool = False, **kwargs: Any) -> GCResNet:
    """ResNet-50 with global context blocks of ratio 1/16 in its last three stages."""
    return _create(GCResNet, "gcnet_resnet_50_r16", 50, pretrained, kwargs, ratio=1 / 16)


@register_model
def gcnet_resnet_50_r4(pretrained: bool = False, **kwargs: Any) -> GCResNet:
    """ResNet-50 with global context blocks of ratio 1/4 in its last three stages."""
    return _create(GCResNet, "gcnet_resnet_50_r4", 50, pretrained, kwargs, ratio=1 / 4)


@register_model
def gcnet_resnet_101_r16(pretrained: bool = False, **kwargs: Any) -> GCResNet:
    """ResNet-101 with global context blocks of ratio 1/16 in its last three stages."""
    return _create(GCResNet, "gcnet_resnet_101_r16", 101, pretrained, kwargs, ratio=1 / 16)


@register_model
def gcnet_resnet_101_r4(pretrained: bool = False, **kwargs: Any) -> GCResNet:
    """ResNet-101 with global context blocks of ratio 1/4 in its last three stages."""
    return _create(GCResNet, "gcnet_resnet_101_r4", 101, pretrained, kwargs, ratio=1 / 4)


@register_model
def cat_resnet_50(pretrained: bool = False, **kwargs: Any) -> CATResNet:
    """ResNet-50 with a reconstruction of CAT; no public code, not the published module."""
    return _create(CATResNet, "cat_resnet_50", 50, pretrained, kwargs)


@register_model
def cat_resnet_101(pretrained: bool = False, **kwargs: Any) -> CATResNet:
    """ResNet-101 with a reconstruction of CAT; no public code, not the published module."""
    return _create(CATResNet, "cat_resnet_101", 101, pretrained, kwargs)


@register_model
def sem_resnet_50(pretrained: bool = False, **kwargs: Any) -> SEMResNet:
    """ResNet-50 with SEM; this project's, the public code has CIFAR models only."""
    return _create(SEMResNet, "sem_resnet_50", 50, pretrained, kwargs)


@register_model
def sem_resnet_101(pretrained: bool = False, **kwargs: Any) -> SEMResNet:
    """ResNet-101 with SEM; this project's, the public code has CIFAR models only."""
    return _create(SEMResNet, "sem_resnet_101", 101, pretrained, kwargs)


@register_model
def sem_resnet_164_cifar(pretrained: bool = False, **kwargs: Any) -> SEMResNet:
    """ResNet-164 with SEM for 32x32 images as in Qrange-group/SEM."""
    defaults = {"depths": (18, 18, 18), "planes": (16, 32, 64), "stem": "cifar", "num_classes": 10}
    return build_backbone(SEMResNet, "sem_resnet_164_cifar", pretrained, defaults, kwargs)


_MEBI, _GIBI = 2**20, 2**30
_CBAM_TABLE = "arXiv 1807.06521, ImageNet table"
_CBAM_NOTE = "published FLOPs have the stride on the first 1x1 convolution, the public code on the 3x3 one"
_CBAM_SECOND_HAND = "published accuracy not verified against the paper, so not given"
_ECA_NOTE = (
    "published in 2**20 parameters and 2**30 FLOPs, which also count BatchNorm and ReLU; kernel sizes of the "
    "released checkpoint"
)
_GC_NOTE = "published for detection only"
_CAT_NOTE = "inferred: no public code; a reconstruction from the abstract and secondary sources"
_SEM_NOTE = (
    "not published: the paper's module in this project's ResNet; the public code has CIFAR models only"
)


def _eca(params: int, macs: int, mebi: float, gibi: float, top1: float) -> ModelInfo:
    return ModelInfo(
        params=params,
        macs=macs,
        published_params=mebi * _MEBI,
        published_macs=gibi * _GIBI,
        published_top1=top1,
        source="BangguWu/ECANet, README",
        note=_ECA_NOTE,
    )


def _cbam(
    params: int, macs: int, millions: float, billions: float, top1: float | None, note: str
) -> ModelInfo:
    source = (
        _CBAM_TABLE if top1 is None else f"{_CBAM_TABLE}; accuracy as quoted by QingbeiGuo/SDA-xNet, README"
    )
    return ModelInfo(params, macs, (3, 224, 224), millions * 1e6, billions * 1e9, top1, source, note)


register_system(
    System(
        name="CBAM",
        paper="Woo et al., CBAM: Convolutional Block Attention Module, ECCV 2018, arXiv 1807.06521",
        model_class=CBAMResNet,
        preset="resnet_gates",
        fused=("pool_channels", "pool_positions", "gate_scale"),
        card=(
            "The paper's: both gates, and CBAM at the end of every residual branch. The released code's: "
            "stride on the 3x3 convolutions (published multiply-accumulates have it on the first 1x1), "
            "momentum 0.01 of the spatial gate's BatchNorm and its weight's start at 0, and the "
            "initialisation. Accuracies of ResNet-50 and -101 are quoted from another public code. "
            "Nothing is inferred."
        ),
        models={
            "cbam_resnet_18": _cbam(11_779_392, 1_815_063_764, 11.78, 1.815, None, _CBAM_SECOND_HAND),
            "cbam_resnet_34": _cbam(21_960_468, 3_665_434_742, 21.96, 3.665, None, _CBAM_SECOND_HAND),
            "cbam_resnet_50": _cbam(28_089_624, 4_095_573_110, 28.09, 3.864, 77.34, _CBAM_NOTE),
            "cbam_resnet_101": _cbam(49_330_172, 7_812_577_278, 49.33, 7.581, 78.49, _CBAM_NOTE),
        },
        layouts=(same_names_layout("Jongchan/attention-module"),),
    )
)
register_system(
    System(
        name="ECA-Net",
        paper="Wang et al., ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks, "
        "CVPR 2020, arXiv 1910.03151",
        model_class=ECAResNet,
        preset="resnet_gates",
        fused=("pool_channels", "gate_scale"),
        card=(
            "The paper's: the gate, and a formula for its kernel size. The released code's: kernel sizes "
            "of the checkpoints do not follow that formula; the registered models have the checkpoints'. "
            "Nothing is inferred."
        ),
        models={
            "eca_resnet_18": _eca(11_689_556, 1_814_085_760, 11.15, 1.70, 70.92),
            "eca_resnet_34": _eca(21_797_744, 3_663_781_952, 20.79, 3.43, 74.21),
            "eca_resnet_50": _eca(25_557_112, 4_089_270_528, 24.37, 3.86, 77.42),
            "eca_resnet_101": _eca(44_549_317, 7_801_574_656, 42.49, 7.35, 78.65),
            "eca_resnet_152": _eca(60_193_042, 11_513_868_544, 57.41, 10.83, 78.92),
        },
        layouts=(same_names_layout("BangguWu/ECANet"),),
    )
)
register_system(
    System(
        name="GCNet",
        paper="Cao et al., GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond, "
        "ICCV workshop 2019, arXiv 1904.11492",
        model_class=GCResNet,
        preset="resnet_gates",
        fused=("context_pool", "gate_scale"),
        card=(
            "The paper's: the block and its ratios. The released code's: details and initialisation of "
            "the block; the code is for detection and has no classifier. Inferred: blocks in the last "
            "three stages of a classifier, and its recipe."
        ),
        models={
            "gcnet_resnet_50_r16": ModelInfo(
                params=28_078_773,
                macs=4_097_896_448,
                published_params=28.11e6,
                published_macs=4.13e9,
                published_top1=77.70,
                source="QingbeiGuo/SDA-xNet, README",
                note="the public code is for detection; the accuracy (top-5 93.66) is as quoted by another "
                "paper's code, where size and FLOPs fit gates in all four stages (28,105,032) better than in "
                "the last three; where the classifier had them is not published",
            ),
            "gcnet_resnet_50_r4": ModelInfo(35_557_941, 4_105_367_552, note=_GC_NOTE),
            "gcnet_resnet_101_r16": ModelInfo(49_337_222, 7_819_169_792, note=_GC_NOTE),
            "gcnet_resnet_101_r4": ModelInfo(63_510_854, 7_833_325_568, note=_GC_NOTE),
        },
        layouts=(OfficialLayout("pytorch", "xvjiarui/GCNet", _gc_to_ours, same_names),),
    )
)
register_system(
    System(
        name="CAT",
        paper="Wu et al., CAT: Learning to Collaborate Channel and Spatial Attention from Multi-Information "
        "Fusion, IET Computer Vision 2023, arXiv 2212.06335",
        model_class=CATResNet,
        preset="resnet_gates",
        fused=("pool_map", "gate_scale"),
        card=(
            "A RECONSTRUCTION. The paper's abstract: a channel and a spatial branch, three poolings in "
            "each, scalars that weigh poolings and branches. Released code: none. Inferred: every "
            "formula, see fused_ops.blocks.gates.CollaborativeAttention, the place in ResNet, and the "
            "recipe. No published number belongs to these models."
        ),
        models={
            "cat_resnet_50": ModelInfo(28_072_888, 4_097_495_484, note=_CAT_NOTE),
            "cat_resnet_101": ModelInfo(49_294_209, 7_816_626_828, note=_CAT_NOTE),
        },
    )
)
register_system(
    System(
        name="SEM",
        paper="Zhong et al., Switchable Self-attention Module, 2022, arXiv 2209.05680",
        model_class=SEMResNet,
        preset="resnet_gates",
        fused=("pool_channels", "gate_scale"),
        card=(
            "The paper's: three excitations whose logits are switched. The released code's: all of the "
            "gate, and ResNet-164 for CIFAR (sem_resnet_164_cifar). Inferred: sem_resnet_50 and "
            "sem_resnet_101, the module in ImageNet's ResNets, and their recipe."
        ),
        models={
            "sem_resnet_50": ModelInfo(28_163_678, 4_091_832_320, note=_SEM_NOTE),
            "sem_resnet_101": ModelInfo(49_489_702, 7_806_420_992, note=_SEM_NOTE),
            "sem_resnet_164_cifar": ModelInfo(
                1_946_974,
                247_902_464,
                input_size=(3, 32, 32),
                note="10 classes; published for CIFAR-10: accuracy 94.95 (Qrange-group/SEM, README), no size",
                preset="sem_cifar",
            ),
        },
        layouts=(OfficialLayout("pytorch", "Qrange-group/SEM", _sem_to_ours, _sem_to_official),),
    )
)
