# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The self-test's check of a weight sync, with vLLM as the sampler."""

from __future__ import annotations

import pytest

from megatron_selfdistill.instruments.selftest.outcome import Outcome

SYNC = "weight sync to the sampler"


def synced(fault: bool) -> Outcome:
    """Return the outcome of this check alone; with ``fault``, only the first weights reach the engine."""
    from megatron_selfdistill.instruments.selftest import node_test
    from megatron_selfdistill.rollout.vllm.in_process import InProcessEngine

    load = InProcessEngine.load

    def load_once(self, tensors, version):
        if version == 0:
            return load(self, tensors, version)
        for _ in tensors:  # a collective
            pass
        self._llm.update_weight_version(str(version))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node_test, "CHECKS", {SYNC: node_test.CHECKS[SYNC]})
        if fault:
            patch.setattr(InProcessEngine, "load", load_once)
        return node_test.selftest(limit_s=1000)[0]  # vLLM is the default where it is installed


@pytest.mark.parametrize("world_size", [1, 2])
def test_vllm_writes_what_the_trainers_weights_say(ranks, world_size):
    for outcome in ranks.run(synced, False, world_size=world_size, init_process_group=False, timeout=600):
        assert outcome.passed, outcome


def test_weights_that_do_not_arrive_fail_the_check(ranks):
    (outcome,) = ranks.run(synced, True, world_size=1, init_process_group=False, timeout=600)
    _, log_probs, stale = outcome.figures
    assert not log_probs.passed and stale.passed and not outcome.passed, outcome
