"""Sample inputs of the depthwise operator: shapes of real models, and awkward ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fused_ops.core.cases import Case, make_map


def _case(
    name: str,
    shape: tuple[int, int, int, int],
    *tags: str,
    kernel: int | tuple[int, int] = 3,
    bias: bool = False,
    norm: str = "none",
    training: bool = False,
    affine: bool = True,
    mean: float = 0.3,
    residual: str = "none",
    identity: bool = False,
    model: str = "",
    calls: int = 1,
    layout: str = "channels_last",
    **options: Any,
) -> Case:
    """A case with random filters and, for ``norm`` pre or post, random affine parameters and statistics."""
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    channels = shape[1]

    def make(
        generator: torch.Generator, dtype: torch.dtype, device: torch.device, layout: str
    ) -> dict[str, Any]:
        from fused_ops.core.batch_norm import BatchNormState

        def vector(centre: float, spread: float, requires_grad: bool = True) -> torch.Tensor:
            values = centre + spread * torch.randn(channels, generator=generator, dtype=torch.float64)
            return values.to(device=device, dtype=parameter_dtype).requires_grad_(requires_grad)

        # Parameters stay in float32 under half-precision activations, as in mixed-precision training.
        parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        x = make_map(shape, generator, dtype, device, layout, mean=mean)
        scale = (kernel[0] * kernel[1]) ** -0.5
        weight = scale * torch.randn((channels, 1, *kernel), generator=generator, dtype=torch.float64)
        weight = weight.to(device=device, dtype=parameter_dtype).requires_grad_()
        arguments: dict[str, Any] = {"x": x, "weight": weight, **options}
        arguments.setdefault("padding", "same")
        if bias:
            arguments["bias"] = vector(0.0, 0.5)
        if norm != "none":
            arguments["norm"] = BatchNormState(
                vector(1.0, 0.2) if affine else None,
                vector(0.0, 0.2) if affine else None,
                vector(mean, 0.1, False),
                vector(1.0, 0.1, False).abs_(),
                training,
                0.1,
                1e-5,
            )
            arguments["norm_placement"] = norm
        if identity:
            arguments["residual"] = x
        elif residual != "none":
            with torch.no_grad():
                plain = {key: arguments[key] for key in ("stride", "padding", "dilation") if key in arguments}
                out_shape = _output_shape(shape, kernel, **plain)
            arguments["residual"] = make_map(out_shape, generator, dtype, device, layout)
        if residual != "none":
            arguments["residual_placement"] = residual
        return arguments

    tags = (*tags, "training") if training else tags
    return Case(name, make, frozenset(tags), model, calls, layout)


def _output_shape(
    shape: tuple[int, int, int, int],
    kernel: tuple[int, int],
    stride: int = 1,
    padding: int | str = "same",
    dilation: int = 1,
) -> tuple[int, int, int, int]:
    sizes = []
    for size, width in zip(shape[2:], kernel, strict=True):
        pad = dilation * (width // 2) if padding == "same" else padding
        sizes.append((size + 2 * pad - dilation * (width - 1) - 1) // stride + 1)
    return (shape[0], shape[1], *sizes)


def cases() -> Sequence[Case]:
    """All cases. ``tiny`` ones have few enough programs for Triton's interpreter."""
    identity = {"residual": "after", "identity": True}
    identity_before = {"residual": "before", "identity": True}
    post, pre = {"norm": "post"}, {"norm": "pre"}
    post_train, pre_train = {**post, "training": True}, {**pre, "training": True}
    tiny = [
        _case(name, shape, "tiny", **options)
        for name, shape, options in (
            ("conv", (2, 8, 5, 6), {}),
            (
                "conv_bias_gelu_residual",
                (1, 12, 7, 4),
                {"bias": True, "activation": "gelu", "residual": "after"},
            ),
            ("identity", (2, 16, 6, 5), {"bias": True, **identity}),
            ("identity_before_relu", (1, 8, 4, 9), {"activation": "relu", **identity_before}),
            ("post_eval_relu6", (2, 8, 5, 5), {**post, "activation": "relu6"}),
            (
                "post_eval_residual_before",
                (1, 8, 5, 3),
                {**post, "activation": "relu", "residual": "before"},
            ),
            ("post_train_silu", (3, 8, 5, 6), {**post_train, "activation": "silu"}),
            ("post_train_none", (2, 20, 9, 5), {**post_train, "bias": True}),
            (
                "post_train_identity_before",
                (2, 8, 6, 5),
                {**post_train, "activation": "hardswish", **identity_before},
            ),
            (
                "post_train_residual_after",
                (2, 8, 4, 4),
                {**post_train, "activation": "gelu_tanh", "residual": "after"},
            ),
            ("pre_eval", (2, 16, 5, 7), {**pre, "bias": True, **identity}),
            ("pre_train", (2, 16, 8, 6), {**pre_train, "bias": True, **identity}),
            ("pre_train_relu", (2, 8, 5, 5), {**pre_train, "activation": "relu"}),
            ("no_affine", (2, 8, 5, 5), {**post_train, "affine": False}),
        )
    ]
    tiny += [
        _case(name, shape, "tiny", "awkward", **options)
        for name, shape, options in (
            ("one_channel", (2, 1, 5, 5), post_train),
            ("three_channels", (2, 3, 3, 17), {"bias": True, "activation": "gelu"}),
            ("one_pixel", (3, 8, 1, 1), post_train),
            ("one_column", (2, 8, 11, 1), pre_train),
            ("large_mean", (2, 8, 6, 6), {**post_train, "mean": 1e3}),
            ("large_mean_pre", (2, 8, 6, 6), {**pre_train, "mean": 1e3}),
        )
    ]
    general = [
        _case("stride2", (2, 8, 7, 8), stride=2, padding=1, norm="post", training=True, activation="relu"),
        _case("kernel5", (2, 8, 7, 6), kernel=5, norm="post", training=True, activation="silu"),
        _case("kernel7_bias", (1, 6, 9, 8), kernel=7, bias=True),
        _case("kernel3x5_dilation2", (1, 6, 9, 12), kernel=(3, 5), dilation=2),
        _case("no_padding", (2, 8, 6, 6), padding=0, bias=True, activation="relu"),
        _case("empty", (0, 8, 6, 6), "awkward", norm="post"),
    ]
    # Maps large enough for traffic to be the maps' own, few enough programs to count it in the interpreter.
    # The widest tile, with sizes divisible as a model's are, on maps small enough to make.
    counted = [
        _case(f"{tag}_{name}", shape, tag, **options)
        for tag, shape in (("traffic", (1, 16, 28, 28)), ("resources", (2, 64, 16, 16)))
        for name, options in {
            "conv": {},
            "identity": {"bias": True, **identity},
            "pre_train": {**pre_train, "bias": True, **identity},
            "post_train_silu": {**post_train, "activation": "silu"},
            "post_eval_relu6": {**post, "activation": "relu6"},
            "kernel5_train": {**post_train, "kernel": 5, "activation": "silu"},
            "kernel7": {"kernel": 7, "bias": True},
            "stride2_train": {**post_train, "stride": 2, "padding": 1, "activation": "silu"},
            "kernel5_stride2": {"kernel": 5, "stride": 2, "padding": 2},
        }.items()
    ]
    # In PyTorch's default layout, which kernels see from the arguments.
    counted += [
        _case(f"resources_nchw_{name}", (2, 64, 16, 16), "resources", layout="nchw", **options)
        for name, options in {
            "train": {**post_train, "activation": "silu"},
            "kernel7": {"kernel": 7, "bias": True},
            "stride2_pre": {**pre_train, "stride": 2, "padding": 1},
        }.items()
    ]
    # Stage sizes of DS-Net at 224 (positional convolution on d channels, local branch on d / 2).
    stages = ((64, 56, 3), (128, 28, 4), (320, 14, 8), (512, 7, 3))
    model = [
        _case(
            f"dsnet_{branch}_{channels // share}x{size}",
            (128, channels // share, size, size),
            "model",
            bias=True,
            model="dsnet_small",
            calls=depth,
            **identity,
            **options,
        )
        for branch, share, options in (("positional", 1, {}), ("local", 2, pre_train))
        for channels, size, depth in stages
    ]
    silu, relu, hardswish = ({**post_train, "activation": name} for name in ("silu", "relu", "hardswish"))
    plain, bias_only = {}, {"bias": True}
    # (channels, size, kernel, stride, calls, options), as timm's models call them at 224.
    published = {
        "efficientnet_b0": [
            (32, 112, 3, 1, 1, silu),
            (96, 112, 3, 2, 1, silu),
            (144, 56, 3, 1, 1, silu),
            (144, 56, 5, 2, 1, silu),
            (240, 28, 5, 1, 1, silu),
            (240, 28, 3, 2, 1, silu),
            (480, 14, 3, 1, 2, silu),
            (480, 14, 5, 1, 1, silu),
            (672, 14, 5, 1, 2, silu),
            (672, 14, 5, 2, 1, silu),
            (1152, 7, 5, 1, 3, silu),
            (1152, 7, 3, 1, 1, silu),
        ],
        "mobilenetv3_large_100": [
            (16, 112, 3, 1, 1, relu),
            (64, 112, 3, 2, 1, relu),
            (72, 56, 3, 1, 1, relu),
            (72, 56, 5, 2, 1, relu),
            (120, 28, 5, 1, 2, relu),
            (240, 28, 3, 2, 1, hardswish),
            (184, 14, 3, 1, 2, hardswish),
            (672, 14, 5, 2, 1, hardswish),
            (960, 7, 5, 1, 2, hardswish),
        ],
        "convnext_tiny": [
            (96, 56, 7, 1, 3, bias_only),
            (192, 28, 7, 1, 3, bias_only),
            (384, 14, 7, 1, 9, bias_only),
            (768, 7, 7, 1, 3, bias_only),
        ],
        "pvt_v2_b2": [
            (channels, size, 3, 1, calls, {"bias": True, "activation": "gelu"})
            for channels, size, calls in ((512, 56, 3), (1024, 28, 4), (1280, 14, 6), (2048, 7, 3))
        ],
        "focalnet_tiny_srf": [
            (channels, size, kernel, 1, calls, {"activation": "gelu"})
            for channels, size, calls in ((96, 56, 2), (192, 28, 2), (384, 14, 6), (768, 7, 2))
            for kernel in (3, 5)
        ],
        # At 448: the stem, the two branches of the HR-blocks, the feed-forward layers, the down-sampling.
        "hiri_vit_small": [
            (32, 224, 3, 1, 1, {**post_train, "activation": "gelu"}),
            (32, 112, 3, 1, 2, bias_only),
            (32, 112, 3, 2, 2, post_train),
            (64, 56, 3, 1, 2, bias_only),
            (64, 56, 3, 2, 2, post_train),
            (512, 28, 3, 1, 2, {"bias": True, **identity}),
            (512, 28, 3, 2, 1, plain),
            (1280, 14, 3, 1, 4, {"bias": True, **identity}),
        ],
    }
    # Half the batch at 448, as such models are trained.
    model += [
        _case(
            f"{name.split('_')[0]}_k{kernel}s{stride}_{channels}x{size}",
            (64 if name.startswith("hiri") else 128, channels, size, size),
            "model",
            kernel=kernel,
            model=name,
            calls=calls,
            **({"stride": stride, "padding": kernel // 2} if stride > 1 else {}),
            **options,
        )
        for name, shapes in published.items()
        for channels, size, kernel, stride, calls, options in shapes
    ]
    # Detection at 800 x 1344 (first stage, one fourth of that), and maps in PyTorch's default layout.
    model += [
        _case("detection_local_32x200x336", (2, 32, 200, 336), "model", bias=True, **pre_train, **identity),
        _case("detection_k7_96x200x336", (2, 96, 200, 336), "model", kernel=7, bias=True),
        _case("nchw_k3s1_144x56", (128, 144, 56, 56), "model", layout="nchw", **silu),
        _case("nchw_k3s2_96x112", (128, 96, 112, 112), "model", layout="nchw", stride=2, padding=1, **silu),
        _case("nchw_k5s1_672x14", (128, 672, 14, 14), "model", layout="nchw", kernel=5, **silu),
        _case("nchw_k7s1_192x28", (128, 192, 28, 28), "model", layout="nchw", kernel=7, bias=True),
    ]
    return (*tiny, *general, *counted, *model)
