"""Fixtures of the native tests."""

from __future__ import annotations

import pytest

from fused_ops.core import native


@pytest.fixture
def fresh_status():
    native.forget()
    yield
    native.forget()
