"""Every system trains, with kernels too: ten steps on digits lower the loss, and resuming changes nothing.

One small member of each system, shrunken by its own arguments. The steps are those of ``fused-ops train``,
without its loader: the same images at every step, so that the loss must fall.
"""

from __future__ import annotations

import copy

import pytest
import test_fishnet
import test_timm_systems
import torch
from support.forced import kernels_of

from fused_ops.core import backends
from fused_ops.models import create_model, list_models
from fused_ops.models.registry import find_system, systems
from fused_ops.train.data import Digits
from fused_ops.train.distributed import World
from fused_ops.train.engine import Engine
from fused_ops.train.settings import settings_from

NARROW = {"depths": (1, 1, 1, 1), "planes": (16, 32, 64, 128)}
# Model of each system, what shrinks it, and the side of the image (32 unless given).
SMALL = {
    "CAT": ("cat_resnet_50", NARROW),
    "CBAM": ("cbam_resnet_18", NARROW),
    "ConvNeXt": ("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (16, 32, 64, 128)}, 64),
    "DCDC": ("dcdc_resnet_50", {**NARROW, "kernel_size": 3}),
    "DS-Net": ("dsnet_test", {}),
    "DaViT": (
        "davit_tiny",
        {"depths": (1, 1, 1, 1), "embed_dims": (32, 32, 64, 64), "num_heads": (1, 1, 2, 2)},
    ),
    "ECA-Net": ("eca_resnet_18", NARROW),
    "EfficientNet": ("efficientnet_b0", {}),
    "FCViT": ("fcvit_test", {}),
    "FishNet": ("fishnet_99", test_fishnet.TINY),
    "FocalNet": ("focalnet_tiny_srf", None, 64),
    "GCNet": ("gcnet_resnet_50_r16", NARROW),
    "HIRI-ViT": ("hiri_vit_test", {}, 64),
    "HLG": ("hlg_test", {}, 64),
    "HRNet": ("hrnet_w18_small", {}),
    "MobileNetV3": ("mobilenetv3_small_075", {}),
    "Next-ViT": ("nextvit_small", {"depths": (1, 2, 5, 2)}),
    "PVT": ("pvt_test", {}, 64),
    "PVTv2": ("pvt_v2_b0", {}),
    "Res2Net": ("res2net50_48w_2s", {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128)}),
    "ResNets with gates, timm's": ("ecaresnet26t", {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128)}),
    "SDA-xNet": (
        "sda_resnet_50",
        {"depths": (2, 1, 2, 1), "planes": (32, 32, 32, 16), "least": 16},
    ),
    "SEM": ("sem_resnet_164_cifar", {"depths": (2, 2, 2)}),
    "ViP": ("vip_test", {}, 64),
}
# With depthwise convolutions that the CUDA kernels cover, which the emulator runs fast enough.
WITH_KERNELS = ["DS-Net", "ViP"]
MORE_WITH_KERNELS = ["ConvNeXt", "FocalNet", "HIRI-ViT", "HLG", "PVTv2"]
# Nothing makes these small.
LARGE = ["EfficientNet", "HRNet", "Next-ViT"]
# Models of one system that call different operators.
SEVERAL_FORMS = ["PVT", "ResNets with gates, timm's"]
# For 512 images, where the loss would not fall at every step from the beginning.
RATES = {"nextvit_small": 0.03}
STEPS = 10
IMAGES = 8


def digits(side):
    """The first training images of each class in turn, as the loader hands them over."""
    source = Digits(train=True)
    order = sorted(range(200), key=lambda i: (source.target(i), i))[:: 200 // IMAGES][:IMAGES]
    images = [
        torch.frombuffer(bytearray(source.load(i).resize((side, side)).tobytes()), dtype=torch.uint8)
        for i in order
    ]
    images = torch.stack(images).view(IMAGES, side, side, 3).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor([source.target(i) for i in order]), []


def engine_of(name, arguments, side, state=None):
    settings = settings_from(
        {
            "data": "digits",
            "model": name,
            "img_size": side,
            "batch_size": IMAGES,
            "device_batch": IMAGES,
            "lr": RATES.get(name, 0.15),
            "epochs": 3,
            "warmup_epochs": 0.0,
        }
    )
    torch.manual_seed(0)
    if arguments is None:
        # The names of timm's FocalNets fix depths and widths.
        model = test_timm_systems.toy_focalnet(2, num_classes=10)
    else:
        model = create_model(name, num_classes=10, **arguments)
    engine = Engine(settings, model, 10, STEPS, World(0, 1, torch.device("cpu")))
    if state is not None:
        engine.load(state)
    return engine


def curve(engine, batch, first, last):
    return [float(engine.update(lambda: batch, 0, number).loss) for number in range(first, last)]


@pytest.fixture
def quiet():
    """One thread: the models are so small that more cost time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check_training(system, kernels):
    name, arguments, side = (*SMALL[system], 32)[:3]
    batch = digits(side)
    with kernels_of("cuda") if kernels else backends.record() as choices:
        engine = engine_of(name, arguments, side)
        losses = curve(engine, batch, 0, STEPS // 2)
        state = copy.deepcopy(engine.state())
        losses += curve(engine, batch, STEPS // 2, STEPS)
        resumed = engine_of(name, arguments, side, state)
        assert curve(resumed, batch, STEPS // 2, STEPS) == losses[STEPS // 2 :]
    assert losses[-1] < 0.9 * losses[0], losses
    assert not kernels or "cuda" in {choice.backend for choice in choices}
    called, listed = {choice.operator for choice in choices}, set(find_system(name).fused)
    assert called <= listed, "the system lists the operators that its models call"
    assert called == listed or system in SEVERAL_FORMS


def test_every_system_is_here():
    missing = {system.name for system in systems()} - set(SMALL)
    # HIRI-ViT's lifted backbones are tested with it.
    assert [name for name in missing if not name.startswith("HIRI-ViT")] == []
    for system, (name, *_) in SMALL.items():
        assert find_system(name).name == system
        assert name in list_models()


def extended(names):
    return [pytest.param(name, marks=pytest.mark.extended) for name in names]


@pytest.mark.parametrize("system", [*(name for name in SMALL if name not in LARGE), *extended(LARGE)])
def test_training(system, quiet):
    check_training(system, kernels=False)


@pytest.mark.parametrize("system", [*WITH_KERNELS, *extended(MORE_WITH_KERNELS)])
def test_training_with_kernels(system, quiet, emulator):
    check_training(system, kernels=True)
