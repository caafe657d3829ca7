# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The outcomes of steps in many layouts."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def outcomes(ranks):
    from layouts import Outcomes

    return Outcomes(ranks)
