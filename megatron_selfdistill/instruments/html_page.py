# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Self-contained pages: one HTML file with its styles, scripts and data, which a browser opens without a network."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import zlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

BLOCK_TYPE = "application/json+deflate"
"""The type of the elements that hold data.  A browser neither runs nor shows an element of an unknown script type."""


def html_page(title: str, body: str, styles: Sequence[str], scripts: Sequence[str], data: Mapping[str, Any]) -> str:
    """Return one HTML file that needs nothing else: no network, no server, no other file.

    ``title``: plain text.  ``body``: markup that the caller has written, without any text of a run.  ``styles``,
    ``scripts``: texts in CSS and in JavaScript; page.css and page.js come before them.  ``data``: the name of a block
    -> a JSON value.  Every text of a run belongs into a block.  The script of the page reads a block with
    ``openBlock(name)`` and shows it with ``textContent``, so no text of a run can become markup or code.  A block costs
    no time before the page opens it.

    The Content-Security-Policy of the page forbids the network, and scripts and styles other than the given ones.
    Raises: ValueError for a value that JSON lacks (NaN, infinities: use None).
    """
    styles = [asset("page.css"), *styles]
    scripts = [asset("page.js"), *scripts]
    policy = "; ".join(
        [
            "default-src 'none'",
            "img-src data:",
            f"style-src {_hashes(styles)}",
            f"script-src {_hashes(scripts)}",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    return asset("page.html").format(
        policy=policy,
        title=html.escape(title),
        styles="\n".join(f"<style>{text}</style>" for text in styles),
        body=body,
        blocks="\n".join(_block(name, value) for name, value in data.items()),
        scripts="\n".join(f"<script>{text}</script>" for text in scripts),
    )


def asset(name: str) -> str:
    """Return the text of a file of ``report/page/``, such as page.css."""
    return files("megatron_selfdistill.instruments.report").joinpath("page", name).read_text(encoding="utf-8")


def _block(name: str, value: Any) -> str:
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    packed = base64.b64encode(zlib.compress(text.encode(), 9)).decode()
    return f'<script type="{BLOCK_TYPE}" id="data-{name}">{packed}</script>'


def _hashes(texts: Sequence[str]) -> str:
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    return " ".join(f"'sha256-{digest}'" for digest in digests)
