"""SDA-xNet: counts, the selection over depth, and the conventions of timm."""

import pytest
import torch
from support import backbones, staged_backbones

from fused_ops.models import create_model, list_models
from fused_ops.models.registry import find_system
from fused_ops.models.sda import SDAStage

# Parameters and multiply-accumulates at 224 pixels.
COUNTED = {
    "sda_resnet_86": (27_219_880, 3.8800e9),
    "sda_senet_86": (49_130_808, 6.7168e9),
    "sda_res2net_86": (45_254_544, 6.9486e9),
    "sda_pyconv_86": (43_331_176, 6.2216e9),
}
OWN = {"sda_resnet_50": (3, 4, 6, 3), "sda_resnet_101": (3, 4, 23, 3)}
DIMS = (256, 512, 1024, 2048)


def builder(name):
    """Two blocks in two stages and few channels; pyramids need 64 for their sixteen groups."""
    first = 64 if "pyconv" in name else 32

    def build(**kwargs):
        torch.manual_seed(0)
        sizes = {"depths": (2, 1, 2, 1), "planes": (first, 32, 32, 16), "least": 16, "num_classes": 7}
        return create_model(name, **{**sizes, **kwargs})

    return build


@pytest.mark.parametrize("name", COUNTED)
def test_counts(name):
    backbones.check_counts(name, *COUNTED[name])


@pytest.mark.parametrize("name", OWN)
def test_counts_of_this_projects_depths(name):
    """The module's parameters by formula, on top of a ResNet with grouped 3x3 convolutions."""
    info = find_system(name).models[name]
    model = create_model(name, device="meta")
    backbones.check_counts(name, info.params, info.macs)
    hidden = (64, 64, 64, 128)
    attention = sum(c * d + 2 * d + m * (d * c + c) for c, d, m in zip(DIMS, hidden, OWN[name], strict=True))
    assert name != "sda_resnet_50" or attention == 1_752_448
    backbone = sum(p.numel() for key, p in model.named_parameters() if ".fc" not in key)
    assert info.params == backbone + attention
    assert sum(p.numel() for p in model.bn2.parameters()) == 4096


def test_all_names_are_counted():
    assert {*COUNTED, *OWN} == set(list_models("sda"))


@pytest.mark.parametrize("name", [*COUNTED, *OWN])
def test_configuration(name):
    backbones.check_configuration(name)


@pytest.mark.parametrize("name", COUNTED)
def test_maps_of_the_published_sizes(name):
    with torch.device("meta"):
        maps = create_model(name, features_only=True).eval()(torch.empty(1, 3, 224, 224))
    assert [tuple(value.shape[1:]) for value in maps] == [
        (c, s, s) for c, s in zip(DIMS, (56, 28, 14, 7), strict=True)
    ]


@pytest.mark.parametrize("name", COUNTED)
def test_timm_contract(name):
    build = builder(name)
    model = build()
    channels = [info["num_chs"] for info in model.feature_info]
    backbones.check_features(build, channels, [4, 8, 16, 32])
    backbones.check_classifier(build)
    backbones.check_groups(model)
    backbones.check_meta_construction(build)
    with pytest.raises(ValueError, match=r"x must be at least 32 x 32 pixels.*got 16 x 64"):
        model(backbones.image(16, 64))


@pytest.mark.parametrize("name", COUNTED)
def test_any_size(name):
    staged_backbones.check_sizes(builder(name), [(32, 32), (33, 65), (40, 100)])


def test_grad_checkpointing():
    build = builder("sda_res2net_86")
    backbones.check_grad_checkpointing(lambda **kwargs: build(drop_path_rate=0.3, **kwargs), batch=4)


@pytest.mark.parametrize("name", ["sda_resnet_86", "sda_pyconv_86"])
def test_training_reduces_the_loss(name):
    backbones.check_training(builder(name), learning_rate=0.02)


class Affine(torch.nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x - 0.5


def test_selection_step_by_step():
    """Sums are taken before the ReLU and fed on after it; the softmax is over the blocks, per channel."""
    torch.manual_seed(0)
    stage = SDAStage([Affine(1.0), Affine(-2.0), Affine(0.5)], 16, 16, 4, dtype=torch.float64).eval()
    x = torch.randn(2, 16, 3, 3, dtype=torch.float64)
    first = x - 0.5
    second = -2 * first.relu() - 0.5
    third = 0.5 * second.relu() - 0.5
    sums = torch.stack([first, second, third])
    hidden = stage.fc(sums.sum(0).mean((2, 3), keepdim=True))
    weights = torch.stack([fc(hidden) for fc in stage.fcs]).softmax(0)
    assert weights.shape == (3, 2, 16, 1, 1)
    torch.testing.assert_close(stage(x), (weights * sums).sum(0).relu())


def test_only_the_resnet_blocks_are_grouped():
    groups = {
        name: create_model(name, device="meta").stage1.layers[0].conv2.groups
        for name in ("sda_resnet_86", "sda_senet_86", "sda_resnet_50")
    }
    assert groups == {"sda_resnet_86": 8, "sda_senet_86": 1, "sda_resnet_50": 8}


def test_argument_errors():
    with pytest.raises(ValueError, match="block='epsa' is unknown; use one of resnet, senet"):
        create_model("sda_resnet_86", block="epsa")
    with pytest.raises(ValueError, match=r"depths must have 4 entries, one per stage, got \(1, 2\)"):
        create_model("sda_resnet_86", depths=(1, 2))
    with pytest.raises(ValueError, match="global_pool='catavgmax' is unknown; use one of avg, max"):
        create_model("sda_resnet_86", global_pool="catavgmax", device="meta")
