"""FishNet: a backbone whose body and head keep and refine the features of every resolution.

Sun et al., "FishNet: A Versatile Backbone for Image, Region, and Pixel Level Prediction", NeurIPS 2018 (arXiv
1901.03495). Public code: kevin-ssy/FishNet (PyTorch).

* FishNet-99, -150 and -201 are as in the public code. The paper gives 26.4 M parameters for a FishNet-150
  that was never released; the released one has 24.96 M.
* Published FLOPs also count BatchNorm, ReLU and pooling, some of them twice; ours are convolutions alone.
* ``fishnext_150`` is INFERRED. The paper says that its 3x3 convolutions are grouped, that the width of a
  group is constant within a resolution and doubles to the next, and about 26 M parameters. Bottlenecks of
  half the block's width and groups of 4, 8, 16 and 32 channels are this project's choice; its 25.7 M are not
  the published 26.2 M.
* Which maps a detector takes is inferred: the four of the head, one per resolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import create_classifier, get_device_dtype
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from fused_ops.blocks.checkpointing import checkpoint_block
from fused_ops.gate import gate_scale, pool_channels
from fused_ops.models.arguments import check_classifier, check_image, check_lengths
from fused_ops.models.common import classification_cfg
from fused_ops.models.layouts import same_names_layout
from fused_ops.models.registry import ModelInfo, System, register_system
from fused_ops.resample import resample_map

__all__ = ["FishBottleneck", "FishNet"]

_BODY_DILATIONS = (1, 2, 4)
_TAIL_STAGES = 3
_STAGES_BEFORE_HEAD = 7
_STAGES = 10
# Index in the public code's last stage, after trunk, transfer and pooling.
_LAST_CONV, _CLASSIFIER = 3, 4


def _norm_act(channels: int, factory: dict[str, Any]) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels, **factory), nn.ReLU(inplace=True)]


class FishBottleneck(nn.Module):
    """Pre-activation bottleneck (B, in_channels, H, W) to (B, out_channels, H, W), paper section 3.

    ``conv3(relu(bn3(conv2(relu(bn2(conv1(relu(bn1(x)))))))))`` plus a shortcut, which is

    * the sum of ``in_channels // out_channels`` adjacent channels of ``x`` if ``reduce`` is set: the
      channel-wise reduction of the up-sampling blocks, without parameters;
    * ``x`` itself where the numbers of channels agree;
    * otherwise a 1x1 convolution after a BatchNorm and ReLU of its own.

    Args:
        in_channels, out_channels: of the block.
        width: channels of the 3x3 convolution; a quarter of ``out_channels`` if None.
        group_width: channels of one group of it; one group of all if None.
        dilation: of it.
        reduce: sum adjacent channels in the shortcut.

    Raises:
        ValueError: if ``reduce`` is set and ``in_channels`` is no multiple of ``out_channels``, or ``width``
            no multiple of ``group_width``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int | None = None,
        group_width: int | None = None,
        dilation: int = 1,
        reduce: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        if reduce and in_channels % out_channels:
            raise ValueError(
                f"in_channels must be a multiple of out_channels={out_channels} to be reduced, "
                f"got {in_channels}"
            )
        width = out_channels // 4 if width is None else width
        group_width = width if group_width is None else group_width
        if width % group_width:
            raise ValueError(f"width must be a multiple of group_width={group_width}, got {width}")
        self.reduction = in_channels // out_channels if reduce else 1
        self.bn1 = nn.BatchNorm2d(in_channels, **factory)
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False, **factory)
        self.bn2 = nn.BatchNorm2d(width, **factory)
        self.conv2 = nn.Conv2d(
            width,
            width,
            3,
            padding=dilation,
            dilation=dilation,
            groups=width // group_width,
            bias=False,
            **factory,
        )
        self.bn3 = nn.BatchNorm2d(width, **factory)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False, **factory)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module | None = None
        if not reduce and in_channels != out_channels:
            self.shortcut = nn.Sequential(
                *_norm_act(in_channels, factory),
                nn.Conv2d(in_channels, out_channels, 1, bias=False, **factory),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.relu(self.bn1(x)))
        out = self.conv2(self.relu(self.bn2(out)))
        out = self.conv3(self.relu(self.bn3(out)))
        if self.shortcut is not None:
            return out + self.shortcut(x)
        if self.reduction > 1:
            return out + x.unflatten(1, (-1, self.reduction)).sum(2)
        return out + x


class _Blocks(nn.Sequential):
    """Blocks in sequence, each of which can be checkpointed."""

    grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        checkpointing = self.grad_checkpointing and torch.is_grad_enabled()
        for block in self:
            x = checkpoint_block(block, x) if checkpointing else block(x)
        return x


class _ChannelMeans(nn.Module):
    """Mean of every channel, (B, C, H, W) to (B, C, 1, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        return pool_channels(x)[:, 0, :, None, None]


class _NearestUpsampling(nn.Module):
    """Twice the height and width, by nearest neighbours."""

    def forward(self, x: Tensor) -> Tensor:
        return resample_map(x, (2 * x.shape[2], 2 * x.shape[3]), mode="nearest")


class _Bridge(nn.Sequential):
    """From tail to body at the lowest resolution: blocks whose output is scaled by a gate and added to it.

    The gate (B, C, 1, 1) comes from the map that enters the blocks: ``blocks(s) * gate(s) + gate(s)``.
    """

    def __init__(self, channels: int, blocks: _Blocks, factory: dict[str, Any]) -> None:
        narrow, wide, hidden = channels // 2, 2 * channels, channels // 16
        reduce = nn.Sequential(
            *_norm_act(channels, factory),
            nn.Conv2d(channels, narrow, 1, bias=False, **factory),
            *_norm_act(narrow, factory),
        )
        gate = nn.Sequential(
            *_norm_act(wide, factory),
            _ChannelMeans(),
            nn.Conv2d(wide, hidden, 1, **factory),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1, **factory),
            nn.Sigmoid(),
        )
        super().__init__(reduce, nn.Conv2d(narrow, wide, 1, **factory), blocks, nn.Sequential(gate))

    def forward(self, x: Tensor) -> Tensor:
        reduce, expand, blocks, gate = self
        x = expand(reduce(x))
        gate = gate(x).flatten(1)
        return gate_scale(blocks(x), gate, channel_add=gate, gate="none")


class _Join(nn.Sequential):
    """A stage of body or head: (trunk after resizing, transferred map) concatenated along the channels."""

    def __init__(self, trunk: _Blocks, transfer: _Blocks, resize: nn.Module) -> None:
        super().__init__(trunk, transfer, resize)

    def forward(self, x: Tensor, transferred: Tensor) -> Tensor:
        trunk, transfer, resize = self[0], self[1], self[2]
        return torch.cat((resize(trunk(x)), transfer(transferred)), 1)


class FishNet(nn.Module):
    """FishNet backbone with a classifier.

    Images (B, in_chans, H, W) with H and W multiples of 32, since the up-sampled maps of the body must meet
    those of the tail. Sub-modules have the public code's names: ``fish.fish.0`` to ``2`` are the tail,
    ``3`` the bridge, ``4`` to ``6`` the body and ``7`` to ``9`` the head.

    Args:
        in_chans: channels of the image.
        num_classes: 0 for no classifier.
        global_pool: ``avg``, ``max``, ``avgmax``, ``catavgmax``, or ``""`` for none (then ``num_classes``
            must be 0).
        depths: blocks of the three tail stages, the bridge, and the trunks of the three body and three head
            stages.
        transfer_depths: transfer blocks of the three body and three head stages.
        tail_dims: channels of the stem and the three tail stages.
        body_dims: channels of the three body trunks. Each must divide the channels that come in.
        width_ratio: channels of a block's 3x3 convolution as a part of its output channels.
        group_widths: channels per group of the 3x3 convolutions at strides 4, 8, 16 and 32; None for
            one group.
        drop_rate: dropout before the classifier; none in the public code.

    Raises:
        ValueError: for arguments that do not fit together and for images of other sizes.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 6, 2, 1, 1, 1, 1, 2, 2),
        transfer_depths: Sequence[int] = (1, 1, 1, 1, 1, 4),
        tail_dims: Sequence[int] = (64, 128, 256, 512),
        body_dims: Sequence[int] = (512, 384, 256),
        width_ratio: float = 0.25,
        group_widths: Sequence[int] | None = None,
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        check_lengths(_STAGES, "stage", depths=depths)
        check_lengths(6, "stage of body and head", transfer_depths=transfer_depths)
        check_lengths(4, "stage of stem and tail", tail_dims=tail_dims)
        check_lengths(3, "stage of the body", body_dims=body_dims)
        if group_widths is not None:
            check_lengths(4, "stride", group_widths=group_widths)
        self.in_chans = in_chans
        self.total_stride = 32

        def block(in_channels: int, out_channels: int, level: int, **kwargs: Any) -> FishBottleneck:
            """A block at stride 4 * 2**level."""
            return FishBottleneck(
                in_channels,
                out_channels,
                width=int(out_channels * width_ratio),
                group_width=group_widths[level] if group_widths else None,
                **kwargs,
                **factory,
            )

        def same(channels: int, level: int, depth: int) -> _Blocks:
            return _Blocks(*(block(channels, channels, level) for _ in range(depth)))

        stem = tail_dims[0]
        for index, (before, after) in enumerate(
            ((in_chans, stem // 2), (stem // 2, stem // 2), (stem // 2, stem))
        ):
            conv = nn.Conv2d(
                before, after, 3, stride=2 if index == 0 else 1, padding=1, bias=False, **factory
            )
            self.add_module(f"conv{index + 1}", nn.Sequential(conv, *_norm_act(after, factory)))
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)

        stages: list[nn.Module] = []
        for index in range(_TAIL_STAGES):
            before, after = tail_dims[index], tail_dims[index + 1]
            blocks = [block(before if i == 0 else after, after, index) for i in range(depths[index])]
            stages.append(nn.Sequential(_Blocks(*blocks), nn.MaxPool2d(2)))
        channels = tail_dims[-1]
        blocks = [block(2 * channels if i == 0 else channels, channels, 3) for i in range(depths[3])]
        stages.append(_Bridge(channels, _Blocks(*blocks), factory))

        # Channels of the maps a0 to a10, where a[i + 1] is what stage i returns.
        dims = [*tail_dims, channels]
        for index, (dim, dilation) in enumerate(zip(body_dims, _BODY_DILATIONS, strict=True)):
            level = 3 - index
            blocks = [
                block(dims[-1] if i == 0 else dim, dim, level, dilation=dilation, reduce=i == 0)
                for i in range(depths[4 + index])
            ]
            source = dims[2 - index]
            transfer = same(source, level - 1, transfer_depths[index])
            stages.append(_Join(_Blocks(*blocks), transfer, _NearestUpsampling()))
            dims.append(dim + source)
        for index in range(3):
            trunk = same(dims[-1], index, depths[7 + index])
            source = dims[6 - index]
            transfer = same(source, index + 1, transfer_depths[3 + index])
            stages.append(_Join(trunk, transfer, nn.MaxPool2d(2)))
            dims.append(dims[-1] + source)
        self.feature_info = [
            {"num_chs": dims[7 + i], "reduction": 4 * 2**i, "module": f"fish.fish.{6 + i}"} for i in range(4)
        ]

        self.num_features = dims[-1] // 2
        stages[-1].append(
            nn.Sequential(
                *_norm_act(dims[-1], factory),
                nn.Conv2d(dims[-1], self.num_features, 1, bias=False, **factory),
                *_norm_act(self.num_features, factory),
            )
        )
        stages[-1].append(nn.Sequential())
        self.fish = nn.Module()
        self.fish.fish = nn.ModuleList(stages)
        self.head_drop = nn.Dropout(drop_rate)
        self._set_classifier(num_classes, global_pool, factory)
        self.reset_parameters()

    def _last_stage(self) -> nn.Sequential | None:
        """The stage with the last convolution and the classifier; None after they were pruned."""
        stages = self.fish.fish
        return stages[-1] if len(stages) == _STAGES and len(stages[-1]) > _LAST_CONV else None

    @property
    def global_pool(self) -> nn.Module:
        last = self._last_stage()
        return nn.Identity() if last is None else last[_CLASSIFIER][0]

    def _set_classifier(self, num_classes: int, global_pool: str, factory: dict[str, Any]) -> None:
        check_classifier(num_classes, global_pool)
        last = self._last_stage()
        if last is None:
            raise ValueError("this model was pruned to a feature extractor and has no place for a classifier")
        pool, classifier = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, use_conv=True, **factory
        )
        self.num_classes = num_classes
        self.head_hidden_size = self.num_features * pool.feat_mult()
        last[_CLASSIFIER] = nn.Sequential(pool, classifier).train(self.training)
        _initialise(classifier)

    def reset_parameters(self) -> None:
        """Initialise all parameters and statistics again, for instance after ``to_empty``."""
        for module in self.modules():
            _initialise(module)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Nothing: the published recipe decays every parameter."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise rates: per stage if ``coarse``, otherwise per block."""
        stages = r"^fish\.fish\.(\d+)"
        blocks = [(rf"{stages}\.(\d+)\.(\d+)\.", None), (rf"{stages}\.(\d+)", None)]
        return {"stem": r"^conv[123]\.", "blocks": stages if coarse else blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input for the backward pass. Running statistics are updated once."""
        for module in self.modules():
            if isinstance(module, _Blocks):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        last = self._last_stage()
        return nn.Identity() if last is None else last[_CLASSIFIER][1]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one; ``global_pool`` stays as it is where it is None."""
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self._set_classifier(num_classes, pool, get_device_dtype(self))

    def forward_nodes(self, x: Tensor, count: int = _STAGES + 1) -> list[Tensor]:
        """The first ``count`` of the maps a0 to a10 of an image (B, in_chans, H, W).

        a0 is the stem's; then come three of the tail, one of the bridge, three of the body and three of the
        head. Their strides are 4, 8, 16, 32, 32, 16, 8, 4, 8, 16, 32. A pruned model returns what it has.
        """
        check_image(x, self.in_chans, self.total_stride, multiple=True)
        nodes = [self.pool(self.conv3(self.conv2(self.conv1(x))))]
        for index, stage in enumerate(self.fish.fish[: count - 1]):
            if index <= _TAIL_STAGES:
                nodes.append(stage(nodes[-1]))
            else:
                # The body takes from the tail, the head from the body: the map of the same resolution.
                nodes.append(stage(nodes[-1], nodes[(6 if index < _STAGES_BEFORE_HEAD else 13) - index]))
        return nodes

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps a7 to a10 of the head, strides 4, 8, 16 and 32.

        Args:
            x: image (B, in_chans, H, W).
            indices: the last n maps, or a list (from 0, negative from the end); None is all.
            norm: has no effect; these maps have no norm of their own.
            stop_early: skip the stages after the last map asked for, which is then the first returned value.
            output_fmt: ``NCHW`` or ``NHWC`` shape of the intermediate maps.
            intermediates_only: return the list alone.

        Returns:
            The list, or the pair of what ``forward_features`` returns and the list.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be NCHW or NHWC, got {output_fmt!r}")
        stages = len(self.fish.fish)
        take, last_taken = feature_take_indices(stages + 1 - _STAGES_BEFORE_HEAD, indices)
        count = _STAGES_BEFORE_HEAD + last_taken + 1
        nodes = self.forward_nodes(x, count) if stop_early else self.forward_nodes(x)
        maps = [nodes[_STAGES_BEFORE_HEAD + i] for i in take]
        if output_fmt == "NHWC":
            maps = [value.permute(0, 2, 3, 1) for value in maps]
        if intermediates_only:
            return maps
        return self._finish(nodes[-1]) if len(nodes) > stages else nodes[-1], maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the head stages after the last one of ``indices``, the last convolution and the classifier.

        Args:
            indices: as in :meth:`forward_intermediates`.
            prune_norm: remove the last convolution and the classifier even if the last stage stays.
            prune_head: the same; they have no use without each other.

        Returns:
            The maps asked for, as indices from 0.
        """
        take, last_taken = feature_take_indices(4, indices)
        shortened = last_taken < 3
        del self.fish.fish[_STAGES_BEFORE_HEAD + last_taken :]
        if not shortened and (prune_norm or prune_head):
            del self.fish.fish[-1][_LAST_CONV:]
        if shortened or prune_norm or prune_head:
            self.num_classes = 0
            self.num_features = self.head_hidden_size = self.feature_info[last_taken]["num_chs"]
        return take

    def _finish(self, x: Tensor) -> Tensor:
        last = self._last_stage()
        return x if last is None else last[_LAST_CONV](x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Image (B, in_chans, H, W) to (B, num_features, H/32, W/32) after the last 1x1 convolution."""
        return self._finish(self.forward_nodes(x)[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, drop out and classify the map of :meth:`forward_features`."""
        last = self._last_stage()
        if last is None:
            return x
        pool, classifier = last[_CLASSIFIER]
        x = self.head_drop(pool(x))
        x = x if pre_logits else classifier(x)
        return x.flatten(1) if pool.pool_type else x

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _initialise(module: nn.Module) -> None:
    """The public code's initialisation: normal weights by fan-out, PyTorch's own for biases."""
    if isinstance(module, nn.Conv2d):
        module.reset_parameters()
        fan_out = module.out_channels * math.prod(module.kernel_size)
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    elif isinstance(module, nn.BatchNorm2d):
        module.reset_parameters()


_99 = {"depths": (2, 2, 6, 2, 1, 1, 1, 1, 2, 2), "transfer_depths": (1, 1, 1, 1, 1, 4)}
_150 = {"depths": (2, 4, 8, 4, 2, 2, 2, 2, 2, 4), "transfer_depths": (2, 2, 2, 2, 2, 4)}
_201 = {"depths": (3, 4, 12, 4, 2, 2, 2, 2, 3, 10), "transfer_depths": (2, 2, 2, 2, 2, 9)}
_NEXT = {"width_ratio": 0.5, "group_widths": (4, 8, 16, 32)}


def _create_fishnet(
    variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]
) -> FishNet:
    arguments = {**defaults, **kwargs}
    out_indices = arguments.pop("out_indices", (0, 1, 2, 3))
    return build_model_with_cfg(
        FishNet,
        variant,
        pretrained,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **arguments,
    )


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return classification_cfg(
        first_conv="conv1.0",
        classifier=f"fish.fish.{_STAGES - 1}.{_CLASSIFIER}.1",
        license="apache-2.0",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "fishnet_99.untrained": _cfg(),
        "fishnet_150.untrained": _cfg(),
        "fishnet_201.untrained": _cfg(),
        "fishnext_150.untrained": _cfg(),
    }
)


@register_model
def fishnet_99(pretrained: bool = False, **kwargs: Any) -> FishNet:
    """FishNet-99 as in kevin-ssy/FishNet ``fishnet99``."""
    return _create_fishnet("fishnet_99", pretrained, _99, kwargs)


@register_model
def fishnet_150(pretrained: bool = False, **kwargs: Any) -> FishNet:
    """FishNet-150 as in kevin-ssy/FishNet ``fishnet150``."""
    return _create_fishnet("fishnet_150", pretrained, _150, kwargs)


@register_model
def fishnet_201(pretrained: bool = False, **kwargs: Any) -> FishNet:
    """FishNet-201 as in kevin-ssy/FishNet ``fishnet201``."""
    return _create_fishnet("fishnet_201", pretrained, _201, kwargs)


@register_model
def fishnext_150(pretrained: bool = False, **kwargs: Any) -> FishNet:
    """FishNeXt-150. Widths and groups are inferred, see the module's docstring."""
    return _create_fishnet("fishnext_150", pretrained, {**_150, **_NEXT}, kwargs)


_FLOPS_NOTE = "published FLOPs also count BatchNorm, ReLU and pooling"


def _info(params: int, macs: int, published: tuple[float, float, float], note: str = "") -> ModelInfo:
    millions, billions, top1 = published
    return ModelInfo(
        params=params,
        macs=macs,
        published_params=millions * 1e6,
        published_macs=billions * 1e9,
        published_top1=top1,
        source="kevin-ssy/FishNet, README, step schedule",
        note=_FLOPS_NOTE + note,
    )


SYSTEM = register_system(
    System(
        name="FishNet",
        paper="Sun et al., FishNet: A Versatile Backbone for Image, Region, and Pixel Level Prediction, "
        "NeurIPS 2018, arXiv 1901.03495",
        model_class=FishNet,
        preset="fishnet",
        fused=("pool_channels", "gate_scale", "resample"),
        models={
            "fishnet_99": _info(16_628_904, 4_263_656_704, (16.62, 4.31, 77.41)),
            "fishnet_150": _info(
                24_959_400,
                6_397_842_688,
                (24.96, 6.45, 78.14),
                "; 79.35 with cosine schedule and label smoothing",
            ),
            "fishnet_201": _info(
                44_584_552,
                10_514_382_080,
                (44.58, 10.58, 78.76),
                "; 79.71 with cosine schedule and label smoothing",
            ),
            "fishnext_150": ModelInfo(
                params=25_738_024,
                macs=6_468_691_200,
                note="inferred: no public code; width of bottlenecks and groups are this project's, "
                "the published 26.2 M are not reproduced",
            ),
        },
        layouts=(same_names_layout("kevin-ssy/FishNet"),),
    )
)
