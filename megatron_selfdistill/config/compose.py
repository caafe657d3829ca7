# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The way from YAML files and the command line to a `Config`: hydra composes the values, the schema checks them."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_selfdistill.config.key_list import config_dir, keys, unknown_key
from megatron_selfdistill.config.methods import settings_class
from megatron_selfdistill.config.overrides import explained, for_hydra
from megatron_selfdistill.config.schema.field_checks import require
from megatron_selfdistill.config.schema.method_config import MethodSettings
from megatron_selfdistill.config.schema.whole_config import Config
from megatron_selfdistill.errors import ConfigError

_UNSET = "???"  # omegaconf's mark of a missing value


def load(overrides: Sequence[str] = (), config_name: str = "train", search_path: Sequence[str] = ()) -> Config:
    """Compose ``<config_name>.yaml`` and hydra ``overrides`` into a `Config`.

    ``search_path``: directories with further groups, which are searched after the project's (hydra.searchpath).

    Raises: `ConfigError`, which names the nearest key where a key is unknown.
    """
    return from_mapping(_composed(overrides, config_name, search_path))


def given_keys(
    overrides: Sequence[str] = (), config_name: str = "train", search_path: Sequence[str] = ()
) -> frozenset[str]:
    """Return the keys that the YAML files or the overrides of the same call of `load` set, also to their defaults."""
    given = _composed(overrides, config_name, search_path)
    found = {f"method.{name}" for name in given.get("method", {})}
    for name in keys():
        value: Any = given
        for part in name.split("."):
            value = value.get(part, _UNSET) if isinstance(value, dict) else _UNSET
        if value not in (_UNSET, {}):
            found.add(name)
    return frozenset(found)


class GivenKeys(frozenset[str]):
    """The result of `given_keys` with the arguments of `selfdistill train` that set these keys."""

    arguments: list[str]

    def __new__(
        cls, overrides: Sequence[str] = (), config_name: str = "train", search_path: Sequence[str] = ()
    ) -> GivenKeys:
        """Return the keys that the arguments of `load` set."""
        made = super().__new__(cls, given_keys(overrides, config_name, search_path))
        name = [] if config_name == "train" else ["--config-name", config_name]
        places = [part for place in search_path for part in ("--config-dir", str(place))]
        made.arguments = [*name, *places, *overrides]
        return made


def from_mapping(values: Mapping[str, Any] | DictConfig) -> Config:
    """Return the `Config` of nested mappings, in which missing keys have their defaults.

    Raises: `ConfigError` for an unknown key, a wrong type and an impossible value.
    """
    name = MethodSettings.name
    try:
        given = values if isinstance(values, DictConfig) else OmegaConf.create(dict(values))
        name = str(OmegaConf.select(given, "method.name", default=name))
        config: Any = OmegaConf.to_object(OmegaConf.merge(_schema(name), given))
        assert isinstance(config, Config)
        return config
    except ConfigError:
        raise
    except (OmegaConfBaseException, ValueError, ArithmeticError, RecursionError) as error:  # Python's limits, too
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        key, reason = getattr(error, "full_key", None) or "", str(error).splitlines()[0]
        raise ConfigError(unknown_key(key, name) or f"{key}: {reason}" if key else reason) from error


def to_yaml(config: Config) -> str:
    """Return the resolved values as YAML, the form of config.yaml in the run directory."""
    return str(OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config))))


def _composed(overrides: Sequence[str], config_name: str, search_path: Sequence[str]) -> dict[str, Any]:
    """Return the values that YAML files and overrides set, unresolved.

    Hydra composes the chosen files first, which takes most of its time, and then applies the overrides of keys.  So the
    project's files are composed once for the same choices; those of a user may change.
    """
    read = for_hydra(overrides)
    for directory in search_path:
        require(Path(directory).is_dir(), f"--config-dir {directory}: there is no such directory")
    of_keys = [one for one in read if _sets_a_key(one)]
    choices = [one.input_line or "" for one in read if not _sets_a_key(one)]
    if search_path:
        directories = ",".join(f"file://{Path(directory).resolve()}" for directory in search_path)
        choices.append(f"hydra.searchpath=[{directories}]")
    files = _by_hydra if any(choice.startswith("hydra") for choice in choices) else _files
    try:
        composed = copy.deepcopy(files(config_name, *choices))
        ConfigLoaderImpl._apply_overrides_to_config(of_keys, composed)
    except Exception as error:  # hydra's and omegaconf's, and those of yaml and of Python for odd files and values
        raise ConfigError(explained(error)) from error
    given: Any = OmegaConf.to_container(composed, resolve=False)
    return _set_values(given)


def _sets_a_key(override: Override) -> bool:
    """Return whether ``override`` is about the value of a key, and chooses no file of a group."""
    name = override.key_or_group
    has_values = not override.is_delete() and isinstance(override.value(), dict)
    return override.package is None and ("." in name or name in keys() or has_values) and not name.startswith("hydra")


def _by_hydra(config_name: str, *overrides: str) -> DictConfig:
    ConfigStore.instance().store("defaults", _unset_keys())
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        composed: DictConfig = compose(config_name, overrides=list(overrides))
        return composed


_files = functools.cache(_by_hydra)


def _set_values(values: dict[Any, Any]) -> dict[Any, Any]:
    """Return nested values without those that nothing has set."""
    parts = {key: _set_values(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in parts.items() if value != _UNSET}


@functools.cache
def _unset_keys() -> DictConfig:
    """Return every key as a missing value; only mappings and the method's section accept further keys."""
    node: DictConfig = OmegaConf.create({"method": {}})
    for name, (default, _) in keys().items():
        if name != "method.name":
            OmegaConf.update(node, name, {} if isinstance(default, dict) else _UNSET)
    OmegaConf.set_struct(node, True)
    for name in ["method", *(name for name, (default, _) in keys().items() if isinstance(default, dict))]:
        OmegaConf.set_struct(OmegaConf.select(node, name), False)
    return node


@functools.cache
def _schema(method: str) -> DictConfig:
    """Return the schema of a method as nodes that a merge may write to; a merge copies it, and no caller changes it."""
    schema: DictConfig = OmegaConf.structured(Config)
    _make_writable(schema)
    schema.method = OmegaConf.structured(settings_class(method))
    _make_writable(schema)
    return schema


def _make_writable(node: Any) -> None:
    """Let the merge write to the nodes of frozen dataclasses, which omegaconf makes read-only."""
    OmegaConf.set_readonly(node, False)
    for name in list(node):
        child = node._get_node(name)
        if isinstance(child, DictConfig) and not child._is_none():
            _make_writable(child)
