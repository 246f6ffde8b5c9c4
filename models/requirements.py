"""Imported before all else of the zoo: names the packages that are missing and how to get them."""

import importlib.util

for _package in ("timm", "safetensors"):
    if importlib.util.find_spec(_package) is None:
        raise ImportError(
            f"fused_ops.models needs {_package}; install it with: pip install 'fused-ops[models]'"
        )
