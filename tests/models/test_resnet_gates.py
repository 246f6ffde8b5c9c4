"""ResNets with gates: counts, where the gates sit, and the conventions of timm."""

import pytest
import torch
from support import backbones, staged_backbones
from support.selection import only

from fused_ops.blocks import gates
from fused_ops.models import CheckpointError, create_model, load_checkpoint, official_state_dict
from fused_ops.models.registry import find_system

# Parameters and multiply-accumulates; 224 pixels and 1000 classes, the last one 32 pixels and 10 classes.
COUNTED = {
    "cbam_resnet_18": (11_779_392, 1.8151e9),
    "cbam_resnet_34": (21_960_468, 3.6654e9),
    "cbam_resnet_50": (28_089_624, 4.0956e9),
    "cbam_resnet_101": (49_330_172, 7.8126e9),
    "eca_resnet_18": (11_689_556, 1.8141e9),
    "eca_resnet_34": (21_797_744, 3.6638e9),
    "eca_resnet_50": (25_557_112, 4.0893e9),
    "eca_resnet_101": (44_549_317, 7.8016e9),
    "eca_resnet_152": (60_193_042, 11.5139e9),
    "gcnet_resnet_50_r16": (28_078_773, 4.0979e9),
    "gcnet_resnet_50_r4": (35_557_941, 4.1054e9),
    "gcnet_resnet_101_r16": (49_337_222, 7.8192e9),
    "gcnet_resnet_101_r4": (63_510_854, 7.8333e9),
    "cat_resnet_50": (28_072_888, 4.0974e9),
    "sem_resnet_50": (28_163_678, 4.0918e9),
    "sem_resnet_164_cifar": (1_946_974, 247.90e6),
}
# One per system and kind of block; the others differ in depth.
BUILT = {
    "cbam_resnet_18": (64, 128, 256, 512),
    "eca_resnet_50": (256, 512, 1024, 2048),
    "gcnet_resnet_50_r16": (256, 512, 1024, 2048),
    "cat_resnet_50": (256, 512, 1024, 2048),
    "sem_resnet_50": (256, 512, 1024, 2048),
}
GATES = {
    "cbam": gates.CBAM,
    "eca": gates.ECA,
    "gcnet": gates.GlobalContext,
    "cat": gates.CollaborativeAttention,
    "sem": gates.SwitchableExcitation,
}


def builder(name):
    """One block per stage and a quarter of the channels, so that the whole contract takes little time."""

    def build(**kwargs):
        torch.manual_seed(0)
        sizes = {"depths": (1, 1, 1, 1), "planes": (16, 32, 64, 128), "num_classes": 7}
        return create_model(name, **{**sizes, **kwargs})

    return build


@pytest.mark.parametrize("name", only([*BUILT, "sem_resnet_164_cifar"], COUNTED))
def test_counts(name):
    backbones.check_counts(name, *COUNTED[name])


@pytest.mark.parametrize("name", [*COUNTED, "cat_resnet_101", "sem_resnet_101"])
def test_configuration(name):
    backbones.check_configuration(name)


@pytest.mark.extended
@pytest.mark.parametrize("name", ["cat_resnet_101", "sem_resnet_101"])
def test_counts_of_deeper_models(name):
    """Known for 50 layers; the other 17 blocks of stage 3 are alike."""
    deep, shallow = find_system(name).models[name], find_system(name).models[name.replace("101", "50")]
    one = create_model(name.replace("101", "50"), device="meta").layer3[1]
    block = sum(p.numel() for p in one.parameters())
    assert deep.params == shallow.params + 17 * block
    backbones.check_counts(name, deep.params, deep.macs)


@pytest.mark.parametrize("name", BUILT)
def test_maps_of_the_published_sizes(name):
    with torch.device("meta"):
        model = create_model(name, features_only=True)
        maps = model(torch.empty(1, 3, 224, 224))
    assert tuple(value.shape[1] for value in maps) == BUILT[name]
    assert [value.shape[2] for value in maps] == [56, 28, 14, 7]
    assert model.feature_info.reduction() == [4, 8, 16, 32]


def test_maps_of_the_cifar_model():
    model = create_model("sem_resnet_164_cifar", features_only=True, depths=(1, 1, 1)).eval()
    with torch.no_grad():
        maps = model(backbones.image(40, 24))
    assert [tuple(value.shape[1:]) for value in maps] == [(64, 40, 24), (128, 20, 12), (256, 10, 6)]
    assert model.feature_info.reduction() == [1, 2, 4]


@pytest.mark.parametrize("name", COUNTED)
def test_where_gates_are(name):
    """In every block, after the last BatchNorm; global context blocks not in the first stage."""
    model = create_model(name, device="meta")
    kind = GATES[name.partition("_")[0]]
    for index in range(1, model.num_stages + 1):
        for block in model.get_submodule(f"layer{index}"):
            gate = [child for child in block.children() if isinstance(child, gates.Gate)]
            if name.startswith("gcnet") and index == 1:
                assert not gate
            else:
                assert [type(child) for child in gate] == [kind]
    kernels = {"eca_resnet_18": (3, 5, 7, 7), "eca_resnet_50": (3, 5, 5, 7), "eca_resnet_101": (3, 3, 5, 7)}
    if name in kernels:
        sizes = [model.get_submodule(f"layer{i}.0.eca.conv").kernel_size[0] for i in range(1, 5)]
        assert tuple(sizes) == kernels[name]


@pytest.mark.parametrize("name", BUILT)
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


@pytest.mark.parametrize("name", BUILT)
def test_any_size(name):
    staged_backbones.check_sizes(builder(name), [(32, 32), (33, 65), (40, 100)])


@pytest.mark.parametrize("name", ["cbam_resnet_18", "gcnet_resnet_50_r16"])
def test_grad_checkpointing(name):
    build = builder(name)
    backbones.check_grad_checkpointing(lambda **kwargs: build(drop_path_rate=0.3, **kwargs))


@pytest.mark.parametrize("name", BUILT)
def test_training_reduces_the_loss(name):
    backbones.check_training(builder(name), learning_rate=0.02)


def test_drop_path_leaves_the_shortcut():
    """A dropped branch leaves the rectified shortcut, whatever the gate."""
    torch.manual_seed(0)
    model = create_model("cbam_resnet_18", drop_path_rate=1.0)
    block = model.layer4[1].train()
    assert block.drop_path.drop_prob == 1.0
    x = backbones.image(4, 4, channels=512)
    torch.testing.assert_close(block(x), x.relu())
    rates = [b.drop_path.drop_prob for i in range(1, 5) for b in model.get_submodule(f"layer{i}")]
    assert rates == pytest.approx([i / 7 for i in range(8)])


@pytest.mark.parametrize("name", [name for name in BUILT if name != "cat_resnet_50"])
def test_official_names_round_trip(name):
    model = builder(name)()
    twin = builder(name)()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.rand_like(tensor.float()))
    load_checkpoint(twin, {"state_dict": {f"module.{k}": v for k, v in official_state_dict(model).items()}})
    for key, value in twin.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


def test_reconstruction_has_no_official_names():
    with pytest.raises(ValueError, match=r"public code of CAT \(none\), got 'pytorch'"):
        official_state_dict(builder("cat_resnet_50")())


def test_detector_checkpoint():
    """GCNet's files hold detectors: the backbone is taken from its prefix, the rest is left."""
    model = builder("gcnet_resnet_50_r16")(num_classes=0)
    state = {f"backbone.{k}": v + 1 for k, v in official_state_dict(model).items()}
    state["neck.lateral_convs.0.conv.weight"] = torch.zeros(1)
    twin = builder("gcnet_resnet_50_r16")(num_classes=0)
    load_checkpoint(twin, {"state_dict": state})
    torch.testing.assert_close(twin.conv1.weight, model.conv1.weight + 1)
    with pytest.raises(CheckpointError, match=r"2 missing \(fc.weight, fc.bias\)"):
        load_checkpoint(builder("gcnet_resnet_50_r16")(), {"state_dict": state})


def test_gates_start_as_published():
    cbam = create_model("cbam_resnet_18", num_classes=2)
    assert cbam.layer1[0].cbam.SpatialGate.spatial.bn.weight.item() == 0
    assert cbam.fc.bias.abs().max() == 0
    gc = create_model("gcnet_resnet_50_r16", num_classes=2)
    transform = gc.layer2[0].context_block.channel_add_conv
    assert transform[-1].weight.abs().max() == 0
    assert transform[0].bias.abs().max() > 0
    std = gc.layer1[0].conv2.weight.std()
    torch.testing.assert_close(std, torch.tensor((2 / (9 * 64)) ** 0.5), rtol=0.05, atol=0)


def test_scalars_of_cat_are_not_decayed():
    model = builder("cat_resnet_50")()
    names = model.no_weight_decay()
    assert len(names) == 3 * 4
    assert names <= {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cbam_resnet_50", {"planes": (8, 16)}, r"planes must have 4 entries, one per stage, got \(8, 16\)"),
        ("eca_resnet_50", {"kernel_sizes": (3,)}, r"kernel_sizes must have 4 entries.* got \(3,\)"),
        ("eca_resnet_50", {"stem": "deep"}, "stem='deep' is unknown; use one of imagenet, cifar"),
        ("sem_resnet_50", {"bottleneck": False}, "bottleneck must be True"),
        ("gcnet_resnet_50_r4", {"stages_with_gate": (True,)}, "stages_with_gate must have 4 entries"),
    ],
)
def test_argument_errors(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, device="meta", **options)
