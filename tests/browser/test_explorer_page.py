# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The explorer's page in a real Chromium: its numbers are those of whole rows in float64, and keys choose tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from explored_records import Words, logit_rows, record_of
from torch import Tensor

from megatron_selfdistill.instruments.explorer.target_page import target_page
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


def test_pointer_and_keys_choose_tokens_and_tell_a_screen_reader(show, rows):
    tab = show(record_of(rows, SAVED, step=100))
    tab.hover("#t30")
    tab.wait_for("explorer.chosen === 30")
    assert tab.value("byId('announcement').textContent").startswith("Token 31, ␣w")
    tab.click("#t40")
    tab.hover("#t50")
    tab.wait_for("!byId('pinned').hidden && explorer.chosen === 40")
    for key, expected in (("ArrowRight", 41), ("ArrowLeft", 40), ("PageDown", 90), ("End", 149), ("Home", 0)):
        tab.key(key)
        tab.wait_for(f"explorer.chosen === {expected}")
    tab.key("ArrowDown")
    differs = tab.value("explorer.differs.findIndex((value, i) => i > 0 && value === 1)")
    tab.wait_for(f"explorer.chosen === {differs}")
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
