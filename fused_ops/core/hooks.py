"""Who looks on while a module runs: a module with a hook cannot be computed as a part of something larger."""

from __future__ import annotations

import torch
from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Hooks of this package look on and change nothing.
_OWN_HOOKS = ("fused_ops.core.explain", "fused_ops.accelerate")


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody would see, or could change, what goes into or comes out of ``module``."""
    for name in HOOKS:
        hooks = getattr(module, name)
        if hooks and any(getattr(hook, "__module__", "") not in _OWN_HOOKS for hook in hooks.values()):
            return True
    return False


def all_hooked() -> bool:
    """Whether somebody looks on at every module's forward."""
    return bool(torch.nn.modules.module._global_forward_hooks)
