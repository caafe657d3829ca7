# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The figures of a report: their metrics exist, and docs/monitoring.md has the same sentences."""

from __future__ import annotations

import re
from pathlib import Path

from metric_keys import documented

from megatron_selfdistill.instruments.report.figures import GROUPS
from megatron_selfdistill.instruments.report.run_record import PHASES

REPOSITORY = Path(__file__).resolve().parents[4]
FIGURES = [figure for figures in GROUPS.values() for figure in figures]


def test_every_metric_of_a_figure_is_one_that_a_run_can_write():
    known = {re.sub(r"_[NK]$", "_*", key) for key in documented()}
    known |= {f"reverse_kl/tenth_{n:02d}" for n in range(1, 11)}
    for figure in FIGURES:
        keys = {key.replace("evaluation_hinted/", "evaluation/") for key in figure.metrics}
        assert keys <= known, figure.title
    assert {f"seconds/{phase}" for phase in PHASES} == {
        key for key in documented() if key.startswith("seconds/") and key != "seconds/step"
    }


def test_a_figure_says_in_whole_sentences_what_is_healthy_and_what_is_sick():
    for figure in FIGURES:
        for sentence in (figure.healthy, figure.sick):
            assert re.fullmatch(r"[A-Z].*\.", sentence) and sentence.count(". ") == 0, sentence
    assert len({figure.title for figure in FIGURES}) == len(FIGURES)


def test_the_page_on_monitoring_has_the_sentences_of_the_figures():
    page = (REPOSITORY / "docs" / "monitoring.md").read_text()
    rows = {row[0]: row[1:] for row in re.findall(r"^\| `(\S+?)`[^|]* \| ([^|]+) \| ([^|]+) \| [^|]+ \|$", page, re.M)}
    by_metric = {}
    for figure in FIGURES:
        by_metric.setdefault(next(iter(figure.metrics)), figure)
    shared = rows.keys() & by_metric.keys()
    assert len(shared) >= 10
    for key in shared:
        assert rows[key] == (by_metric[key].healthy, by_metric[key].sick), key
