# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A report in a real Chromium, and any page: figures, zoom, smoothing, keys, responses, widths, and no network."""

from __future__ import annotations

import json
import math
import shutil

import pytest
from reported_runs import NASTY, add_episodes, write_run

from megatron_selfdistill.instruments.html_page import html_page
from megatron_selfdistill.instruments.report.run_report import write_report

LOSS = "figures.find((figure) => figure.data.title === 'Loss')"
SMOOTH = "(() => { byId('smoothing').value = 60; byId('smoothing').dispatchEvent(new Event('input')); })()"
OTHER = ("optimizer.lr=1e-3", f"data.tokenizer=/{'models/' * 20}tokenizer", "checkpoint.load=/base")
EVERY = "[...document.querySelectorAll(`{}`)].map((part) => part.textContent)"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return write_run(root / "first"), write_run(root / "second", 40, *OTHER, shift=0.5)


@pytest.fixture(scope="module")
def one(runs, tmp_path_factory):
    return write_report(runs[:1], tmp_path_factory.mktemp("page") / "one.html")


@pytest.fixture(scope="module")
def two(runs, tmp_path_factory):
    return write_report(runs, tmp_path_factory.mktemp("page") / "two.html")


def losses_of(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss/mean"] for line in lines if "loss/mean" in line}


@pytest.mark.parametrize(("width", "dark"), [(400, True), (1280, False)])
def test_a_page_loads_without_errors_and_fits_its_window(browser, two, width, dark):
    tab = browser.open(two, width=width, dark=dark)
    tab.value("void figures.forEach((figure) => figure.draw())")
    tab.value("void document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    tab.wait_for("document.querySelector('#pairs .pair') && document.querySelector('#samples .token')")
    assert tab.value("figures.length") >= 15 and tab.value("document.querySelectorAll('canvas').length") >= 15
    assert tab.value("document.documentElement.scrollWidth") <= width
    assert tab.problems == []
    paper = tab.value("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") is not dark


def test_a_report_opens_with_a_curve_an_answer_before_and_after_and_whether_each_run_learns(browser, one, two):
    labels = "[...document.querySelectorAll('#summaries dt')].map((term) => [term.textContent, term.className])"
    three = [["Learns", "good"], ["Healthy", "good"], ["Changed", "open"]]
    tab = browser.open(two)
    assert tab.value(labels) == [*three, *three]
    assert tab.value(EVERY.format("#summaries h3")) == ["first", "second"]
    tab = browser.open(one)
    assert tab.value(labels) == three and tab.text("#summaries dd") == "accuracy (greedy) 0.300 → 0.900, steps 0 to 30"
    assert tab.value("byId('summaries').getBoundingClientRect().bottom < byId('top').getBoundingClientRect().top")
    tab.wait_for("document.querySelector('#opening figure canvas')?.width > 0")
    assert tab.value(EVERY.format("#opening .answer h4")) == ["step 0", "step 30"]
    assert tab.value("document.getElementById('opening').nextElementSibling.id") == "summaries"


@pytest.mark.parametrize(("texts", "places"), [(True, True), (False, True), (True, False)])
def test_a_copy_to_share_lacks_what_its_reader_marks_as_private(browser, one, tmp_path, texts, places):
    tab = browser.open(one)
    title = tab.text("h1")
    assert title == "random weights on problems.jsonl: first" == tab.value("document.title").removesuffix(" · report")
    tab.click(".share summary")
    tab.page.set_checked("#private-texts", texts)
    tab.page.set_checked("#private-places", places)
    with tab.page.expect_download() as download:
        tab.click("#save-copy")
    download.value.save_as(copy := tmp_path / "copy.html")
    shared = browser.open(copy)
    assert shared.problems == [] and shared.value("figures.length > 10 && byId('explored').hidden")
    assert shared.value("[hasBlock('samples'), byId('responses').hidden]") == [not texts, texts]
    assert shared.text("h1") == ("run 1" if places else title)
    assert ("problems.jsonl" in shared.value("document.documentElement.innerText")) is not places


def test_smoothing_is_the_exponential_mean_that_python_computes(browser, one, runs):
    """A constant curve whose means differ by rounding has an axis: ticks for a rounding error would fill the memory."""
    tab = browser.open(one)
    tab.value(SMOOTH)
    scale = tab.value("view.smoothing")
    shown = tab.value(f"{LOSS}.drawn()[1].values")
    total = weight = 0.0
    for value, expected in zip(losses_of(runs[0]).values(), shown, strict=True):
        decay = math.exp(-1 / scale)
        total, weight = total * decay + value, weight * decay + 1
        assert expected == pytest.approx(total / weight, rel=1e-4)
    assert scale > 1 and f"{scale:g} steps" in tab.text("#smoothing-text")
    rate = "figures.find((figure) => figure.data.title === 'Learning rate')"
    means = tab.value(f"{rate}.drawn()[1].values")
    low, high = tab.value(f"{rate}.range({min(means)!r}, {max(means)!r})")
    assert min(means) < max(means) and low < 1e-5 < high and high - low > 1e-7


def test_responses_are_filtered_and_shown_as_text_and_samples_show_where_the_models_disagree(browser, one):
    tab = browser.open(one)
    assert tab.value("document.querySelectorAll('#pairs').length") == 0, "nothing is read before it is opened"
    tab.click("#part-evaluations > summary")
    tab.wait_for("document.querySelector('#pairs .pair')")
    assert tab.text("#part-evaluations output") == "30 of 30 problems"
    assert tab.value("document.querySelector('#pairs .answer pre').textContent") == f"{NASTY} 0"
    assert tab.value("document.images.length") == 0 and tab.value("document.title").endswith(": first · report")
    select = "document.querySelectorAll('#part-evaluations select')[3]"
    tab.value(f"void ({select}.value = 1, {select}.dispatchEvent(new Event('change')))")
    assert tab.text("#part-evaluations output") == "10 of 30 problems"
    assert tab.value(EVERY.format("#pairs .badge")) == ["wrong", "right"] * 10
    tab.click("#part-samples > summary")
    tab.wait_for("document.querySelector('#samples .token')")
    tokens = tab.value("[...document.querySelectorAll('#samples .token')].map((t) => [t.textContent, t.className])")
    assert tokens == [[NASTY, "token less"], [" two", "token more"], [" three", "token"], ["<end>", "token"]]
    assert tab.problems == []


def test_the_turns_of_an_episode_are_one_conversation_with_reward_and_hint_beside_each(browser, tmp_path):
    run_dir = write_run(tmp_path / "run")
    add_episodes(run_dir, {"maze": [0, 1, 2], "torn": [0, 2]})
    tab = browser.open(write_report([run_dir]))
    tab.click("#part-samples > summary")
    tab.wait_for("document.querySelector('#samples .turn')")

    def texts(article: int | str, parts: str) -> list[str]:
        return tab.value(EVERY.format(f"#samples article:nth-child({article}) {parts}"))

    assert texts("n", "h3") == ["training problem 1, step 1", "maze, step 1, episode 3", "torn, step 1, episode 3"]
    assert texts(1, ":is(.turn, aside, .reply)") == [], "a single response has no turns"
    assert texts(2, ".reply") == [f"room {turn} {NASTY}" for turn in (0, 1)], "the last turn has no reply"
    asides = [f"Turn {t + 1}reward {0.25 * t:g}hint of the teachergo {t} {NASTY}" for t in range(3)]
    assert texts(2, "aside") == asides and texts(2, "> pre.prompt") == [f"prompt 0 {NASTY}"]
    assert texts(3, "> pre.prompt") == [f"prompt 0 {NASTY}", f"prompt 2 {NASTY}"], "turn 2 is missing"
    tab.resize(420)
    assert tab.value("document.documentElement.scrollWidth") <= 420
    assert tab.value("document.images.length") == 0 and tab.value("document.title").endswith(": run · report")
    assert tab.problems == []


def test_a_run_that_was_killed_leaves_a_page_without_errors(browser, runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "killed")
    for file in (tmp_path / "killed").glob("*.jsonl"):
        file.write_bytes(file.read_bytes()[:-9])
    tab = browser.open(write_report([tmp_path / "killed"]))
    assert tab.value("figures.length") >= 15 and tab.problems == []
    (tmp_path / "killed" / "metrics.jsonl").write_text("")
    tab = browser.open(write_report([tmp_path / "killed"]))
    assert "No step is logged yet." in tab.text("#groups") and tab.problems == []


def test_a_page_shows_text_that_is_no_markup_stops_code_and_the_network_and_shows_errors(browser, tmp_path):
    nasty = f"{NASTY} & \u2028 \U0001f600"
    show = 'element("pre", { id: "text" }, (await openBlock("value")).text)'
    show = f'startPage(async () => {{ byId("here").append({show}); }});'
    body = '<main id="here"></main><p onclick="document.title = \'run\'" id="click">x</p>'
    for data in ({"value": {"text": nasty}}, {}):
        (tmp_path / "page.html").write_text(html_page("A <title>", body, [], (show,), data), encoding="utf-8")
        tab = browser.open(tmp_path / "page.html")
        if not data:
            assert 'data block "value"' in tab.text("#problem")
            continue
        assert tab.value("byId('text').textContent") == nasty
        assert tab.value("document.images.length") == 0
        tab.click("#click")
        assert tab.value("document.title") == "A <title>"
        assert tab.value("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'stopped')") == "stopped"
        assert tab.problems and all("Content Security Policy" in problem for problem in tab.problems)
