"""ViP: published sizes, counted work, timm's contract, windows, relative logits and the mask."""

import pytest
import torch
from support import staged_backbones
from support.selection import only

from fused_ops.models import create_model
from fused_ops.models.vip import AnyAttention, RelativeLogits, ViP

# Parameters and multiply-accumulates at 224 pixels, counted from the public code.
COUNTED = {
    "vip_mobile": (6_329_640, 0.835e9),
    "vip_tiny": (12_770_280, 1.674e9),
    "vip_small": (32_128_872, 4.510e9),
    "vip_medium": (49_643_272, 7.982e9),
    "vip_base": (87_844_040, 14.958e9),
}


def small(**kwargs):
    return create_model("vip_test", **kwargs)


def conv_head(**kwargs):
    return small(head="conv", **kwargs)


# One with each kind of head; test_vip_golden.py checks the layout of each.
@pytest.mark.parametrize("name", only(["vip_mobile", "vip_medium"], COUNTED))
def test_counts(name):
    staged_backbones.check_table(name, *COUNTED[name])


@pytest.mark.parametrize("check", staged_backbones.CHECKS, ids=staged_backbones.name_of)
@pytest.mark.parametrize("build", [small, conv_head])
def test_contract(build, check):
    check(build, (64, 96))


@pytest.mark.parametrize("build", [small, conv_head])
def test_any_size(build):
    staged_backbones.check_sizes(build, [(32, 32), (33, 65), (40, 100)])
    with torch.no_grad():
        # One image: the batch dimension stays.
        assert build(num_classes=7).eval()(staged_backbones.image((64, 64), batch=1)).shape == (1, 7)


@pytest.mark.parametrize("build", [small, conv_head])
def test_training_reduces_the_loss(build):
    staged_backbones.check_training(build, (64, 64))


def test_windows_are_contiguous_and_come_back():
    stage = small().layer_0
    x = torch.arange(2 * 6 * 9.0).view(2, 6, 9, 1)
    windows = stage._windows(x)
    assert windows.shape == (2, 6, 16, 1)
    torch.testing.assert_close(windows[0, 1].view(4, 4), x[0, :4, 4:8, 0])
    assert torch.all(windows[0, 5].view(4, 4)[2:] == 0)
    torch.testing.assert_close(stage._map(windows, (6, 9)).permute(0, 2, 3, 1), x)


def test_relative_logits_by_their_definition():
    logits = RelativeLogits(3, 4).double()
    query = torch.randn(2, 2, 9, 4, dtype=torch.float64)
    got = logits(query)
    for i in range(9):
        for j in range(9):
            down, right = j // 3 - i // 3 + 2, j % 3 - i % 3 + 2
            want = query[:, :, i, :2] @ logits.rel_emb_h[down] + query[:, :, i, 2:] @ logits.rel_emb_w[right]
            torch.testing.assert_close(got[:, :, i, j], want)


def test_mask_hides_keys():
    torch.manual_seed(0)
    attention = AnyAttention(16, 2).double()
    query, key = torch.randn(2, 5, 16).double(), torch.randn(2, 7, 16).double()
    mask = torch.zeros(2, 7, dtype=torch.bool)
    torch.testing.assert_close(attention(query, key, key, mask=mask), attention(query, key, key))
    mask[:, 4:] = True
    torch.testing.assert_close(
        attention(query, key, key, mask=mask), attention(query, key[:, :4], key[:, :4])
    )
    mask[1] = True
    out = attention(query, key, key, mask=mask)
    torch.testing.assert_close(out[1], attention.proj.bias.expand(5, 16))
    out.sum().backward()
    assert torch.isfinite(attention.to_q.weight.grad).all()


def test_image_sizes():
    model = small(features_only=True).model.eval()
    x = staged_backbones.image((64, 96))
    with torch.no_grad():
        plain = model.forward_intermediates(x, intermediates_only=True)
        whole = model.forward_intermediates(x, intermediates_only=True, image_sizes=[(64, 96)] * 2)
        part = model.forward_intermediates(x, intermediates_only=True, image_sizes=[(64, 96), (32, 32)])
    # Without a mask what fills up the windows is read too, with one it is not.
    assert whole[0].shape == plain[0].shape
    for got, want in zip(part, whole, strict=True):
        torch.testing.assert_close(got[0], want[0])
        assert not torch.allclose(got[1], want[1])
    with pytest.raises(ValueError, match="image_sizes must have 2 entries, one per image"):
        model.forward_intermediates(x, image_sizes=[(64, 96)])


def test_output_norms():
    dense = small(features_only=True, output_norm=True)
    maps = dense(staged_backbones.image((64, 64)))
    for value in maps:
        torch.testing.assert_close(value.mean(1), torch.zeros_like(value[:, 0]), atol=1e-4, rtol=0)


def test_argument_errors():
    with pytest.raises(ValueError, match=r"dims must have 4 entries, one per stage, got \(64, 128\)"):
        ViP(dims=(64, 128), device="meta")
    with pytest.raises(ValueError, match="head='token' is unknown; use one of encoder, conv"):
        ViP(head="token", device="meta")
    with pytest.raises(ValueError, match="num_heads must divide the 64 channels, got 3"):
        ViP(encoder_heads=(3, 2, 4, 8), device="meta")
    with pytest.raises(ValueError, match="global_pool='max' is unknown; use one of avg, ''"):
        small(global_pool="max")
    with pytest.raises(ValueError, match=r"got 'vip_tin'; nearest: vip_tiny"):
        create_model("vip_tin")
