# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The values that code of users returns: numbers and truths also as NumPy and torch have them, and texts."""

from __future__ import annotations

import contextlib
import math
import operator
from typing import Any, SupportsFloat

from megatron_selfdistill.data.records import NO_TEXT, is_text


def finite_number(value: object, name: str) -> float:
    """Return ``value`` as a float: a number of Python or NumPy, or a tensor or an array of one number.

    ``name``: what the message calls the value.  Raises: ValueError for another type, NaN and infinity.
    """
    number = math.nan
    if isinstance(value, SupportsFloat):
        with contextlib.suppress(TypeError, ValueError, RuntimeError, OverflowError):  # such as a tensor of two numbers
            number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number as {name}, got {value!r:.80}")
    return number


def whole_number(value: object) -> int | None:
    """Return ``value`` as an int, also from NumPy or torch; None for a boolean and for all that is no whole number."""
    try:
        return None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def plain(value: Any) -> Any:
    """Return the Python value of a scalar of NumPy, or of a tensor or an array without dimensions; else ``value``."""
    return value.item() if getattr(value, "shape", None) == () else value


def text_or_none(value: object) -> str | None:
    """Return ``value``, a text or None.  Raises: ValueError for another type, and for half of a surrogate pair."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"expected a text or None, got a value of type {type(value).__name__}")
    if not is_text(value):
        raise ValueError(NO_TEXT)
    return value
