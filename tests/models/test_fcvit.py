"""FCViT: published sizes, counted work, timm's contract, and the standardised similarities."""

import pytest
import torch
from support import staged_backbones
from support.selection import only

from fused_ops.models import create_model
from fused_ops.models.fcvit import FCViT, GlobalContext

# Parameters, multiply-accumulates at 224 pixels counted from the public code, and published units of 2**20.
COUNTED = {
    "fcvit_tiny": (4_784_752, 0.902e9, 4.6),
    "fcvit_b12": (14_701_832, 2.646e9, 14),
    "fcvit_b24": (26_960_232, 5.059e9, 25.7),
    "fcvit_b48": (51_477_032, 9.885e9, 49.1),
}


def small(**kwargs):
    return create_model("fcvit_test", **kwargs)


# The others have more blocks of the same kind; test_fcvit_golden.py checks the layout of each.
@pytest.mark.parametrize("name", only(["fcvit_tiny"], COUNTED))
def test_counts(name):
    params, macs, published = COUNTED[name]
    staged_backbones.check_table(name, params, macs)
    assert round(params / 2**20, 1) == published
    assert staged_backbones.table_row(name).published_params == published * 1e6


@pytest.mark.parametrize("check", staged_backbones.CHECKS, ids=staged_backbones.name_of)
def test_contract(check):
    check(small, (64, 96))


def test_any_size():
    staged_backbones.check_sizes(small, [(32, 32), (33, 65), (40, 100), (128, 64)])


def test_training_reduces_the_loss():
    staged_backbones.check_training(small, (64, 64))


def test_context_of_one_position_is_finite():
    """Similarities of a map with one position have no spread within a head."""
    context = GlobalContext(16).double()
    out = context(torch.randn(2, 16, 1, 1, dtype=torch.float64))
    assert torch.isfinite(out).all()


def test_similarities_are_standardised_over_heads_and_positions():
    torch.manual_seed(0)
    context = GlobalContext(16).double()
    torch.nn.init.zeros_(context.fc2.weight)
    torch.nn.init.ones_(context.fc2.bias)
    x = torch.randn(2, 16, 5, 4, dtype=torch.float64)
    similarity = context(x)
    # Both channels of a head get the same, and every sample has mean 0 and unbiased deviation 1.
    torch.testing.assert_close(similarity[:, ::2], similarity[:, 1::2])
    flat = similarity[:, ::2].flatten(1)
    torch.testing.assert_close(flat.mean(1), torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(flat.std(1), torch.ones(2, dtype=torch.float64), atol=1e-3, rtol=0)


def test_output_norms():
    plain = small(num_classes=7).eval()
    dense = small(num_classes=7, output_norm=True).eval()
    state = plain.state_dict() | {k: v for k, v in dense.state_dict().items() if k not in plain.state_dict()}
    dense.load_state_dict(state)
    x = staged_backbones.image((64, 64))
    with torch.no_grad():
        torch.testing.assert_close(dense(x), plain(x))
        raw = plain.forward_intermediates(x, intermediates_only=True)
        normed = dense.forward_intermediates(x, intermediates_only=True)
    for i, (got, value) in enumerate(zip(normed, raw, strict=True)):
        torch.testing.assert_close(got, dense.get_submodule(f"norm{2 * i}")(value))
    two = small(features_only=True, output_norm=True, out_indices=(0, 1))
    assert not hasattr(two.model, "norm4")


def test_layer_scale():
    block = create_model("fcvit_b12", device="cpu", depths=(1, 1, 1, 1)).network[0][0]
    assert torch.all(block.layer_scale_1 == 1e-5)
    block = small(layer_scale_init=0.5).network[2][0]
    assert torch.all(block.layer_scale_2 == 0.5)


def test_argument_errors():
    with pytest.raises(ValueError, match=r"dims must have 4 entries, one per stage, got \(64, 128\)"):
        FCViT(dims=(64, 128), device="meta")
    with pytest.raises(ValueError, match="num_heads must divide the 64 channels, got 7"):
        FCViT(num_heads=7, device="meta")
    with pytest.raises(ValueError, match=r"got 'fcvit_b13'; nearest: fcvit_b"):
        create_model("fcvit_b13")
