"""DCDC-ResNet (a reconstruction): counts, the operator, and the conventions of timm."""

import pytest
import torch
import torch.nn.functional as F
from support import backbones

from fused_ops.models import count_macs, count_params, create_model
from fused_ops.models.dcdc import DCDCResNet, DualDynamicConv2d, apply_position_kernels

# Parameters by depths and kernel size.
PARAMS = {
    ((1, 2, 4, 1), 7): 9_799_248,
    ((2, 3, 5, 2), 7): 13_310_088,
    ((3, 4, 6, 3), 7): 16_820_928,
    ((3, 4, 23, 3), 7): 28_080_096,
    ((3, 8, 36, 3), 7): 37_357_248,
    ((3, 4, 6, 3), 3): 15_230_208,
    ((3, 4, 6, 3), 5): 15_866_496,
}
# Multiply-accumulates with both branches' kernels applied one by one.
MACS = {(1, 2, 4, 1): 1.584e9, (3, 4, 6, 3): 2.585e9}


def small(**kwargs):
    torch.manual_seed(0)
    sizes = {"depths": (1, 1, 1, 1), "planes": (16, 16, 32, 32), "kernel_size": 3, "num_classes": 7}
    return create_model("dcdc_resnet_50", **{**sizes, **kwargs})


@pytest.mark.parametrize(("depths", "kernel_size"), PARAMS)
def test_params(depths, kernel_size):
    model = create_model("dcdc_resnet_50", device="meta", depths=depths, kernel_size=kernel_size)
    assert count_params(model) == PARAMS[depths, kernel_size]


@pytest.mark.parametrize("depths", MACS)
def test_macs(depths):
    """The counter sees convolutions; a kernel's application is 49 per value, here once for both branches."""
    model = create_model("dcdc_resnet_50", device="meta", depths=depths)
    counted = count_macs(model, (3, 224, 224))
    values = sum(depth * 64 * 2**i * (56 // 2**i) ** 2 for i, depth in enumerate(depths))
    assert counted + 2 * 49 * values == pytest.approx(MACS[depths], rel=0.001)


def test_table():
    backbones.check_counts("dcdc_resnet_50", 16_820_928, 2.4495e9)
    backbones.check_configuration("dcdc_resnet_50")


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(6, 8), (5, 7)], ids=str)
def test_position_kernels_by_unfolding(stride, size):
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    out = tuple(-(-side // stride) for side in size)
    kernels = torch.randn(2, 3, 9, *out, dtype=torch.float64)
    taps = F.unfold(x, 3, padding=1, stride=stride).unflatten(1, (3, 2, 9)).unflatten(4, out)
    expected = torch.einsum("bguhw,bgcuhw->bgchw", kernels, taps).flatten(1, 2)
    torch.testing.assert_close(apply_position_kernels(x, kernels, 3, stride), expected)


def test_equal_kernels_are_a_convolution():
    """The same kernel everywhere: the operator is then a depthwise convolution."""
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    weight = torch.randn(2, 25, dtype=torch.float64)
    kernels = weight[None, :, :, None, None].expand(2, 2, 25, 7, 9)
    filters = weight.unflatten(1, (1, 5, 5)).repeat_interleave(2, 0)
    expected = F.conv2d(x, filters, padding=2, groups=4)
    torch.testing.assert_close(apply_position_kernels(x, kernels, 5), expected)


@pytest.mark.parametrize("stride", [1, 2])
def test_branches_are_added(stride):
    torch.manual_seed(0)
    layer = DualDynamicConv2d(32, kernel_size=3, stride=stride, dtype=torch.float64).eval()
    x = torch.randn(2, 32, 5, 7, dtype=torch.float64)
    local = layer.lsa(x).unflatten(1, (2, 9))
    shared = layer.gsi(x).unflatten(1, (2, 9))
    filters = shared.repeat_interleave(16, 1).reshape(64, 1, 3, 3)
    convolved = F.conv2d(x.reshape(1, 64, 5, 7), filters, padding=1, stride=stride, groups=64)
    expected = apply_position_kernels(x, local, 3, stride) + convolved.reshape(2, 32, *local.shape[-2:])
    torch.testing.assert_close(layer(x), expected)


def test_gradients():
    layer = DualDynamicConv2d(16, kernel_size=3, stride=2, group_channels=8, dtype=torch.float64).eval()
    x = torch.randn(1, 16, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_timm_contract():
    model = small()
    backbones.check_features(small, [64, 64, 128, 128], [4, 8, 16, 32])
    backbones.check_classifier(small)
    backbones.check_groups(model)
    backbones.check_meta_construction(small)


def test_odd_sizes():
    with torch.no_grad():
        assert small().eval()(backbones.image(33, 71)).shape == (2, 7)
    with pytest.raises(ValueError, match=r"x must be at least 32 x 32 pixels.*got 16 x 64"):
        small()(backbones.image(16, 64))


def test_grad_checkpointing():
    backbones.check_grad_checkpointing(small, batch=4)


def test_training_reduces_the_loss():
    backbones.check_training(small, learning_rate=0.02)


def test_argument_errors():
    with pytest.raises(ValueError, match="kernel_size must be odd and positive, got 4"):
        DualDynamicConv2d(64, kernel_size=4)
    with pytest.raises(ValueError, match="group_channels must divide the 64 channels, got 48"):
        DualDynamicConv2d(64, group_channels=48)
    with pytest.raises(ValueError, match="bottleneck must be True"):
        DCDCResNet(bottleneck=False)
