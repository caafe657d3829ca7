# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The way from YAML files and the command line to a `Config`: hydra composes the values, the schema checks them."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_selfdistill.config.key_list import config_dir, entries, groups, keys, kinds, method_kinds, unknown_key
from megatron_selfdistill.config.methods import settings_class
from megatron_selfdistill.config.overrides import explained, for_hydra
from megatron_selfdistill.config.schema.field_checks import require
from megatron_selfdistill.config.schema.method_config import MethodSettings
from megatron_selfdistill.config.schema.ranges import described, has_form, shown
from megatron_selfdistill.config.schema.whole_config import Config
from megatron_selfdistill.errors import ConfigError


def load(overrides: Sequence[str] = (), config_name: str = "train", search_path: Sequence[str] = ()) -> Config:
    """Compose ``<config_name>.yaml`` and hydra ``overrides`` into a `Config`.

    ``search_path``: directories with further groups, which are searched after the project's (hydra.searchpath).

    Raises: `ConfigError`, which names the nearest key where a key is unknown.
    """
    return from_mapping(_compose(overrides, config_name, search_path))


def given_keys(
    overrides: Sequence[str] = (), config_name: str = "train", search_path: Sequence[str] = ()
) -> frozenset[str]:
    """Return the keys that the YAML files or the overrides of the same call of `load` set, also to their defaults.

    Of a section within a section, the result has the entries.
    """
    values = _compose(overrides, config_name, search_path, defaults=False)
    composed: Any = OmegaConf.to_container(values, resolve=False)
    given = {f"method.{name}" for name in composed["method"]}
    for name, default in _single_defaults().items():
        value: Any = composed
        for part in name.split("."):
            value = value.get(part)
        if value != (default if isinstance(default, dict) else _UNSET):
            given.add(name)
    return frozenset(given)


_UNSET = "???"  # omegaconf's mark of a missing value


class GivenKeys(Collection[str]):
    """The result of `given_keys`, which is computed when it is first used: a run without a checkpoint never uses it."""

    def __init__(
        self, overrides: Sequence[str] = (), config_name: str = "train", search_path: Sequence[str] = ()
    ) -> None:
        self._arguments = overrides, config_name, search_path

    @functools.cached_property
    def _keys(self) -> frozenset[str]:
        return given_keys(*self._arguments)

    @property
    def arguments(self) -> list[str]:
        """The arguments of `selfdistill train` that set these keys."""
        overrides, config_name, search_path = self._arguments
        name = [] if config_name == "train" else ["--config-name", config_name]
        return [*name, *(part for place in search_path for part in ("--config-dir", str(place))), *overrides]

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _compose(
    overrides: Sequence[str], config_name: str, search_path: Sequence[str], *, defaults: bool = True
) -> DictConfig:
    """Return the composed values; with ``defaults=False``, a key that nothing sets is missing.

    Hydra composes the chosen files first, which takes most of its time, and then applies the overrides of keys.  So the
    project's files are composed once for the same choices; those of a user may change.
    """
    overrides = for_hydra(overrides)
    for directory in search_path:
        if not Path(directory).is_dir():
            raise ConfigError(f"--config-dir {directory}: there is no such directory")
    if search_path:
        directories = ",".join(f"file://{Path(directory).resolve()}" for directory in search_path)
        overrides.append(f"hydra.searchpath=[{directories}]")
    try:
        parsed, options = [_parsed(override) for override in overrides], groups()
        if not all(_is_separate(one, options) for one in parsed):
            return _by_hydra(str(config_dir()), config_name, tuple(overrides), defaults)
        choices = tuple(one.input_line for one in parsed if one.key_or_group in options)
        composed = copy.deepcopy(_files(str(config_dir()), config_name, choices, defaults))
        ConfigLoaderImpl._apply_overrides_to_config(
            [one for one in parsed if one.key_or_group not in options], composed
        )
        return composed
    except (HydraException, OmegaConfBaseException, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(explained(overrides, error)) from error


@functools.cache
def _parsed(override: str) -> Override:
    """Return an override as hydra reads it.  A run reads each of its overrides twice: `load` and `given_keys`."""
    return OverridesParser.create().parse_overrides([override])[0]


def _is_separate(override: Override, options: Collection[str]) -> bool:
    """Return whether ``override`` chooses one file of a group in ``options``, or is about a key of a run alone."""
    name = override.key_or_group
    chooses = name not in options or (isinstance(override.value(), str) and not override.is_delete())
    is_plain = override.package is None and "/" not in name and not name.startswith("hydra")
    return is_plain and not override.is_sweep_override() and chooses


def _by_hydra(directory: str, config_name: str, overrides: tuple[str, ...], defaults: bool) -> DictConfig:
    ConfigStore.instance().store("defaults", _defaults() if defaults else _missing())
    GlobalHydra.instance().clear()
    with initialize_config_dir(directory, version_base="1.3"):
        composed: DictConfig = compose(config_name, overrides=list(overrides))
        return composed


_files = functools.cache(_by_hydra)


def from_mapping(values: Mapping[str, Any] | DictConfig) -> Config:
    """Return the `Config` of nested mappings, in which missing keys have their defaults.

    Raises: `ConfigError` for an unknown key, a wrong type and an impossible value.
    """
    try:
        given = values if isinstance(values, DictConfig) else OmegaConf.merge(values)
        section = OmegaConf.select(given, "method")
        name = str(section.get("name", MethodSettings.name) if isinstance(section, DictConfig) else MethodSettings.name)
        _require_forms(given, name)
        config: Any = OmegaConf.to_object(OmegaConf.merge(_schema(name), values))
        assert isinstance(config, Config)
        return config
    except ConfigError:
        raise
    except (OmegaConfBaseException, ValueError, RecursionError) as error:  # Python's limits on digits and nesting
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        key, reason = getattr(error, "full_key", None) or "", str(error).splitlines()[0]
        if unset := re.search("Environment variable '(.*)' not found", reason):
            reason = f"expected the environment variable {unset[1]}, which is not set: export it"
        raise ConfigError(unknown_key(key) or f"{key or 'a value'}: {reason}") from error


def _require_forms(values: Any, method: str) -> None:
    """Raise `ConfigError` for a value that cannot have the type of its key, and for a section that is no mapping.

    The error is also raised for a setting that the method does not have.
    """
    given: Any = OmegaConf.to_container(values, resolve=False)
    own = method_kinds(method)
    for key, kind in {**kinds(), **own}.items():
        section, _, name = key.rpartition(".")
        part = given
        for one in section.split(".") if section else ():
            part = part.get(one, {})
            require(
                isinstance(part, dict), f"{section} must be a mapping of the keys of this section, got {shown(part)}"
            )
        if name in part:
            require(has_form(kind, part[name]), f"{key} must be {described(kind)}, got {shown(part[name])}")
    for setting in given.get("method", {}):
        message = f"method.name={method} has no setting {setting}"
        require(f"method.{setting}" in own, f"{message}: {_settings_like(setting, own, method)}")


def _settings_like(setting: str, own: Collection[str], method: str) -> str:
    near = difflib.get_close_matches(f"method.{setting}", own, n=1)
    spelt = f"did you mean {near[0]}? " if near else ""
    return f"{spelt}`selfdistill --keys method={method}` lists its settings"


def to_yaml(config: Config) -> str:
    """Return the resolved values as YAML, the form of config.yaml in the run directory."""
    return str(OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config))))


@functools.cache
def _defaults() -> DictConfig:
    """Return the defaults as plain nodes, which accept unknown keys only below the free-form dictionaries.

    All callers share the result, and none changes it.
    """
    node = OmegaConf.create(dataclasses.asdict(Config()) | {"method": {"name": MethodSettings.name}})
    OmegaConf.set_struct(node, True)
    OmegaConf.set_struct(node["method"], False)
    for name, (default, _) in keys().items():
        if isinstance(default, dict):
            OmegaConf.set_struct(OmegaConf.select(node, name), False)
    return node


@functools.cache
def _missing() -> DictConfig:
    """Return the nodes of `_defaults` with missing values."""
    node = copy.deepcopy(_defaults())
    del node["method"]["name"]
    for name, default in _single_defaults().items():
        if not isinstance(default, dict):
            OmegaConf.update(node, name, _UNSET)
    return node


@functools.cache
def _single_defaults() -> dict[str, Any]:
    """Return every key -> its default, and of a section within a section its entries; without the method's name."""
    found = {name: default for name, (default, _) in keys().items() if name not in entries()}
    found |= {f"{key}.{entry}": one for key, part in entries().items() for entry, (one, _) in part.items()}
    del found["method.name"]
    return found


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
