# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The tiny Hugging Face model of each family, which the tests of conversions read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def written(tmp_path_factory) -> Callable[[str], tuple[Path, Any, Any]]:
    """Return a function of a kind that returns (directory, transformers' model, its logits), each made once."""
    import hf_models

    made: dict[str, tuple[Path, Any, Any]] = {}

    def make(kind: str) -> tuple[Path, Any, Any]:
        if kind not in made:
            directory = tmp_path_factory.mktemp(kind)
            model = hf_models.write(kind, directory)
            made[kind] = directory, model, hf_models.hf_logits(model, hf_models.SEQUENCES)
        return made[kind]

    return make
