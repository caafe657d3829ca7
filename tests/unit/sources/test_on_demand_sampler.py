# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A sampler that is built when something is to be sampled."""

from __future__ import annotations

from unittest.mock import Mock

from megatron_selfdistill.sources.synced_sampler import OnDemandSampler


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
