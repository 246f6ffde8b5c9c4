"""Importing the zoo without its optional packages."""

import importlib.util
import sys

import pytest

import fused_ops.models


@pytest.mark.parametrize("package", ["timm", "safetensors"])
def test_missing_package_is_named(monkeypatch, package):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == package else find_spec(name, *args)
    )
    monkeypatch.delitem(sys.modules, "fused_ops.models.requirements")
    monkeypatch.delattr(fused_ops.models, "requirements")
    with pytest.raises(
        ImportError, match=rf"needs {package}; install it with: pip install 'fused-ops\[models\]'"
    ):
        importlib.import_module("fused_ops.models.requirements")
