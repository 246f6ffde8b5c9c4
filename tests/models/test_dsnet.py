"""DS-Net: published sizes, counted work, and the conventions of timm for every registered name."""

import copy

import pytest
import timm
import torch
from support.selection import only
from timm.models import group_parameters

from fused_ops.core.drop_path import DropPath
from fused_ops.models import count_macs, count_params, create_model, list_models, systems
from fused_ops.models.dsnet import DSNet, drop_path_rates

# Parameters and multiply-accumulates at 224 pixels; the starred ones counted from the public code.
COUNTED = {
    "dsnet_tiny": (9_148_200, 1.583e9),
    "dsnet_tiny_star": (10_534_312, 1.832e9),
    "dsnet_small": (19_710_920, 3.066e9),
    "dsnet_small_star": (23_004_552, 3.547e9),
    "dsnet_base": (41_998_920, 7.192e9),
    "dsnet_base_fit": (48_792_936, 7.663e9),
    "dsnet_base_star": (49_343_752, 8.293e9),
}
DEPTHS = {
    "tiny": (2, 2, 4, 1),
    "small": (3, 4, 8, 3),
    "base": (3, 4, 28, 3),
    "base_fit": (3, 4, 29, 5),
}
DIMS, STEPS, MAPS = (64, 128, 320, 512), (8, 4, 2, 2), (56, 28, 14, 7)
NAMES = list_models("dsnet")
# Base models differ from small ones in depth alone, which costs time and shows nothing new.
RUN = ["dsnet_tiny", "dsnet_tiny_star", "dsnet_test"]


def small(name, **kwargs):
    """A model with one block per stage, so that the whole contract runs on every name in little time."""
    depths = (1, 1, 1) if name == "dsnet_test" else (1, 1, 1, 1)
    torch.manual_seed(0)
    return create_model(name, depths=depths, **{"num_classes": 7, **kwargs})


def image(model_name, batch=2, channels=3, size=(64, 96)):
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(0))


def systems_info(name):
    """The row of the table of models."""
    return next(system.models[name] for system in systems() if name in system.models)


@pytest.mark.parametrize("name", only(RUN, NAMES))
def test_counts(name):
    model = create_model(name, device="meta")
    info = systems_info(name)
    params, macs = count_params(model), count_macs(model, info.input_size)
    assert (params, macs) == (info.params, info.macs), "the table of models must have what is counted"
    assert model.default_cfg["input_size"] == info.input_size
    if name in COUNTED:
        assert params == COUNTED[name][0]
        assert macs == pytest.approx(COUNTED[name][1], rel=0.005)


@pytest.mark.parametrize("name", COUNTED)
def test_counts_have_the_closed_form(name):
    star = name.endswith("star")
    depths = DEPTHS[name.removeprefix("dsnet_").removesuffix("_star")]
    params = 1_370_088
    macs = sum(3 * 16 * 64 * 56**2 if i == 0 else 4 * DIMS[i - 1] * DIMS[i] * MAPS[i] ** 2 for i in range(4))
    macs += 512_000
    for dim, step, size, depth in zip(DIMS, STEPS, MAPS, depths, strict=True):
        half, tokens = dim // 2, size * size
        grid = size // step if star else (size - 1) // step + 1
        keys = grid * grid
        work = tokens * (10 * dim**2 + 13.5 * dim) + 3 * half**2 * keys + 2 * keys**2 * half
        if star:
            params += depth * (12.75 * dim**2 + 35.5 * dim)
            work += 4 * half**2 * (tokens + keys) + 4 * tokens * keys * half
        else:
            params += depth * (10.75 * dim**2 + 29.5 * dim + half * ((2 * step + 1) ** 2 + 1))
            work += (2 * step + 1) ** 2 * half * keys
        macs += depth * work
    assert params == COUNTED[name][0]
    # test_counts holds the table of models to what is counted.
    assert systems_info(name).macs == macs


@pytest.mark.parametrize("name", COUNTED)
def test_state_dict_layout(name):
    """Every key and shape of the public layout, spelt out."""
    star = name.endswith("star")
    depths = DEPTHS[name.removeprefix("dsnet_").removesuffix("_star")]
    expected = {"head.weight": (1000, 512), "head.bias": (1000,)}

    def norm(prefix, dim):
        expected.update(
            {f"{prefix}.{key}": (dim,) for key in ("weight", "bias", "running_mean", "running_var")}
        )
        expected[f"{prefix}.num_batches_tracked"] = ()

    def layer(prefix, *shape):
        expected[f"{prefix}.weight"] = shape
        expected[f"{prefix}.bias"] = (shape[0],)

    norm("norm", 512)
    before = 3
    for i, (d, depth) in enumerate(zip(DIMS, depths, strict=True), start=1):
        layer(f"patch_embed{i}.proj", d, before, *((4, 4) if i == 1 else (2, 2)))
        before, h = d, d // 2
        for j in range(depth):
            p = f"blocks{i}.{j}"
            layer(f"{p}.pos_embed", d, 1, 3, 3)
            layer(f"{p}.conv1", d, d, 1, 1)
            layer(f"{p}.conv2", d, d, 1, 1)
            layer(f"{p}.conv", h, 1, 3, 3)
            layer(f"{p}.channel_up", 3 * h, h)
            layer(f"{p}.mlp.fc1", 4 * d, d, 1, 1)
            layer(f"{p}.mlp.fc2", d, 4 * d, 1, 1)
            layer(f"{p}.norm_sa1", h)
            norm(f"{p}.norm1", d)
            norm(f"{p}.norm2", d)
            norm(f"{p}.norm_conv1", h)
            if star:
                norm(f"{p}.norm_conv2", h)
                layer(f"{p}.norm_sa2", h)
                layer(f"{p}.cross_channel_up_conv", 3 * h, h, 1, 1)
                layer(f"{p}.cross_channel_up_sa", 3 * h, h)
                layer(f"{p}.fuse_channel_conv", h, h)
                layer(f"{p}.fuse_channel_sa", h, h)
            else:
                kernel = 2 * STEPS[i - 1] + 1
                layer(f"{p}.attn_down", h, 1, kernel, kernel)
    state = create_model(name, device="meta").state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == expected
    entries = {"dsnet_tiny_star": 429, "dsnet_small_star": 843, "dsnet_base_star": 1763}
    assert len(state) == entries.get(name, 15 + 33 * sum(depths))


@pytest.mark.parametrize("name", NAMES)
def test_names_of_the_configuration_resolve(name):
    model = small(name)
    cfg = model.default_cfg
    assert timm.is_model(name)
    assert cfg["architecture"] == name
    assert isinstance(model.get_submodule(cfg["first_conv"]), torch.nn.Conv2d)
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    stride = model.feature_info[-1]["reduction"]
    assert cfg["pool_size"] == tuple(size // stride for size in cfg["input_size"][1:])
    for info in model.feature_info:
        model.get_submodule(info["module"])
    assert model.num_features == model.feature_info[-1]["num_chs"]


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_head(name):
    model = small(name).eval()
    x = image(name)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape[:2] == (2, model.num_features)
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, model.head_hidden_size)
        torch.testing.assert_close(pooled, features.mean((2, 3)))
        logits = model(x)
        torch.testing.assert_close(logits, model.get_classifier()(pooled))
    assert logits.shape == (2, 7)
    assert logits.std() > 0


@pytest.mark.parametrize("name", NAMES)
def test_features_only(name):
    whole = small(name).eval()
    model = small(name, features_only=True).eval()
    x = image(name)
    with torch.no_grad():
        maps = model(x)
        stage = x
        for i, (value, info) in enumerate(zip(maps, whole.feature_info, strict=True), start=1):
            stage = whole.get_submodule(f"blocks{i}")(whole.get_submodule(f"patch_embed{i}")(stage))
            assert value.shape == (2, info["num_chs"], 64 // info["reduction"], 96 // info["reduction"])
            torch.testing.assert_close(value, stage, rtol=1e-4, atol=1e-4)
    assert model.feature_info.channels() == [info["num_chs"] for info in whole.feature_info]
    assert model.feature_info.reduction() == [info["reduction"] for info in whole.feature_info]
    two = small(name, features_only=True, out_indices=(0, 1)).eval()
    assert len(two(x)) == 2
    assert count_params(two) < count_params(model)


@pytest.mark.parametrize("name", RUN)
def test_forward_intermediates(name):
    model = small(name).eval()
    model.norm.running_var.fill_(4.0)  # a fresh norm changes nothing in eval mode
    x = image(name)
    last = model.num_stages - 1
    with torch.no_grad():
        features = model.forward_features(x)
        final, maps = model.forward_intermediates(x)
        torch.testing.assert_close(final, features)
        assert len(maps) == last + 1
        only = model.forward_intermediates(x, indices=[0, -1], intermediates_only=True)
        assert torch.equal(only[0], maps[0])
        assert torch.equal(only[1], maps[last])
        assert torch.equal(model.forward_intermediates(x, indices=1, intermediates_only=True)[0], maps[last])
        normed = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[0]
        torch.testing.assert_close(normed, features)
        assert not torch.allclose(normed, maps[last])
        nhwc = model.forward_intermediates(x, indices=[1], output_fmt="NHWC", intermediates_only=True)[0]
        torch.testing.assert_close(nhwc.permute(0, 3, 1, 2), maps[1])
        early, taken = model.forward_intermediates(x, indices=[1], stop_early=True)
        assert torch.equal(early, maps[1])
        assert torch.equal(taken[0], maps[1])
    with pytest.raises(ValueError, match="output_fmt must be NCHW or NHWC, got 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_stop_early_runs_no_later_stage():
    model = small("dsnet_test").eval()
    model.blocks3.register_forward_hook(lambda *_: pytest.fail("stage 3 ran"))
    model.forward_intermediates(image("dsnet_test"), indices=[0], stop_early=True)


@pytest.mark.parametrize("name", RUN)
def test_prune_intermediate_layers(name):
    model = small(name).eval()
    x = image(name)
    with torch.no_grad():
        expected = model.forward_intermediates(x, intermediates_only=True)
        assert model.prune_intermediate_layers([1]) == [1]
        assert model.num_stages == 2
        assert not hasattr(model, "blocks3")
        assert model.num_features == model.feature_info[1]["num_chs"]
        torch.testing.assert_close(model(x), expected[1])
        whole = small(name).eval()
        whole.prune_intermediate_layers(1, prune_norm=True, prune_head=False)
        assert whole(x).shape == (2, 7)
        assert isinstance(whole.norm, torch.nn.Identity)


@pytest.mark.parametrize("name", RUN)
def test_reset_classifier(name):
    model = small(name).eval()
    x = image(name)
    with torch.no_grad():
        model.reset_classifier(3)
        assert model(x).shape == (2, 3)
        assert model.num_classes == 3
        model.reset_classifier(3, "catavgmax")
        assert model.head_hidden_size == 2 * model.num_features
        assert model(x).shape == (2, 3)
        model.reset_classifier(0)
        assert model(x).shape == (2, 2 * model.num_features)
        model.reset_classifier(0, "")
        assert model(x).shape == model.forward_features(x).shape
    with pytest.raises(ValueError, match="global_pool=''"):
        model.reset_classifier(3, "")
    with pytest.raises(ValueError, match=r"global_pool='median' is unknown; use one of avg, max"):
        model.reset_classifier(3, "median")
    with pytest.raises(ValueError, match="num_classes must be at least 0, got -1"):
        model.reset_classifier(-1)


@pytest.mark.parametrize("name", RUN)
def test_grad_checkpointing(name):
    model = small(name, drop_path_rate=0.3, dtype=torch.float64).train()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    x = image(name, size=(32, 32)).double()
    results = []
    for net in (model, twin):
        torch.manual_seed(5)
        net(x).square().sum().backward()
        results.append([p.grad for p in net.parameters()])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    for got, want in zip(twin.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    twin.set_grad_checkpointing(False)
    assert not twin.grad_checkpointing


@pytest.mark.parametrize("name", NAMES)
def test_meta_construction_then_to_empty(name):
    with torch.device("meta"):
        model = small(name)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(3)
    model.reset_parameters()
    torch.manual_seed(0)
    fresh = small(name)
    for (key, got), want in zip(model.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(
            got.mean(dtype=torch.float64), want.mean(dtype=torch.float64), atol=0.2, rtol=0.2, msg=key
        )
        assert (got.double().std(correction=0) > 0) == (want.double().std(correction=0) > 0), key
    assert torch.isfinite(model.eval()(image(name))).all()


@pytest.mark.parametrize("name", RUN)
@pytest.mark.parametrize("size", [(32, 32), (33, 65), (40, 100), (96, 32)], ids=str)
def test_any_size(name, size):
    model = small(name).eval()
    with torch.no_grad():
        assert model(image(name, size=size)).shape == (2, 7)


@pytest.mark.parametrize("name", RUN)
def test_image_errors(name):
    model = small(name)
    stride = model.total_stride
    with pytest.raises(
        ValueError, match=f"x must be at least {stride} x {stride} pixels.*got {stride - 1} x 64"
    ):
        model(torch.randn(1, 3, stride - 1, 64))
    with pytest.raises(ValueError, match=r"x must be \(B, 3, H, W\), got \(1, 4, 64, 64\)"):
        model(torch.randn(1, 4, 64, 64))


def test_argument_errors():
    with pytest.raises(ValueError, match=r"dims must have 4 entries, one per stage, got \(64, 128\)"):
        DSNet(dims=(64, 128))
    with pytest.raises(ValueError, match=r"drop_path_schedule='linear' is unknown; use one of .*"):
        DSNet(drop_path_schedule="linear", device="meta")


@pytest.mark.parametrize("channels", [1, 4])
def test_in_chans(channels):
    for name in RUN:
        model = small(name, in_chans=channels).eval()
        with torch.no_grad():
            assert model(image(name, channels=channels)).shape == (2, 7)


@pytest.mark.parametrize("name", RUN)
def test_layouts(name):
    """Both layouts give the same numbers; maps come back in the layout of the image."""
    model = small(name).eval()
    x = image(name)
    with torch.no_grad():
        plain = model.forward_intermediates(x)
        turned = model.forward_intermediates(x.contiguous(memory_format=torch.channels_last))
    for got, want in zip((turned[0], *turned[1]), (plain[0], *plain[1]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert want.is_contiguous()
        assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_argument(dtype):
    model = small("dsnet_test", dtype=dtype).eval()
    assert all(p.dtype == dtype for p in model.parameters())
    assert model(image("").to(dtype)).dtype == dtype


def test_group_matcher_follows_the_depth():
    model = create_model("dsnet_tiny_star", device="meta")
    layer = group_parameters(model, model.group_matcher(), reverse=True)
    order = ["patch_embed1.proj.weight", "blocks1.0.conv1.weight", "blocks1.1.conv1.weight"]
    order += ["patch_embed2.proj.weight", "blocks2.0.conv1.weight", "blocks4.0.conv1.weight", "head.weight"]
    ids = [layer[name] for name in order]
    assert ids == sorted(set(ids))
    assert layer["norm.weight"] == layer["blocks4.0.conv1.weight"]
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert coarse["patch_embed3.proj.weight"] == coarse["blocks3.3.conv2.bias"]
    assert coarse["blocks3.0.conv1.weight"] < coarse["blocks4.0.conv1.weight"]
    assert model.no_weight_decay() == set()


def test_drop_path_schedules():
    depths = (2, 3, 1)
    cumulative = drop_path_rates(0.5, depths, "cumulative")
    assert [len(rates) for rates in cumulative] == [2, 3, 1]
    assert [*cumulative[0], *cumulative[1], *cumulative[2]] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    restart = drop_path_rates(0.5, depths)
    assert restart == [[0.0, 0.1], [0.0, 0.1, 0.2], [0.0]]
    assert drop_path_rates(0.5, (1,)) == [[0.0]]
    expected = torch.linspace(0, 0.1, 18, dtype=torch.float64)
    for schedule, start in (("restart", 0), ("cumulative", 7)):
        model = create_model(
            "dsnet_small_star", device="meta", drop_path_rate=0.1, drop_path_schedule=schedule
        )
        got = [m.drop_prob for m in model.blocks3.modules() if isinstance(m, DropPath)]
        assert got == pytest.approx(expected[start : start + 8].tolist())


def test_training_reduces_the_loss():
    """A few steps on four images must fit them: gradients reach every parameter and point the right way."""
    torch.manual_seed(0)
    model = create_model("dsnet_test", drop_path_rate=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    x, target = image("", batch=4, size=(32, 32)), torch.arange(4)
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
