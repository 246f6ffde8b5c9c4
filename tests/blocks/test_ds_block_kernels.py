"""The DS-Block as one operator and as a chain of operators, on Triton kernels in its interpreter on a CPU.

Every tensor's error against the float64 reference may be at most twice the error that plain PyTorch makes in
the same precision, plus a small floor for where that one is exact.
"""

import copy
import itertools
from unittest import mock

import pytest
import torch
from support.contract import require
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_ops
from fused_ops.attention import reference as attention_reference
from fused_ops.blocks import DSBlock
from fused_ops.blocks.checkpointing import checkpoint_block
from fused_ops.blocks.ds_block import op
from fused_ops.blocks.ds_block import reference as ds_block_reference
from fused_ops.blocks.ds_block import triton as ds_block_triton
from fused_ops.blocks.ds_block.cases import CASES
from fused_ops.co_attention import reference as co_attention_reference
from fused_ops.core import backends, drop_path
from fused_ops.depthwise import op as depthwise

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = [case.name for case in CASES if "tiny" in case.tags]
# The depthwise down-sampler of larger cases without star has a kernel size that Triton kernels do not cover.
CHAIN_NAMES = ["tiny", "convolution_only"]
# Name, as one operator, dtype, training; the rest are extended tests.
QUICK = [
    *((name, True, torch.float32, True) for name in ("tiny", "tiny_no_star", "odd")),
    ("tiny", True, torch.bfloat16, True),
    ("tiny", False, torch.float32, True),
]
EXACTNESS = [
    *itertools.product(NAMES, [True], DTYPES, [False, True]),
    *itertools.product(CHAIN_NAMES, [False], DTYPES, [False, True]),
]


@pytest.fixture(autouse=True)
def _interpreted(request):
    if "gpu" not in request.keywords:
        require("triton", "cpu")


def make(name, dtype=torch.float64, batch=None):
    case = next(case for case in CASES if case.name == name)
    sample = case.make(torch.Generator().manual_seed(0), torch.float64, torch.device("cpu"), "channels_last")
    x = sample["x"].detach()
    if batch is not None:
        x = torch.randn(batch, *x.shape[1:], dtype=x.dtype, generator=torch.Generator().manual_seed(2))
        x = x.contiguous(memory_format=torch.channels_last)
    return sample["block"].to(dtype), x.to(dtype)


def evaluate(block, x, seed=1):
    """Output, gradients of input and parameters, and running statistics after one call, by name."""
    x = x.detach().requires_grad_()
    out = block(x)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    out.backward(cotangent.to(out.device, out.dtype))
    values = {"output": out, "gradient of x": x.grad}
    values |= {f"gradient of {name}": p.grad for name, p in block.named_parameters()}
    values |= {name: b for name, b in block.named_buffers() if b.is_floating_point()}
    return {name: value.detach().double() for name, value in values.items()}


def chosen(block, x, backend="triton"):
    """Results with kernels forced, and which operators ran."""
    with fused_ops.backend(backend), backends.record() as choices:
        values = evaluate(block, x)
    return values, [choice.operator for choice in choices]


def error(value, exact):
    return ((value - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def check(found, plain, exact, dtype):
    floor = 8 * torch.finfo(dtype).eps
    for key, value in exact.items():
        if value.norm() < 1e-9 * value.numel() ** 0.5:
            continue  # exactly zero but for rounding: a bias before BatchNorm in training
        got, allowed = error(found[key], value), 2 * error(plain[key], value) + floor
        assert got <= allowed, f"{key}: {got:.3g} > {allowed:.3g}"


def watch(block):
    """A hook on a layer keeps the block a chain of operators."""
    block.norm1.register_forward_hook(lambda *_: None)
    return block


@pytest.mark.parametrize(
    ("name", "whole", "dtype", "training"),
    [pytest.param(*row, marks=() if row in QUICK else pytest.mark.extended) for row in EXACTNESS],
)
def test_kernels_are_as_exact_as_pytorch(name, whole, dtype, training):
    block, x = make(name)
    # The same rounded numbers for all three, so that only the arithmetic differs.
    x, rounded = x.to(dtype), block.to(dtype).train(training)
    eager, forced, exact = copy.deepcopy(rounded), copy.deepcopy(rounded), copy.deepcopy(rounded).double()
    with fused_ops.backend("reference"):
        reference = evaluate(exact, x.double())
        plain = evaluate(eager, x)
    kernels, operators = chosen(forced if whole else watch(forced), x)
    assert (operators == ["ds_block"]) == whole
    check(kernels, plain, reference, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", [case.name for case in CASES])
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_on_a_gpu(backend, name, training, dtype):
    """Blocks of the published models too; ``auto`` with CUDA's convolutions where they are built."""
    block, x = make(name)
    x, rounded = x.to("cuda", dtype), block.to("cuda", dtype).train(training)
    eager, forced, exact = copy.deepcopy(rounded), copy.deepcopy(rounded), copy.deepcopy(rounded).double()
    with fused_ops.backend("reference"):
        reference = evaluate(exact, x.double())
        plain = evaluate(eager, x)
    kernels, operators = chosen(forced, x, backend)
    assert operators == ["ds_block"] or backend == "auto"
    check(kernels, plain, reference, dtype)


def test_convolutions_by_cuda_kernels(request):
    """As ``auto`` has it where the CUDA library is there: maps and gradients in slices of wider buffers."""
    require("cuda", "cpu", request)
    block, x = make("tiny", torch.float32)
    exact, plain = copy.deepcopy(block).double(), copy.deepcopy(block)
    with fused_ops.backend("reference"):
        reference, eager = evaluate(exact, x.double()), evaluate(plain, x)
    (cuda,) = (one for one in depthwise.BACKENDS if one.name == "cuda")
    calls = []

    def kernels(call, backend):
        assert cuda.can_run(call)[0], cuda.can_run(call)[1]
        calls.append(call)
        return cuda

    with mock.patch.object(ds_block_triton, "_depthwise_kernels", kernels):
        found, operators = chosen(block, x)
    assert operators == ["ds_block"]
    assert len(calls) == 4
    check(found, eager, reference, torch.float32)


def test_large_mean():
    """Contract C2: a mean of a thousand with a spread of one, through every BatchNorm."""
    block, x = make("tiny", torch.float32)
    exact, plain = copy.deepcopy(block).double(), copy.deepcopy(block)
    x = x + 1000
    with fused_ops.backend("reference"):
        reference, eager = evaluate(exact, x.double()), evaluate(plain, x)
    kernels, _ = chosen(block, x)
    check(kernels, eager, reference, torch.float32)


@pytest.mark.parametrize(
    "frozen", ["all", *(pytest.param(name, marks=pytest.mark.extended) for name in ("norm1", "norm_conv2"))]
)
def test_frozen_norms(frozen):
    """Norms in evaluation inside a block in training, with gradients; each on its own."""
    torch.manual_seed(0)
    block, x = make("tiny", torch.float32)
    for name in op.BATCH_NORMS:
        if frozen in ("all", name):
            norm = getattr(block, name).eval()
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.running_mean)
    exact, plain = copy.deepcopy(block).double(), copy.deepcopy(block)
    with fused_ops.backend("reference"):
        reference, eager = evaluate(exact, x.double()), evaluate(plain, x)
    kernels, operators = chosen(block, x)
    assert operators == ["ds_block"]
    check(kernels, eager, reference, torch.float32)


@pytest.mark.extended
@pytest.mark.parametrize("affine", [False, True])
def test_norm_settings(affine):
    """Momentum None, no running statistics, no affine part."""
    block, x = make("tiny", torch.float32)
    for name, settings in zip(
        op.BATCH_NORMS, ({"momentum": None}, {"track_running_stats": False}, {"eps": 0.1}, {}), strict=True
    ):
        old = getattr(block, name)
        setattr(block, name, nn.BatchNorm2d(old.num_features, affine=affine, **settings))
    exact, plain = copy.deepcopy(block).double(), copy.deepcopy(block)
    with fused_ops.backend("reference"):
        for _ in range(2):
            reference, eager = evaluate(exact, x.double()), evaluate(plain, x)
            exact.zero_grad(), plain.zero_grad()
    for _ in range(2):
        block.zero_grad()
        kernels, operators = chosen(block, x)
    assert operators == ["ds_block"]
    exact.zero_grad()
    check(kernels, eager, reference, torch.float32)
    assert int(block.norm1.num_batches_tracked) == 2


class Draws:
    """Seeds and drop-path factors in the order in which a block asks for them."""

    def __init__(self, batch, keep=(1, 0, 1, 1, 0, 1)):
        self.seeds = [torch.tensor([11, 22]), torch.tensor([33, 44])]
        self.keep = torch.tensor(
            list(itertools.islice(itertools.cycle(keep), 2 * batch)), dtype=torch.float64
        )
        self.batch, self.next_seed, self.next_factor = batch, 0, 0

    def seed(self, like):
        self.next_seed += 1
        return self.seeds[self.next_seed - 1]

    def factors(self, x, drop_prob):
        start = self.next_factor * self.batch
        self.next_factor += 1
        kept = self.keep[start : start + self.batch].to(x.dtype) / (1.0 - drop_prob)
        return kept.view(-1, *(1,) * (x.ndim - 1))


def attention_with(draws, dropout):
    """The reference's attention with the masks that kernels make of seeds; it is called three times."""
    calls = []

    def attention(query, key, value, num_heads, _):
        query, key, value = (t.unflatten(-1, (num_heads, -1)) for t in (query, key, value))
        calls.append((query, key, value))
        scale = query.shape[-1] ** -0.5
        if len(calls) == 1:
            seed, options = draws.seeds[0], {"scale": scale, "dropout": dropout}
            return attention_reference.attention(query, key, value, None, None, seed, **options).flatten(2)
        if len(calls) == 2:
            # Both directions at once need the tensors of the call that follows: dropout's masks of one are
            # those of both.
            zeros = torch.zeros_like
            found = co_attention_reference.co_attention(
                query, zeros(query), key, value, zeros(query), zeros(key), draws.seeds[1], scale=scale,
                dropout=dropout,
            )  # fmt: skip
            return found[0].flatten(2)
        zeros = torch.zeros_like
        found = co_attention_reference.co_attention(
            zeros(key), value, zeros(query), zeros(query), key, query, draws.seeds[1], scale=scale,
            dropout=dropout,
        )  # fmt: skip
        return found[1].flatten(2)

    return attention


def test_dropout_and_drop_path():
    """The same masks forward and backward, those of the definition; both branches' factors apart."""
    block, x = make("tiny", torch.float32, batch=6)
    block.attn_drop.p, block.drop_path.drop_prob = 0.3, 0.4
    exact = copy.deepcopy(block).double()
    draws = Draws(6)
    with (
        mock.patch.object(drop_path, "_factors", draws.factors),
        mock.patch("fused_ops.blocks.ds_block.module.draw_seed", draws.seed),
    ):
        kernels, operators = chosen(block, x)
    assert operators == ["ds_block"]
    assert (draws.next_seed, draws.next_factor) == (2, 2)
    draws = Draws(6)

    class Defined(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = exact

        def forward(self, value):
            options = {"num_heads": 1, "downsample": 2, "training": True, "drop_path": 0.4}
            return ds_block_reference.ds_block(value, self.block.state_dict(keep_vars=True), **options)

    with (
        mock.patch.object(drop_path, "_factors", draws.factors),
        mock.patch.object(ds_block_reference, "attention", attention_with(draws, 0.3)),
    ):
        reference = {name.replace("block.", ""): v for name, v in evaluate(Defined(), x.double()).items()}
    for key, value in reference.items():
        if value.norm() > 1e-9 * value.numel() ** 0.5:
            assert error(kernels[key], value) < 2e-5, key


GROUPS = [
    ("mlp.fc2.bias",),
    ("norm2.weight", "mlp.fc1.weight"),
    ("conv2.weight", "fuse_channel_sa.bias"),
    ("fuse_channel_conv.weight",),
    ("cross_channel_up_conv.weight", "norm_sa2.bias"),
    ("norm_conv2.bias",),
    ("conv.weight", "channel_up.weight"),
    ("norm_conv1.weight", "norm_sa1.weight"),
    ("conv1.bias",),
    ("norm1.weight",),
    ("pos_embed.weight",),
    ("x",),
]


@pytest.fixture(scope="module")
def everything():
    """All gradients of the tiny block, in evaluation and in training."""
    found = []
    for training in (False, True):
        block, x = make("tiny", torch.float32)
        found.append(chosen(block.train(training), x)[0])
    return found


@pytest.mark.parametrize(
    "wanted",
    [pytest.param(group, marks=pytest.mark.extended if i % 2 else ()) for i, group in enumerate(GROUPS)],
    ids=",".join,
)
def test_subsets_of_gradients(wanted, everything):
    """Those that are asked for are what they are among all; no other is there."""
    # By batch statistics half of them, since those ask for more than gradients do.
    training = GROUPS.index(wanted) % 4 < 2
    block, x = make("tiny", torch.float32)
    block.train(training)
    everything = everything[training]
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name in wanted)
    x = x.detach().requires_grad_("x" in wanted)
    with fused_ops.backend("triton"):
        out = block(x)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out.backward(cotangent.to(out.dtype))
    found = {"x": x.grad} | {name: parameter.grad for name, parameter in block.named_parameters()}
    for name, gradient in found.items():
        if name in wanted:
            assert torch.equal(gradient.double(), everything[f"gradient of {name}"]), name
        else:
            assert gradient is None, name


@pytest.mark.parametrize("layer", ["mlp.fc1", "norm_sa1", "pos_embed"])
def test_watched_layers_are_called(layer):
    """A layer with a hook, or of another class, is no stock layer: the block is then a chain of operators."""
    block, x = make("tiny", torch.float32)
    watched, other = copy.deepcopy(block), copy.deepcopy(block)
    watched.get_submodule(layer).register_forward_pre_hook(lambda *_: None)
    inner = other.get_submodule(layer)
    inner.__class__ = type("Mine", (type(inner),), {})
    for one in (watched, other):
        assert "ds_block" not in operators_of(one, x, "triton")


def operators_of(block, x, backend):
    """Which operators a forward pass runs."""
    with fused_ops.backend(backend), backends.record() as choices, torch.no_grad():
        block.eval()(x)
    return [choice.operator for choice in choices]


def test_other_backends_run_the_chain():
    block, x = make("tiny", torch.float32)
    assert operators_of(block, x, "triton") == ["ds_block"]
    for backend in ("auto", "reference"):
        assert "ds_block" not in operators_of(block, x, backend)


def test_autocast():
    block, x = make("tiny")
    exact = copy.deepcopy(block)
    single = copy.deepcopy(block).float()
    with fused_ops.backend("reference"):
        reference = evaluate(exact, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kernels, operators = chosen(single, x.float())
        with fused_ops.backend("reference"):
            plain = evaluate(copy.deepcopy(block).float(), x.float())
    assert operators == ["ds_block"]
    assert all(p.grad.dtype == torch.float32 for p in single.parameters())
    check(kernels, plain, reference, torch.bfloat16)


@pytest.mark.extended
def test_repeats_bit_by_bit():
    block, x = make("tiny", torch.float32)
    block.attn_drop.p = 0.2
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(chosen(copy.deepcopy(block), x)[0])
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


@pytest.mark.parametrize("name", ["tiny", pytest.param("tiny_no_star", marks=pytest.mark.extended)])
def test_compiles_whole(name):
    """One graph without a break, forward and backward, with eager's results and strides."""
    torch._dynamo.reset()
    block, x = make(name, torch.float32)
    want, _ = chosen(copy.deepcopy(block), x)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    x = x.detach().requires_grad_()
    with fused_ops.backend("triton"):
        out = compiled(x)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        out.backward(cotangent.to(out.dtype))
    assert out.is_contiguous(memory_format=torch.channels_last)
    found = {"output": out, "gradient of x": x.grad}
    found |= {f"gradient of {n}": p.grad for n, p in block.named_parameters()}
    found |= {n: b for n, b in block.named_buffers() if b.is_floating_point()}
    for key, value in want.items():
        torch.testing.assert_close(
            found[key].double(), value, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "keep"),
    [
        pytest.param(
            name, keep, marks=() if (name, keep) == ("convolution_only", True) else pytest.mark.extended
        )
        for name in ("tiny", "mostly_attention", "convolution_only", "tiny_no_star")
        for keep in (False, True)
    ],
)
def test_operators_and_their_fakes(name, keep):
    """Shapes, strides and dtypes that a compiler is told are those of the results, forward and backward."""
    block, x = make(name, torch.float32)
    calls = []
    run = op.DIFFERENTIABLE.run
    with (
        mock.patch.object(op.DIFFERENTIABLE, "run", lambda *args: calls.append(args[1:]) or run(*args)),
        fused_ops.backend("triton"),
        torch.set_grad_enabled(keep),
    ):
        block(x)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(op.DIFFERENTIABLE.forward, calls[0], test_utils=tests)
    if not keep:
        return
    outputs = op.DIFFERENTIABLE.forward(*calls[0])
    context = mock.Mock()
    op._setup_context(context, calls[0], outputs)
    saved = context.save_for_backward.call_args[0]
    inputs = len(saved) - len(op.KEPT)
    arguments = (*saved[:inputs], list(saved[inputs:]), *context.options)
    needs = [True] * (1 + len(op.PARAMETERS))
    grad = torch.randn_like(x)
    torch.library.opcheck(op.DIFFERENTIABLE.backward, (grad, *arguments, needs, "triton"), test_utils=tests)


def test_second_derivatives_are_refused():
    block, x = make("tiny", torch.float32)
    x.requires_grad_()
    with fused_ops.backend("triton"):
        out = block(x)
    (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"ds_block_backward has no derivative of its own"):
        gradient.sum().backward()


@pytest.mark.extended
def test_checkpointing():
    torch.manual_seed(0)
    block = DSBlock(16, 2, 2, attn_drop=0.2, drop_path=0.3)
    x = torch.randn(4, 16, 6, 5).contiguous(memory_format=torch.channels_last)
    results = []
    for run in (lambda one, value: one(value), checkpoint_block):
        twin = copy.deepcopy(block)
        torch.manual_seed(1)
        value = x.clone().requires_grad_()
        with fused_ops.backend("triton"):
            out = run(twin, value)
            out.square().sum().backward()
        results.append([out, value.grad, *(p.grad for p in twin.parameters()), *twin.buffers()])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


class Copies(TorchDispatchMode):
    """Copies of maps with at least ``least`` elements in another order of memory."""

    def __init__(self, least):
        super().__init__()
        self.least, self.found = least, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("clone", "copy_", "contiguous", "_to_copy", "cat") and "Tensor" in str(type(args[0])):
            source = args[1] if name == "copy_" else args[0]
            if source.numel() >= self.least:
                self.found.append((name, tuple(source.shape)))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["tiny", pytest.param("convolution_only", marks=pytest.mark.extended)])
def test_no_copies_of_maps(name):
    """Neither forward nor backward copies a map or all local tokens."""
    block, x = make(name, torch.float32)
    x.requires_grad_()
    smallest = x.numel() // 2
    with fused_ops.backend("triton"), Copies(smallest) as copies:
        out = block(x)
        out.backward(torch.ones_like(out))
    assert copies.found == []
