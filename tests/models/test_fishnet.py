"""FishNet: counts, the wiring of body and head, and the conventions of timm."""

import pytest
import torch
from support import backbones
from support.selection import only

from fused_ops.models import create_model, list_models
from fused_ops.models.fishnet import FishBottleneck, FishNet

# Parameters and multiply-accumulates of convolutions at 224 pixels.
COUNTED = {
    "fishnet_99": (16_628_904, 4.2637e9),
    "fishnet_150": (24_959_400, 6.3978e9),
    "fishnet_201": (44_584_552, 10.5144e9),
    "fishnext_150": (25_738_024, 6.4687e9),
}
# One of each kind of bottleneck; the others have more of them.
ONE_EACH = ("fishnet_99", "fishnext_150")
TINY = {
    "depths": (1,) * 10,
    "transfer_depths": (1,) * 6,
    "tail_dims": (16, 32, 64, 64),
    "body_dims": (64, 64, 48),
}
NEXT = {"width_ratio": 0.5, "group_widths": (4, 4, 4, 4)}


def small(**kwargs):
    torch.manual_seed(0)
    return create_model("fishnet_99", **{**TINY, "num_classes": 7, **kwargs})


def small_next(**kwargs):
    torch.manual_seed(0)
    return create_model("fishnext_150", **{**TINY, **NEXT, "num_classes": 7, **kwargs})


@pytest.mark.parametrize("name", only(ONE_EACH, COUNTED))
def test_counts(name):
    backbones.check_counts(name, *COUNTED[name])


def test_all_names_are_counted():
    assert set(COUNTED) == set(list_models("fishne"))


@pytest.mark.parametrize("name", COUNTED)
def test_configuration(name):
    backbones.check_configuration(name)


@pytest.mark.parametrize("name", only(ONE_EACH, COUNTED))
def test_maps_of_the_published_sizes(name):
    """Channels and sizes of a0 to a10, and of the maps that a detector takes."""
    with torch.device("meta"):
        model = create_model(name)
        nodes = model.forward_nodes(torch.empty(1, 3, 224, 224))
    assert [tuple(node.shape[1:]) for node in nodes] == [
        (64, 56, 56),
        (128, 28, 28),
        (256, 14, 14),
        (512, 7, 7),
        (512, 7, 7),
        (768, 14, 14),
        (512, 28, 28),
        (320, 56, 56),
        (832, 28, 28),
        (1600, 14, 14),
        (2112, 7, 7),
    ]
    assert [info["num_chs"] for info in model.feature_info] == [320, 832, 1600, 2112]
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32]


def test_parameters_by_stage():
    """FishNet-150, stage by stage."""
    model = create_model("fishnet_150", device="meta")
    stages = [sum(p.numel() for p in stage.parameters()) for stage in model.fish.fish]
    assert stages == [
        41_728,
        306_176,
        2_338_816,
        2_160_672,
        700_928,
        388_864,
        166_784,
        779_648,
        2_733_952,
        15_313_064,
    ]


@pytest.mark.parametrize("build", [small, small_next])
def test_timm_contract(build):
    model = build()
    dims = [info["num_chs"] for info in model.feature_info]
    backbones.check_features(build, dims, [4, 8, 16, 32])
    backbones.check_classifier(build)
    backbones.check_groups(model)
    backbones.check_meta_construction(build)


def test_stop_early():
    model = small().eval()
    x = backbones.image()
    with torch.no_grad():
        nodes = model.forward_nodes(x)
        model.fish.fish[8].register_forward_hook(lambda *_: pytest.fail("a later stage ran"))
        last, maps = model.forward_intermediates(x, indices=[0, 1], stop_early=True)
        torch.testing.assert_close(maps, nodes[7:9])
        assert last is maps[1]
        nhwc = model.forward_intermediates(
            x, indices=[0], stop_early=True, output_fmt="NHWC", intermediates_only=True
        )
        torch.testing.assert_close(nhwc[0].permute(0, 3, 1, 2), nodes[7])


def test_pruned_model():
    model = small().eval()
    x = backbones.image()
    with torch.no_grad():
        nodes = model.forward_nodes(x)
        assert model.prune_intermediate_layers([1]) == [1]
        assert len(model.fish.fish) == 8
        torch.testing.assert_close(model(x), nodes[8])
        assert model.num_features == nodes[8].shape[1]
        assert isinstance(model.get_classifier(), torch.nn.Identity)
    with pytest.raises(ValueError, match="pruned to a feature extractor"):
        model.reset_classifier(3, "avg")


def test_grad_checkpointing():
    backbones.check_grad_checkpointing(small)


@pytest.mark.parametrize("build", [small, small_next])
def test_training_reduces_the_loss(build):
    backbones.check_training(build, batch=4)


@pytest.mark.parametrize("size", [(32, 32), (96, 32)], ids=str)
def test_sizes(size):
    with torch.no_grad():
        assert small().eval()(backbones.image(*size)).shape == (2, 7)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((33, 64), "height and width of x must be multiples of 32, the total stride, got 33 x 64; pad"),
        ((16, 64), "x must be at least 32 x 32 pixels, the total stride, got 16 x 64"),
    ],
)
def test_other_sizes_are_refused(size, message):
    with pytest.raises(ValueError, match=message):
        small()(backbones.image(*size))


def test_argument_errors():
    with pytest.raises(ValueError, match=r"depths must have 10 entries, one per stage, got \(1, 2\)"):
        FishNet(depths=(1, 2))
    with pytest.raises(ValueError, match=r"group_widths must have 4 entries, one per stride, got \(4,\)"):
        FishNet(group_widths=(4,), device="meta")
    with pytest.raises(ValueError, match="width must be a multiple of group_width=5, got 16"):
        FishBottleneck(64, 64, group_width=5)
    with pytest.raises(ValueError, match=r"in_channels must be a multiple of out_channels=48 .*, got 64"):
        FishBottleneck(64, 48, reduce=True)
    with pytest.raises(ValueError, match="output_fmt must be NCHW or NHWC, got 'NLC'"):
        small().forward_intermediates(backbones.image(), output_fmt="NLC")


def test_shortcut_sums_adjacent_channels():
    block = FishBottleneck(8, 4, reduce=True)
    torch.nn.init.zeros_(block.conv3.weight)
    x = torch.arange(8.0).view(1, 8, 1, 1)
    assert block(x.expand(2, 8, 2, 2))[0, :, 0, 0].tolist() == [1.0, 5.0, 9.0, 13.0]


def test_channels_last_stays():
    model = small().eval()
    x = backbones.image()
    with torch.no_grad():
        plain = model.forward_nodes(x)
        turned = model.forward_nodes(x.contiguous(memory_format=torch.channels_last))
    for got, want in zip(turned, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert got.is_contiguous(memory_format=torch.channels_last)
