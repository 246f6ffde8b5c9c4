"""The fill rule, on examples computed when the records were made."""

import pytest
import torch
from support import golden

# name, shape, first values, sum, L2 norm
EXAMPLES = [
    (
        "blocks1.0.norm1.weight",
        (64,),
        (1.0402433918804621, 1.2276381865283006),
        65.189748077706994,
        8.18682241035747,
    ),
    (
        "blocks1.0.norm1.running_mean",
        (64,),
        (0.22773321314795703,),
        0.2027721980667524,
        0.91282793825112762,
    ),
    (
        "blocks1.0.norm1.running_var",
        (64,),
        (1.2480770672326054, 1.0239082558552892),
        68.943607064235067,
        8.6325982766330593,
    ),
    (
        "patch_embed1.proj.bias",
        (64,),
        (0.071897391481736975, 0.11361821307557381),
        1.3139674107385138,
        0.77683717849253309,
    ),
    ("pos_embed4", (1, 50, 512), (-0.0094864642678480181,), 2.7866944236215074, 3.1919012472995067),
    ("channel_add_conv.1.weight", (4, 1, 1), (0.96490440810888889,), 4.11951967453476, None),
    ("layer1.0.eca.conv.weight", (1, 1, 3), (0.17581939960915097,), 0.69843881249584872, None),
    ("head.sa.gamma", (1,), (1.0788480585446067,), None, None),
    ("network.0.0.layer_scale_1", (64,), (1.0154965110338821,), 63.940212258931595, None),
]


@pytest.mark.parametrize(("name", "shape", "first", "total", "norm"), EXAMPLES, ids=lambda v: str(v)[:30])
def test_worked_examples(name, shape, first, total, norm):
    value = golden.fill_value(name, shape).flatten()
    assert value[: len(first)].tolist() == pytest.approx(first, rel=1e-14)
    if total is not None:
        assert value.sum().item() == pytest.approx(total, rel=1e-12)
    if norm is not None:
        assert value.norm().item() == pytest.approx(norm, rel=1e-12)


def test_matrix_with_gain():
    value = golden.fill_value("patch_embed1.proj.weight", (64, 3, 4, 4), gain=0.5).flatten()
    expected = (-0.022405457126415854, -0.020838075097782256, -0.12241536827256795)
    assert value[:3].tolist() == pytest.approx(expected, rel=1e-14)
    assert value[-1].item() == pytest.approx(0.026148065695403538, rel=1e-14)
    assert value.sum().item() == pytest.approx(-3.0283890936400404, rel=1e-12)
    assert value.norm().item() == pytest.approx(3.9347513553169273, rel=1e-12)


def test_inputs():
    x = golden.normal("input", (2, 3, 224, 224))
    first = (0.41628475240817708, -0.1144516792289041, 1.1580745052688868)
    assert x.flatten()[:3].tolist() == pytest.approx(first, rel=1e-14)
    assert x.flatten()[-1].item() == pytest.approx(-1.3053712517744931, rel=1e-14)
    assert x.sum().item() == pytest.approx(-354.70246643157441, rel=1e-10)
    assert x.norm().item() == pytest.approx(548.04517128347629, rel=1e-12)
    draw = golden.generator("cotangent").standard_normal(2000)
    expected = (-2.5933874136628261, 1.4599573165058828, -0.28469616348768501)
    assert draw[:3].tolist() == pytest.approx(expected, rel=1e-14)


def test_deviation_is_seen():
    """A comparison that lets wrong numbers pass would make every golden test worthless."""
    x = golden.normal("input", (2, 3))
    record = {
        "shape": [2, 3],
        "sum": x.sum().item(),
        "l2": x.norm().item(),
        "first4": x.flatten()[:4].tolist(),
    }
    exact = golden.Deviation()
    exact.compare("x", x, record)
    exact.check(1e-14)
    moved = golden.Deviation()
    moved.compare("x", x + torch.tensor([0.0, 1e-6, 0.0]), record)
    with pytest.raises(AssertionError, match=r"x\["):
        moved.check(1e-8)
    with pytest.raises(AssertionError, match="shape"):
        golden.Deviation().compare("x", x.t(), record)
    with pytest.raises(AssertionError, match="no value"):
        golden.Deviation().check(1.0)
    nan = golden.Deviation()
    nan.compare("x", x * float("nan"), record)
    with pytest.raises(AssertionError):
        nan.check(1e-8)
