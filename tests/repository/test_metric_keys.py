# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""docs/metrics.md explains every key that a run can write, and no other; tiny_run.py asks the same of recorded runs."""

from __future__ import annotations

from metric_keys import documented, dynamic, in_sources


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
