# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The way from YAML files and the command line to a `Config`: hydra composes the values, the schema checks them.

Texts on the command line stand as they are, and an error of hydra is one sentence.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_selfdistill.config.key_list import config_dir, keys, long_names, method_keys, unknown_key
from megatron_selfdistill.config.methods import method_names, settings_class
from megatron_selfdistill.config.schema.field_checks import require
from megatron_selfdistill.config.schema.method_config import MethodSettings
from megatron_selfdistill.config.schema.ranges import shown, taken_apart
from megatron_selfdistill.config.schema.whole_config import Config
from megatron_selfdistill.errors import ConfigError

_UNSET = "???"  # omegaconf's mark of a missing value
_MAX_SHOWN = 100


def load(overrides: Sequence[str] = (), config_name: str = "train", search_path: Sequence[str] = ()) -> Config:
    """Compose ``<config_name>.yaml`` and hydra ``overrides`` into a `Config`.

    ``search_path``: directories with further groups, which are searched after the project's (hydra.searchpath).

    Raises: `ConfigError`, which names the nearest key where a key is unknown.
    """
    return from_mapping(_composed(overrides, config_name, search_path))


class GivenKeys(frozenset[str]):
    """The keys that the YAML files or the overrides of a call of `load` set, also to their defaults."""

    arguments: list[str]
    """The arguments of `selfdistill train` that set these keys."""

    def __new__(
        cls, overrides: Sequence[str] = (), config_name: str = "train", search_path: Sequence[str] = ()
    ) -> GivenKeys:
        """Return the keys that the arguments of `load` set."""
        given = _composed(overrides, config_name, search_path)
        found = {f"method.{name}" for name in given.get("method", {})}
        for name in keys():
            value: Any = given
            for part in name.split("."):
                value = value.get(part, _UNSET) if isinstance(value, dict) else _UNSET
            if value not in (_UNSET, {}):
                found.add(name)
        made = super().__new__(cls, found)
        name_of_file = [] if config_name == "train" else ["--config-name", config_name]
        places = [part for place in search_path for part in ("--config-dir", str(place))]
        made.arguments = [*name_of_file, *places, *overrides]
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
    for name, (default, *_) in keys().items():
        if name != "method.name":
            OmegaConf.update(node, name, {} if isinstance(default, dict) else _UNSET)
    OmegaConf.set_struct(node, True)
    for name in ["method", *(name for name, (default, *_) in keys().items() if isinstance(default, dict))]:
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


def for_hydra(overrides: Sequence[str]) -> list[Override]:
    """Return the overrides as hydra reads them; the text of a key that takes a text stands as it is.

    Raises: `ConfigError` for an override that cannot be read, and for one that gives several values.
    """
    return [_parsed(_literal(override)) for override in long_names(overrides)]


def explained(error: Exception) -> str:
    """Return hydra's or omegaconf's error as one sentence, with the nearest key if a key is unknown."""
    text = re.sub(" Config search path: .*", "", " ".join(f"{error} {error.__cause__ or ''}".split()) or repr(error))
    named = re.findall(r"full_key: (\S+)|Could not override '([^'@]+)'\.", text)
    message = unknown_key(max(map("".join, named), key=len, default=""))
    if message is not None:
        file = re.match("In '[^']*'", text)
        return f"{file[0]}: {message}" if file else message
    other = re.search("not find 'model/([^']*)'", text)
    advice = "plan a converted one: checkpoint.load=DIR" if other and "/" in other[1] else "a directory is model=./DIR"
    return f"{text}; {advice}" if other else text


@functools.cache
def _parsed(override: str) -> Override:
    key, equals, value = override.partition("=")
    require(bool(equals and key) or key.startswith("~"), f"expected key=value, got {shown(override)}")
    advice = f"quote a text for hydra and the shell, '{key}=\"{value[:_MAX_SHOWN]}\"'"
    try:
        parsed = OverridesParser.create().parse_override(override)
    except (HydraException, ValueError, RecursionError) as error:  # Python's limits on digits and on nesting
        raise ConfigError(f"{shown(override)} cannot be read ({str(error).splitlines()[0]}): {advice}") from error
    require(not parsed.is_sweep_override(), f"{override} gives several values, and a run takes one: {advice}")
    return parsed


def _literal(override: str) -> str:
    """Return ``key=value`` for hydra; a value that hydra would not read as a text is quoted if the key takes a text."""
    key, equals, value = override.partition("=")
    if not equals or not _takes_text(key) or _gives_text(override):
        return override
    quote = Quote.double if "'" in value else Quote.single
    return f"{key}={QuotedString(value, quote).with_quotes()}"


def _gives_text(override: str) -> bool:
    try:
        return isinstance(_parsed(override).value(), str | NoneType)
    except ConfigError:
        return False  # such as a path with a colon and a space, which hydra reads once it is quoted


def _takes_text(key: str) -> bool:
    if key in _text_keys() or key.startswith("data.fields."):
        return True
    return key.startswith("method.") and key in _text_settings()  # which imports the methods


@functools.cache
def _text_keys() -> frozenset[str]:
    return frozenset(name for name, key in keys().items() if taken_apart(key.kind)[0] is str)


@functools.cache
def _text_settings() -> frozenset[str]:
    settings = [item for method in method_names() for item in method_keys(method).items()]
    return frozenset(name for name, key in settings if taken_apart(key.kind)[0] is str)
