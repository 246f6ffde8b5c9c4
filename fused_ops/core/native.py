"""Placeholder until the native library lands."""


def status() -> tuple[bool, str]:
    return False, "the native library is not built"


def emulator():
    return None
