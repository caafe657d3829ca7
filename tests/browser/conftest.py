# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""One Chromium for all tests of pages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from chromium import Chromium, running_chromium


@pytest.fixture(scope="session")
def browser() -> Iterator[Chromium]:
    with running_chromium() as started:
        yield started
