"""Plain PyTorch by default: in Triton's interpreter these tests would take far too long."""

import pytest

import fused_ops


@pytest.fixture(autouse=True)
def _reference_backend():
    with fused_ops.backend("reference"):
        yield
