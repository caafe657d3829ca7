# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The choice of the cases for ``make test``; the other cases have the mark ``full``, for ``make test-all``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import pytest

Combination = tuple[str, ...]


def combinations(
    *,
    strength: int = 2,
    full_strength: int | None = None,
    quick: Mapping[str, Collection[str]] | None = None,
    valid: Callable[..., bool] = lambda **values: True,
    **axes: Mapping[str, Any] | Iterable[Any],
) -> pytest.MarkDecorator:
    """Parametrize a test over the valid combinations of the axes' values; mark those ``full`` that the cover leaves.

    With ``full_strength``, only those combinations are full which a cover of this strength has beside the first one.
    The first cover has every combination of the values of any ``strength`` axes at least once: 2 covers pairwise, 1 has
    every value once.  An axis is a mapping from names to values, or values that name themselves.  ``quick`` names the
    values of an axis that occur in the first cover; of other axes all values do.  ``valid`` is called with one value
    per axis.
    """
    named = {axis: _named(values) for axis, values in axes.items()}
    cases = [
        case
        for case in itertools.product(*named.values())
        if valid(**{axis: values[name] for (axis, values), name in zip(named.items(), case, strict=True)})
    ]
    allowed = {axis: set(names) for axis, names in (quick or {}).items()}
    for axis, names in allowed.items():
        if unknown := names - named[axis].keys():
            raise ValueError(f"expected values of the axis {axis}, got {sorted(unknown)}; it has {list(named[axis])}")
    candidates = [case for case in cases if all(case[list(named).index(axis)] in allowed[axis] for axis in allowed)]
    cover = cover_of(candidates, strength)
    chosen = set(cases if full_strength is None else cover + cover_of(cases, full_strength, known=cover))

    def param(case: Combination) -> Any:
        values = [of_axis[name] for of_axis, name in zip(named.values(), case, strict=True)]
        return pytest.param(*values, id="-".join(case), marks=() if case in cover else pytest.mark.full)

    params = [param(case) for case in cases if case in chosen]
    return pytest.mark.parametrize(tuple(named) if len(named) > 1 else next(iter(named)), params)


def cover_of(cases: Iterable[Combination], strength: int, known: Iterable[Combination] = ()) -> list[Combination]:
    """Return few cases that have, beside ``known``, every ``strength`` values that occur together; chosen greedily."""
    tuples = {
        case: {frozenset(part) for part in itertools.combinations(enumerate(case), min(strength, len(case)))}
        for case in cases
    }
    missing = set().union(*tuples.values()).difference(*(tuples[case] for case in known))
    cover = []
    while missing:
        best = max(tuples, key=lambda case: len(tuples[case] & missing))  # the first of equals
        cover.append(best)
        missing -= tuples[best]
    return cover


def _named(values: Mapping[str, Any] | Iterable[Any]) -> dict[str, Any]:
    return dict(values) if isinstance(values, Mapping) else {str(value): value for value in values}
