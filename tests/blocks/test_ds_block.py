"""The DS-Block: module against reference, layouts, and what a drop-in module must survive."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fused_ops.blocks import DSBlock
from fused_ops.blocks.checkpointing import checkpoint_block
from fused_ops.blocks.ds_block.cases import CASES
from fused_ops.blocks.ds_block.reference import attention, ds_block, split_channels
from fused_ops.blocks.layout import is_channels_last
from fused_ops.core.cases import LAYOUTS

TINY = next(case for case in CASES if case.name == "tiny")
SMALL = [case for case in CASES if "tiny" in case.tags]
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def make(case, dtype=torch.float64, layout="channels_last", seed=0):
    generator = torch.Generator().manual_seed(seed)
    sample = case.make(generator, dtype, torch.device("cpu"), layout)
    return sample["block"], sample["x"]


def small_block(**options):
    torch.manual_seed(0)
    return DSBlock(16, 2, 2, **options)


def run_reference(block, x, **overrides):
    """The definition with the options of a module."""
    options = {
        "num_heads": block.num_heads,
        "downsample": block.downsample,
        "alpha": block.alpha,
        "align": block.align,
        "global_down": block.global_down,
        "training": block.training,
        "attn_drop": block.attn_drop.p,
        "proj_drop": block.proj_drop.p,
        "drop_path": block.drop_path.drop_prob,
    }
    return ds_block(x, block.state_dict(keep_vars=True), **{**options, **overrides})


def grads(block, x, out, seed=1):
    cotangent = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(seed))
    tensors = [x, *block.parameters()]
    return torch.autograd.grad((out * cotangent).sum(), tensors)


# The recorded numbers cover these sizes too, for module and reference.
LARGE = [
    pytest.param(case, "channels_last", id=case.name, marks=pytest.mark.slow)
    for case in CASES
    if case not in SMALL
]


@pytest.mark.parametrize(
    ("case", "layout"),
    LARGE + [pytest.param(c, layout, id=f"{c.name}-{layout}") for c in SMALL for layout in LAYOUTS],
)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_module_equals_reference(case, layout, training):
    block, x = make(case, layout=layout)
    block.train(training)
    twin = copy.deepcopy(block)
    out, expected = block(x), run_reference(twin, x)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    for got, want in zip(grads(block, x, out), grads(twin, x, expected), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8 * max(want.abs().max().item(), 1.0))
    for (name, got), want in zip(block.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12, msg=name)
    tracked = [v for n, v in block.named_buffers() if n.endswith("num_batches_tracked")]
    assert all(int(v) == int(training) for v in tracked)


def test_dropout_and_drop_path_equal_reference():
    """Same seed, same draws: the three attention dropouts, the projection dropouts and two drop paths."""
    block = small_block(attn_drop=0.3, proj_drop=0.2, drop_path=0.4, dtype=torch.float64)
    nn.init.normal_(block.channel_up.weight)
    x = torch.randn(6, 16, 6, 5, dtype=torch.float64)
    torch.manual_seed(3)
    out = block(x)
    torch.manual_seed(3)
    # Attention dropout is drawn in the same order and shape only by the unfused product, which is what
    # PyTorch runs for dropout on a CPU. The rest is drawn on maps, whose memory order differs in NCHW.
    expected = run_reference(block, x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_drop_path_draws_twice_and_per_sample():
    block = small_block(attn_drop=0.0, drop_path=0.5, dtype=torch.float64).train()
    for norm in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eval()
    x = torch.randn(64, 16, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        x1 = x + block.pos_embed(x)
        block.drop_path.drop_prob = 0.0
        branch = run_reference(block, x, training=False)
        block.drop_path.drop_prob = 0.5
        out = block(x)
    kept_nothing = [(out[i] - x1[i]).abs().max().item() < 1e-12 for i in range(64)]
    same_as_eval = [(out[i] - branch[i]).abs().max().item() < 1e-12 for i in range(64)]
    # Two independent coins per sample: a quarter loses both branches; none is like the unscaled block.
    assert 4 < sum(kept_nothing) < 32
    assert not any(same_as_eval)


def test_reference_attention_equals_pytorch():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, n, 12, dtype=torch.float64) for n in (7, 5, 5))
    split = [t.reshape(2, -1, 3, 4).transpose(1, 2) for t in (query, key, value)]
    expected = nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).reshape(2, 7, 12)
    torch.testing.assert_close(attention(query, key, value, 3), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("which", ["reference", "module"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("options", [{}, {"align": False, "global_down": "dwconv"}], ids=["star", "no_star"])
def test_gradcheck(which, training, options):
    torch.manual_seed(0)
    block = DSBlock(4, 1, 2, mlp_ratio=1.0, attn_drop=0.0, dtype=torch.float64, **options).train(training)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.7)
    # Running statistics are side effects of the call; without them it is a function of its inputs.
    if training:
        for norm in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.track_running_stats = False
            norm.running_mean = norm.running_var = None
    x = torch.randn(2, 4, 4, 3, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in block.named_parameters()]

    def function(x, *values):
        tensors = dict(zip(names, values, strict=True))
        if which == "module":
            return torch.func.functional_call(block, tensors, (x,))
        buffers = dict(block.named_buffers())
        return ds_block(
            x,
            {**buffers, **tensors},
            num_heads=1,
            downsample=2,
            align=block.align,
            global_down=block.global_down,
            training=training,
        )

    torch.autograd.gradcheck(function, (x, *block.parameters()), fast_mode=True)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("size", [(6, 5), (1, 1), (1, 7), (9, 2)], ids=str)
def test_output_layout_follows_input(layout, size):
    block = small_block(attn_drop=0.0).eval()
    x = torch.randn(2, 16, *size).contiguous(memory_format=FORMATS[layout])
    out = block(x)
    assert out.shape == x.shape
    assert out.is_contiguous(memory_format=FORMATS[layout])
    torch.testing.assert_close(out, run_reference(block, x.contiguous()), rtol=1e-4, atol=1e-4)
    wide = torch.randn(2, 40, *size).contiguous(memory_format=FORMATS[layout])
    assert is_channels_last(block(wide[:, 8:24])) == is_channels_last(x)


class CopyCounter(TorchDispatchMode):
    """Counts copies of tensors with at least ``least`` elements."""

    NAMES = ("clone", "copy_", "contiguous", "_to_copy")

    def __init__(self, least):
        super().__init__()
        self.least = least
        self.copies = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.NAMES and isinstance(args[0], torch.Tensor) and args[0].numel() >= self.least:
            self.copies.append((name, tuple(args[0].shape)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"align": False, "global_down": "dwconv"}], ids=["star", "no_star"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_no_copies_in_channels_last(options, training):
    """No permuted or contiguous copy of a map or of the tokens, forward; NCHW pays one on each side."""
    block = small_block(attn_drop=0.0, **options).train(training)
    x = torch.randn(2, 16, 12, 10)
    smallest = 2 * 8 * 6 * 5  # the tokens of the global stream
    prepared = x.contiguous(memory_format=torch.channels_last)
    with CopyCounter(smallest) as counter:
        block(prepared)
    assert counter.copies == []
    with CopyCounter(smallest) as counter:
        block(x)
    assert counter.copies == [("clone", tuple(x.shape))] * 2


def test_copy_counter_sees_copies():
    x = torch.randn(2, 4, 3, 3)
    with CopyCounter(x.numel()) as counter:
        x.permute(0, 2, 3, 1).contiguous()
    assert len(counter.copies) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 16, "num_heads": 3}, "num_heads must divide the 8 channels.*got 3"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"downsample": 0}, "downsample must be at least 1, got 0"),
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
        ({"alpha": 0.25}, "align=True needs .*alpha=0.25"),
        ({"dim": 15}, "align=True needs .*dim=15"),
        ({"global_down": "nearest"}, "global_down must be one of bilinear, dwconv, got 'nearest'"),
        ({"mlp_ratio": 0.0}, "mlp_ratio must give .*got 0.0"),
        ({"drop_path": 2.0}, r"drop_path must be in \[0, 1\], got 2.0"),
    ],
)
def test_argument_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        DSBlock(**{"dim": 16, "num_heads": 2, "downsample": 2, **arguments})


@pytest.mark.parametrize("shape", [(2, 8, 4, 4), (16, 4, 4)], ids=str)
def test_input_errors(shape):
    with pytest.raises(ValueError, match=r"x must be \(B, 16, H, W\), got"):
        small_block()(torch.randn(shape))


@pytest.mark.parametrize(
    ("dim", "alpha", "expected"),
    [(64, 0.5, (32, 32)), (320, 0.9, (288, 32)), (64, 0.0, (0, 64)), (64, 1.0, (64, 0)), (10, 0.25, (3, 7))],
)
def test_split_channels(dim, alpha, expected):
    assert split_channels(dim, alpha) == expected


def test_parameter_counts_have_the_closed_form():
    for dim, heads, step in ((64, 1, 8), (128, 2, 4), (320, 5, 2), (512, 8, 2)):

        def count(**options):
            block = DSBlock(dim, heads, step, device="meta", **options)  # noqa: B023 (called at once)
            return sum(p.numel() for p in block.parameters())

        assert count() == 12.75 * dim**2 + 35.5 * dim
        assert count(align=False) == 10.75 * dim**2 + 29.5 * dim
        down = dim // 2 * ((2 * step + 1) ** 2 + 1)
        assert count(align=False, global_down="dwconv") == count(align=False) + down


def test_initialisation():
    torch.manual_seed(0)
    block = DSBlock(256, 4, 2)
    assert block.channel_up.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.fuse_channel_sa.bias.abs().max() == 0
    # kaiming_uniform_(a=sqrt(5)) of a 1x1 convolution: uniform in +-1/sqrt(fan).
    assert block.conv1.weight.abs().max().item() == pytest.approx(256**-0.5, rel=0.01)
    assert torch.equal(block.norm_sa1.weight, torch.ones(128))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    block, x = make(TINY, torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        out = block(x)
        (out.float() ** 2).mean().backward()
    assert torch.isfinite(out).all()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in block.parameters())
    exact, x64 = make(TINY, torch.float64)
    expected = exact(x64)
    assert (out.double() - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_module(dtype):
    block, x = make(TINY, torch.float32)
    expected = block.eval()(x)
    out = block.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    assert (out.float() - expected).norm() / expected.norm() < 0.05


def test_deepcopy_pickle_and_save():
    block, x = make(TINY)
    block.eval()
    expected = block(x)
    stream = io.BytesIO()
    torch.save(block, stream)
    stream.seek(0)
    for twin in (
        copy.deepcopy(block),
        pickle.loads(pickle.dumps(block)),
        torch.load(stream, weights_only=False),
    ):
        assert torch.equal(twin(x), expected)
        assert twin.conv1.weight is not block.conv1.weight


def test_meta_construction_then_to_empty():
    meta = DSBlock(16, 2, 2, attn_drop=0.0, device="meta")
    assert all(p.is_meta for p in meta.parameters())
    with torch.device("meta"):
        assert DSBlock(16, 2, 2).conv1.weight.is_meta
    block = meta.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*block.parameters(), *block.buffers()):
            tensor.fill_(7)
    block.reset_parameters()
    assert torch.equal(block.norm1.running_var, torch.ones(16))
    assert block.channel_up.bias.abs().max() == 0
    assert int(block.norm2.num_batches_tracked) == 0
    assert torch.isfinite(block(torch.randn(2, 16, 4, 4))).all()


def test_hooks():
    block, x = make(TINY)
    called = []
    block.register_forward_hook(lambda module, inputs, output: called.append("block"))
    for name in (
        "norm1",
        "conv1",
        "channel_up",
        "cross_channel_up_conv",
        "fuse_channel_sa",
    ):
        hook = lambda module, inputs, output, name=name: called.append(name)  # noqa: E731
        block.get_submodule(name).register_forward_hook(hook)
    block(x)
    assert len(called) == 6


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_compile_fullgraph(training):
    torch._dynamo.reset()
    block, x = make(TINY, torch.float32)
    block.train(training)
    twin = copy.deepcopy(block)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    out, expected = compiled(x), twin(x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    for got, want in zip(grads(block, x, out), grads(twin, x, expected), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    for got, want in zip(block.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_checkpointing_changes_nothing():
    """Outputs, gradients, random draws and running statistics, which are updated once."""
    torch.manual_seed(0)
    block = DSBlock(16, 2, 2, attn_drop=0.2, drop_path=0.3, dtype=torch.float64)
    twin = copy.deepcopy(block)
    x = torch.randn(4, 16, 6, 5, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    expected = twin(x)
    expected_grads = grads(twin, x, expected)
    torch.manual_seed(1)
    out = checkpoint_block(block, x)
    for got, want in zip((out, *grads(block, x, out)), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for got, want in zip(block.buffers(), twin.buffers(), strict=True):
        assert torch.equal(got, want)
    assert int(block.norm_conv1.num_batches_tracked) == 1


def test_converted_norms_still_work():
    """SyncBatchNorm and frozen norms take the place of the BatchNorm that is otherwise fused."""
    block, x = make(TINY, torch.float32)
    expected = block.eval()(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block)).eval()
    assert isinstance(converted.norm_conv1, nn.SyncBatchNorm)
    torch.testing.assert_close(converted(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{"momentum": None}, {"track_running_stats": False}], ids=str)
def test_norm_settings(settings):
    block, x = make(TINY)
    for name in ("norm1", "norm_conv1", "norm_conv2", "norm2"):
        old = block.get_submodule(name)
        block.set_submodule(name, nn.BatchNorm2d(old.num_features, **settings, dtype=torch.float64))
    stock = copy.deepcopy(block)
    # The stock composition: the norm is called as a module, the convolution after it.
    stock.norm_conv1 = nn.Sequential(stock.norm_conv1)
    for _ in range(2):
        torch.testing.assert_close(block(x), stock(x), rtol=1e-10, atol=1e-10)
    for got, want in zip(block.buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_empty_batch():
    block = small_block().eval()
    x = torch.randn(0, 16, 6, 5, requires_grad=True)
    out = block(x)
    assert out.shape == (0, 16, 6, 5)
    out.sum().backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in block.parameters())


def test_frozen_parameters_get_no_gradient():
    block, x = make(TINY)
    for name in ("conv", "norm_conv1", "pos_embed"):
        block.get_submodule(name).requires_grad_(False)
    block(x).sum().backward()
    assert block.conv.weight.grad is None
    assert block.norm_conv1.bias.grad is None
    assert block.mlp.fc1.weight.grad is not None
