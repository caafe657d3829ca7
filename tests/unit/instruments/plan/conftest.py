# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What the tests of plans share: the stages of equal models and layouts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_selfdistill.instruments.plan import dry_run
from megatron_selfdistill.instruments.plan.stages import Stage

_BUILT: dict[str, list[Stage]] = {}
_build = dry_run.stages


@pytest.fixture(autouse=True)
def stages_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let dry runs share the stages of equal arguments: a large model takes seconds to build."""
    monkeypatch.setattr(dry_run, "stages", _built_once)


def _built_once(model: Any, config: Any, *cut: Any) -> list[Stage]:
    values = ((field.name, getattr(config, field.name)) for field in dataclasses.fields(config))
    comparable = [(name, getattr(value, "__qualname__", value)) for name, value in values]
    key = repr((model, comparable, *cut))
    if key not in _BUILT:
        _BUILT[key] = _build(model, config, *cut)
    return _BUILT[key]
