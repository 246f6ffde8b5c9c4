"""HLG: sizes under every reading of the released code, timm's contract, windows and position biases."""

import pytest
import torch
from support import staged_backbones
from support.selection import only

from fused_ops.models import count_macs, count_params, create_model
from fused_ops.models.hlg import HLG, DynamicPositionBias

# Parameters in units of 1e6, MACs at 224 pixels and those without the two convolutions of the stem, in 1e9.
COUNTED = {
    "hlg_mobile": (4.141, 0.703, None),
    "hlg_tiny": (11.036, 2.628, 2.144),
    "hlg_small": (24.273, 5.748, 4.675),
    "hlg_medium": (47.831, 10.098, 9.025),
    "hlg_medium_14": (39.978, 8.648, 7.575),
    "hlg_large": (84.356, 17.746, 15.853),
    "hlg_large_14": (70.456, 15.188, 13.295),
}
PUBLISHED_GIGA_MACS = {"hlg_tiny": 2.1, "hlg_small": 4.7, "hlg_medium": 9.0, "hlg_large": 15.9}


def small(**kwargs):
    return create_model("hlg_test", **kwargs)


# The larger ones have more and wider blocks of the same kinds.
@pytest.mark.parametrize("name", only(["hlg_mobile", "hlg_tiny"], COUNTED))
def test_counts(name):
    params, macs, macs_without_stem = COUNTED[name]
    info = staged_backbones.table_row(name)
    staged_backbones.check_table(name, info.params, macs * 1e9)
    assert info.params == pytest.approx(params * 1e6, abs=500)
    assert info.macs == pytest.approx(macs * 1e9, rel=0.001)
    if macs_without_stem is not None:
        width = create_model(name, device="meta").feature_info[0]["num_chs"]
        stem = (27 * width + 9 * width**2) * 112**2
        assert info.macs - stem == pytest.approx(macs_without_stem * 1e9, rel=0.001)
    if name in PUBLISHED_GIGA_MACS:
        assert info.published_macs == PUBLISHED_GIGA_MACS[name] * 1e9
        assert round(macs_without_stem, 1) == PUBLISHED_GIGA_MACS[name]


@pytest.mark.parametrize(
    ("name", "smooth_last", "params"),
    [
        ("tiny", False, 12.1),
        ("tiny", True, 12.7),
        ("small", False, 26.6),
        ("small", True, 27.9),
        ("medium_14", False, 42.3),
        ("medium_14", True, 43.6),
        ("large_14", False, 74.6),
        ("large_14", True, 76.9),
    ],
)
def test_counts_of_the_copy_for_classification(name, smooth_last, params):
    model = create_model(f"hlg_{name}", mlp_width_of="output", smooth_last=smooth_last, device="meta")
    assert count_params(model) == pytest.approx(params * 1e6, abs=51_000)


@pytest.mark.extended
def test_sixteen_layers_do_not_give_the_published_medium_either():
    model = create_model("hlg_medium", depths=(2, 2, 16, 2), device="meta")
    assert count_params(model) == pytest.approx(43.905e6, abs=500)
    assert count_macs(model, (3, 224, 224)) == pytest.approx(9.373e9, rel=0.001)


@pytest.mark.parametrize("check", staged_backbones.CHECKS, ids=staged_backbones.name_of)
def test_contract(check):
    check(small, (64, 96))


@pytest.mark.parametrize("positions", ["raster", "centre"])
def test_any_size(positions):
    def build(**kwargs):
        return small(window_positions=positions, **kwargs)

    staged_backbones.check_sizes(build, [(32, 32), (33, 65), (72, 100)])


def test_training_reduces_the_loss():
    staged_backbones.check_training(small, (64, 64))


def test_windows_come_back():
    for layer, window in zip(small().block1, ((0, 1, 2, 3), (0, 3, 6, 9)), strict=True):
        x = torch.arange(2 * 12 * 8.0).view(2, 12, 8, 1)
        windows = layer._windows(x, (3, 2))
        assert windows.shape == (2, 6, 16, 1)
        # Rows of the first window: contiguous, or as far apart as there are windows in a column.
        torch.testing.assert_close(windows[0, 0].view(4, 4)[:, 0], x[0, list(window), 0, 0])
        torch.testing.assert_close(layer._map(windows, (3, 2)), x)


def test_places_of_window_tokens():
    plain, dilated = small(window_positions="centre").block1
    device = torch.device("cpu")
    x = torch.arange(12 * 8.0).view(1, 12, 8, 1)
    for layer in (plain, dilated):
        rows, columns = layer._window_places((3, 2), 8, device)
        # The place is one of the window's own positions: row and column 2 of 4.
        torch.testing.assert_close(x[0, rows, columns, 0], layer._windows(x, (3, 2))[0, :, 10, 0])
    rows, columns = small().block1[0]._window_places((3, 2), 4, device)
    assert rows.tolist() == [0, 0, 0, 0, 1, 1]
    assert columns.tolist() == [0, 1, 2, 3, 0, 1]


def test_position_bias_depends_on_the_offset_alone():
    bias = DynamicPositionBias(32, 2).double()
    keys = torch.tensor([0, 2]), torch.tensor([1, 3])
    values = bias((3, 4), keys)
    assert values.shape == (2, 12, 2)
    for query in range(12):
        for key in range(2):
            offset = torch.tensor([query // 4 - keys[0][key], query % 4 - keys[1][key]]).double()
            want = bias.pos3(bias.pos2(bias.pos1(bias.pos_proj(offset))))
            torch.testing.assert_close(values[:, query, key], want)


def test_output_norms():
    dense = small(features_only=True, output_norm=True)
    for value in dense(staged_backbones.image((64, 64))):
        torch.testing.assert_close(value.mean(1), torch.zeros_like(value[:, 0]), atol=1e-4, rtol=0)
    two = small(features_only=True, output_norm=True, out_indices=(0, 1))
    assert not hasattr(two.model, "norm_out_2")


def test_argument_errors():
    with pytest.raises(ValueError, match=r"dims must have 4 entries, one per stage, got \(64, 128\)"):
        HLG(dims=(64, 128), device="meta")
    with pytest.raises(
        ValueError, match=r"dims must each be a multiple of the one before, got \(64, 128, 192"
    ):
        HLG(dims=(64, 128, 192, 384), device="meta")
    with pytest.raises(ValueError, match="window_positions='corner' is unknown; use one of raster, centre"):
        HLG(window_positions="corner", device="meta")
    with pytest.raises(ValueError, match="num_heads must divide the 512 channels, got 3"):
        HLG(num_heads=(2, 4, 8, 3), device="meta")
    with pytest.raises(ValueError, match=r"got 'hlg_tinyy'; nearest: hlg_tiny"):
        create_model("hlg_tinyy")
