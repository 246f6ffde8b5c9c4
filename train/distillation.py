"""EMA distillation: the averaged weights teach the weights that they average.

Yao et al., "HIRI-ViT: Scaling Vision Transformer with High Resolution Inputs", TPAMI 2024 (arXiv
2403.11999), section 4.5. The teacher sees the images before they are mixed, without its final average
pooling, so that it says class probabilities at every position. These are mixed by the mask that mixed the
images, averaged over the positions, and made a part of the target. Nothing is added at inference.

Inferred, since the text leaves it open: pairing by the reversed batch, the mask averaged over each position's
area, the teacher in evaluation mode, the defaults of the settings.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.mixup import one_hot
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from .settings import Settings, UsageError

# What forward_features may return, and the dimensions of its positions. Tokens are none: they may be parts.
POSITIONS = {"NCHW": (2, 3), "NHWC": (1, 2)}


class RatioWarmupEma(ModelEmaV3):
    """timm's averaged model with the decay min(decay, (1 + t) / (10 + t)) at update t, counted from 0."""

    def get_decay(self, step: int | None = None) -> float:
        """The decay of update `step`, counted from 1 as timm does."""
        return self.decay if step is None else min(self.decay, step / (step + 9))


def mix_with_mask(mix: Mixup, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mix images in place, and tell how.

    timm keeps ratios and boxes to itself. It mixes image b with image B - 1 - b, so a marker that is 1 for
    one of the two and 0 for the other, mixed with the same random numbers, shows both in every mode.

    Args:
        mix: timm's mixing.
        images: (B, C, H, W) floating point, B even.
        targets: (B) class numbers.

    Returns:
        Mixed images, mixed targets (B, K), and the mask (B, H, W): the share of every pixel that comes from
        the image itself, the rest being its partner's. Its mean is the weight of the image's own label.
    """
    random_state = np.random.get_state()
    batch, _, height, width = images.shape
    images, mixed_targets = mix(images, targets)
    first = torch.arange(batch, device=images.device).view(-1, 1, 1, 1) < batch // 2
    marker = first.to(images.dtype).repeat(1, 1, height, width)
    np.random.set_state(random_state)
    marker, _ = mix(marker, targets)
    return images, mixed_targets, torch.where(first, marker, 1 - marker)[:, 0]


def teacher_target(logits: Tensor, mask: Tensor) -> Tensor:
    """The mean over positions of M P_a + (1 - M) P_b: steps 2 and 3 of section 4.5.

    Args:
        logits: (B, h, w, K) of the unmixed images; image b's partner is image B - 1 - b.
        mask: (B, H, W), the share of every pixel that is the image's own; averaged here to h x w.

    Returns:
        (B, K) float32 probabilities.
    """
    height, width = logits.shape[1:3]
    positions = height * width
    own = F.adaptive_avg_pool2d(mask.float(), (height, width)).flatten(1)
    # What image b contributes to its partner's target is weighed by the partner's mask.
    weights = torch.stack((own, 1 - own.flip(0)), 1) / positions
    probabilities = logits.flatten(1, 2).float().softmax(-1)
    to_own, to_partner = (weights @ probabilities).unbind(1)
    return to_own + to_partner.flip(0)


def soft_targets(targets: Tensor, num_classes: int, label_smoothing: float) -> Tensor:
    """Class numbers (B) as smoothed probabilities (B, K); probabilities as they are."""
    if targets.is_floating_point():
        return targets
    rest = label_smoothing / num_classes
    return one_hot(targets, num_classes, on_value=1 - label_smoothing + rest, off_value=rest)


def teacher_weight(settings: Settings, step: int, updates_per_epoch: int) -> float:
    """Weight of the teacher's target at an update (1 - alpha of the paper), rising to its setting."""
    warmup = settings.ema_distillation_warmup * updates_per_epoch
    return settings.ema_distillation * (min(1.0, step / warmup) if warmup else 1.0)


class Teacher:
    """The averaged model with its pooling removed: images (B, 3, H, W) to logits (B, h, w, K), no gradient.

    It shares the weights of `model`, which stays in evaluation mode: running statistics, no drop path.

    Raises:
        UsageError: if the model's head is no linear layer on the mean over positions.
    """

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self._model = model.eval().requires_grad_(False)
        layout = find_layout(model, settings)

        def logits(images: Tensor) -> Tensor:
            maps = model.forward_features(images)
            return model.get_classifier()(maps.permute(0, 2, 3, 1) if layout == "NCHW" else maps)

        self._logits = torch.compile(logits) if settings.compile else logits

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self._logits(images)

    def share_statistics(self) -> None:
        """Give every rank rank 0's running statistics; all else in the teacher is the same on every rank."""
        statistics = [buffer for buffer in self._model.buffers() if buffer.is_floating_point()]
        if not statistics:
            return
        together = torch.cat([buffer.flatten() for buffer in statistics])
        dist.broadcast(together, src=0)
        parts = together.split([buffer.numel() for buffer in statistics])
        for buffer, part in zip(statistics, parts, strict=True):
            buffer.copy_(part.view_as(buffer))


@torch.no_grad()
def find_layout(model: nn.Module, settings: Settings) -> str:
    """Where the positions are in what `model.forward_features` returns: a key of `POSITIONS`.

    Asked of the model itself, in evaluation mode, so that it holds for any model of timm's conventions.

    Raises:
        UsageError: if the classifier is no linear layer on the mean over them, which is what makes the mean
            of the positions' logits the model's logits.
    """

    def refuse(reason: str) -> UsageError:
        return UsageError(
            f"--ema-distillation {settings.ema_distillation}: {settings.model} {reason}; the model must have "
            "a linear layer on the mean over the positions of its last map"
        )

    for name in ("forward_features", "forward_head", "get_classifier"):
        if not hasattr(model, name):
            raise refuse(f"has no {name}()")
    classifier = model.get_classifier()
    if not isinstance(classifier, nn.Linear):
        raise refuse(f"has a classifier of class {type(classifier).__name__}")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, settings.img_size, settings.img_size, generator=generator)
    images = images.to(classifier.weight.device)
    features = model.forward_features(images)
    if not isinstance(features, Tensor) or features.ndim != 4:
        raise refuse("returns no map from forward_features()")
    # Noise, since maps of untrained models may be so even that any pooling looks like the mean.
    noise = torch.randn(features.shape, generator=generator).to(features)
    pooled = model.forward_head(noise, pre_logits=True)
    for layout, dimensions in POSITIONS.items():
        mean = noise.mean(dimensions)
        if mean.shape == pooled.shape and torch.allclose(pooled, mean, 1e-3, 1e-4):
            logits, expected = model(images), classifier(features.mean(dimensions))
            if torch.allclose(logits, expected, 1e-2, 1e-2 * expected.abs().max().item()):
                return layout
    raise refuse("has another head")
