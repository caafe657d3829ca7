# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The table that a self-test prints."""

from __future__ import annotations

from megatron_selfdistill.instruments.selftest.node_test import CHECKS as FUNCTIONS

CHECKS = list(FUNCTIONS)


def verdicts(table: str) -> dict[str, str]:
    """Return the verdicts from the lines that begin with the name of a check."""
    rows = [(name, line) for line in table.splitlines() for name in CHECKS if line.startswith(f"{name}  ")]
    return {name: line.split("  ")[-1].strip() for name, line in rows}
