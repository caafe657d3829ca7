# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""``python -m tests.gpu``: what ``make test-gpu`` runs; see docs/support.md."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = map(str, (TESTS / "support", TESTS.parent))

from tests.gpu.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
