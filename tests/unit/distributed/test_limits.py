# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A limit of the process that is too low for the ranks is one sentence."""

from __future__ import annotations

import pytest

from megatron_selfdistill.distributed.ranks import _named_limits
from megatron_selfdistill.errors import ConfigError


@pytest.mark.parametrize("reason", ["Too many open files", "Resource temporarily unavailable"])
def test_a_limit_that_torch_does_not_name_is_named_with_its_value(reason):
    with (
        pytest.raises(ConfigError, match=rf"too low: raise `ulimit -n` .* socket: {reason}\)$"),
        _named_limits(),
    ):
        raise RuntimeError(f"[enforce fail at gloo/transport/tcp/socket.cc:24] rv != -1. socket: {reason}")


def test_another_error_of_the_start_passes():
    with pytest.raises(RuntimeError, match=r"^no route to host$"), _named_limits():
        raise RuntimeError("no route to host")
