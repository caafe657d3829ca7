# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The example of adapters: its runs differ in the adapters alone, and adapters learn."""

from __future__ import annotations

import dataclasses

import pytest

from _lib.command_line import CONFIG_NAME
from megatron_selfdistill import config as configuration


def test_the_runs_differ_in_the_adapters_and_their_learning_rate_alone(load_example):
    example = load_example("11_adapters")
    whole, adapted = (
        configuration.load(variant.overrides, CONFIG_NAME)
        for variant in (example.ALL_WEIGHTS, example.adapters(4, example.LEARNING_RATE))
    )
    assert adapted.adapter.rank == 4 and whole.adapter.rank == 0
    assert adapted.optimizer.lr == pytest.approx(10 * whole.optimizer.lr)
    assert dataclasses.replace(adapted, adapter=whole.adapter, optimizer=whole.optimizer) == whole


@pytest.mark.full
def test_adapters_learn_what_all_weights_learn_with_a_smaller_checkpoint(load_example, base, root, monkeypatch, capsys):
    example = load_example("11_adapters")
    made, show, train = [], example.table, example.train_variant

    def seldom_evaluated(variant, *rest):
        return train(dataclasses.replace(variant, overrides=(*variant.overrides, "evaluation.every=100")), *rest)

    monkeypatch.setattr(example, "train_variant", seldom_evaluated)
    monkeypatch.setattr(example, "table", lambda rows: made.extend(rows) or show(rows))
    assert example.main(["--steps", "100", "--ranks", "4", "--directory", str(root)]) == 0
    whole, adapted = made
    assert whole.before == adapted.before < 0.5
    assert min(whole.greedy, adapted.greedy) > 0.9 and adapted.sampled > whole.sampled - 0.05
    assert adapted.checkpoint_bytes < whole.checkpoint_bytes / 3
    assert "against all weights, with a checkpoint of" in capsys.readouterr().out
