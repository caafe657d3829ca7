# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Triton's interpreter, which runs kernels on tensors of a CPU where TRITON_INTERPRET=1 is set, in half of its time."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any


def replace_language_once() -> None:
    """Let Triton's interpreter replace the functions of triton.language once in this process.

    The interpreter does so in every call of a function by a kernel, which takes half of the interpreter's time, and
    undoes the replacement after every launch.  A kernel that is compiled cannot follow in the same process.
    """
    from triton import language
    from triton.runtime import interpreter

    replace: Callable[[Any], Any] = interpreter._patch_lang
    replaced: set[frozenset[int]] = set()

    def replace_once(function: Any) -> SimpleNamespace:
        modules = [value for value in function.__globals__.values() if isinstance(value, ModuleType)]
        visible = frozenset(id(module) for module in modules if module in (language, language.core))
        if visible not in replaced:
            replace(function)
            replaced.add(visible)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = replace_once
