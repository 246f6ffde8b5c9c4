"""Placeholder until the native library lands."""

from fused_ops.core import native


def can_run(call):
    return native.status()


def forward(call, out, raw, mean, var):
    raise RuntimeError(native.status()[1])
