"""Contract C1 to C11 over every registered operator, backend, dtype, layout and case."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.contract import (
    DEVICES,
    RecordCalls,
    assert_three_way,
    case_named,
    convert,
    cotangent,
    kernel_backends,
    make,
    named_tensors,
    operator_cases,
    require,
    run,
)
from torch import Tensor

import fused_ops
from fused_ops.core import library

OPERATORS = library.operators()
KERNELS = [
    pytest.param(OPERATORS["depthwise"], backend, id=f"depthwise-{backend}")
    for backend in kernel_backends(OPERATORS["depthwise"])
]
LOW_PRECISION = (torch.float32, torch.float16, torch.bfloat16)
# Every dtype on the working layout, and every layout in one dtype.
VARIANTS = [(dtype, "channels_last") for dtype in LOW_PRECISION] + [(torch.float32, "slice")]
# The CUDA kernels on NCHW maps are others; Triton's read any strides.
CUDA_VARIANTS = [*VARIANTS, (torch.float32, "nchw"), (torch.bfloat16, "nchw")]


def in_turn(operator, case):
    """The half precision that other cases of the operator stand for: Triton's interpreter is slow."""
    tiny = [other.name for other in operator.cases() if "tiny" in other.tags]
    return (torch.bfloat16, torch.float16)[tiny.index(case.name) % 2] if len(tiny) > 1 else None


def forced(operator, backend, arguments, *, gradients=True):
    """Results on ``backend`` with the widest set of gradients that it has, or its reason for declining."""
    try:
        return run(operator, arguments, backend, gradients=gradients), ""
    except fused_ops.BackendUnavailableError as error:
        return None, str(error)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("operator", "case", "backend", "dtype", "layout"),
    [
        pytest.param(
            *(*case.values, backend, dtype, layout),
            id=f"{backend}-{case.id}-{str(dtype).removeprefix('torch.')}-{layout}",
            marks=pytest.mark.extended if backend == "triton" and in_turn(*case.values) is dtype else (),
        )
        for case in operator_cases("tiny")
        for backend in kernel_backends(case.values[0])
        for dtype, layout in (CUDA_VARIANTS if backend == "cuda" else VARIANTS)
    ],
)
def test_three_way(operator, case, backend, dtype, layout, device, request):
    """C1, C4: output, gradients and running statistics against float64 and eager at the same precision."""
    require(backend, device, request)
    arguments = make(case, dtype, layout, device)
    exact_arguments = convert(arguments, torch.float64)
    eager_arguments = convert(arguments)
    dense = named_tensors(convert(arguments))
    has_backward = next(b for b in operator.backends if b.name == backend).backward is not None
    result, reason = forced(operator, backend, arguments, gradients=has_backward)
    if result is None:
        # A tiny case that a backend declines must be declined for a stated reason, and by that backend only.
        assert backend == "cuda", reason
        assert reason.startswith(f"{operator.name}: backend 'cuda' was requested and cannot run: ")
        pytest.skip(reason)
    exact = run(operator, exact_arguments, "reference", gradients=has_backward)
    eager = run(operator, eager_arguments, "reference", gradients=has_backward)
    assert_three_way(result, eager, exact, dtype)
    names = [name for name in result if name.split(" ")[0] == "out"]
    assert all(result[name].dtype == dtype for name in names)
    for name, value in result.items():
        if name.startswith("grad "):
            source = named_tensors(arguments)[name.removeprefix("grad ")]
            assert value.dtype == source.dtype, name
            # Of tokens, stock PyTorch gives gradients in whatever layout its products leave.
            layouts = (layout_of(eager[name]), layout_of(dense[name.removeprefix("grad ")]))
            assert layout_of(value) in layouts, f"{name}: layout differs from stock"
    for name in names:
        assert layout_of(result[name]) == layout_of(eager[name]), name


def layout_of(tensor: Tensor) -> list[int]:
    """Strides of the dimensions whose stride means anything."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


@pytest.mark.parametrize(("operator", "case"), operator_cases(without=("model", "traffic", "resources")))
def test_float64_runs_on_the_reference(operator, case):
    """Every case, also those no kernel covers: `auto` gives the reference's result on the CPU."""
    arguments = make(case, torch.float64)
    automatic = run(operator, convert(arguments, torch.float64), "auto")
    reference = run(operator, convert(arguments, torch.float64), "reference")
    for name, value in reference.items():
        torch.testing.assert_close(automatic[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    "name",
    ["conv_bias_gelu_residual", "post_train_silu", "pre_train", "stride2", "kernel5", "post_eval_relu6"],
)
def test_reference_gradcheck(name):
    """The reference's gradients against finite differences in float64."""
    operator, case = OPERATORS["depthwise"], case_named(name)
    arguments = make(case, torch.float64)
    arguments["x"] = arguments["x"][:1, :2, :4, :4].detach().requires_grad_()
    arguments["weight"] = arguments["weight"][:2].detach().requires_grad_()
    for key in ("bias", "residual"):
        if arguments.get(key) is not None:
            value = arguments[key]
            cut = value[:2] if key == "bias" else value[:1, :2, :4, :4]
            arguments[key] = cut.detach().requires_grad_()
    if name == "pre_train":
        arguments["residual"] = arguments["x"]
    if "norm" in arguments:
        norm = arguments["norm"]
        arguments["norm"] = norm._replace(
            weight=norm.weight[:2].detach().requires_grad_(),
            bias=norm.bias[:2].detach().requires_grad_(),
            running_mean=norm.running_mean[:2],
            running_var=norm.running_var[:2],
        )
    leaves = [tensor for tensor in named_tensors(arguments).values() if tensor.requires_grad]
    assert torch.autograd.gradcheck(lambda *_: operator.function(**arguments), leaves, nondet_tol=0.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("operator", "backend"), KERNELS)
class TestKernels:
    """Properties of the depthwise kernels beyond agreement on the cases."""

    @pytest.fixture(autouse=True)
    def _required(self, backend, device, request):
        require(backend, device, request)

    def arguments(self, operator, backend, device, name="post_train_silu", dtype=torch.float32):
        if next(b for b in operator.backends if b.name == backend).backward is None:
            pytest.skip(f"the {backend} backend has no backward")
        return make(case_named(name), dtype, device=device)

    def test_expanded_gradient(self, operator, backend, device):
        """C4: the gradient of `.sum()` has stride 0 everywhere."""
        arguments = self.arguments(operator, backend, device)
        exact = convert(arguments, torch.float64)
        shape = (3, 8, 5, 6)
        ones = torch.ones((), device=device)
        got = run(operator, arguments, backend, grad=ones.expand(shape))
        want = run(operator, exact, "reference", grad=ones.double().expand(shape))
        for name, value in want.items():
            torch.testing.assert_close(got[name].double(), value, rtol=2e-5, atol=2e-5)

    @pytest.mark.parametrize(
        ("view", "declined_by"),
        [
            (lambda x: x[:, :, 1:, 1:], ()),
            (lambda x: x[:, 4:12], ()),
            (lambda x: x.flip(0)[1:], ()),
            (lambda x: x[:, ::2], ("cuda",)),
            (lambda x: x[:1].expand(3, -1, -1, -1), ("cuda",)),
            (lambda x: x.transpose(2, 3), ("cuda",)),
            (lambda x: x[:, :, ::2, ::2], ("cuda",)),
        ],
        ids=[
            "inner_window",
            "channels",
            "batch_slice",
            "second_channels",
            "expanded",
            "transposed",
            "second_pixels",
        ],
    )
    def test_views(self, operator, backend, device, view, declined_by):
        """C4: strides are honoured, copied, or declined where stock PyTorch would change the layout."""
        base = torch.randn(3, 16, 7, 8, device=device).contiguous(memory_format=torch.channels_last)
        x = view(base)
        weight = torch.randn(x.shape[1], 1, 3, 3, device=device)
        with fused_ops.backend(backend), torch.no_grad():
            if backend in declined_by:
                with pytest.raises(fused_ops.BackendUnavailableError, match="kernels need neighbouring"):
                    operator.function(x, weight, padding=1)
                return
            out = operator.function(x, weight, padding=1)
        want = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1, groups=x.shape[1])
        torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)

    def test_subsets_of_requires_grad(self, operator, backend, device):
        """C10: any subset of gradients equals the full set's, and nothing else is computed."""
        full = run(operator, self.arguments(operator, backend, device), backend)
        names = ("x", "weight", "norm.weight", "norm.bias")
        for count in (1, 2):
            for subset in itertools.combinations(names, count):
                arguments = self.arguments(operator, backend, device)
                for name, tensor in named_tensors(arguments).items():
                    tensor.requires_grad_(name in subset)
                with RecordCalls(operator.overloads[1:]) as recorded:
                    got = run(operator, arguments, backend)
                asked = {"x": 0, "weight": 1, "norm.weight": 3, "norm.bias": 4}
                needs = [list(call[-2]) for _, call in recorded.calls]
                assert needs == [[index in {asked[name] for name in subset} for index in range(6)]]
                for name in subset:
                    torch.testing.assert_close(got[f"grad {name}"], full[f"grad {name}"], rtol=0, atol=0)

    def test_second_derivative(self, operator, backend, device):
        """C9: a gradient penalty gets the reference's second derivatives."""

        def penalty(arguments, name):
            leaves = [tensor for tensor in named_tensors(arguments).values() if tensor.requires_grad]
            with fused_ops.backend(name):
                out = operator.function(**arguments)
            (grad,) = torch.autograd.grad(out, arguments["x"], cotangent(out), create_graph=True)
            return torch.autograd.grad(grad.square().sum(), leaves, allow_unused=True)

        arguments = self.arguments(operator, backend, device)
        want = penalty(convert(arguments, torch.float64), "reference")
        for got, value in zip(penalty(arguments, backend), want, strict=True):
            if value is None:
                assert got is None or got.abs().max() == 0
                continue
            scale = value.abs().max().item()
            torch.testing.assert_close(got.double(), value, rtol=1e-4, atol=1e-5 * scale + 1e-6)

    def test_poisoned_memory_and_determinism(self, operator, backend, device):
        """C7, C8: two runs are equal to the bit, with every fresh allocation filled with NaN."""
        torch.use_deterministic_algorithms(True)
        try:
            first = run(operator, self.arguments(operator, backend, device, "pre_train"), backend)
            second = run(operator, self.arguments(operator, backend, device, "pre_train"), backend)
        finally:
            torch.use_deterministic_algorithms(False)
        for name, value in first.items():
            assert torch.isfinite(value).all(), name
            torch.testing.assert_close(second[name], value, rtol=0, atol=0)

    def test_canaries(self, operator, backend, device, monkeypatch):
        """Nothing is written beside an output: bands of known values around each stay as they were."""
        buffers = []
        band = 64

        def guarded(shape, like, *, dtype=None):
            plain = torch.empty(
                tuple(shape),
                dtype=dtype or like.dtype,
                device=like.device,
                memory_format=library.memory_format(like),
            )
            buffer = torch.full((plain.numel() + 2 * band,), 77.0, dtype=plain.dtype, device=plain.device)
            buffers.append(buffer)
            return buffer.as_strided(plain.shape, plain.stride(), band)

        monkeypatch.setattr(library, "empty", guarded)
        run(operator, self.arguments(operator, backend, device, "three_channels"), backend)
        assert len(buffers) >= 2
        for buffer in buffers:
            assert (buffer[:band] == 77).all()
            assert (buffer[-band:] == 77).all()
            assert not (buffer[band:-band] == 77).all()

    def test_large_offsets(self, operator, backend, device):
        """C5: an image more than 2**31 elements into its buffer is read at the right place."""
        image_stride = 2**30
        # On the CPU the pages in between are never touched, so they cost no memory.
        buffer = torch.empty(2 * image_stride + 400, dtype=torch.float16, device=device)
        x = buffer.as_strided((3, 8, 6, 5), (image_stride, 1, 40, 8))
        x.copy_(torch.randn(3, 8, 6, 5))
        weight = torch.randn(8, 1, 3, 3, device=device)
        with fused_ops.backend(backend), torch.no_grad():
            out = operator.function(x, weight, padding=1)
        want = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1, groups=8)
        torch.testing.assert_close(out.double(), want, rtol=2e-3, atol=2e-3)

    @pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
    @pytest.mark.parametrize("name", ["post_eval_relu6", "post_train_silu", "conv"])
    def test_infinities_and_nan(self, operator, backend, device, name, value):
        """Non-finite inputs reach exactly the outputs that they reach in stock PyTorch."""
        arguments = make(case_named(name), torch.float32, device=device)
        with torch.no_grad():
            arguments["x"][0, 1, 2, 2] = value
        eager = convert(arguments, torch.float32)
        got, reason = forced(operator, backend, arguments, gradients=False)
        if got is None:
            pytest.skip(reason)
        want = run(operator, eager, "reference", gradients=False)
        torch.testing.assert_close(got["out"], want["out"], rtol=1e-5, atol=1e-5, equal_nan=True)

    def test_statistics_under_a_large_mean(self, operator, backend, device):
        """C2: mean 1000, deviation 1. A sum of squares in float32 would lose every digit of the variance."""
        arguments = self.arguments(operator, backend, device, "large_mean")
        exact = convert(arguments, torch.float64)
        got, want = run(operator, arguments, backend), run(operator, exact, "reference")
        torch.testing.assert_close(
            got["norm.running_var"].double(), want["norm.running_var"], rtol=1e-4, atol=0
        )

    def test_constant_channel(self, operator, backend, device):
        """C2: variance 0 gives the norm's bias, not NaN."""
        arguments = self.arguments(operator, backend, device, "pre_train_relu")
        with torch.no_grad():
            arguments["x"].fill_(5.0)
            arguments["activation"] = "none"
            arguments["weight"].zero_()[:, :, 1, 1] = 1.0
        got = run(operator, arguments, backend)
        bias = arguments["norm"].bias.detach()
        torch.testing.assert_close(got["out"], bias[None, :, None, None].expand(got["out"].shape))

    @pytest.mark.slow
    def test_weight_gradient_accumulates_in_float32(self, operator, backend, device):
        """C3: 4,608 bfloat16 products per filter tap, summed to float32 accuracy."""
        if next(b for b in operator.backends if b.name == backend).backward is None:
            pytest.skip(f"the {backend} backend has no backward")
        x = torch.rand(2, 4, 48, 48, device=device).bfloat16().contiguous(memory_format=torch.channels_last)
        weight = torch.randn(4, 1, 3, 3, device=device, requires_grad=True)
        with fused_ops.backend(backend):
            out = operator.function(x, weight, padding=1)
        (grad,) = torch.autograd.grad(out, weight, torch.ones_like(out))
        exact = weight.detach().double().requires_grad_()
        want_out = torch.nn.functional.conv2d(x.double(), exact, padding=1, groups=4)
        (want,) = torch.autograd.grad(want_out, exact, torch.ones_like(want_out))
        torch.testing.assert_close(grad.double(), want, rtol=1e-6, atol=0)

    @pytest.mark.gpu
    def test_thousand_repeats(self, operator, backend, device):
        """C8: races would show as differing bits."""
        if device != "cuda":
            pytest.skip("for the GPU")
        first = run(operator, self.arguments(operator, backend, device), backend)
        for _ in range(1000):
            again = run(operator, self.arguments(operator, backend, device), backend)
            assert all(torch.equal(again[name], value) for name, value in first.items())


def test_one_value_per_channel_raises_as_torch_does():
    """C2."""
    x, weight = torch.randn(1, 4, 1, 1), torch.randn(4, 1, 3, 3)
    norm = fused_ops.BatchNormState.from_module(torch.nn.BatchNorm2d(4))
    for backend in ("reference", "triton"):
        with (
            fused_ops.backend(backend),
            pytest.raises(ValueError, match="Expected more than 1 value per channel"),
        ):
            fused_ops.depthwise_conv(x, weight, padding=1, norm=norm)


@pytest.mark.parametrize("training", [False, True])
def test_empty_batch(training):
    """C6: as stock: same shape, zero gradients, running statistics as stock leaves them."""
    x = torch.randn(0, 4, 5, 5, requires_grad=True)
    weight = torch.randn(4, 1, 3, 3, requires_grad=True)
    ours, stock = torch.nn.BatchNorm2d(4).train(training), torch.nn.BatchNorm2d(4).train(training)
    out = fused_ops.depthwise_conv(x, weight, padding=1, norm=fused_ops.BatchNormState.from_module(ours))
    want = stock(torch.nn.functional.conv2d(x, weight, padding=1, groups=4))
    assert out.shape == want.shape == (0, 4, 5, 5)
    gradients = torch.autograd.grad(out.sum(), (x, weight))
    assert gradients[1].abs().max() == 0
    torch.testing.assert_close(ours.running_mean, stock.running_mean, equal_nan=True)
    torch.testing.assert_close(ours.running_var, stock.running_var, equal_nan=True)


BAD_ARGUMENTS = [
    ({"x": torch.randn(4, 5, 5)}, ValueError, r"x has 3 dimensions; it must be \(B, C, H, W\)"),
    ({"x": torch.zeros(1, 4, 5, 5, dtype=torch.int32)}, TypeError, "x has dtype torch.int32"),
    ({"weight": torch.randn(8, 1, 3, 3)}, ValueError, r"weight has shape \(8, 1, 3, 3\)"),
    ({"weight": torch.randn(4, 4, 3, 3)}, ValueError, "one filter per channel"),
    ({"weight": torch.randn(4, 1, 2, 3)}, ValueError, "2x3 kernel; sizes must be odd"),
    ({"weight": torch.randn(4, 1, 3, 3).half()}, TypeError, "weight has dtype torch.float16"),
    ({"weight": torch.randn(4, 1, 3, 3, device="meta")}, ValueError, "weight is on meta"),
    ({"bias": torch.randn(3)}, ValueError, r"bias has shape \(3,\); it must be \(4,\)"),
    ({"stride": 0}, ValueError, "stride=0 is not allowed"),
    ({"stride": (1, 2, 3)}, ValueError, "stride=.* is not allowed"),
    ({"padding": -1}, ValueError, "padding=-1 is not allowed"),
    ({"padding": "valid"}, ValueError, "padding='valid' is not allowed"),
    ({"padding": "same", "stride": 2}, ValueError, "padding='same' needs stride 1"),
    ({"dilation": 0}, ValueError, "dilation=0 is not allowed"),
    ({"dilation": 4, "padding": 0}, ValueError, "too small for a 3x3 kernel"),
    ({"activation": "swish"}, ValueError, "activation='swish' is unknown; use one of none, relu"),
    ({"norm_placement": "middle"}, ValueError, "norm_placement='middle'"),
    ({"residual": torch.randn(1, 4, 4, 4)}, ValueError, r"residual has shape \(1, 4, 4, 4\)"),
    ({"residual": torch.randn(1, 4, 5, 5).double()}, TypeError, "residual is torch.float64"),
    ({"residual_placement": "beside"}, ValueError, "residual_placement='beside'"),
    (
        {"norm": fused_ops.BatchNormState(torch.ones(3), None, None, None, True, 0.1, 1e-5)},
        ValueError,
        r"norm.weight has shape \(3,\)",
    ),
    (
        {"norm": fused_ops.BatchNormState(None, None, None, None, False, 0.1, 1e-5)},
        ValueError,
        "norm has no running statistics",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_named(change, error, message):
    """C11: an error that names the argument, the value and what is allowed, before anything runs."""
    arguments = {"x": torch.randn(1, 4, 5, 5), "weight": torch.randn(4, 1, 3, 3), "padding": 1, **change}
    with pytest.raises(error, match=message):
        fused_ops.depthwise_conv(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.randn(1, 4, 5, 5, dtype=torch.float64), "weight": torch.randn(4, 1, 3, 3).double()},
            "float64",
        ),
        (
            {"weight": torch.randn(4, 1, 17, 17), "padding": 8},
            "the kernel is 17x17; the Triton kernels are for up to 225 taps",
        ),
        ({"x": torch.randn(0, 4, 5, 5)}, "x is empty"),
    ],
)
def test_declined_calls_say_why(change, message):
    """C11: a forced backend that cannot run raises with one exact sentence."""
    require("triton", "cpu")
    x = torch.randn(1, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    arguments = {"x": x, "weight": torch.randn(4, 1, 3, 3), "padding": 1, **change}
    with fused_ops.backend("triton"), pytest.raises(fused_ops.BackendUnavailableError, match=message):
        fused_ops.depthwise_conv(**arguments)
