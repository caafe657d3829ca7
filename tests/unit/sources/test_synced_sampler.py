# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The sampler of a run gets each version of the weights once."""

from __future__ import annotations

from unittest.mock import Mock

import torch

from megatron_selfdistill.metrics.phases import Phases
from megatron_selfdistill.sources.synced_sampler import SyncedSampler


def test_each_version_of_the_weights_is_sent_once_and_its_time_is_counted():
    inner, phases = Mock(), Phases(torch.device("cpu"))
    sampler = SyncedSampler(lambda: inner, phases)
    for version in (3, 3, 4, 4, 3):
        sampler.update_weights(version)
    assert [call.args for call in inner.update_weights.call_args_list] == [(3,), (4,), (3,)]
    assert sampler.version == 3 and "seconds/sync" in phases.metrics()


def test_weights_that_could_not_be_sent_are_sent_again():
    inner = Mock()
    inner.update_weights.side_effect = [RuntimeError("the engine died"), None]
    sampler = SyncedSampler(lambda: inner, Phases(torch.device("cpu")))
    for _ in range(2):
        try:
            sampler.update_weights(1)
        except RuntimeError:
            continue
    assert inner.update_weights.call_count == 2 and sampler.version == 1


def test_nothing_is_built_until_something_is_to_be_sampled_and_then_once():
    inner = Mock()
    build = Mock(return_value=inner)
    sampler = SyncedSampler(build, Phases(torch.device("cpu")))
    sampler.sleep()
    sampler.close()
    assert sampler.metrics() == {} and not build.called
    sampler.update_weights(7)
    inner.update_weights.assert_called_once_with(7)
    assert sampler.generate([], None) is inner.generate.return_value and sampler.metrics() is inner.metrics.return_value
    sampler.sleep()
    sampler.close()
    assert build.call_count == inner.sleep.call_count == inner.close.call_count == 1
