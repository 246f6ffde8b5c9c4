"""Finding models, and the command that lists them."""

import json
import subprocess
import sys

import pytest

from fused_ops.models import create_model, list_models, model_table, systems
from fused_ops.models.__main__ import main
from fused_ops.models.registry import System, register_system


def test_list_models():
    names = list_models()
    assert len(names) == len(set(names)) >= 8
    assert list_models("dsnet_*star") == ["dsnet_base_star", "dsnet_small_star", "dsnet_tiny_star"]
    assert list_models("base_fit") == ["dsnet_base_fit"]
    assert list_models("no_such_model") == []


def test_unknown_name():
    with pytest.raises(ValueError, match=r"got 'dsnet_tiny_stra'; nearest: dsnet_tiny_star"):
        create_model("dsnet_tiny_stra")
    with pytest.raises(ValueError, match="got 'resnet50'"):
        create_model("resnet50")


def test_pretrained_is_refused():
    with pytest.raises(ValueError, match="pretrained=True: no weights of dsnet_test are hosted"):
        create_model("dsnet_test", pretrained=True)


def test_systems_are_complete():
    for system in systems():
        assert system.paper
        # Without public code there is no public layout, and a reader of the numbers must be told.
        notes = [info.note for info in system.models.values()]
        assert system.layouts or all("no public code" in n or "not published" in n for n in notes)
        for name, info in system.models.items():
            assert info.params > 0, name
            assert info.macs > 0, name
            if info.published_params is not None:
                assert info.source, name
            else:
                assert info.note, name


def test_published_numbers_agree_or_are_explained():
    for system in systems():
        for name, info in system.models.items():
            if info.published_params is not None and abs(info.params / info.published_params - 1) > 0.01:
                assert "not reproduced" in info.note, name


def test_registering_twice_is_refused():
    system = next(system for system in systems() if system.name == "DS-Net")
    with pytest.raises(ValueError, match="already registered"):
        register_system(system)
    with pytest.raises(ValueError, match="'dsnet_tiny' of other is already registered"):
        register_system(System("other", "", system.model_class, {"dsnet_tiny": system.models["dsnet_tiny"]}))
    with pytest.raises(ValueError, match="'nothing' of other is not registered with timm"):
        register_system(System("other", "", system.model_class, {"nothing": system.models["dsnet_tiny"]}))


def test_json(capsys):
    assert main(["--json", "dsnet_tiny*"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["dsnet_tiny", "dsnet_tiny_star"]
    row = rows[1]
    assert row["system"] == "DS-Net"
    assert row["params"] == 10_534_312
    assert row["macs"] == 1_832_336_768
    assert row["input_size"] == [3, 224, 224]
    assert (row["published_params"], row["published_macs"], row["published_top1"]) == (10.5e6, 1.8e9, 79.0)
    assert row["source"]


@pytest.mark.parametrize("rich", [True, False])
def test_table(capsys, monkeypatch, rich):
    if rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main([]) == 0
    out = capsys.readouterr().out
    for row in model_table():
        assert row["name"] in out
    assert "10.534 M" in out
    assert "1.832 G" in out
    assert "not reproduced" in out


def test_no_match(capsys):
    assert main(["no_such_model"]) == 1
    assert "no model matches 'no_such_model'" in capsys.readouterr().err


def test_command():
    run = subprocess.run(
        [sys.executable, "-m", "fused_ops.models", "dsnet_test"], capture_output=True, text=True, check=True
    )
    assert "dsnet_test" in run.stdout
    assert run.stderr == ""


def test_card(capsys):
    """What is inferred must be said wherever a model is described."""
    assert main(["--card", "hiri_vit_test"]) == 0
    out = capsys.readouterr().out
    (info,) = (system.models["hiri_vit_test"] for system in systems() if "hiri_vit_test" in system.models)
    assert f"{info.params:,} parameters" in out
    assert "INFERRED" in out
    assert "checkpoints: none were published" in out
    assert "calls of depthwise" in out
    assert main(["--card", "pvt_test"]) == 0
    assert "checkpoints: pytorch, whai362/PVT" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--card", "dsnet_smal"])
    assert "nearest: dsnet_small" in capsys.readouterr().err
