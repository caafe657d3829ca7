# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The options that the measuring scripts have in common."""

from __future__ import annotations

import argparse
from collections.abc import Mapping


def measuring_parser(description: str | None, numbers: Mapping[str, int]) -> argparse.ArgumentParser:
    """Return a parser with ``--json`` and one option for each of ``numbers``, the defaults of whole numbers by name."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    parser.add_argument("--json", help="also write every measured time to this file")
    return parser
