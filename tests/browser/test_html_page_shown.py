# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A self-contained page in a real Chromium: blocks, text that is no markup, and no network."""

from __future__ import annotations

import pytest

from megatron_selfdistill.instruments.html_page import html_page

SHOW = """
startPage(async () => {
  const value = await openBlock("value");
  byId("here").append(themeSwitch(), element("pre", { id: "text" }, value.text));
});
"""
NASTY = (
    "</script><script>document.title = 'run'</script><img src=x onerror=\"document.title='run'\"> & \u2028 \U0001f600"
)


@pytest.fixture
def page(tmp_path):
    def write(body='<main id="here"></main>', scripts=(SHOW,), data=None):
        path = tmp_path / "page.html"
        text = html_page("A <title>", body, [], scripts, {"value": {"text": NASTY}} if data is None else data)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_the_text_of_a_block_is_shown_and_never_run(browser, page):
    tab = browser.open(page())
    assert tab.value("byId('text').textContent") == NASTY
    assert tab.value("document.title") == "A <title>"
    assert tab.value("document.images.length") == 0
    assert tab.problems == []


def test_the_policy_stops_code_in_markup_and_the_network(browser, page):
    body = '<main id="here"></main><p onclick="document.title = \'run\'" id="click">x</p>'
    tab = browser.open(page(body))
    tab.click("#click")
    assert tab.value("document.title") == "A <title>"
    assert tab.value("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'stopped')") == "stopped"
    assert any("Content Security Policy" in problem for problem in tab.problems)


def test_an_error_of_the_script_is_shown_on_the_page(browser, page):
    tab = browser.open(page(data={}))
    assert 'data block "value"' in tab.text("#problem")
