# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Servers that answer as those of vLLM do."""

from __future__ import annotations

import pytest


@pytest.fixture
def fakes():
    from fake_vllm import fake_servers

    with fake_servers(2) as servers:
        yield servers
