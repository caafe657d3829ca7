# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Self-contained pages: what a block holds, what is refused."""

from __future__ import annotations

import re

from reported_runs import blocks_of

from megatron_selfdistill.instruments.html_page import html_page


def test_a_page_holds_its_data_and_names_no_other_file():
    data = {"runs": [1.5, None, "</script><b>"], "events-2": {"text": "é\n"}}
    page = html_page("Run <1>", "<main></main>", ["p {}"], ["let x = 1;"], data)
    assert blocks_of(page) == data
    assert "<title>Run &lt;1&gt;</title>" in page
    assert "<b>" not in page
    assert not re.search(r"""(src|href)\s*=|https?://|@import|url\(""", page.split("<body>")[0])


def test_the_policy_names_every_style_and_script_by_its_hash():
    page = html_page("x", "", ["p {}"], ["let x = 1;"], {})
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.count("'sha256-") == 4  # page.css and page.js, and one more of both
    assert "unsafe" not in policy and policy.startswith("default-src 'none';")
