"""What timm's users expect of every backbone, as checks that a model's tests call on small models.

``build(**kwargs)`` makes the model to check; it must take ``num_classes``, ``in_chans``, ``dtype`` and
``features_only``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn

from fused_ops.models import count_macs, count_params, create_model, load_checkpoint, official_state_dict
from fused_ops.models.registry import find_system

from . import golden

Build = Callable[..., nn.Module]


def image(height: int = 64, width: int = 96, batch: int = 2, channels: int = 3) -> Tensor:
    """The same image at every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, channels, height, width, generator=generator)


def check_counts(name: str, params: int, macs: float) -> None:
    """Parameters to the last digit and multiply-accumulates within half a percent; the table has both."""
    model = create_model(name, device="meta")
    info = find_system(name).models[name]
    assert count_params(model) == params == info.params
    counted = count_macs(model, info.input_size)
    assert counted == info.macs
    assert counted == pytest.approx(macs, rel=0.005)


def check_configuration(name: str) -> None:
    """The names in timm's record of a registered model lead to what they say."""
    model = create_model(name, device="meta")
    cfg = model.default_cfg
    assert timm.is_model(name)
    assert cfg["architecture"] == name
    assert cfg["input_size"] == find_system(name).models[name].input_size
    assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d)
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert model.num_classes == cfg["num_classes"]
    stride = model.feature_info[-1]["reduction"]
    assert cfg["pool_size"] == tuple(size // stride for size in cfg["input_size"][1:])
    for info in model.feature_info:
        model.get_submodule(info["module"])


def check_features(build: Build, channels: Sequence[int], strides: Sequence[int]) -> None:
    """features_only, out_indices and forward_intermediates agree with each other and with the table."""
    x = image()
    whole = build().eval()
    model = build(features_only=True).eval()
    assert model.feature_info.channels() == list(channels)
    assert model.feature_info.reduction() == list(strides)
    with torch.no_grad():
        maps = model(x)
        assert [tuple(value.shape) for value in maps] == [
            (2, c, 64 // s, 96 // s) for c, s in zip(channels, strides, strict=True)
        ]
        features, intermediates = whole.forward_intermediates(x)
        torch.testing.assert_close(features, whole.forward_features(x))
        for got, want in zip(maps, intermediates, strict=True):
            torch.testing.assert_close(got, want)
        two = build(features_only=True, out_indices=(0, 1)).eval()
        assert len(two(x)) == 2
        torch.testing.assert_close(two(x)[0], intermediates[0])
        last = whole.forward_intermediates(x, indices=1, intermediates_only=True)
        torch.testing.assert_close(last[0], maps[-1])
    assert count_params(two) < count_params(model) < count_params(whole)


def check_classifier(build: Build) -> None:
    """forward is forward_head of forward_features; the classifier can be replaced and removed."""
    x = image()
    model = build(num_classes=7).eval()
    with torch.no_grad():
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        assert features.shape[:2] == (2, model.num_features)
        assert pooled.shape == (2, model.head_hidden_size)
        logits = model(x)
        torch.testing.assert_close(logits, model.forward_head(features))
        assert logits.shape == (2, 7)
        assert logits.std() > 0
        model.reset_classifier(3)
        assert model.num_classes == 3
        assert model.get_classifier() is model.get_submodule(model.default_cfg["classifier"])
        assert model(x).shape == (2, 3)
        model.reset_classifier(0)
        torch.testing.assert_close(model(x), pooled)
        model.reset_classifier(0, "")
        assert model(x).shape == features.shape
    with pytest.raises(ValueError, match="global_pool=''"):
        model.reset_classifier(3, "")
    with pytest.raises(ValueError, match=r"global_pool='median' is unknown; use one of .*avg, "):
        model.reset_classifier(3, "median")
    with pytest.raises(ValueError, match="num_classes must be at least 0, got -1"):
        model.reset_classifier(-1, "avg")
    fresh = build(in_chans=1).eval()
    with torch.no_grad():
        assert fresh(image(channels=1)).shape[0] == 2
    with pytest.raises(ValueError, match=r"x must be \(B, 1, H, W\), got \(2, 3, 64, 96\)"):
        fresh(x)


def check_groups(model: nn.Module) -> None:
    """Every parameter belongs to exactly one group, and the first convolution's to the first."""
    names = {name for name, _ in model.named_parameters()}
    for coarse in (True, False):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        grouped = [name for group in groups.values() for name in group]
        assert sorted(grouped) == sorted(names)
        assert len(groups) > 4
        first = model.default_cfg["first_conv"] + ".weight"
        assert first in groups[min(groups)]


def check_grad_checkpointing(build: Build, batch: int = 2) -> None:
    """Gradients and running statistics are those of the plain pass."""
    torch.manual_seed(0)
    model = build(dtype=torch.float64).train()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    x = image(64, 64, batch=batch).double()
    results = []
    for net in (model, twin):
        torch.manual_seed(5)
        net(x).square().sum().backward()
        results.append([p.grad for p in net.parameters()])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    for got, want in zip(twin.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def check_training(build: Build, learning_rate: float = 0.05, batch: int = 4, size: int = 64) -> None:
    """Ten steps on a few images must fit them: gradients reach every parameter and point the right way."""
    torch.manual_seed(0)
    model = build(num_classes=4).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    x, target = image(size, size, batch=batch), torch.arange(batch) % 4
    losses = []
    for _ in range(10):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses


def check_meta_construction(build: Build) -> None:
    """Built on meta, emptied onto a device and initialised, a model is like one that was built there."""
    with torch.device("meta"):
        model = build()
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(3)
    model.reset_parameters()
    fresh = build()
    for (key, got), want in zip(model.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert got.shape == want.shape
        spread = float(want.double().std(correction=0))
        torch.testing.assert_close(
            got.mean(dtype=torch.float64),
            want.mean(dtype=torch.float64),
            atol=0.1 + 2 * spread,
            rtol=0,
            msg=key,
        )
        # One or two values may lie near each other by chance.
        if got.numel() > 4:
            assert float(got.double().std(correction=0)) == pytest.approx(spread, rel=0.8, abs=1e-12), key
    assert torch.isfinite(model.eval()(image())).all()


class OfficialNames:
    """A model seen under the official names of its parameters, for :func:`golden.check_train`."""

    def __init__(self, model: nn.Module, rename: Callable[[str], str]) -> None:
        self.model, self.rename = model, rename

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(self.rename(name), value) for name, value in self.model.named_parameters()]


def check_official_names(name: str, record: dict[str, Any], **kwargs: Any) -> None:
    """Names and shapes of the official state dict of a registered model, by the record's hash of them.

    Nothing is filled, which takes seconds for large models: if the fill were wrong, so would the outputs be.
    """
    official = official_state_dict(create_model(name, device="meta", **kwargs))
    assert len(official) == record["state_dict"]["entries"]
    assert golden.layout_sha256(official) == record["state_dict"]["layout_sha256"]


def filled(name: str, record: dict[str, Any], **kwargs: Any) -> nn.Module:
    """A registered model with the fill loaded under the official names, through the checkpoint reader."""
    model = create_model(name, dtype=torch.float64, **kwargs)
    load_checkpoint(model, {"model": golden.fill(official_state_dict(model), record["state_dict"]["gain"])})
    return model
