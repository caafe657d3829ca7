# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The way from YAML files and the command line to a `Config`: hydra composes the values, the schema checks them."""

from __future__ import annotations

import ast
import copy
import dataclasses
import difflib
import functools
import inspect
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_selfdistill.config.environment import as_written, environment_values
from megatron_selfdistill.config.paths import config_dir
from megatron_selfdistill.config.schema.field_checks import kinds_of, require
from megatron_selfdistill.config.schema.ranges import described, has_form, shown, taken_apart
from megatron_selfdistill.config.schema.whole_config import Config
from megatron_selfdistill.errors import ConfigError


def load(overrides: Sequence[str] = (), config_name: str = "train", search_path: Sequence[str] = ()) -> Config:
    """Compose ``<config_name>.yaml`` and hydra ``overrides`` into a `Config`.

    ``search_path``: directories with further groups, which are searched after the project's (hydra.searchpath).

    Raises: `ConfigError`, which names the nearest key where a key is unknown.
    """
    return from_mapping(_compose(_defaults(), overrides, config_name, search_path))


def given_keys(
    overrides: Sequence[str] = (), config_name: str = "train", search_path: Sequence[str] = ()
) -> frozenset[str]:
    """Return the keys that the YAML files or the overrides of the same call of `load` set, also to their defaults."""
    unset = copy.deepcopy(_defaults())
    for name, (default, _) in keys().items():
        if not isinstance(default, dict):
            OmegaConf.update(unset, name, _UNSET)
    composed = OmegaConf.to_container(_compose(unset, overrides, config_name, search_path), resolve=False)
    given = set()
    for name, (default, _) in keys().items():
        value: Any = composed
        for part in name.split("."):
            value = value[part]
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
    defaults: DictConfig, overrides: Sequence[str], config_name: str, search_path: Sequence[str]
) -> DictConfig:
    overrides = [_literal(override) for override in overrides]
    for directory in search_path:
        if not Path(directory).is_dir():
            raise ConfigError(f"--config-dir {directory}: there is no such directory")
    if search_path:
        directories = ",".join(f"file://{Path(directory).resolve()}" for directory in search_path)
        overrides.append(f"hydra.searchpath=[{directories}]")
    ConfigStore.instance().store("defaults", defaults)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            composed: DictConfig = compose(config_name, overrides=overrides)
            return composed
    except (HydraException, OmegaConfBaseException, ValueError, yaml.YAMLError) as error:
        raise ConfigError(_explain(overrides, error, search_path)) from error


def _literal(override: str) -> str:
    """Return ``key=value`` for hydra; a value that hydra would not read as a text is quoted if the key takes a text."""
    key, equals, value = override.partition("=")
    if not equals or (key not in _text_keys() and not key.startswith("data.fields.")):
        return override
    if _gives_text(override):
        return override
    quote = Quote.double if "'" in value else Quote.single
    return f"{key}={QuotedString(value, quote).with_quotes()}"


def _gives_text(override: str) -> bool:
    """Return whether hydra reads the value of ``override`` as one text or null."""
    try:
        parsed = _parsed(override)
    except HydraException:
        return False  # such as a path with a colon and a space, which hydra reads once it is quoted
    return not parsed.is_sweep_override() and isinstance(parsed.value(), str | NoneType)


def _parsed(override: str) -> Override:
    return OverridesParser.create().parse_override(override)


@functools.cache
def _text_keys() -> frozenset[str]:
    """Return the keys whose values are texts, or null."""
    return frozenset(name for name, kind in kinds().items() if taken_apart(kind)[0] is str)


@functools.cache
def kinds() -> dict[str, Any]:
    """Return the type of each key, with the range that it declares."""

    def found(cls: type, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, kind in kinds_of(cls).items():
            if dataclasses.is_dataclass(kind):
                yield from found(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
            elif prefix + name in keys():
                yield prefix + name, kind

    return dict(found(Config, ""))


def from_mapping(values: Mapping[str, Any] | DictConfig) -> Config:
    """Return the `Config` of nested mappings, in which missing keys have their defaults.

    Raises: `ConfigError` for an unknown key, a wrong type and an impossible value.
    """
    try:
        _require_forms(values)
        merged = OmegaConf.merge(_schema(), values)
        environment = environment_values(merged)
        config: Any = OmegaConf.to_object(merged)
        resolved: Config = dataclasses.replace(config, from_environment=environment)
        return resolved
    except ConfigError:
        raise
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        key = getattr(error, "full_key", None) or ""
        raise ConfigError(unknown_key(key) or f"{key}: {str(error).splitlines()[0]}") from error


def _require_forms(values: Mapping[str, Any] | DictConfig) -> None:
    """Raise `ConfigError` for a value that cannot have the type of its key, and for a section that is no mapping."""
    given: Any = OmegaConf.to_container(OmegaConf.merge(values), resolve=False)
    for key, kind in kinds().items():
        section, _, name = key.rpartition(".")
        part = given.get(section, {}) if section else given
        require(isinstance(part, dict), f"{section} must be a mapping of the keys of this section, got {shown(part)}")
        if name in part:
            require(has_form(kind, part[name]), f"{key} must be {described(kind)}, got {shown(part[name])}")


def writable(config: Config) -> dict[str, Any]:
    """Return the configuration as nested plain values, for files and for the comparison of runs.

    All values are resolved, except those that were read from the environment: they may be secrets, and the result has
    their interpolations (``${oc.env:NAME}``).  `from_mapping` of the result reads the environment again.
    """
    values = dataclasses.asdict(config)
    del values["from_environment"]
    return as_written(values, config.from_environment)


def to_yaml(config: Config) -> str:
    """Return the values of `writable` as YAML, the form of config.yaml in the run directory."""
    return OmegaConf.to_yaml(OmegaConf.create(writable(config)))


def keys(cls: type = Config, prefix: str = "") -> dict[str, tuple[Any, str]]:
    """Return every key -> (default, documentation), depth first; ``prefix`` stands before each key."""
    out: dict[str, tuple[Any, str]] = {}
    docs = field_docs(cls)
    for f in dataclasses.fields(cls):
        if f.metadata.get("omegaconf_ignore"):
            continue
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if dataclasses.is_dataclass(default):
            out.update(keys(type(default), f"{prefix}{f.name}."))
        else:
            out[prefix + f.name] = (default, docs.get(f.name, ""))
    return out


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """Return name -> doc comment of each field of a dataclass: the string under the field."""
    body = ast.parse(inspect.getsource(cls)).body[0].body  # type: ignore[attr-defined]
    docs = {}
    for node, after in pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(after, ast.Expr):
            docs[node.target.id] = " ".join(str(ast.literal_eval(after.value)).split())
    return docs


@functools.cache
def _defaults() -> DictConfig:
    """Return the defaults as plain nodes, which accept unknown keys only below the free-form dictionaries.

    All callers share the result, and none changes it.
    """
    node = OmegaConf.create(writable(Config()))
    OmegaConf.set_struct(node, True)
    for name, (default, _) in keys().items():
        if isinstance(default, dict):
            OmegaConf.set_struct(OmegaConf.select(node, name), False)
    return node


@functools.cache
def _schema() -> DictConfig:
    """Return the schema as nodes that a merge may write to; a merge copies it, and no caller changes it."""
    schema: DictConfig = OmegaConf.structured(Config)
    _make_writable(schema)
    return schema


def _make_writable(node: Any) -> None:
    """Let the merge write to the nodes of frozen dataclasses, which omegaconf makes read-only."""
    OmegaConf.set_readonly(node, False)
    for name in list(node):
        child = node._get_node(name)
        if isinstance(child, DictConfig) and not child._is_none():
            _make_writable(child)


def _explain(overrides: Sequence[str], error: Exception, search_path: Sequence[str]) -> str:
    """Return a message for hydra's error.

    It names the first override that does not parse, or whose key or option is unknown; else it is hydra's own.
    """
    options = groups()
    for override in overrides:
        if (message := _unparsable(override)) is not None:
            return message
    for override in overrides:
        key, equals, value = override.partition("=")
        if (message := _without_package(key.lstrip("+"), value, search_path)) is not None:
            return message
        if not equals or key.startswith(("hydra", "+", "~")) or "@" in key:
            continue
        if key not in options:
            message = unknown_key(key)
            if message:
                return message
        elif isinstance(error, MissingConfigException) and f"'{key}/{value}'" in str(error):
            near = difflib.get_close_matches(value, options[key], n=1, cutoff=0.0)[0]
            return f"{key}={value}: there is no such file; did you mean {key}={near}?"
        elif f"Could not override '{key}'" in str(error):
            return (
                f"{key}={value}: the recipe has no groups to choose from; end its defaults with /groups (groups.yaml)"
            )
    if isinstance(error, yaml.YAMLError):
        return " ".join(str(error).split())
    first = str(error).splitlines()[0]
    in_file = re.search(r"full_key: (\S+)", str(error))  # hydra names the key of a file only there
    message = unknown_key(in_file[1]) if in_file else None
    return f"{first.split(':')[0]}: {message}" if message else first


def _unparsable(override: str) -> str | None:
    key, equals, value = override.partition("=")
    try:
        sweep = _parsed(override).is_sweep_override()
    except HydraException as error:
        if not equals and not override.startswith("~"):
            return f"expected key=value, got {override!r}"
        reason = str(error).splitlines()[0]
        return f"{override} cannot be read ({reason}): quote the value for hydra and the shell, '{key}=\"{value}\"'"
    return f"{override} gives several values, and a run takes one: quote a text, '{key}=\"{value}\"'" if sweep else None


def _without_package(group: str, option: str, search_path: Sequence[str]) -> str | None:
    """Return a message if the option's file is in ``search_path`` and lacks the line that lets it set all keys."""
    sections = {field.name for field in dataclasses.fields(Config)}
    for directory in search_path:
        file = Path(directory) / group / f"{option}.yaml"
        if group not in sections and file.is_file() and "@package" not in file.read_text(encoding="utf-8"):
            return (
                f"{group}={option}: {file} must begin with the line `# @package _global_`, which lets it set all keys"
            )
    return None


def groups() -> dict[str, list[str]]:
    """Return group -> options of the configs that the project ships."""
    return {
        directory.name: sorted(file.stem for file in directory.glob("*.yaml"))
        for directory in sorted(config_dir().iterdir())
        if directory.is_dir()
    }


def unknown_key(key: str) -> str | None:
    """Return a message that names the nearest key, or None if the key exists."""
    key = key.split("[")[0]  # an element of a list
    known = keys()
    free_form = [name for name, (default, _) in known.items() if isinstance(default, dict)]
    sections = {name.rsplit(".", i)[0] for name in known for i in range(1, name.count(".") + 1)}
    if not key or key in known or key in sections or any(key.startswith(f"{name}.") for name in free_form):
        return None
    names = [*known] if "." in key else [*known, *sections, *groups()]
    near = _nearest(key, names)
    return f"unknown configuration key {key!r}; did you mean {near!r}? (`selfdistill --keys` lists all)"


def _nearest(key: str, names: Sequence[str]) -> str:
    """Return the name with the same last part in another section, or else the name with the most similar spelling."""
    last = key.rpartition(".")[2]
    same_last = [name for name in names if name.rpartition(".")[2] == last]
    return difflib.get_close_matches(key, same_last or names, n=1, cutoff=0.0)[0]
