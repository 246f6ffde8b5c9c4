"""Gates: what the definitions say, beside the recorded numbers."""

import math

import pytest
import torch
import torch.nn.functional as F

from fused_ops.blocks.gates import (
    CBAM,
    ECA,
    CollaborativeAttention,
    GlobalContext,
    SwitchableExcitation,
    adaptive_kernel_size,
    softmax_entropy,
)

GATES = {
    "cbam": CBAM,
    "eca": ECA,
    "context": GlobalContext,
    "cat": CollaborativeAttention,
    "sem": SwitchableExcitation,
}


def image(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def awake(gate):
    """The gate with every parameter away from its start, some of which switch it off."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter) + 0.2)
    return gate


@pytest.mark.parametrize("kind", GATES.values(), ids=GATES)
def test_contract(kind):
    """Any size, both layouts, and the end of a residual block."""
    gate = awake(kind(32, dtype=torch.float64)).eval()
    x, shortcut = image(2, 32, 5, 7), image(2, 32, 5, 7).flip(0)
    out = gate(x)
    assert out.shape == x.shape
    torch.testing.assert_close(gate(x, shortcut), F.relu(out + shortcut))
    turned = gate(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(turned, out)
    assert gate(image(1, 32, 1, 1)).shape == (1, 32, 1, 1)
    assert all(p.is_meta for p in kind(32, device="meta").parameters())


@pytest.mark.parametrize("kind", GATES.values(), ids=GATES)
def test_gradients(kind):
    gate = awake(kind(16, dtype=torch.float64)).eval()
    assert torch.autograd.gradcheck(gate, (image(1, 16, 2, 2).requires_grad_(),))


@pytest.mark.parametrize("kind", GATES.values(), ids=GATES)
def test_half_precision(kind):
    gate = awake(kind(32)).bfloat16().eval()
    assert gate(image(2, 32, 6, 6).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kind", "channels", "params"),
    [
        *((CBAM, c, n) for c, n in {64: 680, 128: 2284, 256: 8564, 512: 33412, 2048: 526_564}.items()),
        *((GlobalContext, c, n) for c, n in {256: 8753, 512: 33_889, 1024: 133_313, 2048: 528_769}.items()),
        *((CollaborativeAttention, c, n) for c, n in {256: 8249, 512: 32_825, 2048: 524_345}.items()),
        *((SwitchableExcitation, c, n) for c, n in {64: 906, 128: 2832, 256: 9752, 2048: 536_714}.items()),
    ],
)
def test_parameters(kind, channels, params):
    assert sum(p.numel() for p in kind(channels, device="meta").parameters()) == params


def test_adaptive_kernel_size():
    assert [adaptive_kernel_size(2**i) for i in range(6, 12)] == [3, 5, 5, 5, 5, 7]
    assert ECA(2048).conv.kernel_size == (7,)


def test_starts():
    """What a fresh gate does to a map."""
    x = image(2, 64, 4, 4).float()
    torch.testing.assert_close(GlobalContext(64)(x), x)
    cbam = CBAM(64).eval()
    channel = x * cbam.ChannelGate(x).sigmoid()[:, :, None, None]
    torch.testing.assert_close(cbam(x), 0.5 * channel)
    sem = SwitchableExcitation(64)
    assert sem.w1.abs().max() == 0
    assert (sem.b1 == -1).all()


def test_switchable_excitation_scales_logits():
    """The factors multiply what goes into the sigmoids, and the three gates are multiplied."""
    gate = awake(SwitchableExcitation(64, dtype=torch.float64))
    x = image(2, 64, 3, 3)
    v = x.mean((2, 3))
    s = torch.sigmoid(gate.switch_fc(v))
    logits = [
        gate.fc2(F.relu(gate.fc1(v))),
        F.conv1d(v.unsqueeze(1), gate.conv.weight, padding=1).squeeze(1),
        gate.w1.flatten() * v + gate.b1.flatten(),
    ]
    product = math.prod(torch.sigmoid(s[:, i : i + 1] * logits[i]) for i in range(3))
    torch.testing.assert_close(gate(x), x * product[:, :, None, None])


def test_collaborative_attention_step_by_step():
    gate = awake(CollaborativeAttention(32, dtype=torch.float64))
    x = image(2, 32, 3, 4)

    def entropy(dim, size):
        p = x.softmax(dim)
        return -(p * p.log()).sum(dim) / math.log(size)

    def per_position(y):
        return entropy_of(y.flatten(2).softmax(2), 2) / math.log(12)

    def entropy_of(p, dim):
        return -(p * p.log()).sum(dim)

    pooled = (x.mean((2, 3)), x.amax((2, 3)), per_position(x))
    channel = sum(a * gate.mlp(p) for a, p in zip(gate.interior_c, pooled, strict=True)).sigmoid()
    maps = (x.mean(1), x.amax(1), entropy(1, 32))
    spatial = gate.spatial(sum(b * m for b, m in zip(gate.interior_s, maps, strict=True))[:, None]).sigmoid()
    e1, e2 = gate.exterior
    torch.testing.assert_close(gate(x), x * (e1 * channel[:, :, None, None] + e2 * spatial).sigmoid())


def test_entropy():
    """Uniform values have the largest entropy, one large value none, and neither overflows."""
    flat = torch.zeros(1, 2, 4, 4)
    torch.testing.assert_close(softmax_entropy(flat, (2, 3)), torch.ones(1, 2))
    torch.testing.assert_close(
        softmax_entropy(flat, (2, 3), normalise=False), torch.full((1, 2), math.log(16))
    )
    peak = flat.clone()
    peak[..., 0, 0] = 1e4
    assert softmax_entropy(peak, (2, 3)).abs().max() == 0
    shifted = image(1, 2, 4, 4)
    torch.testing.assert_close(softmax_entropy(shifted, 1), softmax_entropy(shifted + 100, 1))
    assert softmax_entropy(torch.zeros(2, 3, 1, 1), (2, 3)).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ECA(64, kernel_size=4), "kernel_size must be odd and positive, got 4"),
        (lambda: CBAM(8), "channels must be at least 16 for this reduction, got 8"),
        (lambda: GlobalContext(64, pooling="max"), "pooling must be 'att' or 'avg', got 'max'"),
        (lambda: GlobalContext(64, fusions=()), r"fusions must be any of 'add' and 'mul', got \(\)"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()
