# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Links from a page of docs/ to files elsewhere in the repository: the site gets a page for each of these files.

On a code host such links lead to the file.  The site has docs/ at its root and every other file that a page links to
under ``repository/``: a Markdown file as a page, any other text file as a listing, a directory as a list of its files.
A link to the file of a method leads to the page of the method, which the site makes from the file's docstring.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Iterable
from pathlib import Path

HOME = "README.md"
"""The path of the site's home."""
LANGUAGES = {".py": "python", ".sh": "bash", ".sbatch": "bash", ".yaml": "yaml", ".json": "json", ".toml": "toml"}
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_FENCE = re.compile(r"^ *(```|~~~)")
_METHOD = re.compile(r"megatron_selfdistill/methods/(?!__)(\w+)\.py")


def site_path(path: str, repository: Path) -> str:
    """Return where the site has a file or directory, given by its path from the repository's root."""
    if path == "docs" or path.startswith("docs/"):
        return path.removeprefix("docs").lstrip("/") or HOME
    if method := _METHOD.fullmatch(path):
        return f"recipes/{method[1]}.md"
    if (repository / path).is_dir():
        return f"repository/{path}/index.md"
    return f"repository/{path}" if path.endswith(".md") else f"repository/{path}.md"


def rewritten(markdown: str, path: str, repository: Path, own: str | None = None) -> tuple[str, list[str]]:
    """Return a page with its links as they must be in the site, and the files outside docs/ that it links to.

    ``path``: the page's own, from the repository's root.  ``own``: where the site shows the text, if it is not at
    ``site_path(path)``.  A link to a file that does not exist stays as it is, so that
    MkDocs reports it.
    """
    own, outside = own or site_path(path, repository), []

    def link(found: re.Match[str]) -> str:
        before, target, anchor, after = found[1], found[2], found[3] or "", found[4]
        aim = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        if ":" in target or target.startswith("/") or aim.startswith("..") or not (repository / aim).exists():
            return found[0]
        inside = aim.startswith("docs/")
        if inside and path.startswith("docs/"):
            return found[0]
        if not inside and not _METHOD.fullmatch(aim):
            outside.append(aim)
        anchor = anchor if aim.endswith(".md") else ""
        return f"{before}{posixpath.relpath(site_path(aim, repository), posixpath.dirname(own) or '.')}{anchor}{after}"

    return _outside_fences(markdown, lambda line: _LINK.sub(link, line)), outside


def linked_files(pages: Iterable[str], repository: Path) -> dict[str, str]:
    """Return a page of the site for each file outside docs/ that ``pages`` link to, also by way of one another.

    ``pages``: Markdown files by their paths from the repository's root.  The result has its paths in the site.
    """
    waiting, made = list(pages), {}
    while waiting:
        path = waiting.pop()
        if path.endswith(".md"):
            text, outside = rewritten((repository / path).read_text(encoding="utf-8"), path, repository)
        else:
            text, outside = listing(path, repository), []
        if not path.startswith("docs/"):
            made[site_path(path, repository)] = text
        waiting += [one for one in outside if site_path(one, repository) not in made and one not in waiting]
    return made


def listing(path: str, repository: Path) -> str:
    """Return a page that shows a text file, or the names of the files in a directory."""
    file, head = repository / path, f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n"
    if file.is_dir():
        names = sorted(one.name + ("/" if one.is_dir() else "") for one in os.scandir(file) if one.name[0] not in "._")
        return head + "\n".join(f"- `{name}`" for name in names) + "\n"
    return f"{head}````{LANGUAGES.get(file.suffix, 'text')}\n{file.read_text(encoding='utf-8')}\n````\n"


def _outside_fences(markdown: str, change: Callable[[str], str]) -> str:
    lines, fenced = [], False
    for line in markdown.split("\n"):
        if _FENCE.match(line):
            fenced = not fenced
        lines.append(line if fenced else change(line))
    return "\n".join(lines)
