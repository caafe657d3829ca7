# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The ranges of keys: a field of a section declares the values that it accepts in its type, inside ``Annotated``."""

from __future__ import annotations

import functools
import operator
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

_COMPARISONS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}
_MAX_SHOWN = 200


@dataclass(frozen=True)
class Bound:
    """One end of a range of numbers."""

    words: str
    """The comparison: at least, above, at most or below."""
    limit: float

    def __str__(self) -> str:
        return f"{self.words} {self.limit}"

    def holds(self, value: Any) -> bool:
        """Return whether a number lies on the right side of the limit; other values have no side."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return not is_number or bool(_COMPARISONS[self.words](value, self.limit))


@dataclass(frozen=True)
class OneOf:
    """A list of choices."""

    choices: tuple[Any, ...]
    or_dotted: bool = False
    """Whether a dotted path of the user's own code is accepted, too."""
    or_number: bool = False
    """Whether a number is accepted, too."""

    def __str__(self) -> str:
        others = ["a dotted path (package.module.function)"] * self.or_dotted + ["a number"] * self.or_number
        shown = [*map(_in_yaml, self.choices), *others]
        return f"one of {', '.join(shown)}" if len(shown) > 1 else shown[0]

    def holds(self, value: Any) -> bool:
        """Return whether ``value`` is a choice; true is not 1."""
        if isinstance(value, int | float) and not isinstance(value, bool):
            return self.or_number
        return value in self.choices or (self.or_dotted and isinstance(value, str) and is_dotted(value))


@dataclass(frozen=True)
class NumberOrRamp(OneOf):
    """Positive whole numbers, lists [FIRST, LAST, STEPS] of a number that grows from FIRST to LAST, and choices."""

    def __str__(self) -> str:
        return (
            f"a positive whole number, [FIRST, LAST, STEPS] of such numbers with LAST >= FIRST, or {super().__str__()}"
        )

    def holds(self, value: Any) -> bool:
        """Return whether ``value`` is a choice, a positive whole number or such a list; true is not 1."""
        numbers = value if isinstance(value, list) else [value]
        if not all(type(one) is int and 0 < one <= MAX_INT for one in numbers):
            return value in self.choices
        return not isinstance(value, list) or (len(value) == 3 and value[0] <= value[1])


@dataclass(frozen=True)
class AnyText:
    """Texts without choices, which files and programs can hold: in UTF-8, and without the character NUL."""

    words: str
    may_be_empty: bool = True
    is_path: bool = False
    """Whether a leading ``~`` stands for the user's home directory."""

    def __str__(self) -> str:
        return self.words if self.may_be_empty else f"{self.words} that is not empty"

    def holds(self, value: Any) -> bool:
        """Return whether files and programs can hold ``value``."""
        is_utf8 = not re.search("[\ud800-\udfff]", str(value))
        return is_utf8 and "\0" not in str(value) and (self.may_be_empty or bool(value))


@dataclass(frozen=True)
class DifferentEntries:
    """Lists that hold each entry once."""

    def __str__(self) -> str:
        return "a list of different entries"

    def holds(self, value: Any) -> bool:
        """Return whether no entry of ``value`` stands there twice."""
        return len(set(value)) == len(value)


at_least = functools.partial(Bound, "at least")
above = functools.partial(Bound, "above")
at_most = functools.partial(Bound, "at most")
below = functools.partial(Bound, "below")

MAX_INT = 2**31 - 1
"""The largest count: devices and engines hold lengths, ids and sizes in 32 bits."""
MAX_NUMBER = 10**9
"""The largest quantity: the product of four such numbers is still finite in float32."""
MAX_WAIT = 10**6
"""The longest time to wait, in seconds or minutes, which every clock can count."""

PositiveInt = Annotated[int, at_least(1), at_most(MAX_INT)]
NonNegativeInt = Annotated[int, at_least(0), at_most(MAX_INT)]
Ranks = Annotated[int, at_least(1), at_most(2**20)]
Seed = Annotated[int, at_least(0), at_most(2**32 - 1)]  # what numpy and torch accept
PositiveFloat = Annotated[float, above(0), at_most(MAX_NUMBER)]
NonNegativeFloat = Annotated[float, at_least(0), at_most(MAX_NUMBER)]
Share = Annotated[float, at_least(0), at_most(1)]
Decay = Annotated[float, at_least(0), below(1)]
LogProb = Annotated[float, at_least(-MAX_NUMBER), at_most(0)]
Temperature = Annotated[float, at_least(0.01), at_most(10**6)]  # logits that are divided by it stay finite
DottedPath = Annotated[str, OneOf((), or_dotted=True)]
Text = Annotated[str, AnyText("a text")]
Name = Annotated[str, AnyText("a text", may_be_empty=False)]
FilePath = Annotated[str, AnyText("a path", is_path=True)]
Directory = Annotated[str, AnyText("a path", may_be_empty=False, is_path=True)]

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Any: "a value"}


def is_dotted(value: str) -> bool:
    """Return whether ``value`` has the form of a dotted path, package.module.function."""
    parts = value.split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts)


def taken_apart(kind: Any) -> tuple[Any, tuple[Any, ...], bool]:
    """Return the plain type of a field's type, the ranges that it declares, and whether it accepts null."""
    nullable = get_origin(kind) in (Union, types.UnionType)
    if nullable:
        (kind,) = (one for one in get_args(kind) if one is not types.NoneType)
    plain, *ranges = get_args(kind) if get_origin(kind) is Annotated else (kind,)
    return plain, tuple(ranges), nullable


def described(kind: Any) -> str:
    """Return the values that a field of the type ``kind`` accepts, in words."""
    plain, ranges, nullable = taken_apart(kind)
    if get_origin(plain) is list:
        words = f"{ranges[0] if ranges else 'a list'}, each {described(get_args(plain)[0])}"
    elif get_origin(plain) is dict:
        words = "a mapping"
    else:
        bounds = " and ".join(str(one) for one in ranges if isinstance(one, Bound))
        first = next((str(one) for one in ranges if not isinstance(one, Bound)), _NAMES[plain])
        words = f"{first}, {bounds}" if bounds else first
    return f"{words}, or null" if nullable else words


def faults(key: str, kind: Any, value: Any) -> Iterator[str]:
    """Yield a message for each part of ``value`` that lies outside of the range of the type ``kind``.

    ``key`` is the key with this value, for messages.  The value has the plain type of ``kind``, or is null.
    """
    plain, ranges, nullable = taken_apart(kind)
    if value is None and plain is not Any:
        return
    form = get_origin(plain)
    is_no_text = plain is str and isinstance(value, int | float | list | dict)
    if not isinstance(value, form) if form is not None else is_no_text:
        yield f"{key} must be {described(kind)}, got {shown(value)}"
    for one in ranges:
        if not one.holds(value):
            yield f"{key} must be {one}{', or null' * nullable}, got {shown(value)}"
    if isinstance(value, dict):
        kind_of_entry = get_args(plain)[1] if get_origin(plain) is dict else Any
        for name, entry in value.items():
            yield from faults(f"{key}.{name}", kind_of_entry, entry)
    elif isinstance(value, list):
        kind_of_entry = get_args(plain)[0] if get_origin(plain) is list else Any
        for place, entry in enumerate(value):
            yield from faults(f"{key}[{place}]", kind_of_entry, entry)


def shown(value: Any) -> str:
    """Return ``value`` for a message, which shows the beginning of a long value."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]} .. ({len(text)} characters)"


def _in_yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
