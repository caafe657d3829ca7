# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""An open report in a real Chromium loads itself again while its run is on, and stays as its reader has left it."""

from __future__ import annotations

import shutil

import pytest
from reported_runs import write_run

from megatron_selfdistill.instruments.report.run_report import write_report

LOSS = "figures.find((figure) => figure.data.title === 'Loss')"
STATE = f"""({{
    zoom: view.zoom, smoothing: view.smoothing, theme: document.documentElement.dataset.theme, scroll: scrollY,
    shown: {LOSS}.lines.map((line) => line.shown),
    pressed: document.querySelectorAll(".legend [aria-pressed=false]").length,
    search: document.querySelector("#part-evaluations input[type=search]").value,
    matches: document.querySelector("#part-evaluations output").textContent,
    open: [...document.querySelectorAll("details[open][id]")].map((part) => part.id),
}})"""


def write_going_on(directory, num_steps):
    """Write a run that has not ended, in place of the one that is there, and its report; return the report."""
    shutil.rmtree(directory, ignore_errors=True)
    write_run(directory, num_steps)
    events = directory / "events.jsonl"
    events.write_text("".join(events.read_text().splitlines(keepends=True)[:-1]))
    return write_report([directory])


@pytest.fixture
def live(browser, tmp_path):
    """Return a run directory of 20 steps that goes on, and a tab with its report and a clock that tests set."""
    tab = browser.open(write_going_on(tmp_path / "run", 20))
    tab.page.clock.install()
    tab.page.reload()
    loaded(tab)
    yield tmp_path / "run", tab
    tab.close()


def loaded(tab):
    tab.page.wait_for_selector("html[data-ready]")  # also outlives a second load, on a slow machine


def pass_seconds(tab, seconds):
    """Let seconds pass, and wait until the page is loaded again."""
    with tab.page.expect_event("load"):
        tab.page.clock.fast_forward(1000 * seconds)
    loaded(tab)


def test_an_open_report_shows_the_new_steps_by_itself_until_the_run_ends(live):
    run_dir, tab = live
    assert tab.text("#live") == "Live: on" and tab.text("#statuses").startswith("20 of 20 steps")
    write_going_on(run_dir, 40)
    pass_seconds(tab, 16)
    assert tab.text("#statuses").startswith("40 of 40 steps") and tab.text("#live") == "Live: on"
    shutil.rmtree(run_dir)
    write_report([write_run(run_dir, 50)])
    pass_seconds(tab, 16)
    assert "the run is complete" in tab.text("#statuses")
    tab.value("void (window.same = true)")
    tab.page.clock.fast_forward(10 * 24 * 3600 * 1000)
    assert tab.value("window.same") and not tab.page.is_visible("#live") and tab.problems == []


def test_a_report_that_is_loaded_again_stays_as_its_reader_has_left_it(live):
    run_dir, tab = live
    tab.click("#live")  # a slow machine must not reload the page before the end of the changes
    tab.value("(() => { byId('smoothing').value = 60; byId('smoothing').dispatchEvent(new Event('input')); })()")
    tab.value(f"void ({LOSS}.element.id = 'loss', zoomTo([4, 12]))")
    tab.click("#loss .row:nth-child(2) button")
    tab.click(".theme-switch")
    tab.click("#part-evaluations > summary")
    tab.wait_for("document.querySelector('#pairs .pair')")
    tab.page.fill("#part-evaluations input[type=search]", "7 + 7")
    tab.value("void (document.activeElement.blur(), byId('responses').scrollIntoView())")
    before = tab.value(STATE)
    assert (before["zoom"], before["theme"], before["shown"]) == ([4, 12], "light", [False])
    assert before["scroll"] > 1000 and before["matches"] == "1 of 30 problems" and before["pressed"] == 1
    write_going_on(run_dir, 20)
    tab.value("void byId('live').click()")
    pass_seconds(tab, 21)
    assert tab.value(STATE) == before
    assert tab.value("[history.state, history.scrollRestoration]") == [None, "auto"] and tab.problems == []


def test_a_report_in_use_or_out_of_sight_waits(live):
    _, tab = live
    tab.click("#live")
    tab.value("void (window.same = true)")
    tab.click("#part-evaluations > summary")
    tab.wait_for("document.querySelector('#pairs .pair')")
    tab.page.focus("#part-evaluations input[type=search]")
    tab.value("void byId('live').click()")
    tab.page.clock.fast_forward(600_000)
    assert tab.value("window.same"), "the reader writes"
    tab.value("void document.activeElement.blur()")
    tab.click("#live")
    tab.page.clock.fast_forward(600_000)
    assert tab.value("window.same") and tab.text("#live") == "Live: off"
    tab.value("void Object.defineProperty(document, 'hidden', {value: true, configurable: true})")
    tab.click("#live")
    tab.page.clock.fast_forward(600_000)
    assert tab.value("window.same"), "nobody sees the page"
    tab.value("void Object.defineProperty(document, 'hidden', {value: false})")
    with tab.page.expect_event("load"):
        tab.value("void setTimeout(() => document.dispatchEvent(new Event('visibilitychange')))")
        tab.page.clock.fast_forward(6_000)


def test_an_old_report_is_loaded_less_often_and_that_of_a_dead_run_never(live):
    _, tab = live
    minute, day = 60_000, 24 * 3600 * 1000
    waits = tab.value(f"[0, {minute}, {60 * minute}, {day / 2}, {day + 1}, -5].map(waitOfAge)")
    assert waits == [15_000, 15_000, 6 * minute, 10 * minute, None, 15_000]
