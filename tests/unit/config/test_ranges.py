# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Every key declares a range, and a value outside of it is one message that names the key."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterator
from typing import Any, get_args, get_origin

import pytest

from megatron_selfdistill.config import Config, from_mapping
from megatron_selfdistill.config.key_list import keys
from megatron_selfdistill.config.schema.ranges import AnyText, Bound, OneOf, taken_apart
from megatron_selfdistill.errors import ConfigError

KINDS = {name: key.kind for name, key in keys().items()}


def lacks_range(kind: Any) -> bool:
    """Return whether a value of the type ``kind`` can be anything although a range could be declared."""
    plain, ranges, _ = taken_apart(kind)
    ends = {one.words for one in ranges if isinstance(one, Bound)}
    is_bounded = bool(ends & {"at least", "above"}) and bool(ends & {"at most", "below"})
    choices = next((one for one in ranges if isinstance(one, OneOf)), None)
    if plain in (int, float):
        return not is_bounded
    if plain is str:
        return choices is None and not any(isinstance(one, AnyText) for one in ranges)
    if plain is Any:
        return choices is None or (choices.or_number and not is_bounded)
    if get_origin(plain) is list:
        return lacks_range(get_args(plain)[0])
    return plain is not bool and get_origin(plain) is not dict  # a mapping has the names of other programs


def test_every_key_declares_the_range_of_its_values():
    without = [key for key, kind in KINDS.items() if lacks_range(kind)]
    assert without == [], "these keys need a range of config/schema/ranges.py in their types"


# -- values outside of the range ---------------------------------------------------------------------------------------


def beyond(kind: Any) -> Iterator[Any]:
    """Yield values of the right type outside of the range of ``kind``: next to each end, and far from it."""
    plain, ranges, _ = taken_apart(kind)
    for one in ranges:
        if isinstance(one, Bound):
            away = -1 if one.words in ("at least", "above") else 1
            yield one.limit if one.words in ("above", "below") else _next(plain, one.limit, away)
            yield from [one.limit + away, away * 2**70]
            if plain is not int:
                yield from [away * 1e300, away * math.inf, math.nan]
        elif isinstance(one, OneOf):
            yield from ["no such choice", "a..b", ""]
        elif isinstance(one, AnyText):
            yield from ["no\0text", "\udcff", *([] if one.may_be_empty else [""])]
    if get_origin(plain) is list:
        yield from ([wrong] for wrong in beyond(get_args(plain)[0]))
        yield from [[accepted(get_args(plain)[0])] * 2] if ranges else []
    if get_origin(plain) is dict and get_args(plain)[1] is not Any:
        yield from ({"problem": wrong} for wrong in [*beyond(get_args(plain)[1]), [1], {"b": 1}])


def of_another_type(kind: Any) -> Iterator[Any]:
    """Yield values that are no values of the type ``kind``, as YAML files and the command line have them."""
    plain, ranges, nullable = taken_apart(kind)
    wrong: dict[Any, list[Any]] = {int: ["three", "", 2.5, math.nan, [1]], float: ["three", "1e", [1]], bool: ["maybe"]}
    yield from wrong.get(plain, ["text", 3] if get_origin(plain) in (list, dict) else [])
    if not nullable and not any(isinstance(one, OneOf) and None in one.choices for one in ranges):
        yield None


def accepted(kind: Any) -> Any:
    """Return a value in the range of the type ``kind``."""
    plain, ranges, _ = taken_apart(kind)
    if plain is str:
        return next((one.choices[0] for one in ranges if isinstance(one, OneOf) and one.choices), "a.b")
    return next(one.limit for one in ranges if isinstance(one, Bound) and one.words in ("at least", "at most"))


def _next(plain: Any, limit: float, away: int) -> float:
    return limit + away if plain is int else math.nextafter(limit, away * math.inf)


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]


def section_with(key: str, value: Any) -> object:
    """Make the section of ``key`` alone, which takes a thousandth of the time of a whole configuration."""
    section, _, name = key.rpartition(".")
    cls: Any = type(operator.attrgetter(section)(Config())) if section else Config
    return cls(**{name: value})


def test_a_value_outside_of_the_range_of_a_key_is_refused_in_one_sentence_with_the_key():
    for key, kind in KINDS.items():
        plain, _, nullable = taken_apart(kind)
        for value in beyond(kind):
            if value == "" and plain is str and nullable:
                continue  # it becomes null
            with pytest.raises(ConfigError) as caught:
                print(f"{key}={value!r} is accepted:", section_with(key, value))
            text = str(caught.value)
            assert text.startswith(key) and "\n" not in text and len(text) < 1000, text


@pytest.mark.full
def test_a_value_of_another_type_is_one_sentence_with_the_key():
    """All wrong values of the first key of each type, since a type reads all its keys."""
    firsts = {str(taken_apart(kind)): (key, kind) for key, kind in reversed(KINDS.items())}
    for key, kind in firsts.values():
        for value in of_another_type(kind):
            with pytest.raises(ConfigError, match=rf"^[^\n]*{re.escape(key)}[^\n]*$"):
                print(f"{key}={value!r} is accepted:", from_mapping(nested(key, value)))


def test_the_ends_of_a_range_are_accepted():
    ends = {"target.teacher_weight": 1000, "rollout.top_p": 1, "seed": 2**32 - 1, "guards.patience": 1}
    for key, value in ends.items():
        section_with(key, value)
