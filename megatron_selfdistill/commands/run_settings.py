# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The settings of a finished or interrupted run that decide its prompts, its target and its samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Set
from pathlib import Path
from typing import Any

import yaml

from megatron_selfdistill.checkpoint.stored_adapters import KEPT_BASE
from megatron_selfdistill.config import Config
from megatron_selfdistill.config.bound_keys import OLD_DEFAULTS
from megatron_selfdistill.errors import ConfigError

CONFIGURATION_FILE = "config.yaml"
SETTINGS = {
    "data": (
        "tokenizer chat_template chat_template_kwargs system_prompt student_template teacher_template "
        "trust_remote_code on_long_context max_length"
    ).split(),
    "target": "rule teacher_weight guided_teacher_weight k_max k anchor match".split(),
    "loss": "divergence jsd_lambda".split(),
    "rollout": "max_new_tokens temperature top_k top_p stop_token_ids".split(),
}
"""The keys that `with_settings_of` takes from a run, by section."""


def is_run(path: Path) -> bool:
    """Return whether a directory is that of a run: it has the run's configuration."""
    return (path / CONFIGURATION_FILE).is_file()


def with_settings_of(run_dir: Path, config: Config, overridden: Set[str]) -> Config:
    """Return ``config`` with the `SETTINGS` of a run, except the keys and the sections that ``overridden`` names.

    A key that the run's configuration lacks, and whose default has changed, has its old default (`OLD_DEFAULTS`).
    Raises: `ConfigError` for a file that cannot be read, and for a value from the environment, which the file does not
    hold.
    """
    stored = _configuration(run_dir)
    for section, names in SETTINGS.items():
        if section in overridden:
            continue
        values = {
            name: value
            for name, value in _stored_section(stored, section).items()
            if name in names and f"{section}.{name}" not in overridden
        }
        for name, value in values.items():
            if "${" in str(value):
                raise ConfigError(
                    f"{run_dir / CONFIGURATION_FILE}: {section}.{name} was read from the environment: set it again, "
                    f"{section}.{name}=..."
                )
        replaced = dataclasses.replace(getattr(config, section), **values)
        config = dataclasses.replace(config, **{section: replaced})
    return config


def _stored_section(stored: dict[str, Any], section: str) -> dict[str, Any]:
    old = {key.partition(".")[2]: value for key, value in OLD_DEFAULTS.items() if key.partition(".")[0] == section}
    values: dict[str, Any] = stored.get(section, {})
    return old | values


def initial_weights(run_dir: Path) -> Path | None:
    """Return the checkpoint of the weights that a run has started from; None where the run did not keep them.

    Of random weights, a run keeps those below its adapters.
    """
    stored = _configuration(run_dir)
    load = stored.get("checkpoint", {}).get("load")
    if load is None and stored.get("adapter", {}).get("rank"):
        return run_dir / KEPT_BASE
    return None if load is None else Path(load)


def has_frozen_teacher(run_dir: Path) -> bool:
    """Return whether the weights that a run has started from are its teacher."""
    frozen: bool = _configuration(run_dir).get("teacher", {}).get("weights") == "frozen"
    return frozen


def _configuration(run_dir: Path) -> dict[str, Any]:
    path = run_dir / CONFIGURATION_FILE
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"expected the configuration of a run in {path}, got {error}") from error
    if not isinstance(stored, dict):
        raise ConfigError(f"expected the configuration of a run in {path}, got {type(stored).__name__}")
    for section in (*SETTINGS, "checkpoint", "adapter", "teacher"):
        if not isinstance(stored.get(section, {}), dict):
            raise ConfigError(f"expected the keys of section {section} in {path}, got {stored[section]!r}")
    return stored
