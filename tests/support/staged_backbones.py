"""timm's contract for a backbone of stages, as checks that every model's tests run.

A test module parametrizes one test over :data:`CHECKS` and hands each a function that builds a model of
little depth, and an image size that the model takes::

    @pytest.mark.parametrize("check", staged_backbones.CHECKS, ids=staged_backbones.name_of)
    def test_contract(check):
        check(lambda **kwargs: create_model("pvt_test", num_classes=7, **kwargs), (64, 96))
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn

from fused_ops.core.drop_path import DropPath
from fused_ops.models import (
    count_macs,
    count_params,
    create_model,
    load_checkpoint,
    official_state_dict,
    systems,
)
from fused_ops.models.registry import ModelInfo, system_of
from support import golden

Build = Callable[..., nn.Module]
Size = tuple[int, int]


def name_of(check: Callable[..., None]) -> str:
    return check.__name__.removeprefix("check_")


def table_row(name: str) -> ModelInfo:
    """The row of the table of models."""
    return next(system.models[name] for system in systems() if name in system.models)


def image(size: Size, batch: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(0))


def built(build: Build, **kwargs: Any) -> nn.Module:
    """A model with 7 classes whose norms do something in eval mode."""
    torch.manual_seed(0)
    model = build(num_classes=7, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(2.0)
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
            nn.init.constant_(module.bias, 0.1)
    return model


def check_table(name: str, params: int, macs: float | None = None) -> None:
    """Counts of the default model, its row in the table and its configuration."""
    model = create_model(name, device="meta")
    info = table_row(name)
    assert count_params(model) == params
    assert (count_params(model), count_macs(model, info.input_size)) == (info.params, info.macs)
    if macs is not None:
        assert info.macs == pytest.approx(macs, rel=0.005)
    cfg = model.default_cfg
    assert timm.is_model(name)
    assert cfg["architecture"] == name
    assert cfg["input_size"] == info.input_size
    assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d)
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    stride = model.feature_info[-1]["reduction"]
    assert cfg["pool_size"] == tuple(-(-size // stride) for size in cfg["input_size"][1:])
    for entry in model.feature_info:
        model.get_submodule(entry["module"])
    assert model.num_features == model.feature_info[-1]["num_chs"]


def check_forward_and_head(build: Build, size: Size) -> None:
    model = built(build).eval()
    x = image(size)
    with torch.no_grad():
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, model.head_hidden_size)
        logits = model(x)
        torch.testing.assert_close(logits, model.get_classifier()(pooled))
    assert logits.shape == (2, 7)
    assert logits.std() > 0


def check_features_only(build: Build, size: Size) -> None:
    whole = built(build).eval()
    model = built(build, features_only=True).eval()
    x = image(size)
    maps = model(x)
    for value, info in zip(maps, whole.feature_info, strict=True):
        # Convolutions with padding round up, those without round down; sizes here are multiples.
        assert value.shape == (2, info["num_chs"], *(-(-length // info["reduction"]) for length in size))
        assert torch.isfinite(value).all()
        assert value.std() > 0
    assert model.feature_info.channels() == [info["num_chs"] for info in whole.feature_info]
    assert model.feature_info.reduction() == [info["reduction"] for info in whole.feature_info]
    two = built(build, features_only=True, out_indices=(0, 1)).eval()
    assert len(two(x)) == 2
    assert count_params(two) < count_params(model)


def check_forward_intermediates(build: Build, size: Size) -> None:
    model = built(build).eval()
    x = image(size)
    last = model.num_stages - 1
    with torch.no_grad():
        features = model.forward_features(x)
        final, maps = model.forward_intermediates(x)
        torch.testing.assert_close(final, features)
        assert len(maps) == last + 1
        only = model.forward_intermediates(x, indices=[0, -1], intermediates_only=True)
        assert torch.equal(only[0], maps[0])
        assert torch.equal(only[1], maps[last])
        nhwc = model.forward_intermediates(x, indices=[1], output_fmt="NHWC", intermediates_only=True)[0]
        torch.testing.assert_close(nhwc.permute(0, 3, 1, 2), maps[1])
        early, taken = model.forward_intermediates(x, indices=[1], stop_early=True)
        assert torch.equal(early, maps[1])
        assert torch.equal(taken[0], maps[1])
    with pytest.raises(ValueError, match="output_fmt must be NCHW or NHWC, got 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


def check_prune_intermediate_layers(build: Build, size: Size) -> None:
    model = built(build).eval()
    x = image(size)
    with torch.no_grad():
        expected = model.forward_intermediates(x, intermediates_only=True)
        before = count_params(model)
        assert model.prune_intermediate_layers([1]) == [1]
        assert model.num_stages == 2
        assert count_params(model) < before
        assert model.num_features == model.feature_info[1]["num_chs"]
        torch.testing.assert_close(model.forward_features(x), expected[1])
        whole = built(build).eval()
        whole.prune_intermediate_layers(1, prune_norm=True, prune_head=False)
        assert whole(x).shape == (2, 7)


def check_reset_classifier(build: Build, size: Size) -> None:
    model = built(build).eval()
    x = image(size)
    with torch.no_grad():
        model.reset_classifier(3)
        assert model(x).shape == (2, 3)
        assert model.num_classes == 3
        for pool in filter(None, model.pools):
            model.reset_classifier(5, pool)
            assert model(x).shape == (2, 5)
        model.reset_classifier(0)
        assert model(x).shape == (2, model.head_hidden_size)
        model.reset_classifier(0, "")
        assert model(x).shape == model.forward_features(x).shape
    with pytest.raises(ValueError, match="global_pool=''"):
        model.reset_classifier(3, "")
    with pytest.raises(ValueError, match=r"global_pool='median' is unknown; use one of .*avg, "):
        model.reset_classifier(3, "median")
    with pytest.raises(ValueError, match="num_classes must be at least 0, got -1"):
        model.reset_classifier(-1)


def check_grad_checkpointing(build: Build, size: Size) -> None:
    model = built(build, drop_path_rate=0.3, dtype=torch.float64).train()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    results = []
    for net in (model, twin):
        torch.manual_seed(5)
        net(image(size).double()).square().sum().backward()
        results.append([p.grad for p in net.parameters()])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    for got, want in zip(twin.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    twin.set_grad_checkpointing(False)
    assert not twin.grad_checkpointing


def check_meta_then_to_empty(build: Build, size: Size) -> None:
    with torch.device("meta"):
        model = build()
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(3)
    model.reset_parameters()
    torch.manual_seed(0)
    fresh = build()
    for (key, got), want in zip(model.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert got.shape == want.shape
        spread, wanted = got.double().std(correction=0), want.double().std(correction=0)
        torch.testing.assert_close(got.double().mean(), want.double().mean(), atol=0.2, rtol=0.2, msg=key)
        assert (spread > 0) == (wanted > 0), key
        if got.numel() > 200 and wanted > 0:
            # Two draws of one distribution, not of two.
            assert 0.7 < spread / wanted < 1.4, key
    assert torch.isfinite(model.eval()(image(size))).all()


def check_image_errors(build: Build, size: Size) -> None:
    model = built(build)
    stride = model.total_stride
    message = f"x must be at least {stride} x {stride} pixels.*got {stride - 1} x {size[1]}"
    with pytest.raises(ValueError, match=message):
        model(torch.randn(1, 3, stride - 1, size[1]))
    with pytest.raises(ValueError, match=r"x must be \(B, 3, H, W\), got \(1, 4, "):
        model(torch.randn(1, 4, *size))


def check_in_chans(build: Build, size: Size) -> None:
    model = built(build, in_chans=4).eval()
    with torch.no_grad():
        assert model(image(size, channels=4)).shape == (2, 7)


def check_layouts(build: Build, size: Size) -> None:
    """Both layouts give the same numbers; maps come back in the layout of the image."""
    model = built(build).eval()
    x = image(size)
    with torch.no_grad():
        plain = model.forward_intermediates(x, intermediates_only=True)
        turned = model.forward_intermediates(
            x.contiguous(memory_format=torch.channels_last), intermediates_only=True
        )
    for got, want in zip(turned, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert want.is_contiguous()
        assert got.is_contiguous(memory_format=torch.channels_last)


def check_dtype_argument(build: Build, size: Size) -> None:
    model = built(build, dtype=torch.bfloat16).eval()
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert model(image(size).bfloat16()).dtype == torch.bfloat16


def check_group_matcher(build: Build, size: Size) -> None:
    """Every parameter has a group, and groups rise with the depth."""
    model = built(build)
    names = [name for name, _ in model.named_parameters()]
    for coarse in (False, True):
        layer = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        assert set(layer) == set(names)
        first = [min(layer[n] for n in names if n.startswith(stage)) for stage in _stage_names(model)]
        assert first == sorted(set(first)), coarse
        assert layer[next(n for n in names if n.startswith(model.classifier_name))] >= first[-1]
        assert layer[model.default_cfg["first_conv"] + ".weight"] <= first[0]
    assert model.no_weight_decay() <= set(names)


def _stage_names(model: nn.Module) -> list[str]:
    return [f"{info['module']}." for info in model.feature_info]


def check_drop_path(build: Build, size: Size) -> None:
    """Rates rise over the blocks from 0 to the one given."""
    rates = [m.drop_prob for m in built(build, drop_path_rate=0.4).modules() if isinstance(m, DropPath)]
    assert rates == sorted(rates)
    assert rates[0] == 0.0
    assert rates[-1] == pytest.approx(0.4)


def check_checkpoints(build: Build, size: Size) -> None:
    """What is written under official names comes back, in every layout."""
    model = built(build)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.1)
    system = system_of(model)
    for framework in {layout.framework for layout in system.layouts}:
        other = built(build)
        load_checkpoint(other, official_state_dict(model, framework))
        for (name, got), want in zip(other.state_dict().items(), model.state_dict().values(), strict=True):
            if not name.endswith("num_batches_tracked"):
                assert torch.equal(got, want), name


CHECKS = [
    check_forward_and_head,
    check_features_only,
    check_forward_intermediates,
    check_prune_intermediate_layers,
    check_reset_classifier,
    check_grad_checkpointing,
    check_meta_then_to_empty,
    check_image_errors,
    check_in_chans,
    check_layouts,
    check_dtype_argument,
    check_group_matcher,
    check_drop_path,
    check_checkpoints,
]


def check_sizes(build: Build, sizes: list[Size]) -> None:
    model = built(build).eval()
    with torch.no_grad():
        for size in sizes:
            logits = model(image(size))
            assert logits.shape == (2, 7)
            assert torch.isfinite(logits).all()


def check_training(build: Build, size: Size, steps: int = 10, rate: float = 2e-3) -> None:
    """Ten steps on four images lower the loss by far, and every parameter gets a gradient."""
    torch.manual_seed(0)
    model = build(drop_path_rate=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    x, target = image(size, batch=4), torch.arange(4)
    losses = []
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None]
        assert not missing
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses


def check_golden_layout(name: str, **kwargs: Any) -> None:
    """Official names and shapes of a model against its record, and with them the fill."""
    model = create_model(name, device="meta", **kwargs)
    official = official_state_dict(getattr(model, "model", model))
    concrete = {
        key: torch.zeros(value.shape, dtype=torch.float64 if value.is_floating_point() else value.dtype)
        for key, value in official.items()
    }
    golden.check_layout(concrete, golden.load(name))


def filled(record_name: str, **kwargs: Any) -> tuple[dict[str, Any], nn.Module]:
    """A record and its model in float64, the fill loaded under the official names by the checkpoint reader.

    With ``features_only=True`` it is the model inside timm's wrapper.
    """
    record = golden.load(record_name)
    name = record_name.removesuffix("_dense").removesuffix("_repaired").removesuffix("_dense")
    model = create_model(name, dtype=torch.float64, **kwargs)
    model = model.model if kwargs.get("features_only") else model
    official = official_state_dict(model)
    if kwargs.get("features_only"):
        golden.check_layout(official, record)
    load_checkpoint(model, {"model": golden.fill(official, record["state_dict"]["gain"])})
    return record, model
