# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The overrides of a command line: refusals of what hydra accepts without effect, and messages for hydra's errors."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Sequence
from types import NoneType

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException

from megatron_selfdistill.config.key_list import groups, keys, kinds, long_names, method_kinds, unknown_key
from megatron_selfdistill.config.methods import method_names
from megatron_selfdistill.config.schema.field_checks import require
from megatron_selfdistill.config.schema.ranges import shown, taken_apart
from megatron_selfdistill.config.words import WORDS

_MAX_CHARACTERS = 10_000  # hydra takes a second to read a list of this length, and minutes for one of ten times as much


def for_hydra(overrides: Sequence[str]) -> list[str]:
    """Return the overrides in hydra's grammar, with quoted texts.

    Raises: `ConfigError` for an override that hydra would accept without effect, or would read for minutes.
    """
    chosen: dict[str, str] = {}
    options, overrides = groups(), long_names(overrides)
    for override in overrides:
        _refuse_without_effect(override)
        name, _, value = override.lstrip("+").partition("=")
        if name in options:
            _require_option(name, override)
            before = value if value.startswith("{") else chosen.setdefault(name, value)
            require(
                before == value,
                f"{name}={before} and {name}={value} each choose a file of the group {name}, and a run takes one: "
                "remove one of them",
            )
    return [_literal(override) for override in overrides]


def explained(overrides: Sequence[str], error: Exception) -> str:
    """Return a message for hydra's error.

    It names the first override that does not parse, or whose key or option is unknown; else it is hydra's own.
    """
    for override in overrides:
        if (message := _unparsable(override)) is not None:
            return message
    if isinstance(error, RecursionError | UnicodeDecodeError):  # a cycle of defaults, a file that is not in UTF-8
        return f"a file or a value of the configuration cannot be read: {error}"
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or key.startswith(("hydra", "+", "~")) or "@" in key:
            continue
        if key not in groups():
            given = _parsed(override).value()
            names = [key, *(f"{key}.{name}" for name in (given if isinstance(given, dict) else ()))]
            if message := next(filter(None, map(unknown_key, names)), None):
                return message
        elif f"Could not override '{key}'" in str(error):
            return (
                f"{key}={value}: the recipe has no groups to choose from; end its defaults with /groups (groups.yaml)"
            )
    if isinstance(error, MissingConfigException | yaml.YAMLError):
        pairs = (one.partition("=") for one in overrides)
        meant = next((f"; did you mean {WORDS[key]}={value}?" for key, _, value in pairs if key in WORDS), "")
        return " ".join(str(error).split()).partition(" Config search path:")[0] + meant
    reason = _reason(error)
    in_file = re.search(r"full_key: (\S+)", str(error))  # hydra names the key of a file only there
    message = unknown_key(in_file[1]) if in_file else None
    return f"{reason.split(':')[0]}: {message}" if message else reason


def _refuse_without_effect(override: str) -> None:
    key, equals, value = override.partition("=")
    name = key.lstrip("+~")
    require(bool(equals and name.strip()) or key.startswith("~"), f"expected key=value, got {shown(override)}")
    require(
        not key.startswith("~") or _is_removable(name),
        f"{override}: expected a group or an entry of a mapping, such as ~model.transformer.NAME: set another value",
    )
    require(
        re.match("hydra([./@]|$)", name) is None or name == "hydra.searchpath",
        f"{override} has no effect: the only setting of hydra's own that a run reads is hydra.searchpath",
    )
    require(
        len(value) <= _MAX_CHARACTERS or _takes_text(name),
        f"{name} has a value of {len(value)} characters, more than the {_MAX_CHARACTERS} that a command line may have: "
        "put the value into a YAML file of your own (--config-dir)",
    )


def _is_removable(name: str) -> bool:
    mappings = [known for known, (default, _) in keys().items() if isinstance(default, dict)]
    return (name in groups() and name != "recipe") or any(f"{name}.".startswith(f"{known}.") for known in mappings)


def _require_option(group: str, override: str) -> None:
    """Raise `ConfigError` unless ``override`` chooses a file of the group, or has the values of the section itself."""
    with contextlib.suppress(HydraException):  # the message of `_unparsable` follows
        value = _parsed(override).value()
        is_name = bool(value) and isinstance(value, str | QuotedString) and "${" not in str(value)
        require(
            is_name or (isinstance(value, dict) and bool(value)),
            f"{override}: expected the name of a file, one of {', '.join(groups()[group])}: choose one, or leave "
            f"{group} out",
        )


def _literal(override: str) -> str:
    """Return ``key=value`` for hydra; a value that hydra would not read as a text is quoted if the key takes a text."""
    key, equals, value = override.partition("=")
    if not equals or not _takes_text(key) or _gives_text(override):
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
    try:
        return OverridesParser.create().parse_override(override)
    except (ValueError, RecursionError) as error:  # Python's limits on digits and on nesting
        raise HydraException(str(error)) from error


def _takes_text(key: str) -> bool:
    if key in _text_keys() or key.startswith("data.fields."):
        return True
    return key.startswith("method.") and key in _text_settings()  # which imports the methods


@functools.cache
def _text_keys() -> frozenset[str]:
    """Return the keys whose values are texts, or null."""
    return frozenset(name for name, kind in kinds().items() if taken_apart(kind)[0] is str)


@functools.cache
def _text_settings() -> frozenset[str]:
    """Return the keys of the project's methods whose values are texts, or null."""
    settings = [item for method in method_names() for item in method_kinds(method).items()]
    return frozenset(name for name, kind in settings if taken_apart(kind)[0] is str)


def _unparsable(override: str) -> str | None:
    key, _, value = override.partition("=")
    try:
        sweep = _parsed(override).is_sweep_override()
    except HydraException as error:
        reason = str(error).splitlines()[0]
        if len(override) > _MAX_CHARACTERS // 10:
            return f"the value of {key} cannot be read ({reason})"
        return f"{override} cannot be read ({reason}): quote the value for hydra and the shell, '{key}=\"{value}\"'"
    return f"{override} gives several values, and a run takes one: quote a text, '{key}=\"{value}\"'" if sweep else None


def _reason(error: Exception) -> str:
    """Return the first line of hydra's error, with that of its cause where hydra's says nothing about it."""
    first, *others = [*str(error).splitlines(), ""]
    if error.__cause__ is not None:
        others += str(error.__cause__).splitlines()
    if first and not re.search("Error merging|raised while composing", first):
        return first
    return f"{first.removesuffix(':')}: {next(filter(None, others), repr(error))}".removeprefix(": ")
