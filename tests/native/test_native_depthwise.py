"""The depthwise CUDA kernels' forward pass, run by the emulator on CPU tensors, against float64 PyTorch."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from support.contract import ACTIVATIONS

from fused_ops.core import library, native
from fused_ops.depthwise import cuda
from fused_ops.depthwise.op import DepthwiseCall

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = pytest.mark.parametrize("layout", ["channels_last", "nchw"])


def channels_last(*shape, dtype=torch.float32, spare=0, device="cpu"):
    """A random channels_last map; with ``spare``, a channel slice of a wider one."""
    n, c, h, w = shape
    wide = torch.randn(n, h, w, c + spare).to(device=device, dtype=dtype)
    return wide.permute(0, 3, 1, 2)[:, :c]


def planes(*shape, dtype=torch.float32, spare=0, device="cpu"):
    """A random NCHW map; with ``spare``, a column slice of a wider one."""
    n, c, h, w = shape
    return torch.randn(n, c, h, w + spare).to(device=device, dtype=dtype)[..., :w]


MAPS = {"channels_last": channels_last, "nchw": planes}


def make_call(x, *, padding=(1, 1), norm="none", affine=True, bias=True, activation="none", **options):
    channels, dtype, device = x.shape[1], options.pop("parameters", torch.float32), x.device
    vector = lambda: torch.randn(channels).to(device=device, dtype=dtype)  # noqa: E731
    mode = options.pop("residual_mode", "none")
    identity = options.pop("identity", False)
    kernel, stride = options.pop("kernel", 3), options.pop("stride", 1)
    height, width = (
        (size + 2 * p - kernel) // stride + 1 for size, p in zip(x.shape[2:], padding, strict=True)
    )
    residual = None
    if mode != "none" and not identity:
        residual = (channels_last if library.is_channels_last(x) else planes)(
            x.shape[0], channels, height, width, dtype=x.dtype, spare=options.pop("spare", 0), device=device
        )
    has_norm = norm != "none"
    call = DepthwiseCall(
        x=x,
        weight=(torch.randn(channels, 1, kernel, kernel) / kernel).to(device=device, dtype=dtype),
        bias=vector() if bias else None,
        norm_weight=vector() if has_norm and affine else None,
        norm_bias=vector() if has_norm and affine else None,
        mean=vector() if has_norm else None,
        var=vector().square() + 0.5 if has_norm else None,
        residual=residual,
        stride=(stride, stride),
        padding=padding,
        dilation=(1, 1),
        norm=norm,
        batch_stats=False,
        eps=1e-5,
        activation=activation,
        residual_mode=mode,
        identity=identity,
    )
    for name, value in options.items():
        setattr(call, name, value)
    return call


def expected(call):
    """The definition in float64."""
    double = lambda tensor: None if tensor is None else tensor.double()  # noqa: E731
    x = double(call.x)
    norm = [double(tensor) for tensor in (call.mean, call.var, call.norm_weight, call.norm_bias)]
    z = F.batch_norm(x, *norm, False, 0.0, call.eps) if call.norm == "pre" else x
    y = F.conv2d(z, double(call.weight), double(call.bias), call.stride, call.padding, groups=x.shape[1])
    if call.norm == "post":
        y = F.batch_norm(y, *norm, False, 0.0, call.eps)
    residual = x if call.identity else double(call.residual)
    if call.residual_mode == "before":
        y = y + residual
    y = ACTIVATIONS[call.activation](y)
    return y + residual if call.residual_mode == "after" else y


def empty_output(call):
    return library.empty(call.output_shape, call.x).fill_(float("nan"))


def launch(call, out, tile=cuda.AUTOMATIC):
    """Forward without batch statistics; nobody asks for the other outputs."""
    with torch.no_grad():
        return cuda.forward(call, out, *[torch.empty(0)] * 4, tile=tile)[0]


def run(call, tile=cuda.AUTOMATIC):
    ok, reason = cuda.can_run(call)
    assert ok, reason
    return launch(call, empty_output(call), tile)


def check(call, out):
    # Rounding of the result, and float32 sums of terms of about 1; half precision rounds once.
    relative = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[call.x.dtype]
    reference = expected(call)
    error = (out.double() - reference).abs()
    allowed = relative * 1.05 * reference.abs() + 2e-5 + 1e-6 * reference.abs()
    assert out.shape == reference.shape
    assert (error <= allowed).all(), (
        f"largest error {error.max():.3g} ({(error / allowed).max():.3g} x allowed)"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 8, 9, 7), (1, 1, 1, 1), (1, 1, 5, 6), (3, 3, 4, 5), (1, 20, 13, 6), (2, 64, 7, 7), (1, 257, 3, 2)],
    ids=str,
)
@LAYOUTS
def test_shapes(emulator, layout, dtype, shape):
    call = make_call(MAPS[layout](*shape, dtype=dtype))
    check(call, run(call))


@pytest.mark.parametrize("norm", ["none", "pre", "post"])
@pytest.mark.parametrize("residual_mode", ["none", "before", "after", "identity before", "identity after"])
@LAYOUTS
def test_every_combination_of_options(emulator, layout, norm, residual_mode):
    identity = residual_mode.startswith("identity")
    mode = residual_mode.removeprefix("identity ")
    for activation, dtype in itertools.product(ACTIVATIONS, DTYPES):
        x = MAPS[layout](1, 16 if layout == "channels_last" else 2, 5, 6, dtype=dtype)
        call = make_call(x, norm=norm, activation=activation, residual_mode=mode, identity=identity)
        check(call, run(call))


@pytest.mark.parametrize("padding", [(0, 0), (1, 0), (2, 1), (3, 5)], ids=str)
@pytest.mark.parametrize("norm", ["pre", "post"])
@LAYOUTS
def test_padding_is_zero_after_the_norm(emulator, layout, padding, norm):
    call = make_call(MAPS[layout](2, 12, 5, 4), padding=padding, norm=norm, residual_mode="after")
    check(call, run(call))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spare", [1, 2, 4, 8])
@LAYOUTS
def test_slices(emulator, layout, dtype, spare):
    x = MAPS[layout](2, 16, 6, 8, dtype=dtype, spare=spare)
    call = make_call(x, norm="post", residual_mode="before", spare=spare)
    check(call, run(call))


@LAYOUTS
def test_crops_and_expanded_maps(emulator, layout):
    whole = MAPS[layout](2, 8, 9, 9)
    views = [whole[:, :, 1:7, 2:8], whole[:1].expand(3, -1, -1, -1), whole[:, :, ::2]]
    views.append(whole[:, :, ::2, ::3] if layout == "channels_last" else whole[:, ::3, :, 1:])
    for x in views:
        call = make_call(x)
        check(call, launch(call, MAPS[layout](*call.output_shape)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_parameters_in_the_type_of_the_map(emulator, dtype):
    for norm in ("pre", "post"):
        call = make_call(channels_last(1, 8, 5, 5, dtype=dtype), norm=norm, parameters=dtype)
        check(call, run(call))


def test_no_affine_and_no_bias(emulator):
    for norm in ("pre", "post"):
        call = make_call(channels_last(1, 8, 5, 5), norm=norm, affine=False, bias=False)
        check(call, run(call))


@LAYOUTS
def test_mean_far_above_the_deviation(emulator, layout):
    for norm in ("pre", "post"):
        x = MAPS[layout](1, 8, 6, 6)
        call = make_call(x + 1000, norm=norm, bias=False)
        if norm == "pre":
            call.mean = torch.full((8,), 1000.0)
        else:
            call.mean = 1000 * call.weight.sum((1, 2, 3))
        error = (run(call).double() - expected(call)).abs()
        if norm == "post":
            # Border positions lack taps; their sums are far from the mean.
            error = error[..., 1:-1, 1:-1]
        assert error.max() < 2e-3


@LAYOUTS
def test_infinities_and_nan_come_out_as_from_torch(emulator, layout):
    x = MAPS[layout](1, 4, 4, 4)
    x[0, 0, 1, 1], x[0, 1, 2, 2], x[0, 2, 0, 0] = float("nan"), float("inf"), float("-inf")
    for activation in ACTIVATIONS:
        call = make_call(x, activation=activation)
        call.weight = call.weight.abs()
        torch.testing.assert_close(
            run(call), expected(call).float(), equal_nan=True, rtol=1e-5, atol=1e-5, check_stride=False
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@LAYOUTS
def test_every_vector_width_and_strip_gives_the_same_bits(emulator, layout, dtype):
    shape = (2, 16, 11, 7) if layout == "channels_last" else (3, 2, 11, 16)
    call = make_call(MAPS[layout](*shape, dtype=dtype), norm="pre", residual_mode="before", identity=True)
    first = run(call)
    check(call, first)
    widths = (1, 2, 4) if dtype == torch.float32 else (1, 2, 4, 8)
    for width, rows in itertools.product(widths, (1, 2, 3, 4, 11, 40)):
        assert torch.equal(first, run(call, (width, 0, rows)))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5, 7])
@LAYOUTS
def test_kernel_sizes_and_strides(emulator, layout, kernel, stride):
    """Every vector width that is compiled, odd and even sizes, and padding other than kernel // 2."""
    shapes = ((2, 16, 9, 7), (1, 6, 8, 10), (1, 3, 7, 12))
    if layout == "nchw":
        shapes = ((2, 2, 9, 16), (1, 3, 8, 12), (2, 2, 7, 5))
    for (shape, pad), dtype in itertools.product(zip(shapes, (kernel // 2, 0, 4), strict=True), DTYPES):
        x = MAPS[layout](*shape, dtype=dtype)
        padding = (pad, kernel // 2)
        for norm, mode in (("pre", "none"), ("post", "before")):
            call = make_call(
                x, kernel=kernel, stride=stride, padding=padding, norm=norm, residual_mode=mode,
                activation="silu",
            )  # fmt: skip
            first = run(call)
            check(call, first)
            for width in (1, 2, 4):
                if layout == "nchw" or (shape[1] % width == 0 and not (kernel == 7 and width == 4)):
                    assert torch.equal(first, run(call, (width, 0, 3)))


@LAYOUTS
def test_repeats_are_bit_equal_on_concurrent_threads(emulator, layout):
    shape = (1, 20, 6, 5) if layout == "channels_last" else (2, 2, 6, 5)
    call = make_call(MAPS[layout](*shape), norm="post", residual_mode="after")
    first = run(call)
    emulator.set_mode("concurrent")
    for _ in range(10):
        assert torch.equal(first, run(call))


def test_empty_batch(emulator):
    call = make_call(channels_last(0, 8, 5, 5))
    assert cuda.can_run(call) == (True, "")
    out, *_ = cuda.forward(call, empty_output(call), *[torch.empty(0)] * 4)
    assert out.shape == (0, 8, 5, 5)
    assert emulator.traffic()["launches"] == 0


@LAYOUTS
def test_nothing_outside_the_maps_is_touched(emulator, layout):
    """Canaries around the output stay, and every address that is read belongs to an argument."""
    for shape, dtype in itertools.product([(1, 3, 5, 5), (2, 8, 4, 7), (1, 20, 3, 3)], DTYPES):
        n, c, h, w = shape
        spare = 8
        x = MAPS[layout](*shape, dtype=dtype, spare=spare)
        call = make_call(x, norm="pre", residual_mode="before")
        inner, last = ((h, w, c), c) if layout == "channels_last" else ((c, h, w), w)
        band = torch.full((n + 2, inner[0] + 2, inner[1] + 2, last + spare), 7.0, dtype=dtype)
        out = band[1:-1, 1:-1, 1:-1, :last]
        out = out.permute(0, 3, 1, 2) if layout == "channels_last" else out
        before = band.clone()
        launch(call, out)
        check(call, out)
        inside = torch.zeros_like(band, dtype=torch.bool)
        inside[1:-1, 1:-1, 1:-1, :last] = True
        assert torch.equal(band[~inside], before[~inside])

        def addresses(tensor):
            size = tensor.element_size()
            offsets = [torch.arange(s) * t for s, t in zip(tensor.shape, tensor.stride(), strict=True)]
            total = offsets[0]
            for offset in offsets[1:]:
                total = (total[:, None] + offset).flatten()
            return {
                tensor.data_ptr() + size * element + byte
                for element in total.tolist()
                for byte in range(size)
            }

        vectors = (call.weight, call.bias, call.norm_weight, call.norm_bias, call.mean, call.var)
        readable = set().union(*(addresses(tensor) for tensor in (x, call.residual, *vectors)))
        read, written = ({a for interval in part for a in range(*interval)} for part in emulator.touched())
        assert read == readable
        assert written == addresses(out)


@LAYOUTS
def test_traffic(emulator, layout):
    x = MAPS[layout](2, 32, 14, 14, dtype=torch.float16)
    call = make_call(x, bias=False, residual_mode="after", identity=True)
    run(call)
    traffic = emulator.traffic()
    least = 2 * x.numel() * 2 + call.weight.numel() * 4
    assert traffic["counted_bytes"] == least
    assert least <= traffic["block_bytes"] < 1.5 * least
    # The residual is asked for once more, which L1 has.
    assert traffic["block_bytes"] <= traffic["requested_bytes"] < 3 * least
    run(call)
    assert emulator.traffic()["counted_bytes"] == 2 * least
    emulator.reset_traffic()
    assert emulator.traffic()["counted_bytes"] == 0


@LAYOUTS
def test_a_vector_that_memory_does_not_allow_is_narrowed(emulator, layout):
    call = make_call(MAPS[layout](1, 8, 4, 4, spare=1))
    check(call, run(call, (4, 0, 0)))


def test_wrong_arguments_are_refused(emulator):
    call = make_call(channels_last(1, 4, 4, 4))
    with pytest.raises(ValueError, match="out has size 5 in dimension 2 and must have 4"):
        launch(call, torch.empty(1, 4, 5, 4))
    with pytest.raises(RuntimeError, match="no forward kernel was compiled for this vector and columns"):
        run(call, (4, 3, 0))
    call = make_call(channels_last(1, 4, 4, 4), norm="pre", mean=None)
    with pytest.raises(RuntimeError, match="no mean and variance"):
        launch(call, empty_output(call))
    call = make_call(channels_last(1, 4, 4, 4), residual_mode="after", residual=None)
    with pytest.raises(RuntimeError, match="a residual mode a residual"):
        launch(call, empty_output(call))


@pytest.mark.parametrize(
    "strides", [(2**31 + 8, 1, 32, 8), (2**31 + 8, 16, 4, 1)], ids=["channels_last", "nchw"]
)
def test_offsets_beyond_32_bits(emulator, strides):
    """Images more than 2**31 elements apart; only the touched pages of the storage take memory."""
    storage = torch.empty(2**31 + 4096, dtype=torch.float16)
    x = torch.as_strided(storage, (2, 8, 4, 4), strides)
    x.copy_(torch.randn(2, 8, 4, 4))
    call = make_call(x)
    check(call, run(call))


def test_codes_are_those_of_the_kernels(emulator):
    codes = emulator.codes()
    assert codes["activation"] == native.ACTIVATIONS
    assert codes["norm"] == cuda.NORMS
    assert codes["residual_mode"] == cuda.RESIDUAL_MODES
    names = {str(dtype).removeprefix("torch."): code for dtype, code in native.SCALAR_TYPES.items()}
    assert codes["type"] == names


REFUSALS = {
    "the kernel is 9x9; the CUDA kernels are for 3x3, 5x5 and 7x7": {"weight": torch.zeros(4, 1, 9, 9)},
    "the kernel is 3x5; the CUDA kernels are for 3x3, 5x5 and 7x7": {"weight": torch.zeros(4, 1, 3, 5)},
    "stride is (3, 3); the CUDA kernels are for strides 1 and 2": {"stride": (3, 3)},
    "stride is (1, 2); the CUDA kernels are for strides 1 and 2": {"stride": (1, 2)},
    "dilation is (2, 2); the CUDA kernels are for dilation 1": {"dilation": (2, 2)},
    "activation is mish; the CUDA kernels do not have it": {"activation": "mish"},
    "x is torch.float64; the CUDA kernels are for float32, float16 and bfloat16": {
        "x": torch.zeros(1, 4, 4, 4, dtype=torch.float64)
    },
    "bias is torch.float64; the CUDA kernels read float32, float16 and bfloat16": {
        "bias": torch.zeros(4, dtype=torch.float64)
    },
    "x has strides (64, 16, 1, 4); the CUDA kernels need neighbouring columns (NCHW)": {
        "x": torch.zeros(1, 4, 4, 4).transpose(2, 3)
    },
    "residual has strides (64, 16, 4, 1); the CUDA kernels need neighbouring channels (channels_last)": {
        "residual": torch.zeros(1, 4, 4, 4)
    },
    "the batch is empty and its statistics are needed; the CUDA kernels need elements": {
        "x": channels_last(0, 4, 4, 4),
        "batch_stats": True,
    },
}


@pytest.mark.parametrize(("reason", "change"), REFUSALS.items(), ids=lambda value: str(value)[:30])
def test_can_run_says_why_not(emulator, reason, change):
    call = make_call(channels_last(1, 4, 4, 4))
    assert cuda.can_run(call) == (True, "")
    for name, value in change.items():
        setattr(call, name, value)
    assert cuda.can_run(call) == (False, reason)


def test_without_an_emulator_a_cpu_tensor_is_refused():
    call = make_call(channels_last(1, 4, 4, 4))
    assert cuda.can_run(call) == (False, "x is on cpu; the CUDA backend needs a CUDA tensor")


@LAYOUTS
def test_can_run_on_fake_tensors(emulator, layout):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert cuda.can_run(make_call(MAPS[layout](1, 4, 4, 4), norm="post")) == (True, "")


@LAYOUTS
def test_the_operator_runs_it(emulator, layout):
    import fused_ops

    x = MAPS[layout](1, 8, 6, 6)
    weight = torch.randn(8, 1, 3, 3)
    with fused_ops.backend("cuda"), torch.no_grad():
        out = fused_ops.depthwise_conv(x, weight, padding=1, activation="silu", residual=x)
    assert emulator.traffic()["launches"] == 1
    torch.testing.assert_close(out, F.silu(F.conv2d(x, weight, padding=1, groups=8)) + x)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["none", "pre", "post"])
@pytest.mark.parametrize("shape", [(2, 64, 56, 56), (1, 3, 5, 7), (3, 20, 13, 6), (1, 257, 9, 9)], ids=str)
@LAYOUTS
def test_on_the_gpu(layout, dtype, norm, shape):
    ok, reason = native.status()
    if not ok:
        pytest.skip(reason)
    for activation, mode in itertools.product(ACTIVATIONS, ("none", "before", "identity after")):
        x = MAPS[layout](*shape, dtype=dtype, device="cuda", spare=8)
        identity = mode.startswith("identity")
        call = make_call(
            x,
            norm=norm,
            activation=activation,
            residual_mode=mode.removeprefix("identity "),
            identity=identity,
        )
        ok, reason = cuda.can_run(call)
        assert ok, reason
        out = empty_output(call)
        launch(call, out)
        check(call, out)
        first = out.clone()
        for _ in range(20):
            launch(call, out)
            assert torch.equal(out, first)
