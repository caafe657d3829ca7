# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The explorer's page in a real Chromium: its numbers are those of whole rows in float64, and keys choose tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from explored_records import Words, logit_rows, record_of
from reported_runs import write_run
from torch import Tensor

from megatron_selfdistill.instruments.explorer.target_page import target_page, write_explored
from megatron_selfdistill.instruments.report.run_report import write_report
from megatron_selfdistill.loss import Divergence, Target, mixed_target
from megatron_selfdistill.loss.definition import divergence as divergence_of_rows
from megatron_selfdistill.loss.definition import entropy

NUM_TOKENS, VOCAB_SIZE = 150, 3000
SAVED = Target(anchor="reference", teacher_weight=1.0)
ALONE, MIXED = Target("teacher_alone", anchor="student"), Target(teacher_weight=1.0, anchor="student")
EOPD = Divergence(forward_above=0.8)
RENYI_TOLERANCES = {0.05: (2e-3, 1e-3), 0.5: (2e-3, 1e-3), 0.999: (2e-3, 1e-3), 2: (2e-2, 2e-3), 4: (8e-2, 4e-3)}
"""Greatest relative and absolute errors by order: a higher power spreads the columns of a bin further."""
STUDENT = {"anchor": "student", "match": "student"}
TEACHER = STUDENT | {"rule": "teacher_alone"}
TOLERANCE_OF_K = {"reference": 1e-3, "student": 2e-2}
"""Greatest relative errors of k: the bins of the page lie along the mix with the reference, which the run has used."""
LARGE = {"teacher_weight": 4, "k_max": None}
SETTINGS: dict[str, tuple[dict[str, Any], Target]] = {
    "as saved": ({}, SAVED),
    "a small weight": ({"teacher_weight": 0.3}, replace(SAVED, teacher_weight=0.3)),
    "a large weight without a bound": (LARGE, replace(SAVED, teacher_weight=4.0, k_max=None)),
    "the student's entropy": ({"match": "student"}, replace(SAVED, match="student")),
    "fixed": ({"rule": "fixed", "k": None}, replace(SAVED, rule="fixed")),
    "a mix with the student": (STUDENT, MIXED),
    "teacher alone": (TEACHER, ALONE),
    "forward KL": ({"divergence": "forward_kl"}, SAVED),
    "JSD": ({"divergence": "jsd", "jsd_lambda": 0.3}, SAVED),
    "eopd": ({"forward_above": EOPD.forward_above}, SAVED),
    "eopd of the teacher alone": (TEACHER | {"forward_above": EOPD.forward_above}, ALONE),
    **{
        f"sr_opsd of order {order}, {kind}": ({"divergence": kind, "order": order}, SAVED)
        for kind in ("reverse_kl", "forward_kl")
        for order in RENYI_TOLERANCES
    },
    "sr_opsd of the teacher alone": (TEACHER | {"order": 0.5}, ALONE),
}
NUMBERS = """(async () => {
  const rows = [];
  for (let token = 0; token < explorer.numTokens; token++) {
    const summary = await explorer.summary(token);
    const t = targetOf(summary, {...explorer.saved, ...%s}, explorer.entropies(token));
    rows.push([t.k, t.entropy, t.reverseKl, t.loss, t.rareMass, t.best === t.studentBest ? 0 : 1, t.status]);
  }
  return rows;
})()"""


@pytest.fixture(scope="module")
def rows() -> list[Tensor]:
    return logit_rows(NUM_TOKENS, VOCAB_SIZE, 3)


@pytest.fixture(scope="module")
def show(browser, tmp_path_factory) -> Callable[..., Any]:
    """Return a function to a tab with the page of a record, or with a page, after it has computed every token once."""

    def shown(record: dict[str, Any] | Path, **window: Any) -> Any:
        page = record
        if isinstance(record, dict):
            page = tmp_path_factory.mktemp("explorer") / "target.html"
            page.write_text(target_page(record), encoding="utf-8")
        tab = browser.open(page, **window)
        tab.wait_for("document.documentElement.dataset.computed === '1'", 60)
        return tab

    return shown


@pytest.fixture(scope="module")
def tab(show, rows):
    return show(record_of(rows, SAVED, step=100))


@pytest.mark.parametrize("name", SETTINGS)
def test_the_page_computes_the_target_of_whole_rows(tab, rows, name):
    changes, target = SETTINGS[name]
    s, t, r = (each.double() for each in rows)
    found = tab.value(NUMBERS % json.dumps(changes))
    numbers = torch.tensor([row[:6] for row in found], dtype=torch.float64)
    exact = mixed_target(s, t, target, r if target.is_anchored else None)
    torch.testing.assert_close(1 / numbers[:, 0], exact.beta, rtol=TOLERANCE_OF_K[target.anchor], atol=0)
    numbers_of_loss = {name: changes[name] for name in ("jsd_lambda", "order", "forward_above") if name in changes}
    kind = Divergence(changes.get("divergence", "reverse_kl"), **numbers_of_loss)
    log_p, q = s.log_softmax(-1), exact.log_q.exp()
    expected = {
        1: entropy(exact.log_q),
        2: divergence_of_rows(log_p, exact.log_q, Divergence()),
        3: divergence_of_rows(log_p, exact.log_q, kind),
        4: torch.where(log_p.exp() < 1e-3, q, 0.0).sum(-1),
        5: (q.argmax(-1) != log_p.argmax(-1)).double(),
    }
    for column, values in expected.items():
        # The threshold of rare tokens may cut a bin, whose columns count as normally distributed.
        rtol, atol = (1e-2, 4e-3) if column == 4 else (2e-3, 3e-4)
        if column == 3 and kind.is_renyi:
            rtol, atol = RENYI_TOLERANCES[kind.order]
        torch.testing.assert_close(numbers[:, column], values, rtol=rtol, atol=atol)
    names = ["matched", "capped", "out_of_range", "undetermined", "given", "unconverged"]
    same = [row[6] == names[status] for row, status in zip(found, exact.status.tolist(), strict=True)]
    assert sum(same) >= 0.97 * NUM_TOKENS, "a token near its bound may have another status"
    assert tab.problems == []


CONTRASTED = Target(anchor="reference", teacher_weight=1.0, num_controls=3)


@pytest.fixture(scope="module")
def contrasted(show):
    return show(record_of(logit_rows(NUM_TOKENS, VOCAB_SIZE, 4), CONTRASTED), width=400)


@pytest.mark.parametrize(
    ("changes", "target"),
    [
        ({}, CONTRASTED),
        ({"k_max": None}, replace(CONTRASTED, k_max=None)),
        ({"rule": "fixed", "k": None}, replace(CONTRASTED, rule="fixed")),
        ({"num_controls": 0}, SAVED),
    ],
)
def test_the_page_of_a_target_with_controls_computes_it_with_and_without_them(contrasted, changes, target):
    s, t, r, c = (each.double() for each in logit_rows(NUM_TOKENS, VOCAB_SIZE, 4))
    found = torch.tensor([row[:4] for row in contrasted.value(NUMBERS % json.dumps(changes))], dtype=torch.float64)
    exact = mixed_target(s, t, target, r, c.expand(target.num_controls, -1, -1) if target.num_controls else None)
    torch.testing.assert_close(1 / found[:, 0], exact.beta, rtol=2e-2 if "num_controls" in changes else 2e-3, atol=0)
    expected = divergence_of_rows(s.log_softmax(-1), exact.log_q, Divergence())
    torch.testing.assert_close(found[:, 3], expected, rtol=5e-3, atol=1e-3)
    assert contrasted.problems == []


def test_the_table_shows_that_what_any_hint_does_cancels(contrasted):
    """At token 9 the teacher and the controls have another favourite than the student, and the target has not."""
    _, t, _, c = (each.double() for each in logit_rows(NUM_TOKENS, VOCAB_SIZE, 4))
    contrasted.value("explorer.choose(9)")
    lines = "[...document.querySelectorAll('.candidates tbody tr')]"
    column = f"{lines}.map((row) => [+row.dataset.id, row.cells[%d].innerText])"
    heads = contrasted.value("[...document.querySelectorAll('.candidates thead th')].map((head) => head.innerText)")
    assert heads == ["token", "student", "teacher", "reference", "other hints", "t - c", "target"]
    log_t = t.log_softmax(-1)
    for index, values, tolerance in ((2, log_t.exp(), 6e-4), (4, c.exp(), 6e-4), (5, log_t - c, 6e-3)):
        for i, text in contrasted.value(column % index):
            assert float(text) == pytest.approx(float(values[9, i]), abs=tolerance)
    favourite = int(t[9].argmax())
    assert log_t[9, favourite] > math.log(0.9) and float(dict(contrasted.value(column % 6))[favourite]) < 0.1
    assert "What any hint does is in the teacher (t) and in c" in contrasted.text(".candidates caption")
    assert contrasted.value("document.documentElement.scrollWidth") <= 400 and contrasted.problems == []


@pytest.mark.parametrize(
    ("divergence", "words"),
    [
        (EOPD, "reverse KL(p ‖ q), and also forward KL(q ‖ p) if H(q) is above 0.8 nats"),
        (Divergence(order=0.5), "Renyi D(p ‖ q) of order 0.5"),
        (Divergence("forward_kl", order=0.95), "Renyi D(q ‖ p) of order 0.95"),
    ],
)
def test_the_page_opens_with_the_divergence_of_the_run_and_comes_back_to_it(show, rows, divergence, words):
    record = record_of([each[:40] for each in rows], SAVED, divergence)
    tab = show(record)
    assert f"Mean {words}: " in tab.text("#progress")
    found = tab.value("[...explorer.values]")
    assert found == pytest.approx(record["tokens"]["loss"], rel=2e-3, abs=1e-3)
    tab.value("explorer.choose(18)")
    assert f"(stored: {record['tokens']['loss'][18]:.3g}"[:12] in tab.text("[data-number=loss]")
    for value, shown in (("reverse_kl", "reverse KL(p ‖ q)"), ("saved", words)):
        tab.value(f"void (byId('divergence').value = '{value}', byId('divergence').dispatchEvent(new Event('change')))")
        tab.wait_for(f"byId('progress').textContent.includes({json.dumps(f'Mean {shown}: ')})")
        if value == "reverse_kl":
            plain = tab.value("[...explorer.values]")
            assert plain == pytest.approx(record["tokens"]["reverse_kl"], rel=2e-3, abs=3e-4)
    assert tab.value("[...explorer.values]") == found and tab.problems == []


def test_a_divergence_that_hangs_on_unstored_logits_is_said_to_be_unknown(show):
    """At token 0, 2000 columns are far below both maxima, and much less likely under the target."""
    rows = logit_rows(2, VOCAB_SIZE, 2)
    for each, depth in zip(rows, (60.0, 90.0), strict=True):
        each[:, 1000:] -= 4
        each[0, 1000:] = each[0].max() - depth - torch.rand(2000, generator=torch.Generator().manual_seed(1))
    tab = show(record_of(rows, ALONE, Divergence(order=4)))
    assert "do not determine the divergence at 1 of 2 tokens" in tab.text("#progress")
    tab.value("explorer.choose(0)")
    assert tab.text("[data-number=loss]").startswith("not determined by the stored logits")
    assert tab.value("Number.isFinite(explorer.values[1])") and tab.problems == []


def test_pointer_and_keys_choose_tokens_and_tell_a_screen_reader(show, rows):
    tab = show(record_of(rows, SAVED, step=100))
    tab.hover("#t30")
    tab.wait_for("explorer.chosen === 30")
    assert tab.value("byId('announcement').textContent").startswith("Token 31, ␣w")
    assert tab.value("byId('announcement').getAttribute('aria-live')") == "polite"
    tab.click("#t40")
    tab.hover("#t50")
    tab.wait_for("!byId('pinned').hidden && explorer.chosen === 40")
    for key, expected in (("ArrowRight", 41), ("ArrowLeft", 40), ("PageDown", 90), ("End", 149), ("Home", 0)):
        tab.key(key)
        tab.wait_for(f"explorer.chosen === {expected}")
    tab.key("ArrowDown")
    differs = tab.value("explorer.differs.findIndex((value, i) => i > 0 && value === 1)")
    tab.wait_for(f"explorer.chosen === {differs}")
    assert tab.value("byId('tokens').getAttribute('aria-activedescendant')") == f"t{differs}"
    assert "first choice differs" in tab.value("byId('announcement').textContent")
    tab.key("Escape")
    assert tab.value("byId('pinned').hidden") and tab.problems == []


def test_markup_in_a_response_is_text(tab):
    tab.value("explorer.choose(0)")
    assert tab.value("document.title") == "Target explorer" and tab.value("document.images.length") == 0
    text = tab.value("byId('tokens').textContent")
    assert text.startswith(Words.NASTY[0] + Words.NASTY[1] + "↵\n")
    assert tab.value("byId('solution').textContent") == "<b>a solution</b>"
    assert tab.value("document.querySelectorAll('#solution b').length") == 0
    assert tab.value("byId('chosen-text').textContent") == Words.NASTY[0].replace(" ", "␣")


@pytest.mark.parametrize(("width", "dark"), [(1280, True), (400, False)])
def test_the_page_fits_the_window(show, rows, width, dark):
    tab = show(record_of(rows, SAVED, step=100), width=width, dark=dark)
    assert tab.value("document.documentElement.scrollWidth") <= width and tab.problems == []


def test_links_of_the_report_open_pages_of_turns_with_reward_hint_and_reply_and_pages_without(
    browser, show, rows, tmp_path
):
    run_dir, record = write_run(tmp_path / "a run"), record_of([each[:20] for each in rows], SAVED, step=10)
    nasty = Words.NASTY[0]
    turn = {"episode": 1, "turn": 2, "reward": 0.25, "hint": f"go {nasty}", "reply": f"a wall {nasty}"}
    write_explored(run_dir, 10, [record | turn, record])
    tab = browser.open(write_report([run_dir]))
    links = "[...document.querySelectorAll('#explored li')].map((link) => link.textContent)"
    assert tab.value(links) == ["step 10, sample 1, turn 3", "step 10, sample 2"]
    tab.click("#explored a")
    tab.wait_for("window.explorer !== undefined && explorer.chosen >= 0")
    about = ["episode 2, turn 3, reward 0.25, 20 tokens", "20 tokens"]
    hints, replies = [turn["hint"], record["solution"]], [[turn["reply"]], []]
    for number, name in enumerate(["step_0000010_1_turn_3.html", "step_0000010_2.html"]):
        page = show(run_dir / "explored" / name)
        assert page.text("#about").startswith(f"step 10, problem p<1>, {about[number]}")
        assert page.value("byId('solution').textContent") == hints[number]
        found = page.value("[...document.querySelectorAll('#reply')].map((reply) => reply.textContent)")
        assert found == replies[number] and page.value("document.title") == "Target explorer" and page.problems == []


def test_a_long_response_opens_before_any_of_its_tokens_is_computed(browser, tmp_path):
    record = record_of(logit_rows(500, 500, 2), Target(anchor="student"))
    for part in ("id", "text", "status", *(key for key, value in record["tokens"].items() if len(value) == 500)):
        record["tokens"][part] = (record["tokens"][part] * 8)[:4000]
    record["blocks"] = (record["blocks"][:7] * 9)[:63]
    (tmp_path / "long.html").write_text(target_page(record), encoding="utf-8")
    tab = browser.open(tmp_path / "long.html")
    assert tab.value("explorer.spans.length") == 4000
    tab.wait_for("document.documentElement.dataset.computed === '1'", 60)
    assert tab.problems == []
