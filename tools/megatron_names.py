# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Report whether versions of Megatron Core have every name, signature and default that this project relies on.

    python tools/megatron_names.py                      # of the Megatron Core that is installed here
    python tools/megatron_names.py DIR [DIR ...]        # of unpacked wheels or source trees: DIR holds megatron/core
    python tools/megatron_names.py --tested             # of the versions in tools/tested_versions.txt
    python tools/megatron_names.py --versions 0.19.2    # of versions that pip downloads once

Neither this project nor Megatron Core is imported.  Most uses are found in the project's files: imported names, the
attributes of modules and of annotated parameters, and calls.  The tables of `megatron_uses` hold the rest.  The script
prints a table with a column per version, then one line per fault; ``--faults`` prints the faults alone, and
``--changes`` prints the signatures that differ between the versions.  The exit status is 1 if there is a fault, and 2
if a version cannot be read.  A name that exists may have changed its meaning: read Megatron's changes, too.
tools/megatron_names.md lists the private names by risk.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from megatron_uses import OLDER_ONLY, REPLACED, SINCE, SUBCLASSES, TORCH_MODULE, UNTIL, Call, Replacement, Use, uses
from package_names import PACKAGE, installed, lookup, signature, signature_of

LOCK = Path(__file__).resolve().parent / "tested_versions.txt"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_selfdistill"

Version = tuple[int, ...]


def faults(root: Path, wanted: Iterable[Use]) -> dict[Use, str]:
    """Return what is wrong with each use in the Megatron Core of the directory ``root``, one sentence per fault."""
    found = {use: fault(root, use) for use in wanted if concerns(use, version_of(root))}
    return {use: sentence for use, sentence in found.items() if sentence}


def concerns(use: Use, version: str) -> bool:
    """Return whether a version must have what a use needs: see `SINCE`, `UNTIL` and `OLDER_ONLY`."""
    return _exists_in(use.name, version) and any(_reads_file(place, version) for place in use.places)


def _exists_in(name: str, version: str) -> bool:
    """Return whether `SINCE` and `UNTIL` let ``version`` have ``name``, or the class or module to which it belongs."""
    parts = name.split(".")
    prefixes = [".".join(parts[: n + 1]) for n in range(len(parts))]
    begun = all(_numbers(SINCE.get(prefix, "0")) <= _numbers(version) for prefix in prefixes)
    return begun and all(_numbers(version) < _numbers(UNTIL.get(prefix, "9999")) for prefix in prefixes)


def _reads_file(place: str, version: str) -> bool:
    below = OLDER_ONLY.get(place.partition(":")[0])
    return below is None or _numbers(version) < _numbers(below)


def _numbers(version: str) -> Version:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def fault(root: Path, use: Use) -> str | None:
    """Return a sentence about what the Megatron Core in ``root`` lacks for a use; None if it has everything."""
    owner, _, member = use.name.rpartition(".")
    if not any(_has(root, f"{each}.{member}") for each in (owner, *SUBCLASSES.get(owner, ()))):
        return f"{use.name} is missing"
    if use.call is not None:
        return _call_fault(root, use.name, use.call)
    if use.kind == "replaced" and use.name in REPLACED:
        return _replacement_fault(root, use.name, REPLACED[use.name])
    if use.kind == "default":
        return _default_fault(root, use)
    return None


def _has(root: Path, name: str) -> bool:
    """Return whether a name is defined, or a member that a class of Megatron has from ``torch.nn.Module``."""
    owner, _, member = name.rpartition(".")
    return lookup(root, name) is not None or (member in TORCH_MODULE and lookup(root, owner) is not None)


def _call_fault(root: Path, name: str, call: Call) -> str | None:
    """Return why a function of Megatron would refuse a call; None if it takes the call or has no readable signature."""
    found = signature(root, name)
    if found is None:
        return None
    version = version_of(root)
    keywords = [word for word in call.keywords if _exists_in(f"{name}({word})", version)]
    names = [p.name for p in found.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    for expected, actual in zip(call.positional, names, strict=False):
        if expected not in ("_", actual):
            return f"{name}: expected the parameter {expected} in the place of {actual}"
    bind = found.bind if call.is_complete else found.bind_partial
    try:
        bind(*call.positional, **dict.fromkeys(keywords))
    except TypeError as error:
        return f"{name}{found}: {error} in the call {call}"
    return None


def _default_fault(root: Path, use: Use) -> str | None:
    parameter, _, expected = use.detail.partition("=")
    found = signature(root, use.name)
    if found is None or parameter not in found.parameters:
        return f"{use.name} has no parameter {parameter}"
    default = found.parameters[parameter].default
    if default == expected:
        return None
    actual = "none" if default is inspect.Parameter.empty else default
    return f"{use.name}: expected {parameter}={expected}, because {use.reason}; the default is {actual}"


def _replacement_fault(root: Path, name: str, replacement: Replacement) -> str | None:
    """Return why code of Megatron that calls ``name`` could not call the function that takes its place.

    Each parameter of Megatron's function must have its place, its name and its default in ours, up to the names in
    `Replacement.renamed`.  ``*args`` or ``**kwargs`` of ours takes what ours does not name.
    """
    theirs, ours = signature(root, name), _our_signature(replacement)
    if theirs is None:
        return f"{name} is no function"
    mine = list(ours.parameters.values())
    named = [p for p in mine if p.kind is p.POSITIONAL_OR_KEYWORD]
    takes_more = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in mine)
    for index, parameter in enumerate(p for p in theirs.parameters.values() if p.kind is not p.VAR_KEYWORD):
        place = named[index] if index < len(named) else None
        if replacement.by_keyword or place is None:
            place = ours.parameters.get(parameter.name)
        if place is None and (takes_more or parameter.name in replacement.not_passed):
            continue
        if place is None or place.name not in (parameter.name, replacement.renamed.get(parameter.name)):
            ending = "none" if place is None else place.name
            return f"{name}{theirs}: {replacement.where} has {ending} in the place of {parameter.name}"
        empty = inspect.Parameter.empty
        if empty not in (parameter.default, place.default) and parameter.default != place.default:
            return (
                f"{name}: {replacement.where} has {parameter.name}={place.default}, expected Megatron's default "
                f"{parameter.default}"
            )
    return None


def _our_signature(replacement: Replacement) -> inspect.Signature:
    """Return the signature of a function of this project, with or without the object that a method gets first."""
    function = replacement.definition(PACKAGE)
    found = signature_of(function)
    return found.replace(parameters=list(found.parameters.values())[1:]) if replacement.has_owner else found


@functools.cache
def version_of(root: Path) -> str:
    """Return the version of the Megatron Core in the directory ``root``."""
    source = (root / "megatron" / "core" / "package_info.py").read_text(encoding="utf-8")
    return ".".join(re.findall(r"^(?:MAJOR|MINOR|PATCH) = (\d+)", source, re.MULTILINE))


def tested_versions(lock: str) -> list[str]:
    """Return the versions of Megatron Core in the section [project] of the text of tools/tested_versions.txt."""
    section = lock.partition("\n[project]\n")[2].partition("\n[")[0]
    return re.findall(r"^megatron-core==([\w.]+)", section, re.MULTILINE)


def root_of(version: str, cache: Path) -> Path:
    """Return a directory with the files of a version: the installed one, or an unpacked wheel that pip downloads once.

    Raises: RuntimeError with one line if pip cannot download the version.
    """
    here = installed("megatron")
    if here is not None and version_of(here) == version:
        return here
    root = cache / f"megatron_core-{version}"
    if not root.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            wheel = _download(version, Path(temporary))
            unpacked = Path(temporary) / "unpacked"
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(unpacked, [name for name in archive.namelist() if name.endswith(".py")])
            unpacked.rename(root)
    return root


def _download(version: str, directory: Path) -> Path:
    """Return the wheel of a version, which pip downloads; its Python files are the same for every Python."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--python-version", "3.12", "--dest", str(directory), f"megatron-core=={version}"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(directory.glob("*.whl"))
    if ended.returncode or not wheels:
        reason = (ended.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise RuntimeError(f"pip could not download megatron-core=={version}, which needs a network once: {reason}")
    return wheels[0]


def changes(roots: Sequence[Path], wanted: Iterable[Use]) -> list[str]:
    """Return the functions whose signatures differ between the versions, and what each version adds and removes."""
    lines = []
    for name in sorted({use.name for use in wanted if use.call is not None or use.kind in ("replaced", "default")}):
        found = [(version_of(root), _parameters(root, name)) for root in roots]
        if any(after != found[0][1] for _, after in found[1:]):
            lines.append(name if found[0][1] else f"{name}, which {found[0][0]} lacks")
        for (_, before), (version, after) in pairwise(found):
            steps = [*(f"-{p}" for p in before if p not in after), *(f"+{p}" for p in after if p not in before)]
            if before != after:
                lines.append(f"    {version}: {', '.join(steps) or 'another order'}{'' if after else ', all of it'}")
    return lines


def _parameters(root: Path, name: str) -> list[str]:
    """Return the parameters of a function as source code; nothing if there is no such function."""
    found = signature(root, name)
    return [str(each) for each in found.parameters.values()] if found else []


def _roots(options: argparse.Namespace) -> list[Path]:
    """Return the directories that the command line names; raise RuntimeError if there are none."""
    versions = [*options.versions, *(tested_versions(LOCK.read_text(encoding="utf-8")) if options.tested else ())]
    roots = [*map(Path, options.directories), *(root_of(version, CACHE) for version in versions)]
    if not roots and (here := installed("megatron")) is not None:
        roots = [here]
    if not roots or any(not (root / "megatron" / "core" / "package_info.py").is_file() for root in roots):
        given = ", ".join(options.directories) or "none, and no Megatron Core here"
        raise RuntimeError(f"expected directories that hold the directory megatron/core, got {given}")
    return roots


def main(arguments: Sequence[str]) -> int:
    """Print the table and the faults; return 0 without a fault, 1 with a fault, 2 if a version cannot be read."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directories", nargs="*", metavar="DIR", help="unpacked wheels or source trees")
    parser.add_argument("--versions", nargs="+", default=[], metavar="VERSION", help="versions that pip downloads once")
    parser.add_argument("--tested", action="store_true", help="the versions in tools/tested_versions.txt")
    parser.add_argument("--faults", action="store_true", help="print the faults and one line, without the table")
    parser.add_argument("--changes", action="store_true", help="print the signatures that differ between the versions")
    options = parser.parse_args(arguments)
    try:
        roots = _roots(options)
    except RuntimeError as error:
        print(f"megatron_names: {error}", file=sys.stderr)
        return 2
    wanted = uses()
    if options.changes:
        print("\n".join(changes(roots, wanted)))
        return 0
    found = [faults(root, wanted) for root in roots]
    if not options.faults:
        print(" | ".join(["use", *map(version_of, roots)]))
        for use in wanted:
            print(" | ".join([str(use), *(_cell(root, use, wrong) for root, wrong in zip(roots, found, strict=True))]))
    for root, wrong in zip(roots, found, strict=True):
        for sentence in dict.fromkeys(wrong.values()):
            places = dict.fromkeys(place for use, each in wrong.items() if each == sentence for place in use.places)
            print(f"Megatron Core {version_of(root)}: {sentence} ({', '.join(list(places)[:3])})")
    total = sum(len(set(wrong.values())) for wrong in found)
    print(f"{len(wanted)} uses of Megatron Core {', '.join(map(version_of, roots))}: {total or 'no'} faults")
    return 1 if total else 0


def _cell(root: Path, use: Use, wrong: dict[Use, str]) -> str:
    if not concerns(use, version_of(root)):
        return "not needed"
    return "FAULT" if use in wrong else "yes"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
