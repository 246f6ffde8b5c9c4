"""What every backbone of the zoo shares: timm's contract, drop path rates, position tables, configurations.

A model file describes how an image becomes the maps of its stages; :class:`StagedBackbone` makes of that the
methods that timm, the trainer and detection heads call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import SelectAdaptivePool2d, get_device_dtype
from timm.models import build_model_with_cfg
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from fused_ops.blocks.checkpointing import checkpoint_block
from fused_ops.blocks.layout import is_channels_last, like_input, to_channels_last
from fused_ops.core.checks import check_choice
from fused_ops.core.initialise import init_linear
from fused_ops.models.arguments import POOLS, check_classifier, check_image

SCHEDULES = ("restart", "cumulative")


def drop_path_rates(rate: float, depths: Sequence[int], schedule: str = "restart") -> list[list[float]]:
    """Drop path probability of every block, per stage.

    The rates rise linearly from 0 to ``rate`` over the sum of the depths. ``"cumulative"`` runs through them
    from the first block to the last. ``"restart"`` starts from 0 in every stage.

    Raises:
        ValueError: for another schedule.
    """
    check_choice("drop_path_schedule", schedule, SCHEDULES)
    last = max(sum(depths) - 1, 1)
    rates = [rate * i / last for i in range(sum(depths))]
    starts = [0 if schedule == "restart" else sum(depths[:i]) for i in range(len(depths))]
    return [rates[start : start + depth] for start, depth in zip(starts, depths, strict=True)]


def check_heads(dim: int, num_heads: int) -> None:
    """Refuse a number of heads that does not divide the channels.

    Raises:
        ValueError: with both numbers.
    """
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads must divide the {dim} channels, got {num_heads}")


def init_conv_fan_out(module: nn.Module) -> None:
    """Convolutions: normal with variance 2 / fan_out, where fan_out counts one group; zero bias."""
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2.0 / fan_out) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def resize_position_table(table: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Bilinear resize of learned positions (1, Hg*Wg, C), row-major, to another grid (1, H*W, C)."""
    if grid == size:
        return table
    maps = table.unflatten(1, grid).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, size, mode="bilinear", align_corners=False)
    return maps.permute(0, 2, 3, 1).flatten(1, 2)


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of every position of a map (B, C, H, W); its tokens are a view."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Mlp(nn.Module):
    """Linear, exact GELU, Linear over the last dimension, with dropout after both."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0, **factory: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, **factory)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim, **factory)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class BlockSequence(nn.Sequential):
    """Blocks one after the other that all need some constants besides, such as the grid of their tokens."""

    def forward(self, x: Any, *constants: Any) -> Any:
        for block in self:
            x = block(x, *constants)
        return x


class TokenPool(nn.Module):
    """Tokens (B, P + N, C) to one row (B, C): the first token, the mean of the last N, or all as they are.

    Args:
        pool_type: ``token``, ``avg``, or ``""`` for all tokens.
        prefix: P, the tokens that are no positions of a map.
    """

    def __init__(self, pool_type: str, prefix: int = 0) -> None:
        super().__init__()
        self.pool_type = pool_type
        self.prefix = prefix

    def feat_mult(self) -> int:
        """Width of the result as a multiple of C."""
        return 1

    def forward(self, x: Tensor) -> Tensor:
        # A pruned model hands on the map of a stage.
        if not self.pool_type or x.ndim != 3:
            return x
        return x[:, 0] if self.pool_type == "token" else x[:, self.prefix :].mean(1)

    def extra_repr(self) -> str:
        return f"pool_type={self.pool_type!r}, prefix={self.prefix}"


class StagedBackbone(nn.Module):
    """A backbone of stages with a classifier, under timm's contract.

    Images (B, in_chans, H, W) of any size from the total stride on; NCHW or channels_last. Feature maps come
    back in the layout of the image; inside, maps are channels_last.

    A subclass builds its modules, calls :meth:`_add_stage` for every stage in order, sets ``head_drop``, ends
    with :meth:`_init_weights` and :meth:`_set_classifier`, and defines

    * :meth:`_begin`, from the image to what the first stage takes,
    * :meth:`_stage`, one stage, from state to state,
    * :meth:`_stage_map`, the map (B, C, H, W) in a state (as it stands: the state is the map),
    * :meth:`_final`, the last state to what ``forward_features`` returns (as it stands: the norm's output),
    * :meth:`_stage_modules`, the names of what belongs to a stage alone,
    * :meth:`_init_weights`, what differs from PyTorch's own initialisation,
    * ``group_matcher``.

    Args:
        in_chans: channels of the image.
    """

    # The checkpoint reader asks the configuration for this name, so both must say the same.
    classifier_name = "head"
    pools: tuple[str, ...] = POOLS

    def __init__(self, in_chans: int) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.num_stages = 0
        self.num_features = in_chans
        self.total_stride = 1
        self.grad_checkpointing = False
        self.feature_info: list[dict[str, Any]] = []

    def _add_stage(self, channels: int, stride: int, module: str) -> None:
        """Record the next stage: channels of its map, its stride and the module whose output the map is."""
        self.num_stages += 1
        self.num_features = channels
        self.total_stride *= stride
        self.feature_info.append({"num_chs": channels, "reduction": self.total_stride, "module": module})

    def _begin(self, x: Tensor) -> Any:
        """Image, channels_last, to what the first stage takes."""
        return x

    def _stage(self, state: Any, index: int) -> Any:
        """Stage ``index`` (from 0)."""
        raise NotImplementedError

    def _stage_map(self, state: Any, index: int) -> Tensor:
        """The map (B, C, H, W) that stage ``index`` hands to a dense head."""
        return state

    def _final(self, state: Any) -> Tensor:
        """What ``forward_features`` makes of the last stage's result."""
        return self.norm(state)

    def _normed_map(self, state: Any, index: int) -> Tensor:
        """The map of a stage, of the last one after the final norm."""
        return self._final(state) if index == len(self.feature_info) - 1 else self._stage_map(state, index)

    def _finish(self, state: Any) -> Tensor:
        """The result of the stages; a pruned model has no end but the map of its last stage."""
        pruned = self.num_stages < len(self.feature_info)
        return self._stage_map(state, self.num_stages - 1) if pruned else self._final(state)

    def _stage_modules(self, index: int) -> tuple[str, ...]:
        """Names of the modules and parameters that only stage ``index`` and the way to it use."""
        raise NotImplementedError

    def _tail_modules(self) -> tuple[str, ...]:
        """Names of the modules between the last stage and the pooling."""
        return ("norm",)

    def _init_weights(self) -> None:
        """Initialise what the system initialises otherwise than PyTorch does."""

    def _create_pool(self, global_pool: str) -> nn.Module:
        """Pooling of what ``forward_features`` returns, with ``feat_mult()`` and ``pool_type``."""
        return SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))

    def _init_classifier(self, head: nn.Module) -> None:
        init_linear(head)

    def _set_classifier(self, num_classes: int, global_pool: str, factory: dict[str, Any]) -> None:
        check_classifier(num_classes, global_pool, self.pools)
        self.num_classes = num_classes
        self.global_pool = self._create_pool(global_pool)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        head = nn.Linear(self.head_hidden_size, num_classes, **factory) if num_classes else nn.Identity()
        self._init_classifier(head)
        setattr(self, self.classifier_name, head)
        self.global_pool.train(self.training)
        head.train(self.training)

    def reset_parameters(self) -> None:
        """Initialise all parameters and statistics again, for instance after ``to_empty``."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        self._init_weights()
        self._init_classifier(self.get_classifier())

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Nothing by name. One-dimensional parameters are the optimizer factory's business, as usual."""
        return set()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input for the backward pass. Running statistics are updated once."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.get_submodule(self.classifier_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one; ``global_pool`` stays as it is where it is None."""
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self._set_classifier(num_classes, pool, get_device_dtype(self))

    def _run_blocks(self, blocks: nn.Sequential, x: Any, *constants: Any) -> Any:
        """A stage's blocks one after the other, each checkpointed where that is set.

        Without checkpointing the stage is called as a whole, so that hooks on it are called too.
        """
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return blocks(x, *constants)
        for block in blocks:
            x = checkpoint_block(block, x, *constants)
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        **inputs: Any,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps of chosen stages.

        Args:
            x: image (B, in_chans, H, W).
            indices: the last n stages, or a list of stages (from 0, negative from the end); None is all.
            norm: apply the final norm to the last stage's map. The others have no norm and stay raw.
            stop_early: skip the stages after the last one asked for. The first returned value is then the
                map of that stage, without the final norm.
            output_fmt: ``NCHW`` or ``NHWC`` shape of the intermediate maps.
            intermediates_only: return the list alone.
            **inputs: what the system takes besides the image, if anything.

        Returns:
            The list, or the pair of what ``forward_features`` returns and the list.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be NCHW or NHWC, got {output_fmt!r}")
        check_image(x, self.in_chans, self.total_stride)
        channels_last = is_channels_last(x)
        take, last_taken = feature_take_indices(self.num_stages, indices)
        last = self.num_stages - 1
        intermediates = []
        state = self._begin(to_channels_last(x), **inputs)
        for index in range((last_taken if stop_early else last) + 1):
            state = self._stage(state, index)
            if index in take:
                taken = self._normed_map(state, index) if norm else self._stage_map(state, index)
                if output_fmt == "NHWC":
                    intermediates.append(taken.permute(0, 2, 3, 1))
                else:
                    intermediates.append(like_input(taken, channels_last))
        if intermediates_only:
            return intermediates
        result = self._finish(state) if index == last else self._stage_map(state, index)
        return _like_image(result, channels_last), intermediates

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last one of ``indices``, and with them the final norm and the head.

        Args:
            indices: as in :meth:`forward_intermediates`.
            prune_norm: remove the final norm even if the last stage stays.
            prune_head: remove the classifier even if the last stage stays.

        Returns:
            The stages asked for, as indices from 0.
        """
        take, last_taken = feature_take_indices(self.num_stages, indices)
        shortened = last_taken < self.num_stages - 1
        if shortened or prune_norm:
            for name in self._tail_modules():
                parent, _, child = name.rpartition(".")
                setattr(self.get_submodule(parent), child, nn.Identity())
        for index in range(last_taken + 1, self.num_stages):
            for name in self._stage_modules(index):
                parent, _, child = name.rpartition(".")
                delattr(self.get_submodule(parent), child)
        self.num_stages = last_taken + 1
        self.total_stride = self.feature_info[last_taken]["reduction"]
        if shortened:
            self.num_features = self.feature_info[last_taken]["num_chs"]
        if shortened or prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Image (B, in_chans, H, W) to the map (B, num_features, h, w) after the final norm."""
        check_image(x, self.in_chans, self.total_stride)
        channels_last = is_channels_last(x)
        state = self._begin(to_channels_last(x))
        for index in range(self.num_stages):
            state = self._stage(state, index)
        return _like_image(self._finish(state), channels_last)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, drop out and classify what :meth:`forward_features` returns."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _like_image(x: Tensor, channels_last: bool) -> Tensor:
    """A map in the layout of the image; tokens as they are."""
    return like_input(x, channels_last) if x.ndim == 4 else x


def build_backbone(
    model_class: type[nn.Module],
    variant: str,
    pretrained: bool,
    defaults: dict[str, Any],
    kwargs: dict[str, Any],
) -> nn.Module:
    """Build a model through timm: ``defaults`` of the variant under the caller's ``kwargs``.

    ``features_only`` takes the maps of ``out_indices``, all stages unless given.
    """
    arguments = {**defaults, **kwargs}
    feature_cfg: dict[str, Any] = {"feature_cls": "getter"}
    if "out_indices" in arguments:
        feature_cfg["out_indices"] = arguments.pop("out_indices")
    elif "depths" in arguments:
        feature_cfg["out_indices"] = tuple(range(len(arguments["depths"])))
    return build_model_with_cfg(model_class, variant, pretrained, feature_cfg=feature_cfg, **arguments)


def classification_cfg(**kwargs: Any) -> dict[str, Any]:
    """timm's record of a classifier of 224x224 ImageNet images, with what ``kwargs`` add or change."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head",
        "fixed_input_size": False,
        **kwargs,
    }
