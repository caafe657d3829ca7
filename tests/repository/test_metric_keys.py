# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""docs/metrics.md explains every key that a run can write, and no other; tiny_run.py asks the same of recorded runs."""

from __future__ import annotations

import re

import pytest
from metric_keys import PAGE, documented, dynamic, in_sources, undocumented

from megatron_selfdistill.metrics import COLUMNS, Phases


def test_every_key_that_the_sources_can_write_is_documented():
    assert sorted(in_sources() - set(documented())) == []


def test_no_key_is_documented_that_nothing_writes_and_none_twice():
    assert sorted(set(documented()) - in_sources()) == []
    assert len(set(documented())) == len(documented()) > 70


def test_every_place_that_makes_keys_up_is_known():
    """A new f-string with a key in it needs its names in metric_keys.py."""
    keys = {"status/*", "seconds/*", "padding/*", "tokens_per_second/*", "rollout/*", "reverse_kl/*"}
    keys |= {"teacher_tokens/*", "teacher_loss/*"}
    evaluations = {"*/*", "avg_at_*", "pass_at_*", "majority_at_*", "pass_over_avg_at_*"}
    names_of_random_streams = {"*/turn*", "balance/*", "eval/*", "pick/*", "solution/*", "verbal/*"}
    assert dynamic() == keys | evaluations | names_of_random_streams


def test_what_a_timer_really_writes_is_documented():
    phases = Phases()
    for name in ("rollout", "train"):
        with phases(name):
            pass
    keys = phases.metrics(rollout=5, train=5).keys()
    assert len(keys) == 6 and undocumented(keys) == set()


@pytest.mark.parametrize(
    "key", ["evaluation/pass_at_8", "evaluation_hinted/greedy_accuracy", "evaluation/avg_at_16", "step"]
)
def test_numbers_and_hinted_evaluations_are_documented(key):
    assert undocumented([key]) == set()


@pytest.mark.parametrize("key", ["evaluation/pass_at_k", "loss/median", "seconds", "evaluation/pass_at_8/x"])
def test_a_key_that_is_not_in_the_table_is_found(key):
    assert undocumented(["loss/mean", key]) == {key}


def test_the_page_explains_the_columns_of_the_console():
    columns = re.findall(r"^  (\S+) +\S.* \((\S+)\)$", COLUMNS, re.MULTILINE)
    assert re.findall(r"^\| ([a-z0-9-]+) \| [^|]+ \| `(\S+)` \|$", PAGE.read_text(), re.MULTILINE) == columns
