# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The versions beyond the upper bounds of setup.py that no commit has tried: what NEWEST=1 reports.

    python tools/newest_versions.py

The script asks the package index about every requirement with an upper bound, in all extras.  It prints a line for each
package that has had a newer minor version for more than 30 days, for any Python, unless tools/tried_versions.toml has
this minor version or a later one.  Where a bound is a major version, as in <6, the same holds for major versions.
Releases before a final one and yanked releases do not count.

The script exits with 1 if it prints a line, and with 2 if the index does not answer.  The variable PIP_INDEX_URL names
another index, which must answer in JSON, as PyPI's https://pypi.org/simple does.
"""

from __future__ import annotations

import ast
import datetime
import http.client
import json
import os
import re
import sys
import tomllib
import urllib.request
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import InvalidSdistFilename, InvalidWheelFilename, parse_sdist_filename, parse_wheel_filename
from packaging.version import InvalidVersion, Version

REPOSITORY = Path(__file__).resolve().parent.parent
SETUP, TRIED = REPOSITORY / "setup.py", REPOSITORY / "tools" / "tried_versions.toml"
PYPI = "https://pypi.org/simple"
JSON = "application/vnd.pypi.simple.v1+json"
PATIENCE = datetime.timedelta(days=30)
"""The time for which a newer version may be there before it is reported."""
LIMIT_S = 60.0
"""The limit in seconds for one answer of the index."""


class IndexUnreadableError(RuntimeError):
    """The package index does not answer, or not in the form that `releases` reads."""


@dataclass(frozen=True)
class Release:
    """A final release that is not yanked."""

    version: Version
    uploaded: datetime.datetime
    """The time of its first file."""
    pythons: str
    """The Pythons that it is for, such as ``>=3.12``; empty if it does not say."""


def main() -> int:
    """Print the newer versions that no commit has tried; return 1 if there are any, 2 without an answer, else 0."""
    bounds = upper_bounds(requirements(SETUP.read_text(encoding="utf-8")))
    record = tried(TRIED.read_text(encoding="utf-8"))
    today = datetime.datetime.now(datetime.UTC)
    try:
        with ThreadPoolExecutor(8) as pool:
            names = sorted({name for name, _ in bounds})
            served = dict(zip(names, pool.map(releases, names), strict=True))
    except IndexUnreadableError as error:
        print(f"[newest versions] {error}", file=sys.stderr)
        return 2
    found = [untried(name, bound, served[name], record.get(name, ()), today) for name, bound in bounds]
    for line in filter(None, found):
        print(f"[newest versions] {line}")
    if not any(found):
        print(f"[newest versions] setup.py or tools/{TRIED.name} has every newer version of {len(names)} packages")
    return 1 if any(found) else 0


def requirements(setup: str) -> list[Requirement]:
    """Return the requirements in the source of setup.py, those of all extras included; the source is not run."""
    constants = {
        getattr(node.targets[0], "id", ""): ast.literal_eval(node.value)
        for node in ast.parse(setup).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in ("REQUIREMENTS", "EXTRAS")
    }
    lines = [*constants["REQUIREMENTS"], *(line for extra in constants["EXTRAS"].values() for line in extra)]
    return list(map(Requirement, lines))


def upper_bounds(required: Iterable[Requirement]) -> list[tuple[str, Version]]:
    """Return the names with their upper bounds, sorted, each pair once.

    Of the requirements of one package that have markers, only the highest bound counts, and none if one of them has
    none: the others are for other Pythons.
    """
    bounds: set[tuple[str, Version]] = set()
    by_marker: dict[str, list[Version | None]] = {}
    for one in required:
        bound = min((Version(clause.version) for clause in one.specifier if clause.operator == "<"), default=None)
        if one.marker is not None:
            by_marker.setdefault(one.name, []).append(bound)
        elif bound is not None:
            bounds.add((one.name, bound))
    for name, some in by_marker.items():
        known = [bound for bound in some if bound is not None]
        if len(known) == len(some):
            bounds.add((name, max(known)))
    return sorted(bounds)


def tried(text: str) -> dict[str, list[Version]]:
    """Return the versions that tools/tried_versions.toml has, by package."""
    found: dict[str, list[Version]] = {}
    for entry in tomllib.loads(text).get("tried", []):
        if entry.keys() != {"package", "version", "date", "found"} or not isinstance(entry["date"], datetime.date):
            raise ValueError(f"expected package, version, date and found in {TRIED.name}, got {entry}")
        found.setdefault(entry["package"], []).append(Version(entry["version"]))
    return found


def untried(
    name: str, bound: Version, served: Iterable[Release], known: Iterable[Version], today: datetime.datetime
) -> str | None:
    """Return a sentence about the newest minor version that `PATIENCE` has passed and nobody has tried, else None."""
    fixed = _fixed(bound)
    beyond: dict[tuple[int, ...], list[Release]] = {}
    for release in served:
        if release.version >= bound:
            beyond.setdefault(_series(release.version, fixed), []).append(release)
    due = [series for series, some in beyond.items() if today - min(one.uploaded for one in some) > PATIENCE]
    if not due or any(_series(version, fixed) >= max(due) for version in known):
        return None
    newest = beyond[max(due)]
    since = min(one.uploaded for one in newest).date()
    wanted = re.sub(r"([<>=!~]+)", r"\1 ", max(newest, key=lambda one: one.version).pythons)
    pythons = f" (Python {wanted})" if wanted else ""
    allowed = ".".join(map(str, bound.release[:fixed]))
    return (
        f"{name} {'.'.join(map(str, max(due)))} has been there since {since}{pythons}, setup.py allows <{allowed}, no "
        f"commit has tried it: raise the bound, or record in tools/{TRIED.name} why not"
    )


def _fixed(bound: Version) -> int:
    """Return how many components a bound fixes: 2 for 0.17 and 2.12.0, 1 for 6."""
    return max([1, *(place for place, number in enumerate(bound.release, 1) if number)])


def _series(version: Version, length: int) -> tuple[int, ...]:
    return (*version.release, *[0] * length)[:length]


def releases(name: str) -> list[Release]:
    """Return the final releases of a package that the index serves, for any Python, without the yanked ones."""
    files: dict[Version, list[Mapping[str, Any]]] = {}
    answer = _answer(name)
    for file in answer["files"]:
        version = _version(file["filename"])
        if version is not None and not version.is_prerelease and not file.get("yanked"):
            files.setdefault(version, []).append(file)
    try:
        return [
            Release(
                version,
                min(datetime.datetime.fromisoformat(file["upload-time"]) for file in some),
                some[-1].get("requires-python") or "",
            )
            for version, some in files.items()
        ]
    except KeyError:
        raise IndexUnreadableError(f"{_address(name)} names no times of uploads: choose PIP_INDEX_URL={PYPI}") from None


def _version(filename: str) -> Version | None:
    """Return the version of a wheel or a source distribution; None for another file, which pip does not take either."""
    try:
        return parse_wheel_filename(filename)[1] if filename.endswith(".whl") else parse_sdist_filename(filename)[1]
    except (InvalidWheelFilename, InvalidSdistFilename, InvalidVersion):
        return None


def _address(name: str) -> str:
    """Return the address of a package's files; the name and the password of a user, which a log may not show, go."""
    index = re.sub(r"//[^/@]*@", "//", os.environ.get("PIP_INDEX_URL") or PYPI)
    return f"{index.rstrip('/')}/{re.sub(r'[-_.]+', '-', name).lower()}/"


def _answer(name: str) -> Mapping[str, Any]:
    """Return the answer of the index about a package, as the simple repository API defines it."""
    address = _address(name)
    try:
        with urllib.request.urlopen(
            urllib.request.Request(address, headers={"Accept": JSON}), timeout=LIMIT_S
        ) as reply:
            answer = json.load(reply)
    except (OSError, http.client.HTTPException) as error:
        raise IndexUnreadableError(f"the package index does not answer: {address}: {error}") from None
    except ValueError:
        raise IndexUnreadableError(f"{address} does not answer in JSON: choose PIP_INDEX_URL={PYPI}") from None
    if not isinstance(answer, dict) or "files" not in answer:
        raise IndexUnreadableError(f"{address} lists no files: choose PIP_INDEX_URL={PYPI}")
    return answer


if __name__ == "__main__":
    sys.exit(main())
