# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Real vLLM servers, for a trainer whose environment has no vLLM: ``make test-vllm`` runs these."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from real_servers import Servers, started


@pytest.fixture(scope="package")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with started(tmp_path_factory.mktemp("servers"), 2) as found:
        yield found
