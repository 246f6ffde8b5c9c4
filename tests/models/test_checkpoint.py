"""Reading and writing weights, and refusing what does not fit."""

import argparse
import copy
import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from fused_ops.models import (
    CheckpointError,
    create_model,
    load_checkpoint,
    official_state_dict,
    save_checkpoint,
)
from fused_ops.models import checkpoint as checkpoint_module


@pytest.fixture
def trained():
    """A model none of whose entries has its initial value."""
    torch.manual_seed(0)
    return randomise(create_model("dsnet_test"))


def randomise(model):
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.1)
            else:
                tensor.fill_(4)
    return model


def fresh(**kwargs):
    return create_model("dsnet_test", **kwargs)


def assert_same(model, other, but=()):
    for (name, got), want in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        if not name.endswith(tuple(but)):
            assert torch.equal(got, want), name


def paddle_state(model):
    """The state as Paddle writes it: numpy arrays, (in, out) Linear weights, its own BatchNorm names."""
    state = OrderedDict()
    linear = ("head.weight", "channel_up.weight", "cross_channel_up_sa.weight", "fuse_channel_conv.weight")
    linear += ("fuse_channel_sa.weight",)
    for name, value in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        array = value.numpy()
        if name.endswith(linear):
            array = np.ascontiguousarray(array.T)
        name = name.replace("running_mean", "_mean").replace("running_var", "_variance")
        state[name] = array
    return state


@pytest.mark.parametrize("root", [None, "model", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_pytorch_checkpoints(tmp_path, trained, root, prefix):
    state = {prefix + name: value for name, value in official_state_dict(trained).items()}
    content = state if root is None else {root: state, "epoch": 3, "args": argparse.Namespace(lr=1e-3)}
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path)
    for source in (path, str(path), content):
        model = fresh()
        load_checkpoint(model, source)
        assert_same(model, trained)


def test_root_key(tmp_path, trained):
    other = randomise(fresh())
    content = {"model": other.state_dict(), "model_ema": trained.state_dict()}
    model = fresh()
    load_checkpoint(model, content, root_key="model_ema")
    assert_same(model, trained)
    with pytest.raises(CheckpointError, match="no state dict under 'ema'; there are: model, model_ema"):
        load_checkpoint(model, content, root_key="ema")


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("named", [False, True], ids=["arrays", "pairs"])
def test_paddle_checkpoints(tmp_path, trained, protocol, named):
    state = paddle_state(trained)
    content = {name: (f"param_{i}", v) if named else v for i, (name, v) in enumerate(state.items())}
    content["StructuredToParameterName@@"] = {name: f"param_{i}" for i, name in enumerate(state)}
    path = tmp_path / "model.pdparams"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    model = fresh()
    load_checkpoint(model, path)
    assert_same(model, trained, but=["num_batches_tracked"])
    assert int(model.norm.num_batches_tracked) == 0


def test_paddle_state_in_memory(trained):
    model = fresh()
    load_checkpoint(model, paddle_state(trained))
    assert_same(model, trained, but=["num_batches_tracked"])


def test_paddle_round_trip(trained):
    ours = official_state_dict(trained, "paddle")
    expected = paddle_state(trained)
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        assert np.array_equal(value.numpy(), expected[name]), name
        assert value.is_contiguous()


def test_no_such_framework(trained):
    with pytest.raises(ValueError, match=r"framework must be .*\(paddle, pytorch\), got 'jax'"):
        official_state_dict(trained, "jax")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("suffix", [".pdparams", ".pth"])
def test_nothing_in_a_file_is_run(tmp_path, trained, suffix):
    path, trace = tmp_path / f"evil{suffix}", tmp_path / "trace"
    state = paddle_state(trained) if suffix == ".pdparams" else trained.state_dict()
    content = {**state, "evil": Payload(str(trace))}
    path.write_bytes(pickle.dumps(content)) if suffix == ".pdparams" else torch.save(content, path)
    model = fresh()
    before = copy.deepcopy(model)
    with pytest.raises(CheckpointError, match="mkdir"):
        load_checkpoint(model, path)
    assert not trace.exists()
    assert_same(model, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks1.0.conv1.weight"), r"1 missing \(blocks1.0.conv1.weight\)"),
        (lambda s: s.update(extra=torch.zeros(1)), r"1 unexpected \(extra\)"),
        (
            lambda s: s.update({"norm.weight": torch.zeros(3)}),
            r"1 mis-shaped \(norm.weight \(3,\) instead of \(128,\)\)",
        ),
        (
            lambda s: s.update({"norm.weight": torch.zeros(128, dtype=torch.int64)}),
            r"another kind of number \(norm.weight torch.int64",
        ),
        (lambda s: [s.pop(n) for n in list(s) if "blocks2" in n], r"46 missing \(.*, .*, .*, .*, \.\.\.\)"),
    ],
    ids=["missing", "unexpected", "shape", "kind", "many"],
)
def test_misfits_are_named_and_nothing_is_loaded(trained, change, message):
    state = dict(trained.state_dict())
    change(state)
    model = fresh()
    before = copy.deepcopy(model)
    with pytest.raises(CheckpointError, match=f"does not fit dsnet_test: .*{message}"):
        load_checkpoint(model, state)
    assert_same(model, before)


def test_other_classifier(trained):
    model = fresh(num_classes=3)
    before = copy.deepcopy(model)
    with pytest.raises(
        CheckpointError, match=r"head.weight \(10, 128\) instead of \(3, 128\).*new_classifier=True"
    ):
        load_checkpoint(model, trained.state_dict())
    assert_same(model, before)
    load_checkpoint(model, trained.state_dict(), new_classifier=True)
    assert torch.equal(model.head.weight, before.head.weight)
    assert torch.equal(model.blocks1[0].conv1.weight, trained.blocks1[0].conv1.weight)
    headless = fresh(num_classes=0)
    with pytest.raises(CheckpointError, match=r"2 unexpected \(head.weight, head.bias\)"):
        load_checkpoint(headless, trained.state_dict())
    load_checkpoint(headless, trained.state_dict(), new_classifier=True)
    assert torch.equal(headless.norm.weight, trained.norm.weight)


def test_safetensors_round_trip(tmp_path, trained):
    path = tmp_path / "model.safetensors"
    trained.to(memory_format=torch.channels_last)
    save_checkpoint(trained, path)
    model = fresh()
    load_checkpoint(model, path)
    assert_same(model, trained)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["model"] == "dsnet_test"
    assert metadata["num_classes"] == "10"
    assert metadata["fused_ops_version"]
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_safetensors_of_another_model(tmp_path, trained):
    path = tmp_path / "model.safetensors"
    save_checkpoint(trained, path)
    other = create_model("dsnet_tiny_star", depths=(1, 1, 1, 1))
    with pytest.raises(CheckpointError, match=r"model.safetensors holds dsnet_test, not dsnet_tiny_star"):
        load_checkpoint(other, path)
    foreign = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file(trained.state_dict(), foreign)
    with pytest.raises(CheckpointError, match="was not written by"):
        load_checkpoint(fresh(), foreign)


@pytest.mark.parametrize("suffix", [".safetensors", ".pdparams", ".pth"])
def test_damaged_files(tmp_path, suffix):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(b"\x80\x04not a checkpoint at all")
    with pytest.raises(CheckpointError, match=f"broken{suffix} "):
        load_checkpoint(fresh(), path)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(fresh(), tmp_path / "absent.pth")


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"model": {"a": "text"}}], ids=str)
def test_no_state_dict(tmp_path, content):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"not a (state dict|tensor)"):
        load_checkpoint(fresh(), path)


@pytest.mark.parametrize("step", ["write", "replace"])
def test_saving_is_atomic(tmp_path, trained, monkeypatch, step):
    """If writing or renaming fails, the old file stays and no temporary one is left."""
    path = tmp_path / "model.safetensors"
    save_checkpoint(trained, path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(checkpoint_module.os, "fsync" if step == "write" else "replace", fail)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(randomise(fresh()), path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_model_on_meta_is_refused(trained):
    with pytest.raises(CheckpointError, match="to_empty"):
        load_checkpoint(fresh(device="meta"), trained.state_dict())


def test_wrapped_model(tmp_path, trained):
    compiled = torch.compile(trained, backend="eager")
    save_checkpoint(compiled, tmp_path / "model.safetensors")
    model = fresh()
    load_checkpoint(torch.compile(model, backend="eager"), tmp_path / "model.safetensors")
    assert_same(model, trained)


def test_foreign_model():
    with pytest.raises(ValueError, match=r"model must be one of fused_ops\.models, got Linear"):
        load_checkpoint(torch.nn.Linear(2, 2), {})


def test_create_model_with_checkpoint(tmp_path, trained):
    path = tmp_path / "model.safetensors"
    save_checkpoint(trained, path)
    assert_same(create_model("dsnet_test", checkpoint=path), trained)
    features = create_model("dsnet_test", checkpoint=path, features_only=True, out_indices=(0, 1))
    assert torch.equal(features.model.blocks2[0].conv2.weight, trained.blocks2[0].conv2.weight)
    assert not hasattr(features.model, "blocks3")
