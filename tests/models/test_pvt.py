"""PVT: published sizes, counted work, timm's contract, positions and the dense form."""

import pytest
import torch
from support import staged_backbones
from support.selection import only

from fused_ops.models import count_params, create_model
from fused_ops.models.common import resize_position_table
from fused_ops.models.pvt import PVT

# Parameters and multiply-accumulates at 224 pixels, counted from the public code.
COUNTED = {
    "pvt_tiny": (13_229_288, 1.933e9),
    "pvt_small": (24_485_864, 3.816e9),
    "pvt_medium": (44_208_104, 6.659e9),
    "pvt_large": (61_369_320, 9.814e9),
}
# Without class token, final norm and classifier.
DENSE = {"pvt_tiny": 12_714_752, "pvt_small": 23_971_328, "pvt_medium": 43_693_568, "pvt_large": 60_854_784}
BLOCKS = {"block1": 345_344, "block2": 592_384, "block3": 1_643_520, "block4": 3_152_384}


def small(**kwargs):
    return create_model("pvt_test", **kwargs)


# The others have more blocks of the same kind; test_pvt_golden.py checks the layout of each.
@pytest.mark.parametrize("name", only(["pvt_tiny"], COUNTED))
def test_counts(name):
    staged_backbones.check_table(name, *COUNTED[name])
    assert count_params(create_model(name, features_only=True, device="meta")) == DENSE[name]


def test_counts_per_block():
    model = create_model("pvt_small", device="meta")
    for stage, params in BLOCKS.items():
        assert count_params(model.get_submodule(f"{stage}.0")) == params


@pytest.mark.parametrize("check", staged_backbones.CHECKS, ids=staged_backbones.name_of)
def test_contract(check):
    check(small, (64, 96))


def test_any_size():
    staged_backbones.check_sizes(small, [(32, 32), (33, 65), (40, 100), (128, 128), (256, 64)])


def test_training_reduces_the_loss():
    staged_backbones.check_training(small, (64, 64))


def test_sizes_at_which_the_public_code_stops():
    """The second stage of a 448 pixel image has as many tokens as the first stage of a 224 pixel one."""
    model = small(img_size=32).eval()
    with torch.no_grad():
        for size in (64, 128):
            maps = model.forward_intermediates(staged_backbones.image((size, size)), intermediates_only=True)
            assert [value.shape[-1] for value in maps] == [size // 4, size // 8, size // 16, size // 32]


def test_positions_are_resized_per_stage():
    table = torch.arange(24.0).view(1, 12, 2)
    assert resize_position_table(table, (3, 4), (3, 4)) is table
    grown = resize_position_table(table, (3, 4), (6, 4))
    assert grown.shape == (1, 24, 2)
    # Resizing rows keeps what is constant in a row, and the edges of the table.
    torch.testing.assert_close(grown[:, :4], table[:, :4])
    torch.testing.assert_close(grown[:, -4:], table[:, -4:])
    model = small(img_size=(64, 128)).eval()
    assert model.grids == [(16, 32), (8, 16), (4, 8), (2, 4)]
    assert model.pos_embed3.shape == (1, 32, 48)
    assert model.pos_embed4.shape == (1, 9, 64)
    with torch.no_grad():
        assert model(staged_backbones.image((64, 128))).shape == (2, 10)


def test_class_token():
    model = small(num_classes=7).eval()
    x = staged_backbones.image((64, 64))
    with torch.no_grad():
        tokens = model.forward_features(x)
        assert tokens.shape == (2, 5, 64)
        torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, 0])
        model.reset_classifier(7, "avg")
        torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, 1:].mean(1))
        normed = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[0]
        torch.testing.assert_close(normed.flatten(2).transpose(1, 2), tokens[:, 1:])
    assert model.no_weight_decay() == {"cls_token"}

    dense = small(num_classes=7, class_token=False).eval()
    assert not hasattr(dense, "cls_token")
    assert dense.global_pool.pool_type == "avg"
    assert dense.forward_features(x).shape == (2, 4, 64)
    assert dense.no_weight_decay() == set()
    with pytest.raises(ValueError, match="global_pool='token' needs a class token"):
        dense.reset_classifier(7, "token")


def test_features_from_a_checkpoint_of_the_classifier():
    model = small(num_classes=7)
    features = small(features_only=True, num_classes=7, checkpoint=model.state_dict())
    assert not hasattr(features.model, "cls_token")
    for name, value in features.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_argument_errors():
    with pytest.raises(ValueError, match=r"dims must have 4 entries, one per stage, got \(64, 128\)"):
        PVT(dims=(64, 128), device="meta")
    with pytest.raises(ValueError, match="num_heads must divide the 320 channels, got 6"):
        PVT(num_heads=(1, 2, 6, 8), device="meta")
    with pytest.raises(ValueError, match="class_token needs a last stage without reduction"):
        PVT(reduction_ratios=(8, 4, 2, 2), device="meta")
    with pytest.raises(ValueError, match=r"got 'pvt_tinny'; nearest: pvt_tiny"):
        create_model("pvt_tinny")
