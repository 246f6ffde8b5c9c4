"""Whole models against the recorded numbers with kernels forced, at float32.

On a CPU the CUDA kernels run in the emulator; Triton's interpreter would take minutes for any of these, so
that its kernels run on a GPU.
"""

import pytest
import test_timm_systems
from support import backbones, forced, golden, staged_backbones

from fused_ops.models import create_model, load_checkpoint, official_state_dict


def whole(model, x):
    return [model(x)]


def maps(model, x):
    return model.forward_intermediates(x, intermediates_only=True)


def headless(model, x):
    return [model.forward_features(x)]


def own(name, run=whole, **kwargs):
    """A model of this project: builder of record, model and outputs."""
    return lambda: (*staged_backbones.filled(name, **kwargs), run)


def gated(name, run=whole, **kwargs):
    """A ResNet with gates, FishNet or SDA-xNet."""

    def build():
        record = golden.load(name)
        model = backbones.filled(name.removesuffix("_backbone"), record, **kwargs)
        return record, model, headless if "features only" in record["eval"][0]["outputs"][0]["name"] else run

    return build


def from_timm(name):
    """A model of timm, accelerated."""

    def build():
        record = golden.load(name)
        known = test_timm_systems.GOLDEN
        model = known[name]() if name in known else create_model(test_timm_systems.EXTENDED[name])
        model = model.double()
        load_checkpoint(model, golden.fill(official_state_dict(model), record["state_dict"]["gain"]))
        return record, model, whole

    return build


def dense_focalnet(name):
    """A backbone for detection of FocalNet."""
    return lambda: (*test_timm_systems.filled_dense(name), lambda model, x: model(x))


DENSE = {"features_only": True, "output_norm": True}
MODELS = {
    **{name: own(name) for name in ("dsnet_tiny_star", "dsnet_small_star", "dsnet_base_star")},
    **{name: own(name) for name in ("pvt_tiny", "pvt_small", "pvt_medium", "pvt_large")},
    **{name: own(name, maps, features_only=True) for name in ("pvt_tiny_dense", "pvt_small_dense")},
    **{name: own(name) for name in ("fcvit_tiny", "fcvit_b12", "fcvit_b24", "fcvit_b48")},
    "fcvit_b12_dense": own("fcvit_b12_dense", maps, **DENSE),
    **{f"vip_{size}": own(f"vip_{size}") for size in ("mobile", "tiny", "small", "medium", "base")},
    **{name: own(name, maps, **DENSE) for name in ("hlg_tiny_dense_repaired", "hlg_small_dense_repaired")},
    **{name: gated(name) for name in ("cbam_resnet_18", "cbam_resnet_50", "eca_resnet_18", "eca_resnet_50")},
    "sem_resnet_164_cifar": gated("sem_resnet_164_cifar"),
    **{f"fishnet_{depth}": gated(f"fishnet_{depth}") for depth in (99, 150, 201)},
    **{f"sda_{block}_86": gated(f"sda_{block}_86") for block in ("resnet", "senet", "res2net", "pyconv")},
    **{
        name: gated(name, maps, num_classes=0)
        for name in ("gcnet_resnet_50_r16_backbone", "gcnet_resnet_50_r4_backbone")
    },
    **{
        name: from_timm(name)
        for name in (*test_timm_systems.GOLDEN, *test_timm_systems.EXTENDED)
        if not name.startswith("next_vit")
    },
    **{name: dense_focalnet(name) for name in test_timm_systems.DENSE},
}
# Those with depthwise convolutions; what has no CUDA kernel runs on the reference path.
BY_CUDA = ["focalnet_toy_huge"]
MORE_BY_CUDA = [
    *(
        "focalnet_tiny_lrf",
        "focalnet_tiny_iso",
        "vip_mobile",
        "dsnet_tiny_star",
        "fcvit_tiny",
    ),
    *("hlg_tiny_dense_repaired", "hlg_small_dense_repaired"),
]


@pytest.mark.parametrize(
    "name", [*BY_CUDA, *(pytest.param(name, marks=pytest.mark.extended) for name in MORE_BY_CUDA)]
)
def test_cuda_kernels(name, emulator):
    record, model, run = MODELS[name]()
    forced.check_golden(model, record, "cuda", run)


@pytest.mark.parametrize("name", test_timm_systems.MODULATIONS)
def test_focal_modulation_on_cuda_kernels(name, emulator):
    record, module = test_timm_systems.filled_modulation(name)
    forced.check_golden(module, record, "cuda", lambda m, x: [test_timm_systems.channels_last_run(m, x)])


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_triton_kernels(name):
    record, model, run = MODELS[name]()
    forced.check_golden(model, record, "triton", run, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*BY_CUDA, *MORE_BY_CUDA])
def test_cuda_kernels_on_a_gpu(name):
    record, model, run = MODELS[name]()
    forced.check_golden(model, record, "cuda", run, "cuda")
