"""The feed-forward chain: contract C1 to C11 and G1 to G7 beyond the cases that every operator runs.

Shapes are tiny: every program costs tens of milliseconds in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
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
from torch.utils.flop_counter import FlopCounterMode

import fused_ops
from fused_ops.bench.limits import kernels_chosen
from fused_ops.bench.traffic import operator_traffic
from fused_ops.core import library, tuning
from fused_ops.core.drop_path import DropPath
from fused_ops.core.triton_support import jit, tl
from fused_ops.feed_forward import triton, triton_norm, triton_products
from fused_ops.feed_forward.module import mlp_on_modules, residual_mlp
from fused_ops.feed_forward.triton_rows import activated, activated_gradient

OPERATOR = library.operators()["feed_forward"]
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


def case(name):
    return case_named(name, "feed_forward")


def arguments_of(name="batch", dtype=torch.float32, device="cpu", **change):
    return {**make(case(name), dtype, device=device), **change}


def oracle(arguments):
    """The definition once more, from nothing of the package: sums and products written out."""
    x, norm = arguments["x"], arguments.get("norm")
    z = x
    if norm is not None:
        dims = tuple(range(x.dim() - 1)) if hasattr(norm, "batch_stats") else -1
        if getattr(norm, "batch_stats", True):
            mean, var = x.mean(dims, keepdim=True), x.var(dims, unbiased=False, keepdim=True)
        else:
            mean, var = norm.running_mean, norm.running_var
        z = (x - mean) / (var + norm.eps).sqrt()
        z = z if norm.weight is None else z * norm.weight
        z = z if norm.bias is None else z + norm.bias
    hidden = torch.einsum("...c,jc->...j", z, arguments["fc1_weight"])
    if arguments.get("fc1_bias") is not None:
        hidden = hidden + arguments["fc1_bias"]
    hidden = ACTIVATIONS[arguments.get("activation", "gelu")](hidden)
    out = torch.einsum("...j,cj->...c", hidden, arguments["fc2_weight"])
    for name, combine in (("fc2_bias", torch.add), ("layer_scale", torch.mul)):
        if arguments.get(name) is not None:
            out = combine(out, arguments[name])
    if arguments.get("drop_path") is not None:
        out = out * arguments["drop_path"][:, None, None]
    return out if arguments.get("residual") is None else out + arguments["residual"]


# Of the reference


@pytest.mark.parametrize(
    ("operator", "case"), operator_cases(without=("model", "traffic", "resources"), only="feed_forward")
)
def test_reference_is_the_definition(operator, case):
    arguments = make(case, torch.float64)
    want = oracle(arguments)
    got = run(operator, arguments, "reference", gradients=False)["out"]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert got.shape == arguments["x"].shape


@pytest.mark.parametrize("name", ["batch", "convnext"])
def test_reference_gradcheck(name):
    arguments = arguments_of(name, torch.float64)
    tensors = {key: t for key, t in named_tensors(arguments).items() if t.requires_grad}
    tensors = {key: t.detach()[:, :4] if key == "x" else t.detach() for key, t in tensors.items()}
    if arguments["residual"] is not arguments["x"]:
        tensors["residual"] = arguments["residual"].detach()[:, :4]
    leaves = [tensor.clone().requires_grad_() for tensor in tensors.values()]

    def function(*values):
        found = dict(zip(tensors, values, strict=True))
        norm = arguments["norm"]._replace(weight=found["norm.weight"], bias=found["norm.bias"])
        if name == "batch":
            statistics = {field: getattr(norm, field).clone() for field in ("running_mean", "running_var")}
            norm = norm._replace(**statistics)
        plain = {key: value for key, value in found.items() if "." not in key}
        plain.setdefault("residual", plain["x"])
        return fused_ops.mlp_block(**plain, norm=norm, drop_path=arguments.get("drop_path"))

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


# Of the kernels


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "name", [c.name for c in OPERATOR.cases() if "awkward" in c.tags and c.name != "empty"]
)
def test_awkward_cases(name, device):
    """C1, C2: what is too odd to be worth every dtype and layout."""
    require("triton", device)
    arguments = arguments_of(name, device=device)
    exact, eager = convert(arguments, torch.float64), convert(arguments)
    got = run(OPERATOR, arguments, "triton")
    assert_three_way(got, run(OPERATOR, eager, "reference"), run(OPERATOR, exact, "reference"), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations(activation, device):
    require("triton", device)
    arguments = arguments_of("layer", device=device, activation=activation)
    exact, eager = convert(arguments, torch.float64), convert(arguments)
    got = run(OPERATOR, arguments, "triton")
    assert_three_way(got, run(OPERATOR, eager, "reference"), run(OPERATOR, exact, "reference"), torch.float32)


@jit
def _activation_kernel(x_ptr, value_ptr, slope_ptr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(value_ptr + i, activated(x, "gelu", DTYPE))
    tl.store(slope_ptr + i, activated_gradient(x, "gelu", DTYPE))


@pytest.mark.parametrize("device", DEVICES)
def test_gelu_in_bfloat16_is_as_exact_as_it_says(device):
    """Published: 2.3e-4 of its value to |x| = 5.5, 2e-7 beyond; bfloat16 rounds by 2e-3."""
    require("triton", device)
    inside = torch.linspace(-5.5, 5.5, 2048)
    outside = torch.cat([torch.linspace(-40, -5.5, 1024), torch.linspace(5.5, 40, 1024)])
    for x, bfloat16 in ((inside, True), (outside, True), (inside, False)):
        value, slope = torch.empty(2048, device=device), torch.empty(2048, device=device)
        dtype = tl.bfloat16 if bfloat16 else tl.float16
        _activation_kernel[(1,)](x.to(device), value, slope, DTYPE=dtype, BLOCK=2048)
        exact = x.double()
        cdf = torch.special.ndtr(exact)
        pdf = torch.exp(-0.5 * exact**2) / math.sqrt(2 * math.pi)
        error = (value.cpu().double() - exact * cdf).abs()
        slope_error = (slope.cpu().double() - (cdf + exact * pdf)).abs()
        if not bfloat16:
            # The error function, for dtypes that round by less.
            assert error.max() < 1e-6
            assert slope_error.max() < 1e-6
        elif x is inside:
            relative = error / (exact * cdf).abs().clamp_min(1e-30)
            assert 1e-4 < relative.max() < 2.4e-4
            assert slope_error.max() < 7e-5
        else:
            # Of values as large as 40 float32 itself loses 2e-6.
            assert (error / exact.abs().clamp_min(1)).max() < 2e-7
            assert slope_error.max() < 2e-7


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["batch", "wide", "scaled", "products_batch", "products_convnext"])
def test_subsets_of_gradients(name, device):
    """C10: any subset equals the full set's to the bit, and nothing else is asked for."""
    require("triton", device)
    full = run(OPERATOR, arguments_of(name, device=device), "triton")
    subsets = [("x",), ("fc1_bias",), ("fc2_weight", "norm.bias")]
    if name == "wide":
        subsets = [("fc2_bias",), ("x", "fc1_weight"), ("norm.weight",)]
    if name == "scaled":
        subsets = [("layer_scale",), ("fc1_weight", "fc2_bias"), ("fc2_weight",)]
    if name == "products_convnext":
        subsets = [("layer_scale",), ("x",), ("fc1_bias", "fc2_weight"), ("fc2_bias",), ("norm.bias",)]
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
def test_a_residual_alone_costs_no_kernel(device):
    """C10: its gradient is the result's."""
    require("triton", device)
    arguments = arguments_of("convnext", device=device)
    for key, tensor in named_tensors(arguments).items():
        tensor.requires_grad_(key == "residual")
    grad = torch.randn(3, 11, 12, device=device)
    with RecordCalls(OPERATOR.overloads[1:]) as recorded:
        got = run(OPERATOR, arguments, "triton", grad=grad)
    assert not recorded.calls
    assert torch.equal(got["grad residual"], grad)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["batch", "wide", "convnext", "products_batch"])
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
    # The result, the gradients and the partial sums.
    assert len(buffers) >= 9
    for buffer in buffers:
        assert (buffer[:band] == 77).all()
        assert (buffer[-band:] == 77).all()


@pytest.mark.parametrize("device", DEVICES)
def test_layouts_of_input_and_gradient(device):
    """C4: maps as views, expanded and transposed gradients, channels that lie apart in memory."""
    require("triton", device)
    wide = torch.randn(2, 32, 5, 8, device=device).contiguous(memory_format=torch.channels_last)
    for x in (wide[:, ::2, :, 1:].permute(0, 2, 3, 1), wide.contiguous()[:, :16, :, :7].permute(0, 2, 3, 1)):
        x = x.detach().requires_grad_()
        arguments = arguments_of("layer", device=device, x=x, residual=x)
        exact = convert(arguments, torch.float64)
        weights = torch.linspace(-1, 1, x.numel(), device=device).view(2, 16, 5, 7).permute(0, 2, 3, 1)
        for grad in (torch.ones((), device=device).expand(x.shape), weights):
            got = run(OPERATOR, arguments, "triton", grad=grad)
            want = run(OPERATOR, exact, "reference", grad=grad.double())
            for name, value in want.items():
                torch.testing.assert_close(got[name].double(), value, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("shape", "strides"),
    [((3, 20, 16), (2**30, 16, 1)), ((2, 3, 16), (16, 2**30, 1))],
    ids=["image", "token"],
)
def test_large_offsets(shape, strides, device):
    """C5: what lies more than 2**31 elements into its buffer is read at the right place."""
    require("triton", device)
    # On the CPU the pages in between are never touched, so they cost no memory.
    buffer = torch.empty(2**31 + 400, dtype=torch.float16, device=device)
    x = buffer.as_strided(shape, strides)
    x.copy_(torch.randn(shape))
    arguments = arguments_of("layer", torch.float16, device, x=x, residual=x)
    got = run(OPERATOR, arguments, "triton", gradients=False)["out"]
    plain = {**arguments, "x": x.clone(), "residual": x.clone()}
    want = run(OPERATOR, convert(plain, torch.float64), "reference", gradients=False)["out"]
    torch.testing.assert_close(got.double(), want, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_not_a_number_reaches_what_it_reaches_in_stock(dtype, device):
    require("triton", device)
    arguments = arguments_of("batch_eval", dtype, device, activation="gelu")
    with torch.no_grad():
        arguments["x"][0, 1, 2] = float("nan")
        arguments["x"][1, 0, 4] = float("inf")
    want = run(OPERATOR, convert(arguments), "reference", gradients=False)["out"]
    got = run(OPERATOR, arguments, "triton", gradients=False)["out"]
    assert torch.equal(got.isfinite(), want.isfinite())


def test_second_derivatives_say_that_there_are_none():
    """C9."""
    require("triton", "cpu")
    arguments = arguments_of("layer")
    with fused_ops.backend("triton"):
        out = OPERATOR.function(**arguments)
    (grad,) = torch.autograd.grad(out.sum(), arguments["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="feed_forward_backward has no derivative of its own"):
        grad.square().sum().backward()


def test_statistics_under_a_large_mean():
    """C2: mean 1000, deviation 1. A sum of squares in float32 would lose every digit of the variance."""
    require("triton", "cpu")
    arguments = arguments_of("large_mean")
    exact = convert(arguments, torch.float64)
    got = run(OPERATOR, arguments, "triton", gradients=False)
    want = run(OPERATOR, exact, "reference", gradients=False)
    for name in ("norm.running_mean", "norm.running_var"):
        torch.testing.assert_close(got[name].double(), want[name], rtol=1e-4, atol=0)


def test_one_value_per_channel_raises_as_torch_does():
    arguments = arguments_of("one_token")
    arguments["x"] = arguments["residual"] = arguments["x"][:1].detach()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        fused_ops.mlp_block(**arguments)


@pytest.mark.parametrize("sizes", [(64, 256), (96, 384), (128, 512), (8, 20), (1, 3)])
def test_plans_cover_all_rows(sizes):
    for kernel in ("forward", "weights", "input"):
        for size in (2, 4):
            tile = triton.heuristic(kernel, *sizes, size)
            assert min(tile) >= 4
            for rows in (1, 100, 401408):
                plan = triton.rows_plan(rows, sizes[0], tile)
                assert (plan.programs - 1) * tile.tokens < rows <= plan.programs * tile.tokens
                plan = triton.weights_plan(rows, *sizes, tile)
                assert (plan.programs - 1) * plan.tiles_each * tile.tokens < rows
                assert rows <= plan.programs * plan.tiles_each * tile.tokens
    for rows in (1, 100, 401408):
        programs, tiles_each, meta = triton_norm.moments_plan(rows, sizes[0])
        each = tiles_each * meta["BLOCK_M"]
        assert (programs - 1) * each < rows <= programs * each


@pytest.mark.parametrize("tile", [(16, 16, 4), (32, 16, 8), (64, 32, 4)])
def test_results_do_not_depend_on_the_tile(tile):
    require("triton", "cpu")
    want = run(OPERATOR, arguments_of("scaled"), "triton")
    names = [f"feed_forward_{kernel} 32-bit" for kernel in ("forward", "weights", "input")]
    with tuning.force(names[0], tile), tuning.force(names[1], tile), tuning.force(names[2], tile):
        got = run(OPERATOR, arguments_of("scaled"), "triton")
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4, msg=name)


PRODUCTS = [(16, 16, 16, 4), (32, 64, 32, 4), triton_products.PYTORCH]


@pytest.mark.parametrize("tile", PRODUCTS)
@pytest.mark.parametrize("name", ["products_batch", "products_layer", "products_convnext"])
def test_products_of_wide_tokens_do_not_depend_on_the_tile(name, tile):
    """Ten tiles of rows, more than a group of them, and PyTorch's products with passes in between."""
    require("triton", "cpu")
    arguments = arguments_of(name, torch.float16)
    rows = arguments["x"].shape
    generator = torch.Generator().manual_seed(3)
    for key in ("x", "residual"):
        if arguments.get(key) is not None:
            wide = torch.randn((rows[0], 160 // rows[0], rows[2]), generator=generator)
            arguments[key] = wide.half().requires_grad_()
    eager, exact = convert(arguments), convert(arguments, torch.float64)
    with contextlib.ExitStack() as stack:
        for kernel in triton_products.TUNED.values():
            stack.enter_context(tuning.force(kernel, tile))
        got = run(OPERATOR, arguments, "triton")
    want = run(OPERATOR, exact, "reference")
    assert_three_way(got, run(OPERATOR, eager, "reference"), want, torch.float16)


@jit
def tiles_kernel(out_ptr, rows, columns, BLOCK: tl.constexpr):
    row, column = triton_products.tile_of_program(rows, columns, BLOCK, BLOCK, 8)
    pointer = out_ptr + tl.program_id(0) * 2
    tl.store(pointer, row)
    tl.store(pointer + 1, column)


def test_tiles_of_products_cover_every_tile_once():
    """The order in which programs take tiles, by plain loops."""
    require("triton", "cpu")
    for rows, columns in ((19, 3), (8, 1), (3, 5), (16, 2)):
        out = torch.full((rows * columns, 2), -1)
        tiles_kernel[(rows * columns,)](out, 16 * rows, 16 * columns - 3, BLOCK=16)
        expected = [
            (row, column)
            for first in range(0, rows, 8)
            for column in range(columns)
            for row in range(first, min(first + 8, rows))
        ]
        assert [tuple(pair) for pair in out.tolist()] == expected


# Of the call


@pytest.mark.parametrize("channels", [16, 160])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_float32_stream_beside_half_precision_tokens(channels, backend):
    """As ConvNeXt has it under autocast: the norm's input is of a convolution, the shortcut is the stream."""
    if backend == "triton":
        require("triton", "cpu")
    torch.manual_seed(4)
    residual = (300 + torch.randn(2, 5, channels)).requires_grad_()
    x = torch.randn(2, 5, channels).bfloat16().requires_grad_()
    weights = [torch.randn(2 * channels, channels) / 9, torch.randn(channels, 2 * channels) / 9]
    norm = fused_ops.LayerNormState(torch.ones(channels), torch.zeros(channels), 1e-6)
    options = {"layer_scale": torch.full((channels,), 0.1), "drop_path": torch.tensor([1.25, 0.0])}
    with fused_ops.backend(backend):
        out = fused_ops.mlp_block(x, *weights, norm, **options, residual=residual)
    grads = torch.autograd.grad(out.sum(), (x, residual))
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, residual)]
    hidden = F.gelu(F.linear(F.layer_norm(exact[0], (channels,), eps=1e-6), weights[0].double()))
    branch = F.linear(hidden, weights[1].double()) * 0.1 * options["drop_path"].double()[:, None, None]
    want = branch + exact[1]
    assert out.dtype == torch.float32
    # Rounded to bfloat16 the sum would be off by up to 1.
    assert (out - want).abs().max() < 0.02
    assert torch.equal(out[1], residual[1])
    wanted = torch.autograd.grad(want.sum(), exact)
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32]
    assert torch.equal(grads[1], torch.ones_like(residual))
    assert (grads[0].double() - wanted[0]).norm() < 0.03 * wanted[0].norm()


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", ["convnext", "batch", "plain", "products_batch", "products_convnext"])
def test_autocast_keeps_the_residual_in_its_dtype(name, backend):
    """Float32 tokens under autocast: products in bfloat16, everything else in float32, as stock layers do."""
    if backend == "triton":
        require("triton", "cpu")
    arguments = arguments_of(name)
    norm = arguments.get("norm")
    with torch.autocast("cpu", torch.bfloat16):
        x = arguments["x"]
        z = x
        if name.endswith("batch"):
            z = F.batch_norm(x.flatten(0, 1), None, None, norm.weight, norm.bias, True).view(x.shape)
        elif name.endswith("convnext"):
            z = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
        hidden = ACTIVATIONS[arguments.get("activation", "gelu")](
            F.linear(z, arguments["fc1_weight"], arguments.get("fc1_bias"))
        )
        want = F.linear(hidden, arguments["fc2_weight"], arguments.get("fc2_bias"))
        if name.endswith("convnext"):
            want = want * arguments["layer_scale"]
        if "drop_path" in arguments:
            want = want * arguments["drop_path"][:, None, None]
        if name != "plain":
            want = want + arguments["residual"]
        with fused_ops.backend(backend):
            got = fused_ops.mlp_block(**arguments)
        assert got.dtype == want.dtype == (torch.bfloat16 if name == "plain" else torch.float32)
    torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)
    (grad,) = torch.autograd.grad(got.float().square().sum(), x)
    assert grad.dtype == torch.float32
    assert arguments["fc1_weight"].dtype == torch.float32
    # The part that is not rounded is there to the last digit: with no branch, the residual comes out.
    if name != "plain":
        with torch.autocast("cpu", torch.bfloat16), fused_ops.backend(backend), torch.no_grad():
            nothing = torch.zeros(x.shape[0])
            got = fused_ops.mlp_block(**{**arguments, "drop_path": nothing})
        assert torch.equal(got, arguments["residual"])


def test_flops():
    """G7: as the stock modules forward, and backward by what is asked for."""
    require("triton", "cpu")
    counts = {}
    for backend in ("reference", "triton"):
        with fused_ops.backend(backend), FlopCounterMode(display=False) as counter:
            fused_ops.mlp_block(**arguments_of("scaled"))
        counts[backend] = counter.get_total_flops()
    layer = 2 * 2 * 17 * 16 * 32
    assert counts["triton"] == counts["reference"] == 2 * layer
    expected = {
        INPUTS: 4 * layer,
        ("x",): 2 * layer,
        ("fc2_bias",): 0,
        ("fc1_weight",): 2 * layer,
        ("fc2_weight",): layer,
        ("layer_scale",): layer,
        ("norm.bias",): 2 * layer,
    }
    for names, flops in expected.items():
        arguments = arguments_of("scaled")
        for key, tensor in named_tensors(arguments).items():
            tensor.requires_grad_(key in names)
        leaves = [t for t in named_tensors(arguments).values() if t.requires_grad]
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), fused_ops.backend("triton"):
            out = fused_ops.mlp_block(**arguments)
            with FlopCounterMode(display=False) as counter:
                torch.autograd.grad(out, leaves, torch.ones_like(out))
        assert counter.get_total_flops() == flops, names


@pytest.mark.parametrize("name", ["batch", "convnext", "products_layer"])
def test_opcheck(name):
    """G3: schema and fake of both torch operators."""
    require("triton", "cpu")
    check_operators(OPERATOR, arguments_of(name))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", ["batch", "convnext", "products_batch"])
def test_compiles_whole(name, backend):
    """G1, G4: one graph forward and one backward, with eager's results."""
    if backend == "triton":
        require("triton", "cpu")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused_ops.mlp_block, backend=counter, fullgraph=True)
    want = run(OPERATOR, arguments_of(name), backend)
    arguments = arguments_of(name)
    with fused_ops.backend(backend):
        out = compiled(**arguments)
    tensors = {key: t for key, t in named_tensors(arguments).items() if t.requires_grad}
    found = torch.autograd.grad(out, list(tensors.values()), cotangent(out))
    torch.testing.assert_close(out.detach(), want["out"], rtol=1e-5, atol=1e-5)
    for key, value in zip(tensors, found, strict=True):
        torch.testing.assert_close(value, want[f"grad {key}"], rtol=1e-4, atol=1e-4)
    if name != "convnext":
        for key in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(arguments["norm"], key), want[f"norm.{key}"])
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["batch", "convnext"])
def test_counted_bytes(name):
    """The bytes that the kernels touch are at most 1.1 times the least, forward and backward."""
    require("triton", "cpu")
    arguments = make(case(f"traffic_{name}"), torch.bfloat16)
    rows = operator_traffic(OPERATOR, "triton", name, lambda: arguments)
    totals = {row["direction"]: row for row in rows if row["kernel"] == "total"}
    unit = 2 * 16 * 4096
    # x (twice, for the statistics; or the residual), the result; x and the gradient twice, x's gradient.
    least = {"forward": 3 * unit, "backward": 5 * unit}
    assert {direction: row["least_bytes"] for direction, row in totals.items()} == least
    with kernels_chosen(chosen := []), torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fused_ops.mlp_block(**arguments)
    for direction, row in totals.items():
        ratio = row["counted_bytes"] / row["least_bytes"]
        assert 1.0 <= ratio <= 1.10, f"{direction}: {ratio:.3f} times the least"
        launches = sum(entry["direction"] == direction for entry in rows) - 1
        # PyTorch's casts of both matrices, and its products with the layer scale.
        others = 2 if name == "batch" else 4
        assert OPERATOR.launch_count(chosen[0][1], direction) == launches + others


def test_partial_sums_of_real_models_weigh_less_than_a_tenth():
    """Partial gradients of the weights, written and read, beside what backward moves at least."""
    for one in OPERATOR.cases():
        if "model" not in one.tags or one.name.endswith("eval_64x56"):
            continue
        with torch._subclasses.FakeTensorMode(), kernels_chosen(chosen := []):
            fused_ops.mlp_block(
                **one.make(torch.Generator(), torch.bfloat16, torch.device("cpu"), "channels_last")
            )
        ((_, call, _),) = chosen
        if not triton.is_narrow(call.x.shape[2]):
            continue
        rows, channels = call.x.shape[0] * call.x.shape[1], call.x.shape[2]
        hidden = call.fc1_weight.shape[0]
        plan = triton.weights_plan(rows, channels, hidden, triton.heuristic("weights", channels, hidden, 2))
        partial = 2 * 4 * plan.programs * (2 * hidden * channels + hidden)
        assert partial <= 0.10 * OPERATOR.least_bytes(call, "backward"), one.name


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [("batch", 3, 5), ("batch_eval", 2, 5), ("convnext", 3, 5), ("plain", 2, 5)],
)
def test_least_bytes(name, forward, backward):
    """In tensors of the input's size."""
    with kernels_chosen(chosen := []):
        fused_ops.mlp_block(**(arguments := arguments_of(name)))
    unit = 4 * arguments["x"].numel()
    assert OPERATOR.least_bytes(chosen[0][1], "forward") == forward * unit
    assert OPERATOR.least_bytes(chosen[0][1], "backward") == backward * unit


BAD_ARGUMENTS = [
    ({"x": torch.randn(16)}, ValueError, r"x has 1 dimension; it must be \(B, ..., C\)"),
    ({"x": torch.zeros(2, 3, 16, dtype=torch.int32)}, TypeError, "x has dtype torch.int32"),
    ({"x": torch.zeros(2, 3, 0)}, ValueError, "it must have at least 1 channel"),
    ({"fc1_weight": torch.randn(64)}, ValueError, r"fc1_weight has shape \(64,\); it must be \(hidden, 16\)"),
    ({"fc1_weight": torch.randn(64, 8)}, ValueError, r"it must be \(64, 16\), from the channels"),
    ({"fc2_weight": torch.randn(16, 64)}, ValueError, r"it must be \(16, 32\), from fc1's hidden units"),
    ({"fc1_bias": torch.randn(16)}, ValueError, r"fc1_bias has shape \(16,\); it must be \(32,\)"),
    ({"fc2_bias": torch.randn(16).half()}, TypeError, "fc2_bias has dtype torch.float16"),
    ({"layer_scale": torch.randn(16, device="meta")}, ValueError, "layer_scale is on meta"),
    ({"drop_path": torch.ones(3)}, ValueError, r"it must be \(2,\), one factor per image"),
    ({"drop_path": torch.ones(2, requires_grad=True)}, ValueError, "drop_path requires grad"),
    ({"activation": "swish"}, ValueError, "activation='swish' is unknown; use one of none, relu"),
    ({"residual": torch.randn(2, 3, 16)}, ValueError, r"residual has shape \(2, 3, 16\); it must be that of"),
    ({"residual": torch.randn(2, 19, 16).double()}, TypeError, "residual has dtype torch.float64"),
    ({"norm": nn.LayerNorm(16)}, TypeError, "norm is a LayerNorm; it must be a BatchNormState"),
    (
        {"norm": fused_ops.BatchNormState(torch.ones(3), None, None, None, True, 0.1, 1e-5)},
        ValueError,
        r"norm.weight has shape \(3,\)",
    ),
    (
        {"norm": fused_ops.LayerNormState(None, torch.ones(3), 1e-5)},
        ValueError,
        r"norm.bias has shape \(3,\)",
    ),
    (
        {"norm": fused_ops.BatchNormState(None, None, None, None, False, 0.1, 1e-5)},
        ValueError,
        "norm has no running statistics",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_named(change, error, message):
    """C11."""
    with pytest.raises(error, match=message):
        fused_ops.mlp_block(**arguments_of("batch", **change))


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("layer", torch.float64, "x is torch.float64; the Triton kernels are for float32, float16 and"),
        ("many_channels", torch.float32, "x has 2056 channels; the Triton kernels are for up to 2048"),
        ("empty", torch.float32, r"x is empty, \(0, 6, 8\)"),
    ],
)
def test_declined_calls_say_why(name, dtype, message):
    """C11: a forced backend that cannot run raises with one exact sentence."""
    require("triton", "cpu")
    arguments = arguments_of(name, dtype)
    with fused_ops.backend("triton"), pytest.raises(fused_ops.BackendUnavailableError, match=message):
        fused_ops.mlp_block(**arguments)
    assert fused_ops.mlp_block(**arguments).shape == arguments["x"].shape


def test_wide_tokens_do_not_keep_the_hidden_values_twice():
    """P4: beside the input the norm's output and fc1's; eager keeps the activation's too."""
    kept = {}
    shapes = {"fc1_weight": (576, 144), "fc2_weight": (144, 576)}
    weights = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}
    arguments = arguments_of("products_layer", **weights, fc1_bias=None)
    x = arguments["x"]
    parameters = {t.data_ptr() for key, t in named_tensors(arguments).items() if key != "x"}
    for backend in ("reference", "triton"):
        storages = {}

        def pack(tensor, found=storages):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with fused_ops.backend(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            fused_ops.mlp_block(**arguments)
        skipped = {x.data_ptr(), *parameters}
        kept[backend] = sum(size for pointer, size in storages.items() if pointer not in skipped)
    rows = 3 * 5
    assert 0 <= kept["triton"] - 4 * rows * (144 + 576) < 100
    assert kept["triton"] < 0.6 * kept["reference"]


def test_wide_tokens_bytes():
    """In float32: norm 2 u, layers u + h and their matrix, twice as often backward, and what is between."""
    with kernels_chosen(chosen := []):
        fused_ops.mlp_block(**(arguments := arguments_of("products_batch")))
    u = 4 * arguments["x"].numel()
    h = u // 4
    matrix = 4 * arguments["fc1_weight"].numel()
    assert OPERATOR.least_bytes(chosen[0][1], "forward") == 8 * u + 4 * h + 2 * matrix
    assert OPERATOR.least_bytes(chosen[0][1], "backward") == 11 * u + 9 * h + 4 * matrix


# Of the module


def stock_block(norm, scaled):
    class Stock(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(12) if norm == "batch" else nn.LayerNorm(12, eps=1e-6)
            self.fc1, self.fc2 = nn.Linear(12, 24), nn.Linear(24, 12)
            self.gamma = nn.Parameter(torch.full((12,), 0.1)) if scaled else None

        def forward(self, x):
            z = self.norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if norm == "batch" else self.norm(x)
            z = self.fc2(F.gelu(self.fc1(z)))
            return x + (z if self.gamma is None else z * self.gamma)

    return Stock()


@pytest.mark.parametrize(("norm", "scaled"), [("batch", False), ("layer", True)])
def test_the_module_is_the_stock_composition(norm, scaled):
    """D1, D2: state_dict both ways, three training steps, running statistics, evaluation."""
    torch.manual_seed(0)
    stock = stock_block(norm, scaled).double()
    module = fused_ops.MLPBlock(12, 2, norm=norm, layer_scale=0.1 if scaled else None).double()
    module.load_state_dict(stock.state_dict())
    stock.load_state_dict(module.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (stock, module)]
    for step in range(3):
        x = torch.randn(2, 4, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        for m, optimizer in zip((stock, module), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().sum().backward()
            optimizer.step()
    for name, value in stock.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(module.eval()(x), stock.eval()(x), rtol=1e-10, atol=1e-12)


def test_another_norm_runs_the_stock_way():
    module = fused_ops.MLPBlock(12, 2, norm="batch")
    x = torch.randn(2, 4, 5, 12)
    module.norm = nn.GroupNorm(3, 12)
    want = x + module.fc2(F.gelu(module.fc1(module.norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))))
    torch.testing.assert_close(module(x), want)


def test_drop_path_of_the_module():
    module = fused_ops.MLPBlock(8, 2, drop_path=0.5)
    x = torch.randn(64, 3, 8)
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
    ],
)
def test_bad_arguments_of_the_module(options, message):
    with pytest.raises(ValueError, match=message):
        fused_ops.MLPBlock(**options)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_maps_through_the_parameters_of_convolutions(backend):
    if backend == "triton":
        require("triton", "cpu")
    norm, fc1, fc2 = nn.BatchNorm2d(8), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)
    x = torch.randn(2, 8, 3, 5).contiguous(memory_format=torch.channels_last)
    want = x + fc2(F.gelu(fc1(norm(x))))
    expected = norm.running_mean.clone()
    norm.reset_running_stats()
    with fused_ops.backend(backend):
        got = mlp_on_modules(x, norm, fc1, fc2, residual=x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_mean, expected)
    assert got.stride() == x.stride()
    assert norm.num_batches_tracked == 1


def test_a_block_with_other_layers_runs_them():
    """Layers that somebody put in place of the stock ones are called."""

    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    Adapted.__module__ = "somebody"
    mlp = nn.Module()
    mlp.fc1, mlp.fc2, mlp.act, mlp.drop = nn.Linear(8, 16), Adapted(16, 8), nn.GELU(), nn.Dropout(0.0)
    mlp.forward = lambda x: mlp.fc2(mlp.act(mlp.fc1(x)))
    x, norm = torch.randn(2, 3, 8), nn.LayerNorm(8)
    torch.testing.assert_close(residual_mlp(x, norm, mlp, DropPath()), x + mlp(norm(x)))


@pytest.mark.gpu
def test_cuda_graph():
    """G5: captured on a side stream, replayed with other inputs."""
    require("triton", "cuda")
    arguments = arguments_of("layer", device="cuda")
    static = arguments["x"].detach()
    arguments["x"] = arguments["residual"] = static
    stream = torch.cuda.Stream()
    with torch.no_grad(), fused_ops.backend("triton"):
        with torch.cuda.stream(stream):
            for _ in range(3):
                fused_ops.mlp_block(**arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = fused_ops.mlp_block(**arguments)
        for _ in range(2):
            static.copy_(torch.randn_like(static))
            graph.replay()
            want = run(OPERATOR, convert(arguments, torch.float64), "reference", gradients=False)["out"]
            torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-4)
