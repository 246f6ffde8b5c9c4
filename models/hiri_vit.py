"""HIRI-ViT: vision transformers for high resolution inputs.

Yao et al., "HIRI-ViT: Scaling Vision Transformer with High Resolution Inputs", IEEE TPAMI 2024 (arXiv
2403.11999). There is no public code, and the table with widths, depths, heads and expansions could not be
read.

From the text of the paper: five stages behind a stem of two branches, HR-blocks in the first two stages, CFFN
blocks in the third, Transformer blocks in the last two, inverted residual down-sampling between them, where
BatchNorm and where LayerNorm stand, and the ablation that leads to this form.

INFERRED, and arguments of :class:`HIRIViT` for that reason: every width, depth, expansion and number of
heads (chosen so that the multiply-accumulates that the text prints come out: 4.7 and 21.5 G, 5.1 and 5.0 G,
8.2 and 9.3 G), the activation, all epsilons and biases, width of the down-sampling and form of its
shortcut, the identity around the HR-block, the classifier, the initialisation, the drop path rates. Counted
numbers of these models are therefore not published ones.

Images of 224 pixels are for the four-stage models, ``..._224``: the last step of the ablation before the
resolution grows. A five-stage model at 224 pixels is another network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from fused_ops import DepthwiseConvBNAct, HRBlock, depthwise_conv
from fused_ops.attention import SpatialReductionAttention
from fused_ops.blocks.layout import PointwiseConv2d, map_to_tokens, to_channels_last, tokens_to_map
from fused_ops.core.activations import FUNCTIONS
from fused_ops.core.checks import check_activation, check_choice
from fused_ops.core.drop_path import DropPath
from fused_ops.core.initialise import init_linear
from fused_ops.feed_forward.module import conv_mlp_on_modules, mlp_on_modules
from fused_ops.models.arguments import check_lengths
from fused_ops.models.common import (
    ChannelLayerNorm,
    StagedBackbone,
    build_backbone,
    check_heads,
    classification_cfg,
    drop_path_rates,
    init_conv_fan_out,
)
from fused_ops.models.registry import ModelInfo, System, register_system

__all__ = ["CFFN", "FFN", "HIRIViT", "HRBlock", "HRStem", "TransformerBlock"]

STEMS = ("hr", "conv", "vit")
BLOCKS = ("hr", "feed_forward", "transformer")
FEED_FORWARDS = ("cffn", "ffn")
DOWNS = ("irds_a", "irds_b", "conv")
SHORTCUTS = ("avg_pool", "strided")
NORMS = ("batch", "layer")


@dataclass(frozen=True)
class Details:
    """The inferred choices that every part of the network needs, as in :class:`HIRIViT`.

    ``factory`` has tensors' device and dtype.
    """

    activation: str = "gelu"
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1
    ln_eps: float = 1e-6
    stem_depth: int = 2
    stem_low_dim: int | None = None
    stem_bias: bool = False
    hr_bias: bool = True
    hr_shortcut: bool = True
    fc_bias: bool = True
    qkv_bias: bool = True
    proj_bias: bool = True
    patch_bias: bool = True
    down_bias: bool = False
    down_shortcut: str = "avg_pool"
    factory: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_activation(self.activation)
        check_choice("down_shortcut", self.down_shortcut, SHORTCUTS)

    def norm(self, kind: str, dim: int) -> nn.Module:
        """A norm of maps (B, dim, H, W)."""
        if kind == "layer":
            return ChannelLayerNorm(dim, eps=self.ln_eps, **self.factory)
        return nn.BatchNorm2d(dim, eps=self.bn_eps, momentum=self.bn_momentum, **self.factory)

    def depthwise(self, dim: int, stride: int, bias: bool) -> nn.Conv2d:
        """The parameters of a 3x3 depthwise convolution."""
        return nn.Conv2d(dim, dim, 3, stride=stride, padding=1, groups=dim, bias=bias, **self.factory)


class ConvBNAct(nn.Module):
    """act(BN(conv(x))) of maps (B, C, H, W), with the submodules ``conv`` and ``bn``."""

    def __init__(self, conv: nn.Conv2d, details: Details) -> None:
        super().__init__()
        self.conv = conv
        self.bn = details.norm("batch", conv.out_channels)
        self.activation = details.activation

    def forward(self, x: Tensor) -> Tensor:
        return FUNCTIONS[self.activation](self.bn(self.conv(x)))


class HRStem(nn.Module):
    """Image (B, in_chans, H, W) to (B, dim, H/4, W/4) by a light high and a thorough low resolution branch.

    Both start from a strided convolution. high: 3x3 depthwise, strided 3x3. low: strided 3x3, 3x3, 1x1.
    Their sum is normalised (paper, section 4.1 and Fig. 3c). Inferred: a norm and an activation follow the
    first convolution, the depthwise one, and the first two of the low branch; the width ``hidden_dim``, and
    that of the low branch, ``dim``; no biases.
    """

    def __init__(self, in_chans: int, hidden_dim: int, dim: int, norm: str, details: Details) -> None:
        super().__init__()

        def conv3x3(channels: int, out: int, stride: int) -> nn.Conv2d:
            bias = details.stem_bias
            return nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=bias, **details.factory)

        self.conv = ConvBNAct(conv3x3(in_chans, hidden_dim, 2), details)
        self.hr_dw = DepthwiseConvBNAct(
            hidden_dim,
            bias=details.stem_bias,
            activation=details.activation,
            eps=details.bn_eps,
            momentum=details.bn_momentum,
            **details.factory,
        )
        self.hr_down = conv3x3(hidden_dim, dim, 2)
        low_dim = details.stem_low_dim or dim
        self.lr_down = ConvBNAct(conv3x3(hidden_dim, low_dim, 2), details)
        self.lr_conv = ConvBNAct(conv3x3(low_dim, low_dim, 1), details)
        self.lr_pw = PointwiseConv2d(low_dim, dim, bias=details.stem_bias, **details.factory)
        self.norm = details.norm(norm, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        high = self.hr_down(self.hr_dw(x))
        low = self.lr_pw(self.lr_conv(self.lr_down(x)))
        return self.norm(high + low)


class ConvStem(nn.Sequential):
    """Image to (B, dim, H/4, W/4): strided 3x3, two 3x3 (each with norm and activation), strided 3x3, norm.

    Stacked 3x3 convolutions are the paper's (section 5.4); their number (``stem_depth`` between the strided
    ones) and norms are inferred from the stem of the authors' Wave-ViT, their width is ``hidden_dim``.
    """

    def __init__(self, in_chans: int, hidden_dim: int, dim: int, norm: str, details: Details) -> None:
        def conv3x3(channels: int, out: int, stride: int) -> nn.Conv2d:
            bias = details.stem_bias
            return nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=bias, **details.factory)

        super().__init__(
            ConvBNAct(conv3x3(in_chans, hidden_dim, 2), details),
            *(ConvBNAct(conv3x3(hidden_dim, hidden_dim, 1), details) for _ in range(details.stem_depth)),
            nn.Conv2d(hidden_dim, dim, 3, stride=2, padding=1, bias=details.patch_bias, **details.factory),
            details.norm(norm, dim),
        )


class ViTStem(nn.Sequential):
    """Image to (B, dim, H/4, W/4): one 7x7 convolution with stride 4 (paper, section 5.4) and a norm.

    ``hidden_dim`` is not used; it makes the three stems interchangeable.
    """

    def __init__(self, in_chans: int, hidden_dim: int, dim: int, norm: str, details: Details) -> None:
        bias = details.patch_bias
        super().__init__(
            nn.Conv2d(in_chans, dim, 7, stride=4, padding=3, bias=bias, **details.factory),
            details.norm(norm, dim),
        )


class CFFN(nn.Module):
    """z = act(FC1(norm(x))); y = x + DropPath(FC2(DW3x3(z) + z)), on maps (B, dim, H, W) (section 3).

    The activation is before the depthwise convolution, which has an identity of its own. ``norm`` is
    BatchNorm in the published models (section 4.4). The biases are inferred.
    """

    def __init__(self, dim: int, expansion: float, drop_path: float, norm: str, details: Details) -> None:
        super().__init__()
        hidden_dim = int(dim * expansion)
        self.norm = details.norm(norm, dim)
        self.fc1 = nn.Linear(dim, hidden_dim, bias=details.fc_bias, **details.factory)
        self.dw = details.depthwise(hidden_dim, 1, details.fc_bias)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=details.fc_bias, **details.factory)
        self.drop_path = DropPath(drop_path)
        self.activation = details.activation

    def forward(self, x: Tensor) -> Tensor:
        return conv_mlp_on_modules(
            x,
            self.norm,
            self.fc1,
            self.dw,
            self.fc2,
            activation=self.activation,
            conv_activation="none",
            conv_identity=True,
            drop_path=self.drop_path.factors(x),
            residual=x,
        )


class FFN(nn.Module):
    """y = x + DropPath(FC2(act(FC1(norm(x))))) on maps (B, dim, H, W): the first row of the ablation."""

    def __init__(self, dim: int, expansion: float, drop_path: float, norm: str, details: Details) -> None:
        super().__init__()
        hidden_dim = int(dim * expansion)
        self.norm = details.norm(norm, dim)
        self.fc1 = nn.Linear(dim, hidden_dim, bias=details.fc_bias, **details.factory)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=details.fc_bias, **details.factory)
        self.drop_path = DropPath(drop_path)
        self.activation = details.activation

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.permute(0, 2, 3, 1)
        factors = self.drop_path.factors(x)
        out = mlp_on_modules(
            tokens,
            self.norm,
            self.fc1,
            self.fc2,
            activation=self.activation,
            drop_path=factors,
            residual=tokens,
        )
        return out.permute(0, 3, 1, 2)


class TransformerBlock(nn.Module):
    """x = x + DropPath(attention(LN(x))), then a feed-forward block, on maps (B, dim, H, W) (section 3).

    No spatial reduction in the published models (section 5.4); ``reduction_ratio`` is for the first two
    rows of the ablation. Inferred: biases, and the head width of 32 channels.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        reduction_ratio: int,
        drop_path: float,
        ffn: nn.Module,
        details: Details,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=details.ln_eps, **details.factory)
        self.attn = SpatialReductionAttention(
            dim, num_heads, reduction_ratio, qkv_bias=details.qkv_bias, **details.factory
        )
        if not details.proj_bias:
            self.attn.proj.register_parameter("bias", None)
        self.drop_path = DropPath(drop_path)
        self.ffn = ffn

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[-2], x.shape[-1])
        tokens = self.attn(self.norm1(map_to_tokens(x)), size)
        return self.ffn(x + self.drop_path(tokens_to_map(tokens, size)))


class IRDS(nn.Module):
    """Inverted residual down-sampling by 2 with a shortcut (section 4.3 and Fig. 5).

    ``irds_a``: strided 3x3 convolution to more channels, 1x1 convolution. ``irds_b``: 1x1 convolution to
    more channels, norm, activation, strided 3x3 depthwise convolution, 1x1 convolution. Inferred: ``ratio``
    times as many channels in between, the norm and activation after the first convolution of ``irds_a``, no
    biases, no norm at the end, and the shortcut: the mean over 2x2 positions (those that exist), then a 1x1
    convolution (``strided``: the 1x1 convolution at every second position).

    The last two 1x1 convolutions, whose results are added, are one matrix product over the joined channels of
    both inputs. It is not computed so, since joining them moves what it saves. Per position of the result,
    with C = ``in_dim``, ``ratio`` 4 and O = ``dim``, in values: two products and the addition move 5 C + 5 O
    forward and 10 C + 4 O backward, joining and one product 15 C + O and 10 C + 2 O, and the pooling's
    backward copies its part of the joined gradient first, 2 C. That is 2 C more in inference and the same in
    training where O = 2 C. The four of HIRI-ViT-S (448 pixels, 128 images, bfloat16; counted by
    ``fused_ops.bench.limits.count_step``, with that copy): +85 MB of 19.4 GB in inference, -19 MB of 65.2 GB
    in training. Adding one product into the result of the other moves 202 MB less in inference (1%), and
    607 MB more in training.
    """

    def __init__(self, in_dim: int, dim: int, kind: str, ratio: float, details: Details) -> None:
        super().__init__()
        hidden_dim = int(in_dim * ratio)
        bias, factory = details.down_bias, details.factory
        if kind == "irds_a":
            down = nn.Conv2d(in_dim, hidden_dim, 3, stride=2, padding=1, bias=bias, **factory)
            self.exp = ConvBNAct(down, details)
        else:
            self.exp = ConvBNAct(PointwiseConv2d(in_dim, hidden_dim, bias=bias, **factory), details)
            self.dw = details.depthwise(hidden_dim, 2, bias)
        self.pw = PointwiseConv2d(hidden_dim, dim, bias=bias, **factory)
        self.shortcut = PointwiseConv2d(in_dim, dim, bias=bias, **factory)
        self.pool = details.down_shortcut == "avg_pool"

    def forward(self, x: Tensor) -> Tensor:
        main = self.exp(x)
        if hasattr(self, "dw"):
            main = depthwise_conv(main, self.dw.weight, self.dw.bias, stride=2, padding=1)
        if self.pool:
            short = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
        else:
            short = x[:, :, ::2, ::2]
        return self.pw(main) + self.shortcut(short)


class ConvDown(nn.Sequential):
    """Down-sampling by 2 with one strided 3x3 convolution (section 4.3) and a norm (inferred)."""

    def __init__(self, in_dim: int, dim: int, norm: str, details: Details) -> None:
        super().__init__(
            nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, bias=details.patch_bias, **details.factory),
            details.norm(norm, dim),
        )


def build_hr_block(
    dim: int, expansion: float, drop_path: float, details: Details, block: type[HRBlock] = HRBlock
) -> HRBlock:
    """The HR-block (section 4.2) with the inferred choices of ``details``."""
    return block(
        dim,
        expansion,
        drop_path,
        activation=details.activation,
        high_bias=details.hr_bias,
        fc_bias=details.fc_bias,
        shortcut=details.hr_shortcut,
        eps=details.bn_eps,
        momentum=details.bn_momentum,
        **details.factory,
    )


_STEM_CLASSES = {"hr": HRStem, "conv": ConvStem, "vit": ViTStem}
_FEED_FORWARD_CLASSES = {"cffn": CFFN, "ffn": FFN}


class HIRIViT(StagedBackbone):
    """HIRI-ViT backbone with a classifier; with other arguments the networks of its ablation.

    Images (B, in_chans, H, W) of any size from the total stride on (64 with five stages); NCHW or
    channels_last. Feature maps come back in the layout of the image; inside, maps are channels_last.

    All defaults are INFERRED but ``stem``, ``blocks``, ``downs`` and the places of the norms (see the
    module).

    Args:
        in_chans: channels of the image.
        num_classes: 0 for no classifier.
        global_pool: ``avg``, ``max``, ``avgmax``, ``catavgmax``, or ``""`` for none (then ``num_classes``
            must be 0).
        depths, dims: blocks and channels per stage.
        blocks: per stage ``hr`` (:class:`HRBlock`), ``feed_forward`` (see ``feed_forward``) or
            ``transformer``.
        num_heads: heads per stage; only those of Transformer stages count.
        expansions: hidden width of a block's fully connected layers per stage, as a multiple of its channels.
        reduction_ratios: per stage, the factor by which a strided convolution reduces the grid of keys and
            values.
        stem: ``hr``, ``conv`` or ``vit``.
        stem_dim: channels of the stem at half the image's resolution.
        stem_depth: convolutions of the stem ``conv`` between its two strided ones.
        stem_low_dim: channels inside the low branch of the stem ``hr``; None for those of the first stage.
        downs: one less than stages: ``irds_a``, ``irds_b`` or ``conv``.
        feed_forward: ``cffn`` or ``ffn``, also inside Transformer blocks.
        stem_norm: the stem's last norm, ``batch`` or ``layer``.
        down_norms: norms of the ``conv`` down-samplings.
        feed_forward_norms: norm of every feed-forward, per stage.
        final_norm: ``layer`` or ``batch``, before the pooling.
        activation: relu, silu, gelu (exact), gelu_tanh or hardswish.
        bn_eps, bn_momentum, ln_eps: of the norms.
        stem_bias: biases of the stem's convolutions, but for ``patch_bias``.
        hr_bias: bias of the HR-block's depthwise convolution at full resolution.
        fc_bias: biases of the fully connected layers, and of the depthwise convolution of a CFFN.
        qkv_bias, proj_bias: biases of queries, keys and values, and of attention's output projection.
        patch_bias: biases of ``conv`` down-samplings and of the last convolution of the stems ``conv`` and
            ``vit``.
        down_bias: biases of the IRDS convolutions.
        hr_shortcut: identity around the HR-block.
        down_ratio: channels inside an IRDS as a multiple of its input's; one for all or one per change of
            stage.
        down_shortcut: ``avg_pool`` or ``strided``.
        drop_rate: dropout before the classifier.
        drop_path_rate: largest stochastic depth probability, rising linearly over all blocks.

    Raises:
        ValueError: for arguments that do not fit together and for images that are too small.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 5, 9, 4),
        dims: Sequence[int] = (32, 64, 128, 320, 640),
        blocks: Sequence[str] = ("hr", "hr", "feed_forward", "transformer", "transformer"),
        num_heads: Sequence[int] = (1, 2, 4, 10, 20),
        expansions: Sequence[float] = (4, 4, 4, 4, 4),
        reduction_ratios: Sequence[int] = (1, 1, 1, 1, 1),
        stem: str = "hr",
        stem_dim: int = 32,
        stem_depth: int = 2,
        stem_low_dim: int | None = None,
        downs: Sequence[str] = ("irds_a", "irds_a", "irds_b", "irds_b"),
        feed_forward: str = "cffn",
        stem_norm: str = "batch",
        down_norms: Sequence[str] = ("batch", "batch", "layer", "layer"),
        feed_forward_norms: Sequence[str] = ("batch", "batch", "batch", "batch", "batch"),
        final_norm: str = "layer",
        activation: str = "gelu",
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
        ln_eps: float = 1e-6,
        stem_bias: bool = False,
        hr_bias: bool = True,
        hr_shortcut: bool = True,
        fc_bias: bool = True,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        patch_bias: bool = True,
        down_ratio: float | Sequence[float] = 4.0,
        down_bias: bool = False,
        down_shortcut: str = "avg_pool",
        drop_rate: float = 0.0,
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
            blocks=blocks,
            num_heads=num_heads,
            expansions=expansions,
            reduction_ratios=reduction_ratios,
            feed_forward_norms=feed_forward_norms,
        )
        ratios = [down_ratio] * len(downs) if isinstance(down_ratio, int | float) else down_ratio
        check_lengths(
            len(depths) - 1, "change of stage", downs=downs, down_norms=down_norms, down_ratio=ratios
        )
        check_choice("stem", stem, STEMS)
        check_choice("feed_forward", feed_forward, FEED_FORWARDS)
        for name, values, allowed in (
            ("blocks", blocks, BLOCKS),
            ("downs", downs, DOWNS),
            ("stem_norm", (stem_norm,), NORMS),
            ("final_norm", (final_norm,), NORMS),
            ("down_norms", down_norms, NORMS),
            ("feed_forward_norms", feed_forward_norms, NORMS),
        ):
            for value in values:
                check_choice(name, value, allowed)
        for kind, dim, heads in zip(blocks, dims, num_heads, strict=True):
            if kind == "transformer":
                check_heads(dim, heads)
        details = Details(
            activation=activation,
            bn_eps=bn_eps,
            bn_momentum=bn_momentum,
            ln_eps=ln_eps,
            stem_depth=stem_depth,
            stem_low_dim=stem_low_dim,
            stem_bias=stem_bias,
            hr_bias=hr_bias,
            hr_shortcut=hr_shortcut,
            fc_bias=fc_bias,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            patch_bias=patch_bias,
            down_bias=down_bias,
            down_shortcut=down_shortcut,
            factory=factory,
        )

        def build_block(stage: int, drop_path: float) -> nn.Module:
            dim, expansion = dims[stage], expansions[stage]
            if blocks[stage] == "hr":
                return build_hr_block(dim, expansion, drop_path, details)
            ffn = _FEED_FORWARD_CLASSES[feed_forward](
                dim, expansion, drop_path, feed_forward_norms[stage], details
            )
            if blocks[stage] == "feed_forward":
                return ffn
            ratio = reduction_ratios[stage]
            return TransformerBlock(dim, num_heads[stage], ratio, drop_path, ffn, details)

        self.stem = _STEM_CLASSES[stem](in_chans, stem_dim, dims[0], stem_norm, details)
        rates = drop_path_rates(drop_path_rate, depths, "cumulative")
        self.stages = nn.ModuleList()
        self.downs = nn.ModuleList()
        for i, dim in enumerate(dims):
            if i > 0 and downs[i - 1] == "conv":
                self.downs.append(ConvDown(dims[i - 1], dim, down_norms[i - 1], details))
            elif i > 0:
                self.downs.append(IRDS(dims[i - 1], dim, downs[i - 1], ratios[i - 1], details))
            self.stages.append(nn.Sequential(*(build_block(i, rate) for rate in rates[i])))
            self._add_stage(dim, 2 if i else 4, f"stages.{i}")
        self.norm = details.norm(final_norm, dims[-1])
        self.head_drop = nn.Dropout(drop_rate)
        self._init_weights()
        self._set_classifier(num_classes, global_pool, factory)

    def _init_weights(self) -> None:
        for module in self.modules():
            init_linear(module)
            init_conv_fan_out(module)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise rates: per stage if ``coarse``, otherwise per block.

        The down-sampling before a stage belongs to the stage before it.
        """
        if coarse:
            return {"stem": r"^stem\.", "blocks": r"^(?:stages|downs)\.(\d+)\."}
        blocks = [
            (r"^stages\.(\d+)\.(\d+)\.", None),
            (r"^downs\.(\d+)\.", (99998,)),
            (r"^norm\.", (99999,)),
        ]
        return {"stem": r"^stem\.", "blocks": blocks}

    def _begin(self, x: Tensor) -> Tensor:
        return self.stem(x)

    def _stage(self, x: Tensor, index: int) -> Tensor:
        if index:
            x = self.downs[index - 1](x)
        return self._run_blocks(self.stages[index], to_channels_last(x))

    def _stage_modules(self, index: int) -> tuple[str, ...]:
        return f"stages.{index}", f"downs.{index - 1}"


_FIVE_STAGES = {"crop_pct": 1.0, "input_size": (3, 448, 448), "pool_size": (7, 7)}


def _cfg(stem_conv: str = "stem.conv.conv", **kwargs: Any) -> dict[str, Any]:
    return classification_cfg(first_conv=stem_conv, license="", **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "hiri_vit_small.untrained": _cfg(**_FIVE_STAGES),
        "hiri_vit_base.untrained": _cfg(**_FIVE_STAGES),
        "hiri_vit_large.untrained": _cfg(**_FIVE_STAGES),
        "hiri_vit_small_224.untrained": _cfg("stem.0.conv"),
        "hiri_vit_base_224.untrained": _cfg("stem.0.conv"),
        "hiri_vit_large_224.untrained": _cfg("stem.0.conv"),
        "hiri_vit_test.untrained": _cfg(
            num_classes=10, input_size=(3, 64, 64), pool_size=(1, 1), crop_pct=1.0
        ),
    }
)

FOUR_STAGES = {
    "blocks": ("feed_forward", "feed_forward", "transformer", "transformer"),
    "expansions": (4, 4, 4, 4),
    "reduction_ratios": (1, 1, 1, 1),
    "stem": "conv",
    "downs": ("irds_a", "irds_b", "irds_b"),
    "down_norms": ("batch", "layer", "layer"),
    "feed_forward_norms": ("batch",) * 4,
}
_SMALL = {"stem_dim": 32, "drop_path_rate": 0.1}
_BASE = {"stem_dim": 64, "drop_path_rate": 0.15}
_LARGE = {"stem_dim": 64, "drop_path_rate": 0.3}


def _create_hiri_vit(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: Any) -> nn.Module:
    return build_backbone(HIRIViT, variant, pretrained, defaults, kwargs)


@register_model
def hiri_vit_small(pretrained: bool = False, **kwargs: Any) -> HIRIViT:
    """HIRI-ViT-S, five stages, for 448 pixels. Widths, depths and heads are inferred."""
    defaults = {
        **_SMALL,
        "depths": (2, 2, 5, 9, 4),
        "dims": (32, 64, 128, 320, 640),
        "num_heads": (1, 2, 4, 10, 20),
    }
    return _create_hiri_vit("hiri_vit_small", pretrained, defaults, kwargs)


@register_model
def hiri_vit_base(pretrained: bool = False, **kwargs: Any) -> HIRIViT:
    """HIRI-ViT-B, five stages, for 448 pixels. Widths, depths and heads are inferred."""
    defaults = {
        **_BASE,
        "depths": (2, 2, 3, 12, 4),
        "dims": (64, 96, 128, 384, 768),
        "num_heads": (2, 3, 4, 12, 24),
    }
    return _create_hiri_vit("hiri_vit_base", pretrained, defaults, kwargs)


@register_model
def hiri_vit_large(pretrained: bool = False, **kwargs: Any) -> HIRIViT:
    """HIRI-ViT-L, five stages, for 448 pixels. Widths, depths and heads are inferred."""
    defaults = {
        **_LARGE,
        "depths": (2, 2, 6, 19, 4),
        "dims": (96, 128, 256, 448, 896),
        "num_heads": (3, 4, 8, 14, 28),
    }
    return _create_hiri_vit("hiri_vit_large", pretrained, defaults, kwargs)


@register_model
def hiri_vit_small_224(pretrained: bool = False, **kwargs: Any) -> HIRIViT:
    """HIRI-ViT-S for 224 pixels: four stages, as before the last steps of the ablation. Inferred."""
    defaults = {
        **FOUR_STAGES,
        **_SMALL,
        "depths": (1, 5, 9, 4),
        "dims": (64, 128, 320, 640),
        "num_heads": (2, 4, 10, 20),
    }
    return _create_hiri_vit("hiri_vit_small_224", pretrained, defaults, kwargs)


@register_model
def hiri_vit_base_224(pretrained: bool = False, **kwargs: Any) -> HIRIViT:
    """HIRI-ViT-B for 224 pixels: four stages, as before the last steps of the ablation. Inferred."""
    defaults = {
        **FOUR_STAGES,
        **_BASE,
        "depths": (1, 3, 12, 4),
        "dims": (96, 128, 384, 768),
        "num_heads": (3, 4, 12, 24),
    }
    return _create_hiri_vit("hiri_vit_base_224", pretrained, defaults, kwargs)


@register_model
def hiri_vit_large_224(pretrained: bool = False, **kwargs: Any) -> HIRIViT:
    """HIRI-ViT-L for 224 pixels: four stages, as before the last steps of the ablation. Inferred."""
    defaults = {
        **FOUR_STAGES,
        **_LARGE,
        "depths": (1, 6, 19, 4),
        "dims": (128, 256, 448, 896),
        "num_heads": (4, 8, 14, 28),
    }
    return _create_hiri_vit("hiri_vit_large_224", pretrained, defaults, kwargs)


@register_model
def hiri_vit_test(pretrained: bool = False, **kwargs: Any) -> HIRIViT:
    """A very small HIRI-ViT for 64x64 images, to test training with. Not published."""
    defaults = {
        "depths": (1, 1, 1, 1, 1),
        "dims": (8, 16, 24, 32, 64),
        "num_heads": (1, 1, 1, 2, 4),
        "stem_dim": 8,
        "drop_path_rate": 0.0,
    }
    return _create_hiri_vit("hiri_vit_test", pretrained, defaults, kwargs)


_SOURCE = "arXiv 2403.11999, text of sections 1 and 5"
_NOTE = "no public code: widths, depths, heads and other details are inferred"


def _info(
    params: int,
    macs: int,
    size: int,
    published_macs: float | None = None,
    published_top1: float | None = None,
    note: str = "",
) -> ModelInfo:
    return ModelInfo(
        params=params,
        macs=macs,
        input_size=(3, size, size),
        published_macs=published_macs,
        published_top1=published_top1,
        source=_SOURCE if published_macs or published_top1 else "",
        note=f"{_NOTE}; {note}" if note else _NOTE,
    )


SYSTEM = register_system(
    System(
        name="HIRI-ViT",
        paper="Yao et al., HIRI-ViT: Scaling Vision Transformer with High Resolution Inputs, "
        "IEEE TPAMI 2024, arXiv 2403.11999",
        model_class=HIRIViT,
        preset="hiri_vit",
        fused=("attention", "depthwise", "feed_forward_conv", "hr_chain"),
        models={
            "hiri_vit_small": _info(34_413_032, 4_974_549_248, 448, 5.0e9, 84.3),
            "hiri_vit_base": _info(
                54_443_880, 9_331_923_456, 448, 9.3e9, None, "the text gives 9.3 G and no size"
            ),
            "hiri_vit_large": _info(94_505_704, 19_868_572_416, 448, None, 85.7),
            "hiri_vit_small_224": _info(
                34_322_504,
                4_702_896_384,
                224,
                4.7e9,
                83.6,
                "published: row 6 of the ablation, without distillation",
            ),
            "hiri_vit_base_224": _info(
                54_135_912, 8_234_925_568, 224, 8.2e9, None, "the text gives 8.2 G without naming the size"
            ),
            "hiri_vit_large_224": _info(93_771_624, 16_875_674_368, 224, None, 85.3),
            "hiri_vit_test": ModelInfo(
                params=115_602,
                macs=1_498_368,
                input_size=(3, 64, 64),
                note="not published: a very small model for tests",
            ),
        },
    )
)
