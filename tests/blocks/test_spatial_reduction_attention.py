"""Spatial-reduction attention against timm's modules and the recorded numbers of the public code."""

from __future__ import annotations

import itertools

import pytest
import timm
import torch
from support import golden
from timm.models import nextvit, pvt_v2, twins
from torch import nn

import fused_ops
from fused_ops.attention import SpatialReductionAttention

DOUBLE = {"dtype": torch.float64}


def pvt_attention(stock: pvt_v2.Attention) -> SpatialReductionAttention:
    linear = stock.pool is not None
    ratio = 1 if linear or stock.sr is None else stock.sr.stride[0]
    return SpatialReductionAttention(
        stock.dim, stock.num_heads, ratio, reduction="pool" if linear else "conv", **DOUBLE
    )


def twins_attention(stock: twins.GlobalSubSampleAttn) -> SpatialReductionAttention:
    return SpatialReductionAttention(stock.dim, stock.num_heads, stock.sr_ratio, **DOUBLE)


def nextvit_attention(stock: nextvit.EfficientAttention) -> SpatialReductionAttention:
    return SpatialReductionAttention(
        stock.dim, stock.num_heads, stock.sr_ratio, reduction="token_pool", out_dim=stock.out_dim, **DOUBLE
    )


MODELS = {
    "pvt_v2_b0": (pvt_v2.Attention, pvt_attention),
    "pvt_v2_b2": (pvt_v2.Attention, pvt_attention),
    "pvt_v2_b2_li": (pvt_v2.Attention, pvt_attention),
    "twins_pcpvt_small": (twins.GlobalSubSampleAttn, twins_attention),
    "nextvit_small": (nextvit.EfficientAttention, nextvit_attention),
}


def attentions(model: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    """One of each stage's attention modules: those of a stage are alike."""
    found = {}
    for module in model.modules():
        if isinstance(module, kind):
            found.setdefault((module.q.in_features, getattr(module, "sr_ratio", None)), module)
    return list(found.values())


@pytest.mark.parametrize("name", MODELS)
def test_in_place_of_timms(name):
    """Parameters load strictly both ways; output, input's and parameters' gradients agree in float64."""
    kind, convert = MODELS[name]
    # Only a few modules get memory: filling whole models with random weights takes seconds.
    with torch.device("meta"):
        found = attentions(timm.create_model(name), kind)
    # Next-ViT has no attention in its first stage.
    assert len(found) == (3 if name == "nextvit_small" else 4)
    # 13 x 18 is no multiple of any ratio, nor of 7.
    height, width = 13, 18
    for stock in found:
        golden.disable_randomness(stock)
        stock.to_empty(device="cpu").double()
        ours = convert(stock)
        assert list(ours.state_dict()) == list(stock.state_dict())
        stock.load_state_dict(golden.fill(stock.state_dict()))
        ours.load_state_dict(stock.state_dict())
        stock.load_state_dict(ours.state_dict())
        size = () if kind is nextvit.EfficientAttention else ((height, width),)
        x = torch.randn(1, height * width, stock.q.in_features, **DOUBLE, requires_grad=True)
        ours.eval(), stock.eval()
        with torch.no_grad():
            torch.testing.assert_close(ours(x, *size), stock(x, *size), rtol=1e-10, atol=1e-10)
        ours.train(), stock.train()
        out, want = ours(x, *size), stock(x, *size)
        torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-10)
        grad = torch.randn_like(out)
        got = torch.autograd.grad(out, (x, *ours.parameters()), grad)
        expected = torch.autograd.grad(want, (x, *stock.parameters()), grad)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        for key, value in stock.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-12, atol=1e-12)


def test_whole_model():
    """Every attention module of a model exchanged: the same logits from the same weights."""
    kind, convert = MODELS["pvt_v2_b0"]
    torch.manual_seed(0)
    model = timm.create_model("pvt_v2_b0").double().eval()
    x = torch.randn(1, 3, 64, 32, **DOUBLE)
    with torch.no_grad():
        want = model(x)
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, kind):
                    ours = convert(child).eval()
                    ours.load_state_dict(child.state_dict())
                    setattr(parent, name, ours)
        torch.testing.assert_close(model(x), want, rtol=1e-10, atol=1e-10)
        rows = fused_ops.explain(model, x).rows()
    assert [row["op"] for row in rows] == ["attention"] * 8
    assert rows[0]["call"] == "128 queries on 2 keys, 1 heads of 32, batch 1 float64"


class OfficialMlp(nn.Module):
    """Next-ViT's feed-forward part under its official names, which timm's are not."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, hidden, 1, **DOUBLE)
        self.conv2 = nn.Conv2d(hidden, dim, 1, **DOUBLE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.conv1(x).relu())


def test_next_vit_golden():
    """Recorded numbers of bytedance/Next-ViT's transformer block, with its attention exchanged."""
    record = golden.load("next_vit_ntb_192_256_s4")
    block = nextvit.NextTransformerBlock(192, 256, 0.0, sr_ratio=4, **DOUBLE)
    block.e_mhsa = SpatialReductionAttention(192, 6, 4, reduction="token_pool", **DOUBLE)
    block.mlp = OfficialMlp(256, 512)
    golden.check_layout(block.state_dict(), record)
    block.load_state_dict(golden.fill(block.state_dict(), record["state_dict"]["gain"]))
    golden.check_eval(block, record, lambda x: ([block(x)], ())).check(golden.EVAL_TOLERANCE)
    golden.check_train(block, record, lambda x: [block(x)]).check(golden.TRAIN_TOLERANCE)


VARIANTS = {
    "conv": {"reduction_ratio": 2},
    "plain": {"reduction_ratio": 1},
    "pool": {"reduction": "pool"},
    "token_pool": {"reduction_ratio": 2, "reduction": "token_pool"},
}


def module_of(variant: str, dtype: torch.dtype = torch.float32, **options) -> SpatialReductionAttention:
    torch.manual_seed(1)
    module = SpatialReductionAttention(24, 3, **VARIANTS[variant], **options)
    module.load_state_dict(golden.fill(module.state_dict()))
    return module.to(dtype)


@pytest.mark.parametrize("variant", VARIANTS)
def test_on_the_kernels(variant):
    """Output and every gradient by the Triton kernels, which read the packed projections where they lie."""
    x = torch.randn(2, 20, 24, **DOUBLE)
    found = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        module = module_of(variant, dtype)
        inputs = x.to(dtype).requires_grad_()
        with fused_ops.backend(backend):
            out = module(inputs, (4, 5))
        weights = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
        found.append((out, *torch.autograd.grad((out * weights).sum(), (inputs, *module.parameters()))))
    # A bias of the keys has no gradient but rounding errors: it shifts all scores of a query alike.
    largest = max(float(other.detach().abs().max()) for other in found[1])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=2e-6 * largest)


def test_dropout_follows_the_mode():
    module = module_of("conv", attn_drop=0.5)
    x = torch.randn(1, 20, 24)
    for backend in ("reference", "triton"):
        with fused_ops.backend(backend), torch.no_grad():
            module.eval()
            assert torch.equal(module(x, (4, 5)), module(x, (4, 5)))
            module.train()
            first, second = module(x, (4, 5)), module(x, (4, 5))
            assert not torch.allclose(first, second)
            torch.manual_seed(4)
            first = module(x, (4, 5))
            torch.manual_seed(4)
            assert torch.equal(first, module(x, (4, 5)))


def test_checkpointing_repeats_the_dropout():
    """D9: recomputed under activation checkpointing with the same mask."""
    from torch.utils.checkpoint import checkpoint

    module = module_of("plain", attn_drop=0.5).train()
    x = torch.randn(1, 20, 24, requires_grad=True)
    found = []
    with fused_ops.backend("triton"):
        for run in (module, lambda x, size: checkpoint(module, x, size, use_reentrant=False)):
            torch.manual_seed(6)
            out = run(x, (4, 5))
            found.append((out, *torch.autograd.grad(out.square().sum(), x)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_compiles_whole():
    """One graph per variant, with eager's result."""
    torch._dynamo.reset()
    x = torch.randn(2, 20, 24)
    for variant in ("conv", "token_pool"):
        module = module_of(variant).eval()
        with fused_ops.backend("triton"):
            want = module(x, (4, 5))
            got = torch.compile(module, backend="aot_eager", fullgraph=True)(x, (4, 5))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 5}, "num_heads must divide the 24 channels, got 5"),
        ({"reduction_ratio": 0}, "reduction_ratio must be at least 1, got 0"),
        ({"reduction": "mean"}, "reduction='mean' is unknown; use one of conv, pool, token_pool"),
    ],
)
def test_argument_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        SpatialReductionAttention(**{"dim": 24, "num_heads": 3, **arguments})


@pytest.mark.parametrize(("variant", "size"), list(itertools.product(("conv", "pool"), (None, (3, 5)))))
def test_size_has_to_fit(variant, size):
    with pytest.raises(ValueError, match="does not fit the 20 tokens"):
        module_of(variant)(torch.randn(1, 20, 24), size)
