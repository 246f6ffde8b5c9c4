"""The feed-forward chain with a depthwise convolution: the contract beyond what every operator runs.

Shapes are tiny: every program costs tens of milliseconds in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from support.contract import (
    ACTIVATIONS,
    DEVICES,
    RecordCalls,
    assert_three_way,
    case_named,
    check_operators,
    convert,
    cotangent,
    make,
    named_tensors,
    operator_cases,
    require,
    run,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import fused_ops
from fused_ops.bench.limits import kernels_chosen
from fused_ops.bench.traffic import operator_traffic
from fused_ops.core import library, statistics
from fused_ops.depthwise import triton as depthwise_triton
from fused_ops.feed_forward import triton, triton_norm, triton_products, triton_wide
from fused_ops.feed_forward.module import conv_mlp_on_modules
from fused_ops.feed_forward.op import allocate_backward, allocate_forward

OPERATOR = library.operators()["feed_forward_conv"]
INPUTS = (
    "x",
    "fc1_weight",
    "fc1_bias",
    "fc2_weight",
    "fc2_bias",
    "norm.weight",
    "norm.bias",
    "layer_scale",
    "conv_weight",
    "conv_bias",
)


def extended(*values):
    return pytest.param(*values, marks=pytest.mark.extended)


def case(name):
    return case_named(name, "feed_forward_conv")


def arguments_of(name="pvt", dtype=torch.float32, device="cpu", **change):
    return {**make(case(name), dtype, device=device), **change}


def oracle(arguments):
    """The definition once more, from nothing of the package: the convolution as nine shifted products."""
    x, norm = arguments["x"], arguments.get("norm")
    is_map = x.dim() == 4
    z = x.movedim(1, -1) if is_map else x.unflatten(1, arguments["size"])
    if norm is not None:
        dims = (0, 1, 2) if hasattr(norm, "batch_stats") else -1
        if getattr(norm, "batch_stats", True):
            mean, var = z.mean(dims, keepdim=True), z.var(dims, unbiased=False, keepdim=True)
        else:
            mean, var = norm.running_mean, norm.running_var
        z = (z - mean) / (var + norm.eps).sqrt()
        z = z if norm.weight is None else z * norm.weight
        z = z if norm.bias is None else z + norm.bias
    hidden = torch.einsum("bhwc,jc->bhwj", z, arguments["fc1_weight"])
    if arguments.get("fc1_bias") is not None:
        hidden = hidden + arguments["fc1_bias"]
    hidden = ACTIVATIONS[arguments.get("activation", "none")](hidden)
    padded = F.pad(hidden, (0, 0, 1, 1, 1, 1))
    height, width = hidden.shape[1:3]
    convolved = sum(
        padded[:, i : i + height, j : j + width] * arguments["conv_weight"][:, 0, i, j]
        for i in range(3)
        for j in range(3)
    )
    if arguments.get("conv_bias") is not None:
        convolved = convolved + arguments["conv_bias"]
    convolved = ACTIVATIONS[arguments.get("conv_activation", "gelu")](convolved)
    if arguments.get("conv_identity", False):
        convolved = convolved + hidden
    out = torch.einsum("bhwj,cj->bhwc", convolved, arguments["fc2_weight"])
    for name, combine in (("fc2_bias", torch.add), ("layer_scale", torch.mul)):
        if arguments.get(name) is not None:
            out = combine(out, arguments[name])
    if arguments.get("drop_path") is not None:
        out = out * arguments["drop_path"][:, None, None, None]
    out = out.movedim(-1, 1) if is_map else out.flatten(1, 2)
    return out if arguments.get("residual") is None else out + arguments["residual"]


# Of the reference


@pytest.mark.parametrize(
    ("operator", "case"), operator_cases(without=("model", "traffic", "resources"), only="feed_forward_conv")
)
def test_reference_is_the_definition(operator, case):
    arguments = make(case, torch.float64)
    want = oracle(arguments)
    got = run(operator, arguments, "reference", gradients=False)["out"]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert got.shape == arguments["x"].shape


@pytest.mark.parametrize("name", ["linear", extended("cffn")])
def test_reference_gradcheck(name):
    arguments = arguments_of(name, torch.float64)
    tensors = {key: t.detach() for key, t in named_tensors(arguments).items() if t.requires_grad}
    leaves = [tensor.clone().requires_grad_() for tensor in tensors.values()]
    settings = {k: v for k, v in arguments.items() if not isinstance(v, torch.Tensor) and k != "norm"}

    def function(*values):
        found = dict(zip(tensors, values, strict=True))
        norm = arguments["norm"]._replace(weight=found["norm.weight"], bias=found["norm.bias"])
        if name == "cffn":
            norm = norm._replace(running_mean=None, running_var=None)
        plain = {key: value for key, value in found.items() if "." not in key}
        return fused_ops.conv_mlp_block(**plain, **settings, norm=norm, residual=plain["x"])

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


# Of the kernels


QUICK = ("eval", "plain", "both", "one_pixel")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "name",
    [
        c.name if c.name in QUICK else extended(c.name)
        for c in OPERATOR.cases()
        if "awkward" in c.tags and c.name != "empty"
    ],
)
def test_awkward_cases(name, device):
    """C1, C2: what is too odd to be worth every dtype and layout."""
    require("triton", device)
    arguments = arguments_of(name, device=device)
    exact, eager = convert(arguments, torch.float64), convert(arguments)
    got = run(OPERATOR, arguments, "triton")
    assert_three_way(got, run(OPERATOR, eager, "reference"), run(OPERATOR, exact, "reference"), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "subsets"),
    [
        ("pvt", [("conv_bias", "fc1_bias")]),
        ("cffn", [("fc2_weight", "norm.bias"), ("conv_weight",)]),
        extended("pvt", [("conv_weight",), ("x",), ("fc2_bias",), ("fc1_weight",)]),
        extended("cffn", [("fc1_bias",), ("conv_bias",), ("x", "conv_weight"), ("norm.weight",)]),
        extended("linear", [("layer_scale",), ("fc2_bias", "conv_bias")]),
    ],
)
def test_subsets_of_gradients(name, subsets, device):
    """C10: any subset equals the full set's to the bit, and nothing else is asked for."""
    require("triton", device)
    full = run(OPERATOR, arguments_of(name, device=device), "triton")
    for subset in subsets:
        arguments = arguments_of(name, device=device)
        for key, tensor in named_tensors(arguments).items():
            tensor.requires_grad_(key in subset)
        with RecordCalls(OPERATOR.overloads[1:]) as recorded:
            got = run(OPERATOR, arguments, "triton")
        assert [list(call[-2]) for _, call in recorded.calls] == [[key in subset for key in INPUTS]]
        assert {key for key in got if key.startswith("grad ")} == {f"grad {key}" for key in subset}
        for key in subset:
            torch.testing.assert_close(got[f"grad {key}"], full[f"grad {key}"], rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [extended("pvt"), "cffn"])
def test_determinism_and_canaries(name, device, monkeypatch):
    """C7, C8: equal to the bit with poisoned memory, and nothing written beside an output."""
    require("triton", device)
    buffers = []
    band = 64
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def guarded(plain):
        if plain.device.type == "meta" or not plain.is_floating_point():
            return plain
        buffer = torch.full((plain.numel() + 2 * band,), 77.0, dtype=plain.dtype, device=plain.device)
        buffers.append(buffer)
        return buffer.as_strided(plain.shape, plain.stride(), band)

    torch.use_deterministic_algorithms(True)
    try:
        first = run(OPERATOR, arguments_of(name, device=device), "triton")
        arguments = arguments_of(name, device=device)
        monkeypatch.setattr(torch, "empty", lambda *a, **k: guarded(empty(*a, **k)))
        monkeypatch.setattr(torch, "empty_like", lambda *a, **k: guarded(empty_like(*a, **k)))
        monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: guarded(new_empty(*a, **k)))
        second = run(OPERATOR, arguments, "triton")
    finally:
        monkeypatch.undo()
        torch.use_deterministic_algorithms(False)
    for key, value in first.items():
        assert torch.isfinite(value).all(), key
        torch.testing.assert_close(second[key], value, rtol=0, atol=0)
    # The result, the hidden maps, the gradients and the partial sums.
    assert len(buffers) >= 12
    for buffer in buffers:
        assert (buffer[:band] == 77).all()
        assert (buffer[-band:] == 77).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["nchw", "window", extended("tokens")])
def test_layouts_of_input_and_gradient(layout, device):
    """C4: NCHW, a window of a larger map, tokens whose channels lie apart; gradients of other layouts."""
    require("triton", device)
    wide = torch.randn(2, 16, 3, 4, device=device)
    x = {
        "nchw": lambda: wide[:, :8].contiguous(),
        "window": lambda: wide.contiguous(memory_format=torch.channels_last)[:, ::2, 1:, 1:],
        "tokens": lambda: wide[:, :8].contiguous().flatten(2).transpose(1, 2),
    }[layout]()
    x = x.detach().requires_grad_()
    settings = {} if x.dim() == 4 else {"size": (3, 4)}
    arguments = {**arguments_of("cffn", device=device), "x": x, "residual": x, **settings}
    exact = convert(arguments, torch.float64)
    if layout == "nchw":
        grad = torch.ones((), device=device).expand(x.shape)
    else:
        grad = torch.linspace(-1, 1, x.numel(), device=device).view(x.shape[::-1])
        grad = grad.permute(*range(x.dim())[::-1])
    got = run(OPERATOR, arguments, "triton", grad=grad)
    want = run(OPERATOR, exact, "reference", grad=grad.double())
    for name, value in want.items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-4, atol=1e-4, msg=name)
    if layout != "window":
        assert got["out"].stride() == got["grad x"].stride() == x.stride()
    else:
        assert got["out"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("device", DEVICES)
def test_large_offsets(device):
    """C5: images more than 2**31 elements apart."""
    require("triton", device)
    # On the CPU the pages in between are never touched, so they cost no memory.
    buffer = torch.empty(2**31 + 400, dtype=torch.float16, device=device)
    x = buffer.as_strided((3, 8, 8), (2**30, 8, 1))
    x.copy_(torch.randn(3, 8, 8))
    arguments = arguments_of("pvt", torch.float16, device, x=x, residual=x, drop_path=None)
    got = run(OPERATOR, arguments, "triton", gradients=False)["out"]
    plain = {**arguments, "x": x.clone(), "residual": x.clone()}
    want = run(OPERATOR, convert(plain, torch.float64), "reference", gradients=False)["out"]
    torch.testing.assert_close(got.double(), want, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["pvt", "eval"])
def test_not_a_number_reaches_what_it_reaches_in_stock(name, device):
    require("triton", device)
    arguments = arguments_of(name, device=device)
    with torch.no_grad():
        arguments["x"].flatten(1)[0, 0] = float("nan")
        arguments["x"].flatten(1)[1, -1] = float("inf")
    want = run(OPERATOR, convert(arguments), "reference", gradients=False)["out"]
    got = run(OPERATOR, arguments, "triton", gradients=False)["out"]
    assert torch.equal(got.isfinite(), want.isfinite())


def test_second_derivatives_say_that_there_are_none():
    """C9."""
    require("triton", "cpu")
    arguments = arguments_of("cffn")
    message = "for second derivatives run mlp_block or conv_mlp_block inside"
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), fused_ops.backend("triton"):
        out = fused_ops.conv_mlp_block(**arguments)
        (grad,) = torch.autograd.grad(out.sum(), arguments["x"], create_graph=True)
        with pytest.raises(RuntimeError, match=message):
            grad.square().sum().backward()


def test_one_value_per_channel_raises_as_torch_does():
    arguments = arguments_of("one_pixel")
    arguments["x"] = arguments["residual"] = arguments["x"][:1].detach()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        fused_ops.conv_mlp_block(**arguments)


# Of the call


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("linear", "reference"),
        ("cffn", "triton"),
        extended("linear", "triton"),
        extended("cffn", "reference"),
    ],
)
def test_autocast_keeps_the_residual_in_its_dtype(name, backend):
    """Float32 maps under autocast: the hidden map in bfloat16, everything else in float32."""
    if backend == "triton":
        require("triton", "cpu")
    arguments = arguments_of(name)
    want = oracle(arguments)
    with torch.autocast("cpu", torch.bfloat16), fused_ops.backend(backend):
        got = fused_ops.conv_mlp_block(**arguments)
        with torch.no_grad():
            bare = fused_ops.conv_mlp_block(**{**arguments, "residual": None})
            kept = fused_ops.conv_mlp_block(**{**arguments, "drop_path": torch.zeros(len(want))})
    assert got.dtype == torch.float32
    assert bare.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)
    assert torch.equal(kept, arguments["residual"])
    (grad,) = torch.autograd.grad(got.square().sum(), arguments["x"])
    assert grad.dtype == torch.float32
    assert arguments["conv_weight"].dtype == torch.float32


def test_flops():
    """G7: as the stock modules forward, and backward by what is asked for."""
    require("triton", "cpu")
    counts = {}
    for backend in ("reference", "triton"):
        with fused_ops.backend(backend), FlopCounterMode(display=False) as counter:
            fused_ops.conv_mlp_block(**arguments_of("linear"))
        counts[backend] = counter.get_total_flops()
    layer, convolution = 2 * 6 * 12 * 18, 2 * 6 * 18 * 9
    assert counts["triton"] == counts["reference"] == 2 * layer + convolution
    expected = {
        INPUTS: 4 * layer + 2 * convolution,
        ("x",): 2 * layer + convolution,
        ("fc2_bias",): 0,
        ("fc1_bias",): layer + convolution,
        ("conv_weight",): layer + convolution,
        ("conv_bias",): layer,
        ("fc2_weight",): layer,
    }
    for names, flops in expected.items():
        arguments = arguments_of("linear")
        for key, tensor in named_tensors(arguments).items():
            tensor.requires_grad_(key in names)
        leaves = [t for t in named_tensors(arguments).values() if t.requires_grad]
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), fused_ops.backend("triton"):
            out = fused_ops.conv_mlp_block(**arguments)
            with FlopCounterMode(display=False) as counter:
                torch.autograd.grad(out, leaves, torch.ones_like(out))
        assert counter.get_total_flops() == flops, names


@pytest.mark.parametrize("name", [extended("linear"), "cffn"])
def test_opcheck(name):
    """G3: schema and fake of both torch operators."""
    require("triton", "cpu")
    check_operators(OPERATOR, arguments_of(name))


@pytest.mark.parametrize(
    ("name", "backend"),
    [("cffn", "triton"), extended("pvt", "triton"), extended("pvt", "reference")],
)
def test_compiles_whole(name, backend):
    """G1, G4: one graph forward and one backward, with eager's results."""
    if backend == "triton":
        require("triton", "cpu")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused_ops.conv_mlp_block, backend=counter, fullgraph=True)
    want = run(OPERATOR, arguments_of(name), backend)
    arguments = arguments_of(name)
    with fused_ops.backend(backend):
        out = compiled(**arguments)
    tensors = {key: t for key, t in named_tensors(arguments).items() if t.requires_grad}
    found = torch.autograd.grad(out, list(tensors.values()), cotangent(out))
    torch.testing.assert_close(out.detach(), want["out"], rtol=1e-5, atol=1e-5)
    assert out.stride() == want["out"].stride()
    for key, value in zip(tensors, found, strict=True):
        torch.testing.assert_close(value, want[f"grad {key}"], rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_bounded_recompilation():
    """G2: over batches and resolutions."""
    require("triton", "cpu")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module = fused_ops.ConvMLPBlock(8, 2, norm="batch")
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    with fused_ops.backend("triton"), torch.no_grad():
        for batch, height, width in ((5, 2, 3), (3, 2, 3), (2, 3, 4)):
            x = torch.randn(batch, 8, height, width).contiguous(memory_format=torch.channels_last)
            assert compiled(x).shape == x.shape
    assert counter.frame_count <= 2
    torch._dynamo.reset()


class Work(TorchDispatchMode):
    """Counts PyTorch's operations that write memory, and the bytes that they read and write."""

    def __init__(self):
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function.overloadpacket._qualified_op_name
        if name.startswith("aten::") and not any(word in name for word in ("empty", "detach")):
            written = {
                argument.name
                for argument in function._schema.arguments
                if argument.alias_info is not None and argument.alias_info.is_write
            }
            named = dict(zip((a.name for a in function._schema.arguments), args, strict=False)) | kwargs
            reads = [t for key, v in named.items() if key not in written for t in tree_leaves(v)]
            reads = [t for t in reads if isinstance(t, torch.Tensor)]
            known = {t.untyped_storage()._cdata for t in reads}
            fresh = [t for t in tree_leaves(result) if t.untyped_storage()._cdata not in known]
            if fresh:
                self.launches += 1
                self.bytes += sum(t.numel() * t.element_size() for t in (*reads, *fresh))
        return result


def pytorch_work(arguments):
    """What PyTorch does beside the Triton kernels, which do not run, by direction."""
    with kernels_chosen(chosen := []), torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fused_ops.conv_mlp_block(**arguments)
    ((_, call, _),) = chosen
    found = {}
    with contextlib.ExitStack() as stack, torch.no_grad():
        for module in (triton, triton_norm, triton_products, triton_wide, depthwise_triton, statistics):
            for name in vars(module):
                if name.endswith("_kernel"):
                    stack.enter_context(mock.patch.object(module, name, mock.MagicMock()))
        with Work() as found["forward"]:
            out, normalised, value, *statistics_ = triton.forward(call, *allocate_forward(call))
        if call.batch_stats:
            call.mean, call.var = statistics_[:2]
        needs = [tensor is not None for tensor in call.tensors()[:10]]
        gradients = allocate_backward(call, needs)
        with Work() as found["backward"]:
            triton.backward(call, torch.empty_like(out), normalised, value, needs, *gradients)
    return call, found


@pytest.mark.parametrize("name", [extended("pvt"), "cffn"])
def test_counted_bytes(name):
    """What kernels touch and products read and write is at most 1.1 times the least, forward and backward."""
    require("triton", "cpu")
    arguments = make(case(f"traffic_{name}"), torch.bfloat16)
    call, others = pytorch_work(arguments)
    rows = operator_traffic(OPERATOR, "triton", name, lambda: arguments)
    totals = {row["direction"]: row for row in rows if row["kernel"] == "total"}
    for direction, row in totals.items():
        counted = row["counted_bytes"] + others[direction].bytes
        assert row["least_bytes"] == OPERATOR.least_bytes(call, direction)
        ratio = counted / row["least_bytes"]
        assert 1.0 <= ratio <= 1.10, f"{direction}: {ratio:.3f} times the least"
        launches = sum(entry["direction"] == direction for entry in rows) - 1
        assert OPERATOR.launch_count(call, direction) == launches + others[direction].launches


def test_least_bytes():
    """In tensors of the input's size u, the hidden map's h and matrices m, all in float32.

    Forward: the norm reads and writes u, each product u, h and m, the convolution 2 h, the sum 3 u; a
    BatchNorm reads u for its statistics. Backward: the convolution once more 2 h (with its raw output, which
    the activation behind it needs, 3 h), four products, its gradients 3 h (4 h), the norm once more 2 u, its
    sums 2 u and its gradient 4 u, fc2's bias u; drop path 2 u.
    """
    for name, forward, backward in (("cffn", (8, 4, 2), (13, 9, 4)), ("pvt", (7, 4, 2), (15, 11, 4))):
        with kernels_chosen(chosen := []):
            fused_ops.conv_mlp_block(**(arguments := arguments_of(name)))
        u, m = 4 * arguments["x"].numel(), 4 * arguments["fc1_weight"].numel()
        units = (u, 2 * u, m)
        for direction, counts in (("forward", forward), ("backward", backward)):
            least = sum(count * unit for count, unit in zip(counts, units, strict=True))
            assert OPERATOR.least_bytes(chosen[0][1], direction) == least, (name, direction)


def test_only_the_hidden_map_before_the_convolution_is_kept():
    """P4: beside x and parameters fc1's result; eager keeps three to four maps of that size."""
    require("triton", "cpu")
    kept = {}
    arguments = arguments_of("pvt")
    passed = {t.data_ptr() for t in named_tensors(arguments).values()}
    for backend in ("reference", "triton"):
        storages = {}

        def pack(tensor, found=storages):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with fused_ops.backend(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            fused_ops.conv_mlp_block(**arguments)
        kept[backend] = sum(size for pointer, size in storages.items() if pointer not in passed)
    hidden = 4 * 2 * arguments["x"].numel()
    assert kept["triton"] == hidden
    assert kept["reference"] >= 3 * hidden


BAD_ARGUMENTS = [
    ({"x": torch.randn(8, 16)}, ValueError, r"x has 2 dimensions; it must be a map \(B, C, H, W\) or tokens"),
    (
        {"x": torch.zeros(2, 8, 8, dtype=torch.int32), "residual": None},
        TypeError,
        "x has dtype torch.int32",
    ),
    ({"size": None}, ValueError, r"size is missing; tokens \(B, H\*W, C\) need the map's \(H, W\)"),
    ({"size": (3, 3)}, ValueError, r"size=\(3, 3\) does not fit x, which has 8 tokens per image"),
    ({"size": (-2, -4)}, ValueError, r"size=\(-2, -4\) does not fit"),
    ({"size": (8,)}, ValueError, r"size=\(8,\) does not fit"),
    ({"x": torch.randn(2, 8, 4, 2)}, ValueError, r"size=\(2, 4\) is given, and x is a map of \(4, 2\)"),
    (
        {"conv_weight": torch.randn(16, 3, 3)},
        ValueError,
        r"it must be \(16, 1, 3, 3\), one 3x3 filter per hidd",
    ),
    ({"conv_weight": torch.randn(16, 1, 5, 5)}, ValueError, r"it must be \(16, 1, 3, 3\)"),
    ({"conv_weight": torch.randn(16, 1, 3, 3).half()}, TypeError, "conv_weight has dtype torch.float16"),
    ({"conv_weight": None}, TypeError, "conv_weight is None; without a convolution there is mlp_block"),
    ({"conv_bias": torch.randn(8)}, ValueError, r"conv_bias has shape \(8,\); it must be \(16,\)"),
    ({"conv_activation": "swish"}, ValueError, "conv_activation='swish' is unknown; use one of none, relu"),
    ({"activation": "swish"}, ValueError, "activation='swish' is unknown; use one of none, relu"),
    ({"fc2_weight": torch.randn(8, 32)}, ValueError, r"it must be \(8, 16\), from fc1's hidden units"),
    ({"residual": torch.randn(2, 8, 16)}, ValueError, r"residual has shape \(2, 8, 16\); it must be that of"),
    ({"residual": torch.randn(2, 8, 8).double()}, TypeError, "residual has dtype torch.float64"),
    ({"norm": nn.LayerNorm(8)}, TypeError, "norm is a LayerNorm; it must be a BatchNormState"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_named(change, error, message):
    """C11."""
    with pytest.raises(error, match=message):
        fused_ops.conv_mlp_block(**arguments_of("pvt", **change))


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("pvt", torch.float64, "x is torch.float64; the Triton kernels are for float32, float16 and"),
        ("many_channels", torch.float32, "x has 2056 channels; the Triton kernels are for up to 2048"),
        ("empty", torch.float32, r"x is empty, \(0, 6, 8\)"),
    ],
)
def test_declined_calls_say_why(name, dtype, message):
    """C11: a forced backend that cannot run raises with one exact sentence."""
    require("triton", "cpu")
    arguments = arguments_of(name, dtype)
    with fused_ops.backend("triton"), pytest.raises(fused_ops.BackendUnavailableError, match=message):
        fused_ops.conv_mlp_block(**arguments)
    assert fused_ops.conv_mlp_block(**arguments).shape == arguments["x"].shape


def test_rows_too_long_for_the_kernels_are_declined():
    with kernels_chosen(chosen := []):
        fused_ops.conv_mlp_block(**arguments_of("pvt"))
    ((name, call, _),) = chosen
    assert name == "feed_forward_conv"
    assert triton.can_run(call)[0] or not triton.can_run(call)[1].startswith("one row")
    call.size = (1, 2**27)
    with mock.patch.object(triton.backends, "triton_takes", return_value=(True, "")):
        assert triton.can_run(call) == (
            False,
            f"one row of the hidden map has {(2**27 + 2) * 16} values; fewer than 2**31 are allowed",
        )


# Of the module


class Stock(nn.Module):
    """HIRI-ViT's CFFN or PVTv2's MLP in a residual, with the module's names."""

    def __init__(self, cffn):
        super().__init__()
        self.cffn = cffn
        self.norm = nn.BatchNorm2d(6) if cffn else nn.LayerNorm(6, eps=1e-6)
        self.fc1, self.fc2 = nn.Linear(6, 12), nn.Linear(12, 6)
        self.dwconv = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.gamma = None if cffn else nn.Parameter(torch.full((6,), 0.1))

    def forward(self, x):
        if self.cffn:
            z = F.gelu(self.fc1(self.norm(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
            return x + self.fc2((self.dwconv(z) + z).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        z = self.fc1(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return x + (self.fc2(F.gelu(self.dwconv(z)).permute(0, 2, 3, 1)) * self.gamma).permute(0, 3, 1, 2)


CFFN_SETTINGS = {"norm": "batch", "activation": "gelu", "conv_activation": "none", "conv_identity": True}


@pytest.mark.parametrize("cffn", [True, False])
def test_the_module_is_the_stock_composition(cffn):
    """D1, D2: state_dict both ways, three training steps, running statistics, evaluation."""
    torch.manual_seed(0)
    stock = Stock(cffn).double()
    module = fused_ops.ConvMLPBlock(6, 2, **(CFFN_SETTINGS if cffn else {"layer_scale": 0.1})).double()
    module.load_state_dict(stock.state_dict())
    stock.load_state_dict(module.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (stock, module)]
    for step in range(3):
        x = torch.randn(2, 6, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        for m, optimizer in zip((stock, module), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().sum().backward()
            optimizer.step()
    for name, value in stock.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(module.eval()(x), stock.eval()(x), rtol=1e-10, atol=1e-12)
    tokens = x.flatten(2).transpose(1, 2)
    torch.testing.assert_close(module(tokens, (4, 5)), module(x).flatten(2).transpose(1, 2))


@pytest.mark.parametrize("as_map", [True, False])
def test_another_norm_runs_the_stock_way(as_map):
    module = fused_ops.ConvMLPBlock(12, 2, norm="batch")
    x = torch.randn(2, 12, 3, 4)
    module.norm = nn.GroupNorm(3, 12)
    z = F.linear(module.norm(x).permute(0, 2, 3, 1), module.fc1.weight, module.fc1.bias)
    z = F.gelu(module.dwconv(z.permute(0, 3, 1, 2)))
    want = x + module.fc2(z.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    tokens = x.flatten(2).transpose(1, 2)
    got = module(x) if as_map else module(tokens, (3, 4)).transpose(1, 2).view_as(x)
    torch.testing.assert_close(got, want)


def test_drop_path_of_the_module():
    module = fused_ops.ConvMLPBlock(8, 2, drop_path=0.5)
    x = torch.randn(64, 8, 2, 3)
    torch.manual_seed(3)
    out = module(x)
    kept = (out != x).flatten(1).any(1)
    assert 16 < kept.sum() < 48
    module.drop_path.drop_prob = 0.0
    torch.testing.assert_close(out[kept], x[kept] + 2 * (module(x) - x)[kept])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim=0 is not allowed"),
        ({"dim": 4, "expansion": 0.1}, "expansion=0.1 leaves no hidden unit of 4"),
        ({"dim": 4, "norm": "group"}, "norm='group' is unknown; use one of layer, batch, none"),
        ({"dim": 4, "activation": "swish"}, "activation='swish' is unknown"),
        ({"dim": 4, "conv_activation": "swish"}, "conv_activation='swish' is unknown"),
    ],
)
def test_bad_arguments_of_the_module(options, message):
    with pytest.raises(ValueError, match=message):
        fused_ops.ConvMLPBlock(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 5, "padding": 1}, r"conv has kernel_size=\(5, 5\); it must be \(3, 3\)"),
        ({"stride": 2}, r"conv has stride=\(2, 2\)"),
        ({"padding": 0}, r"conv has padding=\(0, 0\); it must be \(1, 1\) or 'same'"),
        ({"dilation": 2, "padding": "same"}, r"conv has dilation=\(2, 2\)"),
        ({"padding_mode": "reflect"}, "conv has padding_mode='reflect'"),
        ({"groups": 4}, "conv has groups=4; it must be 16"),
        ({"out_channels": 32}, "conv has out_channels=32; it must be 16"),
    ],
)
def test_other_convolutions_are_refused(options, message):
    settings = {"out_channels": 16, "kernel_size": 3, "padding": 1, "groups": 16, **options}
    conv = nn.Conv2d(16, **settings)
    with pytest.raises(ValueError, match=message):
        conv_mlp_on_modules(torch.randn(1, 8, 3, 3), None, nn.Linear(8, 16), conv, nn.Linear(16, 8))


def three_way_of_modules(stock, fused, x, settings):
    """C1 of a stock chain and ours on the same modules: results, gradients of input and parameters."""
    found = {}
    for kind, dtype, function in (
        ("exact", torch.float64, stock),
        ("eager", x.dtype, stock),
        ("got", x.dtype, fused),
    ):
        modules = [module.to(dtype).train() for module in settings]
        given = x.detach().to(dtype).requires_grad_()
        leaves = {"x": given}
        for number, module in enumerate(modules):
            leaves |= {f"{number}.{name}": p for name, p in module.named_parameters()}
        for module in modules:
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
        out = function(given)
        gradients = torch.autograd.grad(out, list(leaves.values()), cotangent(out))
        found[kind] = {"out": out.detach()} | {
            f"grad {name}": value for name, value in zip(leaves, gradients, strict=True)
        }
    assert_three_way(found["got"], found["eager"], found["exact"], x.dtype)


def pvt_block(name, **settings):
    """The norm and the MLP of a block's second half."""
    block = pytest.importorskip("timm").create_model(name, **settings).stages[0].blocks[0]
    return block.norm2, block.mlp


NARROW = {"embed_dims": (8,) * 4, "num_heads": (1,) * 4, "depths": (1,) * 4, "mlp_ratios": (2,) * 4}


@pytest.mark.parametrize(
    ("settings", "backend"),
    [(NARROW, "triton"), extended({}, "triton"), extended({}, "reference")],
    ids=["narrow-triton", "own-triton", "own-reference"],
)
def test_the_mlp_of_timms_pvt_v2_b0(settings, backend):
    """C1: exchanged by hand, with the norm before it and the residual around it."""
    if backend == "triton":
        require("triton", "cpu")
    norm, mlp = pvt_block("pvt_v2_b0", **settings)
    size = (2, 3)

    def fused(x):
        with fused_ops.backend(backend):
            return conv_mlp_on_modules(x, norm, mlp.fc1, mlp.dwconv, mlp.fc2, size=size, residual=x)

    x = torch.randn(1, 6, norm.normalized_shape[0])
    three_way_of_modules(lambda x: x + mlp(norm(x), size), fused, x, (norm, mlp))


def test_the_mlp_of_timms_linear_pvt_v2():
    """A ReLU before the convolution."""
    norm, mlp = (module.double() for module in pvt_block("pvt_v2_b2_li", **NARROW))
    assert isinstance(mlp.relu, nn.ReLU)
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    got = conv_mlp_on_modules(
        x, norm, mlp.fc1, mlp.dwconv, mlp.fc2, size=(3, 4), activation="relu", residual=x
    )
    torch.testing.assert_close(got, x + mlp(norm(x), (3, 4)))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_feed_forward_of_hiri_vit(backend):
    """C1: on the parameters of 1x1 convolutions, as the paper has them, and of the model's own block."""
    from fused_ops.models.hiri_vit import CFFN, Details

    if backend == "triton":
        require("triton", "cpu")
    block = CFFN(8, 2, 0.0, "batch", Details())

    def stock(x):
        z = F.gelu(block.fc1(block.norm(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return x + block.fc2((block.dw(z) + z).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def fused(x):
        with fused_ops.backend(backend):
            return block(x)

    x = torch.randn(2, 8, 2, 3).contiguous(memory_format=torch.channels_last)
    three_way_of_modules(stock, fused, x, (block.norm, block))


# Across processes


def synchronised(size, dtype):
    torch.manual_seed(11)
    module = fused_ops.ConvMLPBlock(4, 2, **CFFN_SETTINGS).to(dtype)
    values = torch.randn(size, 4, 2, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return module, (values + 3).to(dtype)


def step(module, x, backend):
    """Result, gradients (sums over images) and buffers."""
    x.requires_grad_()
    with fused_ops.backend(backend):
        out = module(x)
    weights = torch.linspace(-1, 1, out.shape[1:].numel(), dtype=out.dtype).view(out.shape[1:])
    (out * weights + out.square()).sum().backward()
    found = {"out": out.detach(), "x": x.grad}
    found |= {name: parameter.grad for name, parameter in module.named_parameters()}
    return found | dict(module.named_buffers())


def worker(rank, folder):
    sys.path[:0] = [str(Path(__file__).parents[1])]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    module, x = synchronised(3, torch.float32)
    module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    found = step(module, x[:1] if rank == 0 else x[1:], "triton")
    for name, _ in module.named_parameters():
        dist.all_reduce(found[name])
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.extended
def test_two_processes_equal_one(tmp_path):
    """D8: batch statistics of both, with different numbers of images."""
    require("triton", "cpu")
    mp.start_processes(worker, (str(tmp_path),), nprocs=2, start_method="spawn")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    want = step(*synchronised(3, torch.float64), "reference")
    for name, value in want.items():
        found = [part[name].double() for part in ranks]
        for got in [torch.cat(found)] if name in ("out", "x") else found:
            torch.testing.assert_close(got, value.double(), rtol=2e-4, atol=2e-4, msg=name)


@pytest.mark.gpu
def test_cuda_graph():
    """G5: captured on a side stream, replayed with other inputs."""
    require("triton", "cuda")
    arguments = arguments_of("pvt", device="cuda")
    static = arguments["x"].detach()
    arguments["x"] = arguments["residual"] = static
    stream = torch.cuda.Stream()
    with torch.no_grad(), fused_ops.backend("triton"):
        with torch.cuda.stream(stream):
            for _ in range(3):
                fused_ops.conv_mlp_block(**arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = fused_ops.conv_mlp_block(**arguments)
        for _ in range(2):
            static.copy_(torch.randn_like(static))
            graph.replay()
            want = run(OPERATOR, convert(arguments, torch.float64), "reference", gradients=False)["out"]
            torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-4)
