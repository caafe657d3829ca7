# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The names of another package, found in its files without an import of the package.

A *root* is the directory that holds the package: site-packages, an unpacked wheel or a source tree.  `vllm_names`
asks whether such a package has the names that this project uses.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parent.parent / "megatron_selfdistill"


class Place(NamedTuple):
    """The statement that defines a name, and the module of the statement."""

    module: str
    node: ast.AST
    of_class: bool = False
    """Whether the statement stands in a class."""


def imported_names(package: str, directory: Path = PACKAGE) -> list[str]:
    """Return each name of ``package`` that the files of ``directory`` import, as module.name, sorted."""
    found = set()
    for path in directory.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)) if package in source else ():
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == package:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names if alias.name.partition(".")[0] == package}
    return sorted(found)


def installed(package: str) -> Path | None:
    """Return the directory that holds the installed ``package``, which is not imported; None if there is none."""
    spec = importlib.util.find_spec(package)
    places = [*(spec.submodule_search_locations or ())] if spec is not None else []
    return Path(places[0]).parent if places else None


@functools.cache
def parsed(root: Path, module: str) -> ast.Module | None:
    """Return the syntax tree of a module or of a package's ``__init__``; None if there is no such file."""
    path = root.joinpath(*module.split("."))
    for file in (path / "__init__.py", path.with_name(path.name + ".py")):
        if file.is_file():
            return ast.parse(file.read_text(encoding="utf-8"))
    return None


@functools.cache
def lookup(root: Path, name: str) -> Place | None:
    """Return where a dotted name is defined: a module, something in a module, or a member of a class; else None.

    The lookup follows imports from module to module, and from a class to its bases.  A name that a module imports from
    another package is defined by the import, and so is everything that belongs to the name.
    """
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        module = ".".join(parts[:cut])
        tree = parsed(root, module)
        if tree is not None:
            return _within(root, Place(module, tree), parts[cut:])
    return None


def _within(root: Path, place: Place, parts: list[str]) -> Place | None:
    """Return where the dotted name ``parts`` is defined in a module or in a class and its bases."""
    if not parts:
        return place
    first, rest = parts[0], parts[1:]
    for child in definitions(place.node).get(first, ()):
        found = None
        if isinstance(child, ast.ImportFrom | ast.Import):
            target = _target(root, place.module, child, first)
            if target.partition(".")[0] != place.module.partition(".")[0]:
                return Place(place.module, child)
            found = lookup(root, ".".join([target, *rest])) if target != f"{place.module}.{first}" else None
        elif isinstance(child, ast.ClassDef):
            found = _within(root, Place(place.module, child), rest)
        if found is None and not rest:
            found = Place(place.module, child, isinstance(place.node, ast.ClassDef))
        if found is not None:
            return found
    for base in bases(root, place) if isinstance(place.node, ast.ClassDef) else _starred(root, place):
        found = _within(root, base, parts)
        if found is not None:
            return found
    return None


def bases(root: Path, place: Place) -> Iterator[Place]:
    """Yield the bases of a class that the package itself defines."""
    assert isinstance(place.node, ast.ClassDef)
    for base in place.node.bases:
        name = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
        found = lookup(root, f"{place.module}.{name}")
        if found is not None and isinstance(found.node, ast.ClassDef):
            yield found


def _starred(root: Path, place: Place) -> Iterator[Place]:
    """Yield the modules of which a module imports every name."""
    for node in statements(place.node):
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            module = _origin(root, place.module, node)
            tree = parsed(root, module)
            if tree is not None and module != place.module:
                yield Place(module, tree)


def _target(root: Path, module: str, node: ast.Import | ast.ImportFrom, name: str) -> str:
    """Return the full name of what an import statement in ``module`` calls ``name``."""
    original = next(alias.name for alias in node.names if name in (alias.asname, alias.name))
    return original if isinstance(node, ast.Import) else f"{_origin(root, module, node)}.{original}"


def _origin(root: Path, module: str, node: ast.ImportFrom) -> str:
    """Return the module from which a statement in ``module`` imports."""
    if not node.level:
        return node.module or ""
    is_package = root.joinpath(*module.split("."), "__init__.py").is_file()
    parts = module.split(".")
    above = parts[: len(parts) - node.level + is_package]
    return ".".join([*above, *filter(None, [node.module])])


@functools.cache
def definitions(node: ast.AST) -> dict[str, list[ast.AST]]:
    """Return the statements that define each name of a module or a class: functions, classes, assignments and imports.

    The names include the attributes that methods set on ``self``, and the names in a module's strings, which the module
    imports on demand.
    """
    found: dict[str, list[ast.AST]] = {}
    for name, child in _defined(node):
        found.setdefault(name, []).append(child)
    return found


def _defined(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    for child in statements(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield child.name, child
        elif isinstance(child, (ast.Import, ast.ImportFrom)):
            yield from ((alias.asname or alias.name, child) for alias in child.names)
        elif isinstance(child, (ast.Assign, ast.AnnAssign)):
            yield from ((target.id, child) for target in _targets(child) if isinstance(target, ast.Name))
            if isinstance(child.value, ast.Dict):
                keys = (key.value for key in child.value.keys if isinstance(key, ast.Constant))
                yield from ((key, child) for key in keys if isinstance(key, str))
    if isinstance(node, ast.ClassDef):
        for child in ast.walk(node):
            if isinstance(child, (ast.Assign, ast.AnnAssign)):
                attributes = (target for target in _targets(child) if isinstance(target, ast.Attribute))
                yield from ((each.attr, child) for each in attributes if getattr(each.value, "id", "") == "self")


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the statements of a module or a class, including the statements under an if, a try or a with."""
    for child in ast.iter_child_nodes(node):
        yield child
        if isinstance(child, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
            yield from statements(child)


def _targets(node: ast.Assign | ast.AnnAssign) -> Iterator[ast.expr]:
    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
        yield from target.elts if isinstance(target, ast.Tuple) else [target]
