# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A place of one test for the Python code that transformers copies out of model directories and imports."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from transformers import dynamic_module_utils

_PACKAGE = "transformers_modules"


def keep_in(directory: Path, patch: pytest.MonkeyPatch) -> None:
    """Let transformers copy remote code to ``directory``, until ``patch`` is undone.

    transformers appends its place to ``sys.path`` and never removes it, so that remote code would import its neighbours
    from the place of an earlier test.
    """
    for name in [name for name in sys.modules if name.partition(".")[0] == _PACKAGE]:
        patch.delitem(sys.modules, name)
    patch.setattr(sys, "path", [*sys.path])
    patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(directory))
