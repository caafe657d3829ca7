# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The functions that MkDocs calls: they generate the reference and the pages of methods, and keep links valid.

Nothing that is generated is committed.  ``pages`` needs no MkDocs, so that tests read the pages of the site.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tools")]

from docs_site import api, commands, configuration, home, links, methods  # noqa: E402

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

STYLE = "assets/site.css"
"""Where the site has site.css of this directory; mkdocs.yml names it."""
IN_NAVIGATION = ("CONTRIBUTING.md", "CHANGELOG.md")
"""Files of the repository's root that the navigation names; other files are there where a page links to them."""


def reference() -> dict[str, str]:
    """Return the pages of the reference: path in the site -> Markdown."""
    return {
        "reference/configuration.md": configuration.page(),
        "reference/commands.md": commands.page(),
        **api.pages(),
    }


def repository_pages() -> dict[str, str]:
    """Return a page for each file outside docs/ that the navigation or another page leads to."""
    pages = [path.relative_to(REPOSITORY).as_posix() for path in sorted((REPOSITORY / "docs").rglob("*.md"))]
    return links.linked_files([*pages, home.README, *IN_NAVIGATION], REPOSITORY)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Give headings the anchors that a code host gives them, so that one link works in both places."""
    from pymdownx.slugs import slugify

    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages and the style to the pages of docs/."""
    from mkdocs.structure.files import File, InclusionLevel

    named = {links.site_path(name, REPOSITORY) for name in IN_NAVIGATION}
    style = (Path(__file__).parent / "site.css").read_text(encoding="utf-8")
    files.append(File.generated(config, STYLE, content=style))
    for path, text in {**reference(), **methods.pages()}.items():
        files.append(File.generated(config, path, content=text))
    for path, text in repository_pages().items():
        level = InclusionLevel.INCLUDED if path in named else InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, path, content=text, inclusion=level))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Lead a page's links to files outside docs/ to their pages in the site; begin the home with the README."""
    if page.file.generated_by is not None:
        return markdown
    if page.file.src_uri == links.HOME:
        return home.page(markdown, REPOSITORY)
    return links.rewritten(markdown, f"docs/{page.file.src_uri}", REPOSITORY)[0]
