"""Fixtures of the native tests: the emulator, built once and put in the CUDA library's place."""

from __future__ import annotations

import pytest

from fused_ops.core import native


@pytest.fixture(scope="session")
def tools():
    return native.build_tools()


@pytest.fixture(scope="session")
def built_emulator(tools):
    try:
        return native.build_emulator()
    except tools.BuildError as error:
        if "the compiler failed" in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture
def emulator(built_emulator):
    native.set_emulator(built_emulator)
    built_emulator.set_mode("sequential")
    built_emulator.set_multiprocessors(4)
    built_emulator.reset_traffic()
    yield built_emulator
    native.set_emulator(None)
    built_emulator.set_mode("sequential")


@pytest.fixture
def fresh_status():
    native.forget()
    yield
    native.forget()
