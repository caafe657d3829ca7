# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The sampler of a run gets each version of the weights once, and is built when something is to be sampled."""

from __future__ import annotations

from unittest.mock import Mock

import torch

from megatron_selfdistill.metrics.phases import Phases
from megatron_selfdistill.sources.synced_sampler import OnDemandSampler, SyncedSampler


def test_each_version_of_the_weights_is_sent_once_and_its_time_is_counted():
    inner, phases = Mock(), Phases(torch.device("cpu"))
    sampler = SyncedSampler(inner, phases)
    for version in (3, 3, 4, 4, 3):
        sampler.update_weights(version)
    assert [call.args for call in inner.update_weights.call_args_list] == [(3,), (4,), (3,)]
    assert sampler.version == 3 and "seconds/sync" in phases.metrics()


def test_everything_else_is_the_inner_samplers():
    inner = Mock()
    sampler = SyncedSampler(inner, Phases(torch.device("cpu")))
    assert sampler.generate([], None) is inner.generate.return_value
    assert sampler.metrics() is inner.metrics.return_value
    sampler.sleep()
    sampler.close()
    assert inner.sleep.call_count == inner.close.call_count == 1 and not inner.update_weights.called


def test_weights_that_could_not_be_sent_are_sent_again():
    inner = Mock()
    inner.update_weights.side_effect = [RuntimeError("the engine died"), None]
    sampler = SyncedSampler(inner, Phases(torch.device("cpu")))
    for _ in range(2):
        try:
            sampler.update_weights(1)
        except RuntimeError:
            continue
    assert inner.update_weights.call_count == 2 and sampler.version == 1


def test_new_weights_wait_for_the_responses_under_way_where_they_are_to_keep_the_old_ones():
    inner, phases = Mock(), Phases(torch.device("cpu"))
    sampler = SyncedSampler(inner, phases, settles=True)
    for version in (3, 3, 4):
        sampler.update_weights(version)
    assert [name for name, *_ in inner.method_calls] == ["settle", "update_weights"] * 2
    assert {"seconds/rollout", "seconds/sync"} <= phases.metrics().keys(), "waiting for responses is no sync"


def test_nothing_is_built_until_something_is_to_be_sampled_and_then_once():
    inner = Mock()
    build = Mock(return_value=inner)
    sampler = OnDemandSampler(build)
    sampler.sleep()
    sampler.close()
    assert sampler.metrics() == {} and not build.called
    sampler.update_weights(7)
    inner.update_weights.assert_called_once_with(7)
    assert sampler.generate([], None) is inner.generate.return_value and sampler.metrics() is inner.metrics.return_value
    sampler.sleep()
    sampler.close()
    assert build.call_count == inner.sleep.call_count == inner.close.call_count == 1
