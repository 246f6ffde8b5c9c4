"""Forward and backward of the depthwise CUDA kernels in training, in the emulator, against the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.contract import assert_three_way, convert, named_tensors, run

import fused_ops
from fused_ops.core import library, native
from fused_ops.core.batch_norm import BatchNormState
from fused_ops.depthwise import cuda

OPERATOR = library.operators()["depthwise"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMOOTH = ("silu", "none", "gelu", "gelu_tanh")
ACTIVATIONS = ("relu", "silu", "relu6", "gelu", "hardswish", "none", "gelu_tanh")


def make(shape, *, kernel, stride, padding, norm="none", training=False, residual="none", identity=False,
         activation="none", dtype=torch.float32, bias=True, spare=0, device="cpu",
         layout="channels_last"):  # fmt: skip
    """Arguments of ``depthwise_conv``; with ``spare``, maps are slices of wider ones."""
    batch, channels, height, width = shape

    def feature_map(h, w):
        if layout == "nchw":
            wide = torch.randn(batch, channels, h, w + spare).to(device=device, dtype=dtype)
            return wide[..., :w].requires_grad_()
        wide = torch.randn(batch, h, w, channels + spare).to(device=device, dtype=dtype)
        return wide.permute(0, 3, 1, 2)[:, :channels].requires_grad_()

    def vector(centre, spread):
        return (centre + spread * torch.randn(channels)).to(device)

    x = feature_map(height, width)
    arguments = {
        "x": x,
        "weight": (torch.randn(channels, 1, kernel, kernel) / kernel).to(device).requires_grad_(),
        "bias": vector(0.0, 0.5).requires_grad_() if bias else None,
        "stride": stride,
        "padding": padding,
        "activation": activation,
    }
    if norm != "none":
        arguments["norm"] = BatchNormState(
            vector(1.0, 0.2).requires_grad_(), vector(0.0, 0.2).requires_grad_(), vector(0.1, 0.1),
            vector(1.0, 0.1).abs(), training, 0.1, 1e-5,
        )  # fmt: skip
        arguments["norm_placement"] = norm
    if residual != "none":
        size = [(extent + 2 * padding - kernel) // stride + 1 for extent in (height, width)]
        arguments["residual"] = x if identity else feature_map(*size)
        arguments["residual_placement"] = residual
    return arguments


def check(arguments):
    """Output, statistics and every gradient by the three-way rule of the contract."""
    dtype = arguments["x"].dtype
    exact, eager = convert(arguments, torch.float64), convert(arguments)
    result = run(OPERATOR, arguments, "cuda")
    assert_three_way(result, run(OPERATOR, eager, "reference"), run(OPERATOR, exact, "reference"), dtype)
    return result


PLACEMENTS = (("none", False), ("pre", True), ("post", True), ("pre", False), ("post", False))
LAYOUTS = pytest.mark.parametrize("layout", ["channels_last", "nchw"])


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize(("norm", "training"), PLACEMENTS)
@LAYOUTS
def test_gradients(emulator, layout, norm, training, kernel, stride):
    """Every vector width by the channels or columns, odd and even maps, padding wider and narrower."""
    residuals = itertools.cycle(("none", "before", "after"))
    # Where a derivative jumps, rounding to half precision decides by chance which side of it a value is on.
    activations = {
        dtype: itertools.cycle(ACTIVATIONS if dtype == torch.float32 else SMOOTH) for dtype in DTYPES
    }
    variants = (
        ((2, 8, 9, 7), kernel // 2, DTYPES),
        ((1, 6, 8, 10), kernel // 2 + 2, (torch.float32,)),
        ((2, 3, 7, 8), 0, (torch.bfloat16,)),
    )
    if layout == "nchw":
        # Columns take the place of channels; padding of 2 leaves vectors at stride 2 aligned.
        variants += (((2, 3, 9, 12), kernel // 2, DTYPES), ((2, 2, 7, 12), 2, (torch.float16,)))
    for shape, padding, dtypes in variants:
        for dtype in dtypes:
            check(
                make(shape, kernel=kernel, stride=stride, padding=padding, norm=norm, training=training,
                     residual=next(residuals), activation=next(activations[dtype]), dtype=dtype,
                     layout=layout)
            )  # fmt: skip


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("residual", ["before", "after"])
@LAYOUTS
def test_identity(emulator, layout, kernel, residual):
    for (norm, training), activation in itertools.product(PLACEMENTS, ("none", "silu")):
        check(
            make((2, 4, 5, 6), kernel=kernel, stride=1, padding=kernel // 2, norm=norm, training=training,
                 residual=residual, identity=True, activation=activation, layout=layout)
        )  # fmt: skip


def test_one_pixel_of_stride_two_can_be_its_own_residual(emulator):
    check(make((3, 4, 1, 1), kernel=3, stride=2, padding=1, residual="after", identity=True))


@pytest.mark.parametrize("spare", [1, 2, 4])
@LAYOUTS
def test_slices(emulator, layout, spare):
    check(make((2, 8, 5, 8), kernel=3, stride=1, padding=1, norm="post", training=True,
               activation="silu", residual="before", spare=spare, dtype=torch.float16,
               layout=layout))  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", ["pre", "post"])
@LAYOUTS
def test_every_tile_gives_the_same_input_gradient(emulator, layout, norm, training):
    """Strips, vector widths and blocks only change the order of the sums over the map."""
    shape = (2, 8, 11, 9) if layout == "channels_last" else (9, 2, 11, 12)
    arguments = make(shape, kernel=3, stride=1, padding=1, norm=norm, training=training,
                     activation="relu", layout=layout)  # fmt: skip
    first = check(convert(arguments))
    for tile in ((1, 0, 1), (2, 0, 3), (4, 0, 40), (4, 4, 5)):
        for multiprocessors in (1, 500):
            emulator.set_multiprocessors(multiprocessors)
            got = run_with_tile(arguments, tile)
            for name, value in first.items():
                torch.testing.assert_close(got[name], value, rtol=2e-5, atol=2e-5, msg=f"{name} {tile}")
            if not training:
                assert torch.equal(got["grad x"], first["grad x"])


def run_with_tile(arguments, tile):
    backends = {backend.name: backend for backend in OPERATOR.backends}
    originals = dict(vars(backends["cuda"]))
    forced = {
        name: lambda *a, function=originals[name]: function(*a, tile=tile) for name in ("forward", "backward")
    }
    for name, function in forced.items():
        object.__setattr__(backends["cuda"], name, function)
    try:
        return run(OPERATOR, convert(arguments), "cuda")
    finally:
        for name in forced:
            object.__setattr__(backends["cuda"], name, originals[name])


def launched(emulator, arguments, wanted):
    """Kernels of the backward pass where only the tensors ``wanted`` ask for a gradient."""
    for tensor in named_tensors(arguments).values():
        tensor.requires_grad_(any(tensor is entry for entry in wanted))
    with fused_ops.backend("cuda"):
        out = OPERATOR.function(**arguments)
    emulator.reset_traffic()
    torch.autograd.grad(out, wanted, torch.randn_like(out))
    return [launch[0] for launch in emulator.launches()]


@LAYOUTS
def test_launches(emulator, layout):
    """One pass over the map where that is enough, and nothing for gradients that nobody asks for."""

    def make_map(**options):
        return make((1, 8, 6, 6), layout=layout, **options)

    post = make_map(kernel=3, stride=1, padding=1, norm="post", training=True, activation="relu")
    passes = ["norm_sums", "merge_sums", "depthwise_backward", "merge_sums"]
    assert launched(emulator, post, [post["x"], post["weight"]]) == passes
    assert launched(emulator, post, [post["x"]]) == passes[:3]
    assert launched(emulator, post, [post["norm"].weight]) == passes[:2]
    pre = make_map(kernel=3, stride=1, padding=1, norm="pre", training=True)
    assert launched(emulator, pre, [pre["x"], pre["weight"]]) == [
        "depthwise_backward",
        "merge_sums",
        "finish",
    ]
    assert launched(emulator, pre, [pre["weight"]]) == ["depthwise_backward", "merge_sums"]
    plain = make_map(kernel=5, stride=2, padding=2)
    assert launched(emulator, plain, [plain["x"]]) == ["depthwise_backward"]
    running = make_map(kernel=3, stride=1, padding=1, norm="post")
    assert launched(emulator, running, [running["x"], running["norm"].bias]) == passes[2:]


def test_gradients_of_an_empty_batch_are_zero(emulator):
    arguments = make((0, 4, 5, 5), kernel=3, stride=1, padding=1, norm="post")
    result = run(OPERATOR, arguments, "cuda")
    assert result["out"].shape == (0, 4, 5, 5)
    for name in ("weight", "bias", "norm.weight", "norm.bias"):
        assert result[f"grad {name}"].abs().max() == 0


@LAYOUTS
def test_large_mean(emulator, layout):
    """The statistics' digits survive a mean of 1000 deviations, over several blocks."""
    x = (1000 + torch.randn(2, 20, 9, 12)).permute(0, 3, 1, 2)
    x = x.contiguous() if layout == "nchw" else x
    weight = torch.zeros(12, 1, 3, 3)
    weight[:, :, 1, 1] = 1.0
    emulator.set_multiprocessors(100)
    for placement in ("pre", "post"):
        norm = BatchNormState(None, None, torch.zeros(12), torch.zeros(12), True, 1.0, 1e-5)
        with fused_ops.backend("cuda"):
            fused_ops.depthwise_conv(x, weight, padding=1, norm=norm, norm_placement=placement)
        torch.testing.assert_close(
            norm.running_var.double(), x.double().var((0, 2, 3)), rtol=1e-5, atol=0
        )  # fmt: skip
        torch.testing.assert_close(norm.running_mean.double(), x.double().mean((0, 2, 3)), rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", ["post_train", "pre_train", "conv"])
@LAYOUTS
def test_traffic(emulator, layout, name):
    """Distinct bytes close to the least; halos, which L2 serves, within a third of it."""
    norm, _, training = name.partition("_")
    options = {"norm": norm, "training": bool(training), "activation": "silu"} if training else {}
    # So many positions to a block as on a map with the batch of a real model, so few parts to merge.
    emulator.set_multiprocessors(1)
    for kernel, stride in ((3, 1), (5, 1), (7, 1), (3, 2)):
        arguments = make((4, 32 if layout == "channels_last" else 8, 28, 28), kernel=kernel, stride=stride,
                         padding=kernel // 2, bias=False, dtype=torch.bfloat16, layout=layout,
                         **options)  # fmt: skip
        for row in totals(arguments):
            least = row["least_bytes"]
            assert least <= row["counted_bytes"] <= 1.10 * least, (kernel, stride, row)
            assert row["block_bytes"] <= 1.35 * least, (kernel, stride, row)


def totals(arguments):
    from fused_ops.bench.traffic import operator_traffic

    rows = operator_traffic(OPERATOR, "cuda", "case", lambda: arguments)
    return [row for row in rows if row["kernel"] == "total"]


@LAYOUTS
def test_stages_apart_equal_one_call(emulator, layout, monkeypatch):
    """A process group of one: the exchange between the stages changes nothing."""
    from fused_ops.core import distributed

    for name in ("exchange_moments", "exchange_sums"):
        monkeypatch.setattr(distributed, name, lambda *arguments: None)
    for norm in ("pre", "post"):
        arguments = make((2, 4, 6, 5), kernel=3, stride=1, padding=1, norm=norm, training=True,
                         activation="silu", layout=layout)  # fmt: skip
        together = run(OPERATOR, convert(arguments), "cuda")
        arguments["norm"] = arguments["norm"]._replace(group="somebody")
        apart = run(OPERATOR, arguments, "cuda")
        for key, value in together.items():
            assert torch.equal(apart[key], value), key


@pytest.mark.parametrize("grad", ["channels_last", "expanded", "every_second_column"])
def test_gradients_of_another_layout_reach_planes(emulator, grad):
    """C4: copied where its columns are not neighbours."""
    shape = (2, 3, 6, 8)
    grad = {
        "channels_last": torch.randn(shape).contiguous(memory_format=torch.channels_last),
        "expanded": torch.ones(()).expand(shape),
        "every_second_column": torch.randn(2, 3, 6, 16)[..., ::2],
    }[grad]
    arguments = make(shape, kernel=3, stride=1, padding=1, norm="post", training=True, activation="silu",
                     residual="before", layout="nchw")  # fmt: skip
    exact = run(OPERATOR, convert(arguments, torch.float64), "reference", grad=grad.double())
    for name, value in run(OPERATOR, arguments, "cuda", grad=grad).items():
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-4, atol=1e-5, msg=name)


def test_planes_larger_than_a_block_and_many_small_ones(emulator):
    """Tiles of rows and of columns meet without a seam, and rounds of segments without a gap."""
    for shape, kernel, stride, padding in (
        ((1, 2, 40, 200), 7, 1, 3),
        ((1, 2, 31, 393), 5, 2, 4),
        ((1, 2, 150, 30), 3, 1, 2),
        ((200, 2, 3, 3), 7, 1, 3),
        ((70, 2, 7, 6), 3, 2, 1),
    ):
        # One multiprocessor: as many segments to a block as fit.
        emulator.set_multiprocessors(1)
        for norm in ("pre", "post"):
            check(make(shape, kernel=kernel, stride=stride, padding=padding, norm=norm, training=True,
                       activation="silu", residual="before", layout="nchw"))  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("norm", "training"), PLACEMENTS)
@LAYOUTS
def test_on_the_gpu(layout, norm, training, dtype):
    ok, reason = native.status()
    if not ok:
        pytest.skip(reason)
    for kernel, stride, shape in itertools.product(
        (3, 5, 7), (1, 2), ((2, 64, 56, 56), (3, 20, 13, 6), (1, 257, 14, 14))
    ):
        arguments = make(shape, kernel=kernel, stride=stride, padding=kernel // 2, norm=norm,
                         training=training, activation="silu", residual="before", dtype=dtype,
                         device="cuda", layout=layout)  # fmt: skip
        assert cuda.KERNEL_SIZES.count(kernel) == 1
        check(arguments)
