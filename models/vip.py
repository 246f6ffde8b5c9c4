"""ViP: visual parser.

Sun et al., "Visual Parser: Representing Part-whole Hierarchies with Transformers", 2021 (arXiv 2107.05790).
Public code: kevin-ssy/ViP (PyTorch), and yuexy/ViP-Object-Detection for the dense form. Only the code was
available in full, so everything here follows it, without a comparison with the paper; the published sizes
come out. ViP-Mobile is in the code alone. Nothing is inferred.

The network carries two streams: a map, and a few tokens ("parts") that read from the whole map and are read
by every position of it. Not to be confused with Vision Permutator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from fused_ops import depthwise_conv
from fused_ops.blocks.layout import to_channels_last
from fused_ops.core.checks import check_choice
from fused_ops.core.drop_path import DropPath
from fused_ops.core.initialise import init_linear
from fused_ops.feed_forward.module import mlp_on_modules
from fused_ops.models.arguments import check_lengths
from fused_ops.models.common import (
    BlockSequence,
    ChannelLayerNorm,
    StagedBackbone,
    TokenPool,
    build_backbone,
    check_heads,
    classification_cfg,
    drop_path_rates,
)
from fused_ops.models.layouts import same_names_layout
from fused_ops.models.registry import ModelInfo, System, register_system

__all__ = ["AnyAttention", "ViP"]

HEADS = ("encoder", "conv")


class RelativeLogits(nn.Module):
    """Learned logits of relative positions in a square window, one table per axis, shared by the heads.

    Half of a query's channels reads the vertical offset, the other half the horizontal one.
    """

    def __init__(self, window: int, head_dim: int, **factory: Any) -> None:
        super().__init__()
        self.window = window
        self.rel_emb_h = nn.Parameter(torch.empty(2 * window - 1, head_dim // 2, **factory))
        self.rel_emb_w = nn.Parameter(torch.empty(2 * window - 1, head_dim // 2, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.rel_emb_h, std=0.02)
        nn.init.trunc_normal_(self.rel_emb_w, std=0.02)

    def forward(self, query: Tensor) -> Tensor:
        """Queries (B, heads, P·P, d), row-major, to logits (B, heads, P·P, P·P)."""
        window = self.window
        line = torch.arange(window, device=query.device)
        # Row i holds the embeddings of the offsets from i to all positions of the axis.
        offsets = line[None, :] - line[:, None] + window - 1
        vertical, horizontal = query.unflatten(2, (window, window)).chunk(2, dim=-1)
        rows = vertical @ self.rel_emb_h[offsets].transpose(1, 2)
        columns = horizontal.transpose(2, 3) @ self.rel_emb_w[offsets].transpose(1, 2)
        logits = rows.unsqueeze(-1) + columns.transpose(2, 3).unsqueeze(-2)
        return logits.flatten(4, 5).flatten(2, 3)


class AnyAttention(nn.Module):
    """Multi-head attention of any queries, keys and values, each behind a LayerNorm of its own.

    Projections of queries, keys and values have no bias, the output's has. Positions are added to queries
    and keys before their norms, the same for every head.

    Args:
        dim: channels; ``num_heads`` must divide them.
        num_heads: attention heads; channels are [head][d].

    Shapes: query (B, Nq, dim), key and value (B, Nk, dim), positions (1, N, 1, d), mask (B, Nk), True for
    keys that nobody may read, query_mask (B, Nq), True for queries that read nothing. A query that reads
    nothing gets the bias of the output projection. Output (B, Nq, dim).
    """

    def __init__(self, dim: int, num_heads: int, **factory: Any) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.norm_q = nn.LayerNorm(dim, **factory)
        self.norm_k = nn.LayerNorm(dim, **factory)
        self.norm_v = nn.LayerNorm(dim, **factory)
        self.to_q = nn.Linear(dim, dim, bias=False, **factory)
        self.to_k = nn.Linear(dim, dim, bias=False, **factory)
        self.to_v = nn.Linear(dim, dim, bias=False, **factory)
        self.proj = nn.Linear(dim, dim, **factory)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_position: Tensor | None = None,
        key_position: Tensor | None = None,
        mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        relative: RelativeLogits | None = None,
    ) -> Tensor:
        """``relative`` adds logits to those of queries and keys, inside the scaling by 1 / sqrt(d)."""
        query = self._heads(self.to_q(self.norm_q(self._placed(query, query_position))))
        key = self._heads(self.to_k(self.norm_k(self._placed(key, key_position))))
        value = self._heads(self.to_v(self.norm_v(value)))
        bias = None if relative is None else relative(query) * self.scale
        if mask is None:
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        else:
            logits = query @ key.transpose(-2, -1) * self.scale
            logits = logits if bias is None else logits + bias
            hidden = mask[:, None, None]
            # Not -inf: the softmax of a row of nothing else would be NaN.
            weights = logits.masked_fill(hidden, torch.finfo(logits.dtype).min).softmax(-1)
            out = weights.masked_fill(hidden, 0.0) @ value
        if query_mask is not None:
            out = out.masked_fill(query_mask[:, None, :, None], 0.0)
        return self.proj(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _placed(self, x: Tensor, position: Tensor | None) -> Tensor:
        if position is None:
            return x
        return (x.unflatten(-1, (self.num_heads, -1)) + position).flatten(2)


class FeedForward(nn.Module):
    """x + drop_path(fc2(GELU(fc1(LayerNorm(x))))), in one operator."""

    def __init__(self, dim: int, hidden_dim: int, **factory: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, **factory)
        self.fc1 = nn.Linear(dim, hidden_dim, **factory)
        self.fc2 = nn.Linear(hidden_dim, dim, **factory)

    def forward(self, x: Tensor, drop_path: DropPath) -> Tensor:
        factors = drop_path.factors(x)
        return mlp_on_modules(x, self.norm, self.fc1, self.fc2, drop_path=factors, residual=x)


class PartMixing(nn.Module):
    """LayerNorm, then a linear map from all parts to all parts, the same for every channel: (B, n, C)."""

    def __init__(self, dim: int, num_parts: int, **factory: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, **factory)
        self.linear = nn.Conv1d(num_parts, num_parts, 1, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


class Encoder(nn.Module):
    """Parts (B, n, C) read from the features (B, N, C), mix with each other, and pass a feed-forward
    network."""

    def __init__(
        self, dim: int, num_heads: int, num_parts: int, drop_path: float, feed_forward: bool, **factory: Any
    ) -> None:
        super().__init__()
        self.enc_attn = AnyAttention(dim, num_heads, **factory)
        self.reason = PartMixing(dim, num_parts, **factory)
        if feed_forward:
            self.enc_ffn = FeedForward(dim, dim, **factory)
        self.drop_path = DropPath(drop_path)

    def forward(self, parts: Tensor, x: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        parts = parts + self.drop_path(self.enc_attn(parts, x, x, query_position=position, mask=mask))
        parts = parts + self.reason(parts)
        if hasattr(self, "enc_ffn"):
            parts = self.enc_ffn(parts, self.drop_path)
        return parts


class Decoder(nn.Module):
    """Every position of the windows (B, w, P·P, C) reads from the parts, then from its own window."""

    def __init__(
        self, dim: int, num_heads: int, window: int, mlp_ratio: float, drop_path: float, **factory: Any
    ) -> None:
        super().__init__()
        hidden_dim = int(dim * mlp_ratio)
        self.attn1 = AnyAttention(dim, num_heads, **factory)
        self.ffn1 = FeedForward(dim, hidden_dim, **factory)
        self.attn2 = AnyAttention(dim, num_heads, **factory)
        self.rel_pos = RelativeLogits(window, dim // num_heads, **factory)
        self.ffn2 = FeedForward(dim, hidden_dim, **factory)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, parts: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        windows = (x.shape[0], x.shape[1])
        x = x.flatten(1, 2)
        x = x + self.drop_path(self.attn1(x, parts, parts, key_position=position, query_mask=mask))
        x = self.ffn1(x, self.drop_path)
        # Stochastic depth drops whole samples, so it must see them and not their windows.
        inside = x.unflatten(1, (windows[1], -1)).flatten(0, 1)
        inside_mask = None if mask is None else mask.unflatten(1, (windows[1], -1)).flatten(0, 1)
        attended = self.attn2(inside, inside, inside, mask=inside_mask, relative=self.rel_pos)
        attended = attended.unflatten(0, windows).flatten(1, 2)
        if mask is not None:
            attended = attended.masked_fill(mask[..., None], 0.0)
        x = x + self.drop_path(attended)
        x = self.ffn2(x, self.drop_path)
        return x.unflatten(1, (windows[1], -1))


class Block(nn.Module):
    """Encoder, then decoder, on windows (B, w, P·P, C) and parts (B, n, C)."""

    def __init__(
        self,
        dim: int,
        encoder_heads: int,
        decoder_heads: int,
        num_parts: int,
        window: int,
        mlp_ratio: float,
        drop_path: float,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(dim, encoder_heads, num_parts, drop_path, True, **factory)
        self.decoder = Decoder(dim, decoder_heads, window, mlp_ratio, drop_path, **factory)

    def forward(
        self,
        streams: tuple[Tensor, Tensor],
        query_position: Tensor,
        key_position: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        x, parts = streams
        parts = self.encoder(parts, x.flatten(1, 2), query_position, mask)
        return self.decoder(x, parts, key_position, mask), parts


class FeatureProjection(nn.Module):
    """3x3 depthwise convolution with a stride, and a linear map without bias: (B, C, H, W) to (B, h, w,
    dim)."""

    def __init__(self, in_dim: int, dim: int, stride: int, **factory: Any) -> None:
        super().__init__()
        self.to_token = nn.Conv2d(in_dim, in_dim, 3, stride, padding=1, groups=in_dim, **factory)
        self.proj = nn.Linear(in_dim, dim, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        conv = self.to_token
        x = depthwise_conv(x, conv.weight, conv.bias, stride=conv.stride, padding=conv.padding)
        return self.proj(x.permute(0, 2, 3, 1))


class Stage(nn.Module):
    """Entry of both streams, and blocks on windows of the map.

    Map (B, in_dim, H, W) and parts (B, in_parts, in_dim) to map (B, dim, H/stride, W/stride), rounded up,
    and parts (B, num_parts, dim). Windows that reach over the edge are filled with zeros, which without a
    mask take part as keys, as in the public classification code.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        in_parts: int,
        num_parts: int,
        stride: int,
        window: int,
        encoder_heads: int,
        decoder_heads: int,
        mlp_ratio: float,
        drop_paths: Sequence[float],
        last_encoder: bool,
        **factory: Any,
    ) -> None:
        super().__init__()
        check_heads(dim, encoder_heads)
        check_heads(dim, decoder_heads)
        self.window = window
        self.rpn_qpos = nn.Parameter(torch.empty(1, num_parts, 1, dim // encoder_heads, **factory))
        self.rpn_kpos = nn.Parameter(torch.empty(1, num_parts, 1, dim // decoder_heads, **factory))
        self.proj = FeatureProjection(in_dim, dim, stride, **factory)
        self.proj_norm = nn.LayerNorm(dim, **factory)
        change = nn.Identity()
        if num_parts != in_parts:
            change = nn.Conv1d(in_parts, num_parts, 1, bias=False, **factory)
        self.proj_token = nn.Sequential(
            change, nn.Linear(in_dim, dim, **factory), nn.LayerNorm(dim, **factory)
        )
        self.blocks = BlockSequence(
            *(
                Block(dim, encoder_heads, decoder_heads, num_parts, window, mlp_ratio, rate, **factory)
                for rate in drop_paths
            )
        )
        self.last_enc = nn.Identity()
        if last_encoder:
            self.last_enc = Encoder(dim, encoder_heads, num_parts, drop_paths[-1], False, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The positions of the parts; the submodules are not touched."""
        nn.init.trunc_normal_(self.rpn_qpos, std=0.02)
        nn.init.trunc_normal_(self.rpn_kpos, std=0.02)

    def forward(
        self, x: Tensor, parts: Tensor, mask: Tensor | None, run: Callable[..., tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """``mask`` (B, H0, W0): 1 where the image has padding; ``run(blocks, ...)`` runs the blocks."""
        x = self.proj_norm(self.proj(x))
        size = (x.shape[1], x.shape[2])
        hidden = None
        if mask is not None:
            hidden = F.interpolate(mask[:, None].to(x.dtype), size)[:, 0, :, :, None]
            hidden = self._windows(hidden, 1.0).flatten(1) > 0.5
        streams = (self._windows(x), self.proj_token(parts))
        windows, parts = run(self.blocks, streams, self.rpn_qpos, self.rpn_kpos, hidden)
        # Pruning the end of the model leaves the parts as the last block made them.
        if not isinstance(self.last_enc, nn.Identity):
            # It reads the windows and not the map: what fills windows up takes part here too.
            parts = self.last_enc(parts, windows.flatten(1, 2), self.rpn_qpos, hidden)
        return self._map(windows, size), parts

    def _windows(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """(B, H, W, C) to (B, w, P·P, C), windows and their positions row-major."""
        window = self.window
        below, right = -x.shape[1] % window, -x.shape[2] % window
        x = F.pad(x, (0, 0, 0, right, 0, below), value=fill)
        x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def _map(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, w, P·P, C) to the map (B, C, H, W) without what was filled in."""
        window = self.window
        across = -(-size[1] // window)
        x = x.unflatten(2, (window, window)).unflatten(1, (-1, across))
        x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return x[:, : size[0], : size[1]].permute(0, 3, 1, 2)


class ViP(StagedBackbone):
    """ViP backbone with a classifier.

    Images (B, in_chans, H, W) of any size from the total stride (32) on; NCHW or channels_last. Feature
    maps come back in the layout of the image.

    ``forward_features`` returns parts (B, n, dim) where ``head`` is ``encoder``, and a map (B, dim, H/32,
    W/32) where it is ``conv``. ``forward_intermediates`` takes ``image_sizes`` besides, one (height, width)
    per image: positions below and to the right of it are padding and are read by nobody.

    Args:
        in_chans: channels of the image.
        num_classes: 0 for no classifier.
        global_pool: ``avg``, ``""`` for none (then ``num_classes`` must be 0), and with ``head="conv"`` also
            ``max``, ``avgmax`` and ``catavgmax``.
        depths, dims, num_parts, encoder_heads, decoder_heads, windows, strides: per stage: blocks,
            channels, parts, heads of both directions, side of the windows, stride of the entry.
        stem_dim: channels of the stem.
        mlp_ratio: hidden width of the decoder's feed-forward networks as a multiple of the channels.
        head: ``encoder`` classifies the mean of the parts after one more encoder, ``conv`` the mean of the
            map after a 1x1 convolution.
        output_norm: a LayerNorm on every stage's feature map, as in the dense form of the public code. It
            does not change what the classifier computes.
        drop_rate: dropout before the classifier.
        drop_path_rate: largest stochastic depth probability, rising linearly over all blocks; published: 0
            for mobile, 0.1 for tiny and small, 0.2 for medium, 0.3 for base.

    Raises:
        ValueError: for arguments that do not fit together and for images that are too small.
    """

    classifier_name = "last_fc"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (1, 1, 2, 1),
        dims: Sequence[int] = (64, 128, 256, 512),
        num_parts: Sequence[int] = (32, 32, 32, 32),
        encoder_heads: Sequence[int] = (1, 2, 4, 8),
        decoder_heads: Sequence[int] = (1, 2, 4, 8),
        windows: Sequence[int] = (8, 7, 7, 7),
        strides: Sequence[int] = (1, 2, 2, 2),
        stem_dim: int = 64,
        mlp_ratio: float = 3.0,
        head: str = "encoder",
        output_norm: bool = False,
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
            num_parts=num_parts,
            encoder_heads=encoder_heads,
            decoder_heads=decoder_heads,
            windows=windows,
            strides=strides,
        )
        check_choice("head", head, HEADS)
        self.head_type = head
        self.output_norm = output_norm
        if head == "encoder":
            self.pools = ("avg", "")
        self.conv1 = nn.Conv2d(in_chans, stem_dim, 7, stride=2, padding=3, bias=False, **factory)
        self.norm1 = nn.BatchNorm2d(stem_dim, **factory)
        self.pool1 = nn.MaxPool2d(3, stride=2, padding=1)
        self.rpn_tokens = nn.Parameter(torch.empty(1, num_parts[0], stem_dim, **factory))
        rates = drop_path_rates(drop_path_rate, depths, "cumulative")
        in_dim, in_parts, last = stem_dim, num_parts[0], len(depths) - 1
        for i, dim in enumerate(dims):
            stage = Stage(
                in_dim,
                dim,
                in_parts,
                num_parts[i],
                strides[i],
                windows[i],
                encoder_heads[i],
                decoder_heads[i],
                mlp_ratio,
                rates[i],
                last_encoder=head == "encoder" and i == last,
                **factory,
            )
            self.add_module(f"layer_{i}", stage)
            if output_norm:
                self.add_module(f"trans_norm_{i}", ChannelLayerNorm(dim, **factory))
            self._add_stage(dim, strides[i] if i else 4 * strides[i], f"layer_{i}")
            in_dim, in_parts = dim, num_parts[i]
        if head == "conv":
            self.last_linear = nn.Conv2d(in_dim, in_dim, 1, bias=False, **factory)
            self.last_norm = nn.BatchNorm2d(in_dim, **factory)
        self.head_drop = nn.Dropout(drop_rate)
        self._init_weights()
        self._set_classifier(num_classes, global_pool, factory)

    def _init_weights(self) -> None:
        for module in self.modules():
            init_linear(module)
            if isinstance(module, nn.Conv1d | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.rpn_tokens, std=0.02)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise rates: per stage if ``coarse``, otherwise per block."""
        last = (r"^(?:layer_\d+\.last_enc|last_linear|last_norm|trans_norm_\d+)\.", (99999,))
        block = [] if coarse else [(r"^layer_(\d+)\.blocks\.(\d+)\.", None)]
        return {
            "stem": r"^(?:conv1|norm1)\.|^rpn_tokens$",
            "blocks": [last, *block, (r"^layer_(\d+)\.", None)],
        }

    def _create_pool(self, global_pool: str) -> nn.Module:
        return TokenPool(global_pool) if self.head_type == "encoder" else super()._create_pool(global_pool)

    def _begin(
        self, x: Tensor, image_sizes: Sequence[tuple[int, int]] | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Image to map, parts and the mask of the padding (B, H, W)."""
        mask = None
        if image_sizes is not None:
            if len(image_sizes) != x.shape[0]:
                raise ValueError(
                    f"image_sizes must have {x.shape[0]} entries, one per image, got {image_sizes}"
                )
            mask = x.new_ones((x.shape[0], *x.shape[-2:]))
            for i, (height, width) in enumerate(image_sizes):
                mask[i, :height, :width] = 0.0
        parts = self.rpn_tokens.expand(x.shape[0], -1, -1)
        return self.pool1(F.gelu(self.norm1(self.conv1(x)))), parts, mask

    def _stage(
        self, state: tuple[Tensor, Tensor, Tensor | None], index: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        x, parts, mask = state
        x, parts = self.get_submodule(f"layer_{index}")(to_channels_last(x), parts, mask, self._run_blocks)
        return x, parts, mask

    def _stage_map(self, state: tuple[Tensor, Tensor, Tensor | None], index: int) -> Tensor:
        return self.get_submodule(f"trans_norm_{index}")(state[0]) if self.output_norm else state[0]

    def _normed_map(self, state: tuple[Tensor, Tensor, Tensor | None], index: int) -> Tensor:
        is_last = index == len(self.feature_info) - 1
        if is_last and self.head_type == "conv":
            return self._final(state)
        return self._stage_map(state, index)

    def _final(self, state: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
        x, parts, _ = state
        if self.head_type == "conv":
            return F.gelu(self.last_norm(self.last_linear(x)))
        return F.gelu(parts)

    def _stage_modules(self, index: int) -> tuple[str, ...]:
        return (f"layer_{index}", f"trans_norm_{index}") if self.output_norm else (f"layer_{index}",)

    def _tail_modules(self) -> tuple[str, ...]:
        if self.head_type == "conv":
            return "last_linear", "last_norm"
        return (f"layer_{self.num_stages - 1}.last_enc",)


def _create_vip(
    variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]
) -> nn.Module:
    return build_backbone(ViP, variant, pretrained, defaults, kwargs)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return classification_cfg(first_conv="conv1", classifier="last_fc", **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "vip_mobile.untrained": _cfg(),
        "vip_tiny.untrained": _cfg(),
        "vip_small.untrained": _cfg(),
        "vip_medium.untrained": _cfg(),
        "vip_base.untrained": _cfg(),
        "vip_test.untrained": _cfg(num_classes=10, input_size=(3, 64, 64), pool_size=(2, 2), crop_pct=1.0),
    }
)


@register_model
def vip_mobile(pretrained: bool = False, **kwargs: Any) -> ViP:
    """ViP-Mobile as in kevin-ssy/ViP; no results are published."""
    defaults = {
        "depths": (1, 1, 1, 1),
        "dims": (48, 96, 192, 384),
        "num_parts": (16, 16, 16, 32),
        "drop_path_rate": 0.0,
    }
    return _create_vip("vip_mobile", pretrained, defaults, kwargs)


@register_model
def vip_tiny(pretrained: bool = False, **kwargs: Any) -> ViP:
    """ViP-Tiny as in kevin-ssy/ViP."""
    defaults = {"depths": (1, 1, 2, 1), "dims": (64, 128, 256, 512), "drop_path_rate": 0.1}
    return _create_vip("vip_tiny", pretrained, defaults, kwargs)


@register_model
def vip_small(pretrained: bool = False, **kwargs: Any) -> ViP:
    """ViP-Small as in kevin-ssy/ViP."""
    defaults = {
        "depths": (1, 1, 3, 1),
        "dims": (96, 192, 384, 768),
        "num_parts": (64, 64, 64, 64),
        "encoder_heads": (1, 3, 6, 12),
        "decoder_heads": (3, 6, 12, 24),
        "drop_path_rate": 0.1,
    }
    return _create_vip("vip_small", pretrained, defaults, kwargs)


@register_model
def vip_medium(pretrained: bool = False, **kwargs: Any) -> ViP:
    """ViP-Medium as in kevin-ssy/ViP."""
    defaults = {
        "depths": (1, 1, 8, 1),
        "dims": (96, 192, 384, 768),
        "num_parts": (64, 64, 64, 128),
        "encoder_heads": (1, 3, 6, 12),
        "decoder_heads": (3, 6, 12, 24),
        "head": "conv",
        "drop_path_rate": 0.2,
    }
    return _create_vip("vip_medium", pretrained, defaults, kwargs)


@register_model
def vip_base(pretrained: bool = False, **kwargs: Any) -> ViP:
    """ViP-Base as in kevin-ssy/ViP."""
    defaults = {
        "depths": (1, 1, 8, 1),
        "dims": (128, 256, 512, 1024),
        "num_parts": (64, 64, 128, 128),
        "encoder_heads": (1, 4, 8, 16),
        "decoder_heads": (4, 8, 16, 32),
        "head": "conv",
        "drop_path_rate": 0.3,
    }
    return _create_vip("vip_base", pretrained, defaults, kwargs)


@register_model
def vip_test(pretrained: bool = False, **kwargs: Any) -> ViP:
    """A very small ViP for 64x64 images, to test training with. Not published."""
    defaults = {
        "depths": (1, 1, 1, 1),
        "dims": (16, 32, 48, 64),
        "num_parts": (8, 8, 8, 12),
        "encoder_heads": (1, 2, 2, 4),
        "decoder_heads": (2, 2, 4, 4),
        "windows": (4, 4, 4, 3),
        "stem_dim": 16,
        "drop_path_rate": 0.0,
    }
    return _create_vip("vip_test", pretrained, defaults, kwargs)


def _info(params: int, macs: int, published: tuple[float, float, float]) -> ModelInfo:
    millions, billions, top1 = published
    return ModelInfo(
        params=params,
        macs=macs,
        published_params=millions * 1e6,
        published_macs=billions * 1e9,
        published_top1=top1,
        source="arXiv 2107.05790, ImageNet table",
    )


SYSTEM = register_system(
    System(
        name="ViP",
        paper="Sun et al., Visual Parser: Representing Part-whole Hierarchies with Transformers, "
        "arXiv 2107.05790",
        model_class=ViP,
        preset="vip",
        fused=("depthwise", "feed_forward"),
        models={
            "vip_mobile": ModelInfo(
                params=6_329_640, macs=834_661_824, note="in the public code alone: no results are published"
            ),
            "vip_tiny": _info(12_770_280, 1_674_244_352, (12.8, 1.7, 79.0)),
            "vip_small": _info(32_128_872, 4_509_538_176, (32.1, 4.5, 82.1)),
            "vip_medium": _info(49_643_272, 7_981_729_152, (49.6, 8.0, 83.3)),
            "vip_base": _info(87_844_040, 14_957_756_928, (87.8, 15.0, 83.6)),
            "vip_test": ModelInfo(
                params=240_742,
                macs=7_939_712,
                input_size=(3, 64, 64),
                note="not published: a very small model for tests",
            ),
        },
        layouts=(same_names_layout("kevin-ssy/ViP"),),
    )
)
