"""accelerate() in models that others wrote: all that a step leaves behind equals the untouched model's."""

from __future__ import annotations

import copy
import json

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("torchvision")

from accelerate_helpers import assert_same, build, inference, training_step

import fused_ops
from fused_ops.bench.accelerate import MODELS, RESULTS, entry, markdown

# Convolutions exchanged with one module after them, with two, and in all, as found when this was written: the
# equality of results would also hold if the finder lost some.
EXCHANGED = {
    "convnext_atto": (0, 0, 12),
    "cspnext_tiny": (0, 4, 4),
    "ecaresnet26t": (0, 0, 0),
    "edgenext_xx_small": (0, 0, 15),
    "efficientnet_b0": (0, 16, 16),
    "efficientvit_b0": (0, 5, 15),
    "fastvit_t8": (32, 0, 32),
    "focalnet_tiny_srf": (24, 0, 24),
    "gcresnet33ts": (0, 0, 0),
    "ghostnet_050": (25, 16, 41),
    "hardcorenas_a": (0, 11, 11),
    "hgnetv2_b0": (3, 9, 12),
    "inception_next_atto": (0, 0, 36),
    "lcnet_035": (0, 13, 13),
    "mixnet_s": (0, 3, 43),
    "mnasnet_small": (0, 15, 15),
    "mobilenetv2_035": (0, 17, 17),
    "mobilenetv3_small_050": (0, 11, 11),
    "mobilenetv4_conv_small_050": (4, 11, 15),
    "mobilevit_xxs": (0, 7, 7),
    "nextvit_small": (0, 0, 0),
    "pvt_v2_b0": (0, 0, 0),
    "regnetx_002": (0, 0, 0),
    "repvit_m0_9": (26, 0, 49),
    "resnet10t": (0, 0, 0),
    "rexnet_100": (13, 3, 16),
    "starnet_s1": (15, 0, 30),
    "swiftformer_xs": (16, 0, 16),
    "test_convnext": (0, 0, 9),
    "test_mambaout": (0, 0, 6),
    "test_vit": (0, 0, 0),
    "tf_efficientnet_lite0": (0, 12, 12),
    "tinynet_e": (0, 10, 10),
    "twins_pcpvt_small": (0, 0, 4),
    "torchvision/fasterrcnn_mobilenet_v3_large_320_fpn": (0, 15, 15),
    "torchvision/lraspp_mobilenet_v3_large": (0, 15, 15),
    "torchvision/mnasnet0_5": (0, 17, 17),
    "torchvision/mobilenet_v2": (0, 17, 17),
    "torchvision/mobilenet_v3_small": (0, 11, 11),
    "torchvision/shufflenet_v2_x0_5": (19, 0, 19),
    "torchvision/ssdlite320_mobilenet_v3_large": (0, 19, 31),
}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


GATES = ("SqueezeExcite", "SEModule", "EffectiveSEModule", "SqueezeExcitation", "EcaModule", "GlobalContext")
# Attention with a path of its own to keys and values, by model.
RESIDUAL = " -> + residual"
# How many operators take in the addition after them, by model.
ADDITIONS = {
    "convnext_atto": 4,
    "ecaresnet26t": 8,
    "edgenext_xx_small": 10,
    "fastvit_t8": 20,
    "focalnet_tiny_srf": 2,
    "inception_next_atto": 4,
    "mobilevit_xxs": 9,
    "nextvit_small": 3,
    "pvt_v2_b0": 16,
    "repvit_m0_9": 46,
    "starnet_s1": 15,
    "swiftformer_xs": 12,
    "test_convnext": 9,
    "test_vit": 6,
    "twins_pcpvt_small": 27,
}
ATTENTIONS = {"nextvit_small": 4, "pvt_v2_b0": 8, "twins_pcpvt_small": 16}


def gates(model: torch.nn.Module) -> int:
    """By what their classes are called."""
    return sum(type(module).__name__.removeprefix("Accelerated") in GATES for module in model.modules())


def snapshot(model: torch.nn.Module) -> list[tuple[str, int, type, list[str]]]:
    """Every module object, its class, and which attributes it has."""
    return [(name, id(m), type(m), sorted(m.__dict__)) for name, m in model.named_modules()]


# The slowest, whose kinds of layers others have too; Next-ViT is compared with its authors' numbers besides.
SLOW = {
    *("fastvit_t8", "focalnet_tiny_srf", "gcresnet33ts", "mixnet_s", "nextvit_small", "regnetx_002"),
    *("repvit_m0_9", "rexnet_100", "tf_efficientnet_lite0", "tinynet_e"),
    "torchvision/fasterrcnn_mobilenet_v3_large_320_fpn",
    "torchvision/lraspp_mobilenet_v3_large",
    "torchvision/mobilenet_v2",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.extended] * (name in SLOW)) for name in MODELS]
)
def test_same_model(name):
    stock = build(name)
    fused = copy.deepcopy(stock)
    before, state = snapshot(fused), fused.state_dict()
    report = fused_ops.accelerate(fused)
    done = [row for row in report.results if row.exchanged]
    kinds = [row.pattern.removesuffix(RESIDUAL).count("->") for row in done if row.kind == "depthwise"]
    assert sum(row.kind == "gate" for row in done) == gates(stock)
    assert sum(row.kind == "attention" for row in done) == ATTENTIONS.get(name, 0)
    assert sum(row.pattern.endswith(RESIDUAL) for row in done) == ADDITIONS.get(name, 0)
    assert (kinds.count(1), kinds.count(2), len(kinds)) == EXCHANGED[name]
    assert [n for n, *_ in snapshot(fused)] == [n for n, *_ in before]
    assert fused.state_dict().keys() == state.keys()
    assert all(fused.state_dict()[key].data_ptr() == value.data_ptr() for key, value in state.items())
    assert_same(training_step(fused), training_step(stock))
    assert_same(inference(fused), inference(stock))
    fused_ops.restore(fused)
    assert snapshot(fused) == before
    assert_same(dict(fused.state_dict()), dict(stock.state_dict()))


def test_every_chain_runs_fused():
    """The equality above would also hold if chains fell back to the stock modules."""
    from fused_ops.core import backends

    for name in ("efficientnet_b0", "torchvision/shufflenet_v2_x0_5", "convnext_atto"):
        model = build(name)
        rows = fused_ops.accelerate(model).results
        mlps = sum(row.kind == "mlp" and row.exchanged for row in rows)
        assert (mlps > 0) == (name == "convnext_atto")
        with backends.record() as choices:
            inference(model)
        # A gate pools and scales.
        assert len(choices) == EXCHANGED[name][2] + 2 * gates(model) + mlps
        norms = sum("post-norm with running statistics" in choice.call for choice in choices)
        assert norms == sum(EXCHANGED[name][:2])


@pytest.mark.parametrize(("name", "exchanged"), [("lcnet_035", 15), ("test_convnext", 18), ("pvt_v2_b0", 16)])
def test_ten_steps_of_training(name, exchanged):
    """C1: in float32, no further from float64 than twice what the stock model is."""
    results = []
    for dtype, exchange in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        model = build(name).to(dtype).train()
        if exchange:
            assert fused_ops.accelerate(model).exchanged == exchanged
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        generator = torch.Generator().manual_seed(3)
        losses = []
        for _ in range(10):
            images = torch.randn(4, 3, 64, 64, generator=generator, dtype=torch.float64).to(dtype)
            targets = torch.randint(3, (4,), generator=generator)
            torch.manual_seed(4)
            loss = torch.nn.functional.cross_entropy(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().double())
        weights = torch.cat([p.detach().double().flatten() for p in model.state_dict().values()])
        results.append((torch.stack(losses), weights))
    truth, stock, fused = results
    assert truth[0][0] != truth[0][-1]
    for want, reference, got in zip(truth, stock, fused, strict=True):
        # Floor: rounding the result itself to float32.
        floor = torch.finfo(torch.float32).eps * want.abs().max()
        assert (got - want).abs().max() <= 2 * (reference - want).abs().max() + floor


@pytest.mark.parametrize("name", ["lcnet_035", "torchvision/mobilenet_v3_small"])
def test_committed_table_is_current(name):
    entries = json.loads((RESULTS / "accelerate.json").read_text())
    assert [row["model"] for row in entries] == list(MODELS)
    assert (RESULTS / "accelerate.md").read_text() == markdown(entries)
    committed = next(row for row in entries if row["model"] == name)
    assert committed == entry(name), "run `fused-ops accelerate --table`"
