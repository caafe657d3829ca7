# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The home of the site: the first screen of the repository's README, then the tables of docs/README.md."""

from __future__ import annotations

import re
from pathlib import Path

from docs_site import links

README = "README.md"
BEGIN, END = "<!-- first screen -->", "<!-- end of the first screen -->"
"""The lines of the README between which its first screen stands."""
_OWN_ANCHOR = re.compile(r"\]\(#")


def page(index: str, repository: Path) -> str:
    """Return the home as Markdown: ``index``, the text of docs/README.md, below the first screen of the README.

    Raises: ValueError unless the README has each marker once, in this order.
    """
    text = (repository / README).read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise ValueError(f"expected the lines {BEGIN} and {END} once each in {README}, for the home of the site")
    screen = text.partition(BEGIN)[2].partition(END)[0].strip()
    screen = _OWN_ANCHOR.sub(f"]({README}#", screen)
    screen, _ = links.rewritten(screen, README, repository, own=links.HOME)
    tables, _ = links.rewritten(index, f"docs/{README}", repository)
    return f"{screen}\n\n#{tables}"
