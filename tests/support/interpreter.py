"""Makes Triton's interpreter round as the hardware does, and leaves out work that changes nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


def round_to_bfloat16() -> None:
    """Convert float32 to bfloat16 by rounding to nearest even.

    The interpreters of Triton 3.6 and 3.9 cut the low bits off, a bias of half a unit in the last place that
    no GPU has and that shows in every sum.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, source: Any, destination: Any) -> Any:
        names = str(source.dtype.scalar), str(destination.scalar)
        if names != ("fp32", "bf16"):
            return cast(self, source, destination)
        bits = np.ascontiguousarray(source.data).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        data = np.where(np.isnan(source.data), np.uint16(0x7FC0), rounded)
        return TensorHandle(data, destination.scalar)

    InterpreterBuilder.cast_impl = cast_impl


def save_time() -> None:
    """Leave out work of the interpreter that changes no result: more than half of its time.

    Of one that has other parts than those of Triton 3.6 to 3.9, nothing is left out.
    """
    from triton.runtime import interpreter

    parts = ("interpreter_builder", "tl", "_patch_lang", "_LangPatchScope", "_get_np_dtype")
    if not all(hasattr(interpreter, part) for part in parts):
        return
    builder = interpreter.interpreter_builder
    # Without `debug` the interpreter computes whether integers overflow and then says nothing about it.
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    _patch_once_per_launch(interpreter)
    _remember_dtypes(interpreter)


def _patch_once_per_launch(interpreter: Any) -> None:
    """Otherwise every call of a device function puts the same functions into `tl` again."""
    patch_lang, tl = interpreter._patch_lang, interpreter.tl
    patched: set[tuple[bool, bool]] = set()
    # Which of the two modules a function sees, by its globals, which are kept so that their id stays theirs.
    seen: dict[int, tuple[dict[str, Any], tuple[bool, bool]]] = {}

    class Scope(interpreter._LangPatchScope):
        def __init__(self, inner: Any) -> None:
            self._changes = inner._changes

        def restore(self) -> None:
            patched.clear()
            super().restore()

    def patch(function: Any) -> Any:
        names = function.__globals__
        if id(names) not in seen:
            found = {id(value) for value in names.values()}
            seen[id(names)] = names, (id(tl) in found, id(tl.core) in found)
        modules = seen[id(names)][1]
        if modules in patched:
            return Scope(interpreter._LangPatchScope())
        patched.add(modules)
        return Scope(patch_lang(function))

    interpreter._patch_lang = patch


def _remember_dtypes(interpreter: Any) -> None:
    """NumPy's dtype of a Triton type, which depends on the type of its elements alone."""
    numpy_dtype = interpreter._get_np_dtype
    known: dict[str, np.dtype] = {}

    def remembered(kind: Any) -> np.dtype:
        name = kind.scalar.name
        if name not in known:
            known[name] = numpy_dtype(kind)
        return known[name]

    interpreter._get_np_dtype = remembered
