# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A report in a real Chromium: figures, zoom, smoothing, keys, responses, widths, and its speed."""

from __future__ import annotations

import json
import math
import random
import shutil

import pytest
from reported_runs import NASTY, add_episodes, write_run

from megatron_selfdistill.instruments.report.figures import GROUPS
from megatron_selfdistill.instruments.report.run_record import RunRecord
from megatron_selfdistill.instruments.report.run_report import report_page, write_report

LOSS = "figures.find((figure) => figure.data.title === 'Loss')"
OTHER = ("optimizer.lr=1e-3", f"data.tokenizer=/{'models/' * 20}tokenizer", "checkpoint.load=/base")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return two run directories, which tests read and do not change."""
    root = tmp_path_factory.mktemp("runs")
    return write_run(root / "first"), write_run(root / "second", 40, *OTHER, shift=0.5)


@pytest.fixture(scope="module")
def one(runs, tmp_path_factory):
    """Return the report of one run."""
    return write_report(runs[:1], tmp_path_factory.mktemp("page") / "one.html")


@pytest.fixture(scope="module")
def two(runs, tmp_path_factory):
    """Return the report of two runs."""
    return write_report(runs, tmp_path_factory.mktemp("page") / "two.html")


def logged(run_dir, key):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
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
    tab.close()


def test_the_first_screen_says_whether_each_run_learns_and_is_healthy(browser, one, two):
    labels = "[...document.querySelectorAll('#summaries dt')].map((term) => [term.textContent, term.className])"
    tab = browser.open(two)
    three = [["Learns", "good"], ["Healthy", "good"], ["Changed", "open"]]
    assert tab.value(labels) == [*three, *three]
    assert tab.value("[...document.querySelectorAll('#summaries h3')].map((h) => h.textContent)") == ["first", "second"]
    tab = browser.open(one)
    assert tab.value(labels) == three and tab.text("#summaries dd") == "accuracy (greedy) 0.300 → 0.900, steps 0 to 30"
    assert tab.value("byId('summaries').getBoundingClientRect().bottom < byId('top').getBoundingClientRect().top")


def test_a_report_opens_with_a_drawn_curve_and_an_answer_before_and_after(browser, one):
    tab = browser.open(one)
    tab.wait_for("document.querySelector('#opening figure canvas')?.width > 0")
    shown = "[...document.querySelectorAll('#opening .answer h4')].map((heading) => heading.textContent)"
    assert tab.value(shown) == ["step 0", "step 30"]
    assert tab.value("document.getElementById('opening').nextElementSibling.id") == "summaries"
    tab.close()


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
    shared.close()


def test_dragging_zooms_every_figure_and_the_button_shows_all_steps_again(browser, one):
    tab = browser.open(one)
    tab.value(f"void ({LOSS}.element.id = 'loss', {LOSS}.draw())")
    assert tab.value("byId('all-steps').disabled")
    tab.drag("#loss .u-over", 0.2, 0.6)
    scales = "figures.filter((f) => f.plot).map((f) => [f.plot.scales.x.min, f.plot.scales.x.max])"
    tab.wait_for("view.zoom !== null")
    (low, high), *others = tab.value(scales)
    assert (low, high) == (6, 18) and len(others) >= 2 and all(other == [6, 18] for other in others)
    tab.click("#all-steps")
    assert all(scale == [0, 30] for scale in tab.value(scales)) and tab.value("byId('all-steps').disabled")
    tab.close()


def test_keys_move_the_cursor_and_zoom(browser, one, runs):
    tab = browser.open(one)
    tab.value(f"void ({LOSS}.draw(), {LOSS}.holder.focus())")
    now = f"{LOSS}.holder.getAttribute('aria-valuetext')"
    for _ in range(3):
        tab.key("ArrowLeft")
    step, _, value = tab.value(now).partition(": loss ")
    assert step == "step 27" and float(value) == pytest.approx(logged(runs[0], "loss/mean")[27], rel=5e-3)
    tab.key("Home")
    assert tab.value(now).startswith("step 0")
    tab.key("End")
    tab.key("+")
    assert tab.value("view.zoom") == [15, 30]
    tab.key("-")
    assert tab.value("view.zoom") == [8, 30]
    tab.key("0")
    assert tab.value("view.zoom") is None
    tab.close()


def test_smoothing_is_the_exponential_mean_that_python_computes(browser, one, runs):
    tab = browser.open(one)
    tab.value("(() => { byId('smoothing').value = 60; byId('smoothing').dispatchEvent(new Event('input')); })()")
    scale = tab.value("view.smoothing")
    shown = tab.value(f"{LOSS}.drawn()[1].values")
    total = weight = 0.0
    for value, expected in zip(logged(runs[0], "loss/mean").values(), shown, strict=True):
        decay = math.exp(-1 / scale)
        total, weight = total * decay + value, weight * decay + 1
        assert expected == pytest.approx(total / weight, rel=1e-4)
    assert scale > 1 and f"{scale:g} steps" in tab.text("#smoothing-text")
    tab.close()


def test_a_constant_curve_whose_means_differ_by_rounding_has_an_axis(browser, one):
    """The ticks of an axis as long as a rounding error would fill the memory."""
    tab = browser.open(one)
    tab.value("(() => { byId('smoothing').value = 60; byId('smoothing').dispatchEvent(new Event('input')); })()")
    rate = "figures.find((figure) => figure.data.title === 'Learning rate')"
    means = tab.value(f"{rate}.drawn()[1].values")
    low, high = tab.value(f"{rate}.range({min(means)!r}, {max(means)!r})")
    assert min(means) < max(means) and low < 1e-5 < high and high - low > 1e-7
    tab.close()


def test_responses_are_filtered_and_shown_as_text(browser, one):
    tab = browser.open(one)
    assert tab.value("document.querySelectorAll('#pairs').length") == 0, "nothing is read before it is opened"
    tab.click("#part-evaluations > summary")
    tab.wait_for("document.querySelector('#pairs .pair')")
    assert tab.text("#part-evaluations output") == "30 of 30 problems"
    assert tab.value("document.querySelector('#pairs .answer pre').textContent") == f"{NASTY} 0"
    assert tab.value("document.images.length") == 0 and tab.value("document.title").endswith(": first · report")
    choose = (
        "(() => {{ const s = document.querySelectorAll('#part-evaluations select')[3];"
        "s.value = {}; s.dispatchEvent(new Event('change')); }})()"
    )
    tab.value(choose.format(1))
    assert tab.text("#part-evaluations output") == "10 of 30 problems"
    assert (
        tab.value("[...document.querySelectorAll('#pairs .badge')].map((b) => b.textContent)")
        == ["wrong", "right"] * 10
    )
    tab.value(choose.format(0))
    tab.close()


def test_samples_show_where_teacher_and_student_disagree(browser, one):
    tab = browser.open(one)
    tab.click("#part-samples > summary")
    tab.wait_for("document.querySelector('#samples .token')")
    tokens = tab.value("[...document.querySelectorAll('#samples .token')].map((t) => [t.textContent, t.className])")
    assert tokens == [[NASTY, "token less"], [" two", "token more"], [" three", "token"], ["<end>", "token"]]
    assert tab.problems == []
    tab.close()


def test_the_turns_of_an_episode_are_one_conversation_with_reward_and_hint_beside_each(browser, tmp_path):
    run_dir = write_run(tmp_path / "run")
    add_episodes(run_dir, {"maze": [0, 1, 2], "torn": [0, 2]})
    tab = browser.open(write_report([run_dir]))
    tab.click("#part-samples > summary")
    tab.wait_for("document.querySelector('#samples .turn')")
    texts = "[...document.querySelectorAll('#samples article:nth-child({}) {}')].map((part) => part.textContent)"
    assert tab.value(texts.format("n", "h3")) == [
        "training problem 1, step 1",
        "maze, step 1, episode 3",
        "torn, step 1, episode 3",
    ]
    assert tab.value(texts.format(1, ":is(.turn, aside, .reply)")) == [], "a single response has no turns"
    order = (
        "[...document.querySelectorAll('#samples article:nth-child(2) :is(h4, .token-text, .reply)')]"
        ".map((part) => part.className || part.textContent)"
    )
    turns = [part for number in (1, 2, 3) for part in ("token-text", f"Turn {number}", "reply")]
    assert tab.value(order) == turns[:-1], "the last turn has no reply"
    assert tab.value(texts.format(2, ".reply")) == [f"room {turn} {NASTY}" for turn in (0, 1)]
    assert tab.value(texts.format(2, "aside")) == [
        f"Turn {turn + 1}reward {reward}hint of the teachergo {turn} {NASTY}"
        for turn, reward in enumerate((0, 0.25, 0.5))
    ]
    tokens = tab.value(texts.format(2, ".token.less"))
    assert tokens == [NASTY] * 3, "each turn has its marks"
    assert tab.value(texts.format(2, "> pre.prompt")) == [f"prompt 0 {NASTY}"]
    assert tab.value(texts.format(2, "> details summary")) == ["Prompt of turn 2", "Prompt of turn 3"]
    assert tab.value(texts.format(3, "> pre.prompt")) == [f"prompt 0 {NASTY}", f"prompt 2 {NASTY}"], "turn 2 is missing"
    beside = (
        "[...document.querySelectorAll('.turn')].every((turn) => turn.firstElementChild.getBoundingClientRect().right"
        " <= turn.lastElementChild.getBoundingClientRect().left)"
    )
    assert tab.value(beside)
    tab.resize(420)
    assert tab.value("document.documentElement.scrollWidth") <= 420 and not tab.value(beside)
    assert tab.value("document.images.length") == 0 and tab.value("document.title").endswith(": run · report")
    assert tab.problems == []
    tab.close()


def test_a_run_that_was_killed_leaves_a_page_without_errors(browser, runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "killed")
    for file in (tmp_path / "killed").glob("*.jsonl"):
        file.write_bytes(file.read_bytes()[:-9])
    tab = browser.open(write_report([tmp_path / "killed"]))
    assert tab.value("figures.length") >= 15 and tab.problems == []
    (tmp_path / "killed" / "metrics.jsonl").write_text("")
    tab = browser.open(write_report([tmp_path / "killed"]))
    assert "No step is logged yet." in tab.text("#groups") and tab.problems == []
    tab.close()


def test_three_runs_of_10000_steps_open_in_less_than_two_seconds(browser, tmp_path):
    keys = [key.replace("*", "8") for figures in GROUPS.values() for figure in figures for key in figure.metrics]
    steps, records = list(range(1, 10_001)), []
    for number in range(3):
        rng = random.Random(number)
        noise = [rng.gauss(0, 1) for _ in steps]
        records.append(RunRecord(f"run {number}", {}, dict.fromkeys(keys, (steps, noise)), [], [], []))
    page = tmp_path / "large.html"
    page.write_text(report_page(records), encoding="utf-8")
    fastest = min(browser.open(page).seconds for _ in range(3))
    print(f"{page.stat().st_size / 1e6:.2f} MB, open in {fastest:.2f} s")
    assert fastest < 2
