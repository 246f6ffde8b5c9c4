"""Other backbones lifted to 448 pixels by HIRI-ViT's structure: PVTv2, DaViT and HRNet.

Yao et al., "HIRI-ViT: Scaling Vision Transformer with High Resolution Inputs", IEEE TPAMI 2024 (arXiv
2403.11999), section 5.7 and Table 9. The paper's text says that the three backbones gain accuracy at modest
cost when they get the five-stage, two-branch structure. There is no public code, and the table could not be
read: sizes, widths and numbers are not known.

INFERRED is therefore the form: a front end takes the place of the original stem of stride 4, so that every
original stage sees at 448 pixels the map that it sees at 224. The front end is HIRI-ViT's stem (stride 4),
two HR-blocks and an inverted residual down-sampling (stride 8) to the width of the original first stage.
Models ``..._lift_a`` have that alone; in ``..._lift_b`` two HR-blocks also take the place of every block of
the original first stage. Everything else is timm's model, with its layers on fused operators where
:func:`fused_ops.accelerate` knows them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from fused_ops import HRBlock
from fused_ops.accelerate import accelerate
from fused_ops.blocks.checkpointing import checkpoint_block
from fused_ops.blocks.layout import map_to_tokens, to_channels_last, tokens_to_map
from fused_ops.core.checks import check_choice
from fused_ops.core.initialise import init_linear
from fused_ops.models.arguments import check_image
from fused_ops.models.common import classification_cfg, init_conv_fan_out
from fused_ops.models.hiri_vit import IRDS, Details, HRStem, build_hr_block
from fused_ops.models.registry import ModelInfo, System, register_system

__all__ = ["FrontEnd", "LiftedBackbone"]

LIFTS = ("a", "b")
# Of the lifted network; the original one has half of it.
TOTAL_STRIDE = 64


class FrontEnd(nn.Module):
    """Image (B, in_chans, H, W) to (B, out_dim, H/8, W/8), rounded up: stem, HR-blocks, down-sampling.

    Args:
        in_chans: channels of the image.
        stem_dim: channels at half the image's resolution.
        dim: channels at a quarter of it.
        out_dim: channels of the result.
        depth: HR-blocks.
        expansion: of the HR-blocks.
        down_ratio: channels inside the down-sampling as a multiple of ``dim``.
        details: the other inferred choices, as in HIRI-ViT.
    """

    def __init__(
        self,
        in_chans: int,
        stem_dim: int,
        dim: int,
        out_dim: int,
        depth: int,
        expansion: float,
        down_ratio: float,
        details: Details,
    ) -> None:
        super().__init__()
        self.stem = HRStem(in_chans, stem_dim, dim, "batch", details)
        self.blocks = nn.Sequential(*(build_hr_block(dim, expansion, 0.0, details) for _ in range(depth)))
        self.down = IRDS(dim, out_dim, "irds_a", down_ratio, details)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(to_channels_last(x))
        for block in self.blocks:
            checkpointed = self.grad_checkpointing and torch.is_grad_enabled()
            x = checkpoint_block(block, x) if checkpointed else block(x)
        return self.down(x)


class _ToChannelsLastShape(nn.Module):
    """(B, C, H, W) to (B, H, W, C), as PVTv2's patch embedding hands its map on."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class _TokenHRBlock(HRBlock):
    """The HR-block between tokens (B, H·W, C) and their grid, as PVTv2 calls its blocks."""

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return map_to_tokens(super().forward(tokens_to_map(x, tuple(size))))


class LiftedBackbone(nn.Module):
    """A backbone of timm behind HIRI-ViT's front end, with timm's conventions.

    ``front`` is the front end, ``body`` timm's model without its stem, whose parameters keep their names.
    All arguments but ``base`` are inferred.

    Args:
        base: timm's name of a PVTv2, DaViT or HRNet.
        stem_dim, front_dim: channels of the front end at a half and a quarter of the image's resolution.
        front_depth: HR-blocks of the front end.
        lift: ``a``: the front end alone; ``b``: HR-blocks in the original first stage too (not HRNet).
        hr_per_block: HR-blocks for each original block of the first stage. DaViT's window and channel blocks
            count one by one.
        expansion, down_ratio: of the HR-blocks and of the front end's down-sampling.
        activation, bn_eps, bn_momentum, hr_bias, hr_shortcut, fc_bias, stem_bias, down_bias, down_shortcut:
            of the new parts, as in :class:`fused_ops.models.hiri_vit.HIRIViT`.
        in_chans: channels of the image.
        **base_arguments: for timm's model: ``num_classes``, ``global_pool``, ``drop_rate``,
            ``drop_path_rate`` and others. HR-blocks in the first stage have the stochastic depth of the
            blocks that they stand for, those of the front end none.

    Raises:
        ValueError: for another base or lift; for an image under 64 pixels, and with HRNet for one whose
            height and width are not multiples of 64.
    """

    def __init__(
        self,
        base: str,
        stem_dim: int,
        front_dim: int,
        front_depth: int = 2,
        lift: str = "a",
        hr_per_block: int = 2,
        expansion: float = 4,
        down_ratio: float = 4.0,
        activation: str = "gelu",
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
        hr_bias: bool = True,
        hr_shortcut: bool = True,
        fc_bias: bool = True,
        stem_bias: bool = False,
        down_bias: bool = False,
        down_shortcut: str = "avg_pool",
        in_chans: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **base_arguments: Any,
    ) -> None:
        super().__init__()
        check_choice("lift", lift, LIFTS)
        family = base.split("_")[0]
        check_choice("base", family, ("pvt", "davit", "hrnet"))
        if lift == "b" and family == "hrnet":
            raise ValueError("lift='b' is not defined for HRNet, whose first stage is no stage of its own")
        details = Details(
            activation=activation,
            bn_eps=bn_eps,
            bn_momentum=bn_momentum,
            hr_bias=hr_bias,
            hr_shortcut=hr_shortcut,
            fc_bias=fc_bias,
            stem_bias=stem_bias,
            down_bias=down_bias,
            down_shortcut=down_shortcut,
            factory={"device": device, "dtype": dtype},
        )
        self.body = timm.create_model(base, device=device, dtype=dtype, **base_arguments)
        self.in_chans = in_chans
        self.has_first_stage = lift == "a"
        # HRNet adds maps of different strides, which must fit to the pixel.
        self._needs_multiple = family == "hrnet"
        # HRNet's first map is the stem's, which the front end has made another.
        self._offset = 1 if family == "hrnet" else 0
        self.feature_info = [
            {**info, "reduction": 2 * info["reduction"], "module": f"body.{info['module']}"}
            for info in self.body.feature_info[self._offset :]
        ]
        self._remove_stem(family)
        accelerate(self.body)
        if lift == "b":
            self._replace_first_stage(family, hr_per_block, expansion, details)
        self.front = FrontEnd(
            in_chans,
            stem_dim,
            front_dim,
            64 if family == "hrnet" else self.feature_info[0]["num_chs"],
            front_depth,
            expansion,
            down_ratio,
            details,
        )
        _initialise(self.front.modules())

    def _remove_stem(self, family: str) -> None:
        if family == "pvt":
            self.body.patch_embed = _ToChannelsLastShape()
        elif family == "davit":
            self.body.stem = nn.Identity()
        else:
            for name in ("conv1", "bn1", "act1", "conv2", "bn2", "act2"):
                setattr(self.body, name, nn.Identity())

    def _replace_first_stage(self, family: str, count: int, expansion: float, details: Details) -> None:
        stage = self.body.stages[0]
        dim = self.feature_info[0]["num_chs"]
        # A block of DaViT is a pair, of window and of channel attention.
        old = list(stage.blocks) if family == "pvt" else [part for pair in stage.blocks for part in pair]
        rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in old for _ in range(count)]
        kind = _TokenHRBlock if family == "pvt" else HRBlock
        blocks = [build_hr_block(dim, expansion, rate, details, kind) for rate in rates]
        _initialise(module for block in blocks for module in block.modules())
        stage.blocks = nn.ModuleList(blocks) if family == "pvt" else nn.Sequential(*blocks)

    @property
    def num_classes(self) -> int:
        return self.body.num_classes

    @property
    def num_features(self) -> int:
        return self.body.num_features

    @property
    def head_hidden_size(self) -> int:
        return self.body.head_hidden_size

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Nothing by name, as in the three original models."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The groups of timm's model; the front end is the stem."""

        def in_body(pattern: str) -> str:
            return pattern.replace("^", r"^body\.", 1)

        groups: dict[str, Any] = {"stem": r"^front\."}
        for name, patterns in self.body.group_matcher(coarse=coarse).items():
            if name != "stem":
                groups[name] = (
                    in_body(patterns)
                    if isinstance(patterns, str)
                    else [(in_body(pattern), number) for pattern, number in patterns]
                )
        return groups

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input for backward, as far as timm's model can."""
        self.body.set_grad_checkpointing(enable)
        self.front.grad_checkpointing = enable
        if not self.has_first_stage:
            # timm's checkpointing, of a stage or of all of DaViT's, would count every batch twice in the
            # HR-blocks' running statistics.
            self.body.stages[0].grad_checkpointing = False
            self.body.grad_checkpointing = False

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.body.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one; ``global_pool`` stays as it is where it is None."""
        self.body.reset_classifier(num_classes, global_pool)

    def _front(self, x: Tensor) -> Tensor:
        check_image(x, self.in_chans, TOTAL_STRIDE, multiple=self._needs_multiple)
        return self.front(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps (B, C, H, W) of the original stages, at strides 8, 16, 32 and 64; as timm's."""
        return self.body.forward_intermediates(
            self._front(x),
            indices=self._in_body(indices),
            norm=norm,
            stop_early=stop_early,
            output_fmt=output_fmt,
            intermediates_only=intermediates_only,
        )

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what comes after the last of ``indices``, as timm's."""
        taken = self.body.prune_intermediate_layers(self._in_body(indices), prune_norm, prune_head)
        return [index - self._offset for index in taken]

    def _in_body(self, indices: int | Sequence[int] | None) -> list[int]:
        taken, _ = feature_take_indices(len(self.feature_info), indices)
        return [index + self._offset for index in taken]

    def forward_features(self, x: Tensor) -> Tensor:
        """Image (B, in_chans, H, W) to the last map (B, num_features, h, w)."""
        return self.body.forward_features(self._front(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify what :meth:`forward_features` returns."""
        return self.body.forward_head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _initialise(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        init_linear(module)
        init_conv_fan_out(module)


_CLASSIFIERS = {"pvt": "body.head", "davit": "body.head.fc", "hrnet": "body.classifier"}
_NOTE = "not published: the numbers of the paper's table are not known; the form is inferred; no public code"
# Base, channels of the front end (stem, blocks), and per lift the parameters and multiply-accumulates at 448.
_ROWS: list[tuple[str, tuple[int, int], dict[str, tuple[int, int]]]] = [
    ("pvt_v2_b0", (16, 16), {"a": (3_686_696, 724_421_120), "b": (3_544_360, 598_278_656)}),
    ("pvt_v2_b1", (32, 32), {"a": (14_094_952, 2_704_446_464), "b": (13_531_752, 2_259_084_288)}),
    ("pvt_v2_b2", (32, 32), {"a": (25_448_808, 4_622_825_472), "b": (24_604_008, 3_954_782_208)}),
    ("pvt_v2_b2_li", (32, 32), {"a": (22_639_464, 4_484_941_824), "b": (22_568_808, 3_854_831_616)}),
    ("pvt_v2_b3", (32, 32), {"a": (45_324_648, 7_493_394_432), "b": (44_479_848, 6_825_351_168)}),
    ("pvt_v2_b5", (32, 32), {"a": (82_041_960, 12_313_351_168), "b": (81_303_912, 11_975_265_280)}),
    ("davit_tiny", (32, 48), {"a": (28_543_752, 5_632_697_856), "b": (28_621_128, 5_124_214_272)}),
    ("davit_small", (32, 48), {"a": (49_929_480, 9_883_909_632), "b": (50_006_856, 9_375_426_048)}),
    ("davit_base", (32, 64), {"a": (88_272_488, 17_263_273_984), "b": (88_408_424, 16_379_774_976)}),
    ("hrnet_w18", (32, 32), {"a": (21_355_708, 4_771_849_904)}),
    ("hrnet_w32", (32, 32), {"a": (41_289_384, 9_409_445_888)}),
    ("hrnet_w48", (32, 32), {"a": (77_526_568, 17_766_308_864)}),
]


def _name(base: str, lift: str) -> str:
    return f"{base}_lift_{lift}"


default_cfgs = generate_default_cfgs(
    {
        f"{_name(base, lift)}.untrained": classification_cfg(
            input_size=(3, 448, 448),
            pool_size=(7, 7),
            crop_pct=1.0,
            first_conv="front.stem.conv.conv",
            classifier=_CLASSIFIERS[base.split("_")[0]],
            license="",
        )
        for base, _, lifts in _ROWS
        for lift in lifts
    }
)


def _register(base: str, widths: tuple[int, int], lift: str) -> None:
    """Make a model known to timm, as ``register_model`` does for a function of its name."""
    name = _name(base, lift)

    def build(pretrained: bool = False, **kwargs: Any) -> LiftedBackbone:
        arguments = {"base": base, "stem_dim": widths[0], "front_dim": widths[1], "lift": lift, **kwargs}
        feature_cfg = {"feature_cls": "getter", "out_indices": arguments.pop("out_indices", (0, 1, 2, 3))}
        return build_model_with_cfg(LiftedBackbone, name, pretrained, feature_cfg=feature_cfg, **arguments)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"timm's {base}, lifted to 448 pixels: lift {lift}. Inferred."
    globals()[name] = register_model(build)


for _base, _widths, _lifts in _ROWS:
    for _lift in _lifts:
        _register(_base, _widths, _lift)

SYSTEM = register_system(
    System(
        name="HIRI-ViT's lifted backbones",
        paper="Yao et al., HIRI-ViT: Scaling Vision Transformer with High Resolution Inputs, "
        "IEEE TPAMI 2024, arXiv 2403.11999, Table 9",
        model_class=LiftedBackbone,
        preset="hiri_vit",
        fused=("attention", "depthwise", "feed_forward", "hr_chain"),
        models={
            _name(base, lift): ModelInfo(params=params, macs=macs, input_size=(3, 448, 448), note=_NOTE)
            for base, _, lifts in _ROWS
            for lift, (params, macs) in lifts.items()
        },
    )
)
