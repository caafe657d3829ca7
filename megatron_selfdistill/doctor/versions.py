# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Versions of packages and the versions that are wanted, such as ``>=0.16.1,<0.17``, without any package."""

from __future__ import annotations

import operator
import re

_CLAUSE = re.compile(r"(>=|<|==)([0-9][0-9a-z.+]*)")
_COMPARISONS = {">=": operator.ge, "<": operator.lt, "==": operator.eq}


def is_readable(wanted: str) -> bool:
    """Return whether `satisfies` reads every clause of ``wanted``."""
    return all(map(_CLAUSE.fullmatch, wanted.split(",")))


def satisfies(version: str, wanted: str) -> bool:
    """Return whether ``version`` satisfies ``wanted``, a list of >=, < and ==.

    Only the leading numbers count: a local build or a release candidate equals its release.
    """
    for clause in filter(None, wanted.split(",")):
        match = _CLAUSE.fullmatch(clause.strip())
        assert match is not None, clause
        both = [numbers(text) for text in (version, match.group(2))]
        length = max(map(len, both))
        have, limit = (part + [0] * (length - len(part)) for part in both)
        if not _COMPARISONS[match.group(1)](have, limit):
            return False
    return True


def newer(version: str, newest: str) -> bool:
    """Return whether ``version`` is beyond ``newest`` as far as the numbers of ``newest`` go.

    2.14 is beyond 2.13; 2.13.1 is not.
    """
    known = numbers(newest)
    return numbers(version)[: len(known)] > known


def without_upper_bound(wanted: str) -> str:
    """Return ``wanted`` without its clauses that begin with <."""
    return ",".join(clause for clause in wanted.split(",") if not clause.strip().startswith("<"))


def numbers(version: str) -> list[int]:
    """Return the leading numbers of a version; [0] if there are none."""
    leading = re.match(r"[0-9]+(\.[0-9]+)*", version)
    return [int(part) for part in leading.group().split(".")] if leading else [0]
