# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Compare the tables of the pages with the recorded results of ``results/``, and print what differs.

python experiments/compare_pages.py        the status is 1 if a table differs
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

SCRIPTS = "adapter_map anchored_tables false_alarms hint_levels quests real_map recipe_table staleness two_teachers"
"""The scripts that write tables of pages."""


def differs(script: Path) -> bool:
    """Return whether a script finds other tables in its page; the script runs here, since torch is imported once."""
    sys.argv = [str(script), "--check"]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        return bool(end.code)
    return False


if __name__ == "__main__":
    differing = [name for name in SCRIPTS.split() if differs(Path(__file__).with_name(f"{name}.py"))]
    print(f"differences: {', '.join(differing) or 'none'}")
    sys.exit(1 if differing else 0)
