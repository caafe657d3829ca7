# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The scripts of tools/ and examples/ as modules, and the pages that the documentation's site makes of methods."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock


def load_script(file: Path) -> ModuleType:
    """Return a new module of a script, which imports what lies beside it, and which a test may change."""
    spec = importlib.util.spec_from_file_location(f"script_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for their module there
    with mock.patch.object(sys, "path", [str(file.parent), *sys.path]):
        spec.loader.exec_module(module)
    return module


def page_of_method(name: str) -> str:
    return str(_site().methods.page(name))


@functools.cache
def _site() -> ModuleType:
    return load_script(Path(__file__).resolve().parents[2] / "tools" / "docs_site" / "hooks.py")
