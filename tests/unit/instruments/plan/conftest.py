# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What the tests of plans share: the stages of equal models and layouts, and the configurations of equal overrides."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from omegaconf import DictConfig

from megatron_selfdistill.config import compose
from megatron_selfdistill.instruments.plan import dry_run
from megatron_selfdistill.instruments.plan.stages import Stage

_BUILT: dict[str, list[Stage]] = {}
_build = dry_run.stages
_COMPOSED: dict[tuple[str, ...], DictConfig] = {}
_compose = compose._compose


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


@pytest.fixture(autouse=True)
def configurations_composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let loads of equal overrides share what hydra composes, which takes a tenth of a second."""
    monkeypatch.setattr(compose, "_compose", _composed_once)


def _composed_once(
    defaults: DictConfig, overrides: Sequence[str], config_name: str, search_path: Sequence[str]
) -> DictConfig:
    if search_path or defaults is not compose._defaults():
        return _compose(defaults, overrides, config_name, search_path)
    key = (config_name, *overrides)
    if key not in _COMPOSED:
        _COMPOSED[key] = _compose(defaults, overrides, config_name, search_path)
    return _COMPOSED[key]
