"""Finding models, and the command that lists them."""

import json
import re
import subprocess
import sys

import pytest
import timm

from fused_ops.models import count_macs, count_params, create_model, list_models, model_table, systems
from fused_ops.models.__main__ import describe, main
from fused_ops.models.registry import System, find_system, preset_of, register_system
from fused_ops.train.presets import PRESETS


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


def test_published_macs_agree_or_are_explained():
    """To half a unit of the last digit printed, or half a percent."""
    for system in systems():
        for name, info in system.models.items():
            if info.published_macs is None:
                continue
            published = f"{info.published_macs / 1e9:.12g}"
            digits = max(1, len(published.partition(".")[2]))
            printed = abs(info.macs / 1e9 - float(published)) <= 0.5 * 10**-digits
            if not printed and abs(info.macs / info.published_macs - 1) > 0.005:
                assert re.search("FLOPs|MACs|multiply-accumulates", info.note + info.source), name


@pytest.mark.parametrize("name", list_models("[!d]*_test"))
def test_counts_of_models_for_tests(name):
    info = find_system(name).models[name]
    model = create_model(name, device="meta")
    assert (count_params(model), count_macs(model, info.input_size)) == (info.params, info.macs)


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
    assert row["preset"] == "imagenet"
    assert row["checkpoints"] == ["pytorch: SteveTsui/DS-Net", "paddle: PaddlePaddle/PaddleClas"]
    assert "co_attention" in row["fused"]
    assert [row["inferred"] for row in rows] == [True, False]


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
    assert "0.044 G" in out
    for system in systems():
        assert all(operator in out for operator in system.fused), system.name
    # The last table has a line or more per system.
    table = " ".join(out.split("published figures from")[1].split())
    for text in ("kevin-ssy/FishNet", "none published", "sem_cifar", "arXiv 2102.12122", "pool_map"):
        assert text in table
    assert "…" not in out


def test_no_match(capsys):
    assert main(["no_such_model"]) == 1
    assert "no model matches 'no_such_model'" in capsys.readouterr().err


def test_command():
    run = subprocess.run(
        [sys.executable, "-m", "fused_ops.models", "dsnet_test"], capture_output=True, text=True, check=True
    )
    assert "dsnet_test" in run.stdout
    assert run.stderr == ""


def test_every_system_has_a_recipe():
    """A preset that exists, for the system and for each of its models."""
    assert [system.name for system in systems() if not system.preset] == []
    for name in list_models():
        assert preset_of(name) in PRESETS, name


def test_every_preset_is_some_systems():
    used = {preset_of(name) for name in list_models()}
    # A system may have further ones, for fine-tuning.
    first = {name for name in PRESETS if not any(name.startswith(f"{other}_") for other in used)}
    assert first - {"digits", "synthetic"} - used == set()
    for preset in PRESETS.values():
        models = [preset.settings.get("model", "dsnet_small"), *preset.by_model]
        assert [name for name in models if name not in list_models()] == []


def test_preset_of_one_model():
    assert preset_of("sem_resnet_50") == "resnet_gates"
    assert preset_of("sem_resnet_164_cifar") == "sem_cifar"
    with pytest.raises(ValueError, match="nearest: pvt_small"):
        preset_of("pvt_smal")


@pytest.mark.parametrize("name", ["fishnet_99", "hrnet_w18_small", "dla60_res2net"])
def test_no_stochastic_depth(name):
    """Rate 0 is what such a model has; other rates are refused as timm does."""
    model = create_model(name, device="meta", num_classes=3, drop_path_rate=0.0)
    assert model.num_classes == 3
    with pytest.raises(TypeError, match="drop_path_rate"):
        create_model(name, device="meta", drop_path_rate=0.1)


def test_every_card_says_whose_what_is():
    for system in systems():
        text = describe(system)
        assert "paper" in text or system.paper.split(",")[0] in text, system.name
        assert re.search(r"code", text), system.name
        assert re.search(r"infer|reconstruct|this\s+project's", text, re.IGNORECASE), system.name
        if system.name in ("CAT", "DCDC"):
            assert "RECONSTRUCTION" in text


def test_reconstructions_are_labelled_wherever_they_are_listed(capsys):
    names = [name for name in list_models() if re.match("cat_|dcdc_|fishnext_", name)]
    rows = {row["name"]: row for row in model_table()}
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in names:
        assert rows[name]["inferred"]
        assert rows[name]["note"].startswith("inferred")
        assert "(inferred)" in next(line for line in lines if f" {name} *" in line or line.startswith(name))
    # A docstring is what timm and editors show.
    for name in names:
        assert re.search("inferred|reconstruction", timm.model_entrypoint(name).__doc__), name


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
    out = capsys.readouterr().out
    assert "checkpoints: pytorch, whai362/PVT" in out
    assert "fused-ops train --preset pvt --model pvt_test" in out
    assert main(["--card", "dsnet_tiny"]) == 0
    assert "published: 9,100,000 parameters" in capsys.readouterr().out
    assert "window and channel" in describe(find_system("davit_tiny"))
    with pytest.raises(SystemExit):
        main(["--card", "dsnet_smal"])
    assert "nearest: dsnet_small" in capsys.readouterr().err
