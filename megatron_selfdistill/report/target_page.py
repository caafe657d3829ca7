# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The page of the target explorer: one explored response, whose target the page computes again for other settings."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_selfdistill.explored_files import explored_files, page_of, read_explored, step_and_sample
from megatron_selfdistill.replaced_files import replace_file
from megatron_selfdistill.report.html_page import asset, html_page

logger = logging.getLogger(__name__)

VERSION = 1
"""The version of the form of a record that the page reads."""

_BODY = """\
<header>
<div id="title"><h1>Target explorer</h1></div>
<p id="about" class="soft"></p>
</header>
<details id="settings" open><summary>Settings of the target</summary>
<div id="controls" class="toolbar" role="group" aria-label="Settings of the target"></div>
</details>
<p id="progress" role="status" class="small"></p>
<p id="accuracy" class="small soft"></p>
<div class="explorer" id="explorer">
<main>
<div class="context">
<details><summary>Prompt of the student</summary><pre id="prompt"></pre></details>
<details><summary>Solution, which only the teacher sees</summary><pre id="solution"></pre></details>
</div>
<details><summary>How to read this page</summary>
<p class="small soft">The colour and the underline of a token show its divergence between student and target, in nats.
Point at a token, or use the arrow keys: left and right go from token to token, down and up to the next token at which
the target's first choice is not the student's. A click holds a token, and Escape lets it go.
In the table of candidates, bold numbers are the first choice of a model.</p></details>
<div id="legend" class="small" aria-label="Divergence of a token in nats"></div>
<div id="tokens" role="listbox" tabindex="0" aria-label="Tokens of the response; arrow keys choose a token"></div>
</main>
<aside class="panel" aria-label="The chosen token">
<div id="about-token">
<h2 class="small"><span id="chosen-title">Choose a token</span><span id="chosen-text"></span></h2>
<p id="pinned" class="small soft" hidden>Held: Escape, or another click, follows the pointer again.</p>
<p id="announcement" aria-live="polite"></p>
<table><tbody id="numbers"></tbody></table>
</div>
<div>
<div id="candidates"></div>
<button type="button" id="all-candidates" hidden></button>
</div>
</aside>
</div>
"""


@dataclass(frozen=True)
class TargetPage:
    """The page of one explored response of a run."""

    path: Path
    step: int
    """The step of the response, counted from 1."""
    sample: int
    """The number of the sample within the step, counted from 1."""


def target_page(record: Mapping[str, Any]) -> str:
    """Return the page of an explored response: one HTML file that needs nothing else.

    ``record``: as `ExploredResponse.record` returns it.  The page decodes the logits of 64 tokens at a time, when it
    needs them.
    Raises: ValueError for a record of another version.
    """
    if record.get("version") != VERSION:
        raise ValueError(
            f"expected an explored response of version {VERSION}, got version {record.get('version')}: "
            "use the version of this package that has written it"
        )
    overview = {name: value for name, value in record.items() if name not in ("blocks", "texts")}
    blocks = {f"block-{number}": block for number, block in enumerate(record["blocks"])}
    scripts = [asset(name) for name in ("target.js", "explorer.js", "explorer_page.js")]
    data = {"overview": overview, "texts": record["texts"], **blocks}
    return html_page("Target explorer", _BODY, [asset("explorer.css")], scripts, data)


def write_target_page(record: Mapping[str, Any], path: Path) -> None:
    """Write the page of an explored response in one move.  Raises: OSError, ValueError."""
    replace_file(path, target_page(record))


def write_target_pages(run_dir: Path) -> list[TargetPage]:
    """Write the missing pages of a run's explored responses beside their files, and return all pages in their order.

    A page is written again where its file is newer.  A file that cannot be read gets no page, and a warning.
    Raises: OSError if a page cannot be written.
    """
    pages = []
    for source in explored_files(run_dir):
        page = TargetPage(page_of(source), *step_and_sample(source))
        if not page.path.exists() or page.path.stat().st_mtime_ns < source.stat().st_mtime_ns:
            try:
                record = read_explored(source)
                text = target_page(record)
            except (ValueError, OSError) as error:
                reason = error.strerror if isinstance(error, OSError) else error  # str(OSError) repeats the path
                logger.warning("%s has no page: %s", source, reason)
                continue
            replace_file(page.path, text)
        pages.append(page)
    return pages
