# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The overrides of a command line: texts that stand as they are, and one sentence for hydra's errors."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from types import NoneType

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from megatron_selfdistill.config.key_list import kinds, long_names, method_kinds, unknown_key
from megatron_selfdistill.config.methods import method_names
from megatron_selfdistill.config.schema.field_checks import require
from megatron_selfdistill.config.schema.ranges import shown, taken_apart
from megatron_selfdistill.errors import ConfigError

_MAX_SHOWN = 100


def for_hydra(overrides: Sequence[str]) -> list[Override]:
    """Return the overrides as hydra reads them; the text of a key that takes a text stands as it is.

    Raises: `ConfigError` for an override that cannot be read, and for one that gives several values.
    """
    return [_parsed(_literal(override)) for override in long_names(overrides)]


def explained(error: Exception) -> str:
    """Return hydra's or omegaconf's error as one sentence, with the nearest key if a key is unknown."""
    whole = " ".join(f"{error} {error.__cause__ or ''}".split()) or repr(error)
    text = re.sub(" Config search path: .*", "", whole)
    named = re.findall(r"full_key: (\S+)|Could not override '([^'@]+)'\.", text)
    message = unknown_key(max(map("".join, named), key=len, default=""))
    if message is not None:
        file = re.match("In '[^']*'", text)
        return f"{file[0]}: {message}" if file else message
    return text


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
    """Return whether hydra reads the value of ``override`` as one text or null."""
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
    """Return the keys whose values are texts, or null."""
    return frozenset(name for name, kind in kinds().items() if taken_apart(kind)[0] is str)


@functools.cache
def _text_settings() -> frozenset[str]:
    """Return the keys of the project's methods whose values are texts, or null."""
    settings = [item for method in method_names() for item in method_kinds(method).items()]
    return frozenset(name for name, kind in settings if taken_apart(kind)[0] is str)
