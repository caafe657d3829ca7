# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""README's table "What runs where", from docs/support.json and what GPUs have reported in docs/support.jsonl.

    python tools/support_table.py            writes the table between README's two marker lines
    python tools/support_table.py --check    exits with 1 where README has another one

docs/support.json has the rows: the claim, what a CPU shows of it, and levels of checks of ``make test-gpu``, weakest
first.  A row is green where the last run of each check of one of its levels has passed, with what that level covers; it
is red where the last run of one of its checks has failed.  Nobody types a GPU's cell.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
ROWS, RESULTS, README = (REPOSITORY / name for name in ("docs/support.json", "docs/support.jsonl", "README.md"))
BEGIN = "<!-- The table is written by tools/support_table.py from docs/support.json and docs/support.jsonl. -->"
END = "<!-- The end of the table of tools/support_table.py. -->"
LEGEND = (
    "✅ tested in CI (CPU, gloo, the real megatron-core 0.16.1) · 🟢 tested on a GPU (which, when) · "
    "🔴 failed on a GPU · ⚪ written, never run"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write README's table, or with --check compare it; return 1 where it differs, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args(arguments)
    old = README.read_text(encoding="utf-8")
    new = with_table(old, table(json.loads(ROWS.read_text(encoding="utf-8"))["rows"], read_results(RESULTS)))
    if options.check:
        if new != old:
            print("README's table is not the one of tools/support_table.py: run it", file=sys.stderr)
        return int(new != old)
    README.write_text(new, encoding="utf-8")
    return 0


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return the results of all runs on GPUs, in the order in which they came; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def table(rows: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]]) -> str:
    """Return the legend and the table as Markdown."""
    last = last_runs(results)
    lines = [LEGEND, "", "| | CPU | GPU |", "|---|---|---|"]
    lines += [f"| {row['claim']} | {row['cpu']} | {gpu_cell(row, last)} |" for row in rows]
    return "\n".join(lines)


def last_runs(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return of each check the results of its last run in which it was not skipped."""
    done = [result for result in results if result["verdict"] != "skipped"]
    newest = {result["check"]: result["run"] for result in done}
    last: dict[str, list[dict[str, Any]]] = {}
    for result in done:
        if result["run"] == newest[result["check"]]:
            last.setdefault(result["check"], []).append(result)
    return last


def gpu_cell(row: dict[str, Any], last: dict[str, list[dict[str, Any]]]) -> str:
    """Return the GPU's cell of a row: a verdict with device and date, or that nothing has run."""
    note = f" {row['gpu_note']}" if row["gpu_note"] else ""
    checks = dict.fromkeys(check for level in row["levels"] for check in level["checks"])
    for check in checks:
        for result in last.get(check, []):
            if result["verdict"] != "ok":
                return f"🔴 {check} ({result['device']}, {result['date']}){note}"
    for level in reversed(row["levels"]):
        if level["checks"] and all(check in last for check in level["checks"]):
            found = [result for check in level["checks"] for result in last[check]]
            oldest = min(found, key=lambda result: result["run"])
            covers = f": {level['covers']}" if level["covers"] else ""
            return f"🟢 {oldest['device']}, {oldest['date']}{covers}{note}"
    return f"⚪{note}"


def with_table(readme: str, new: str) -> str:
    """Return README with ``new`` between its marker lines.  Raises: ValueError where there is not one of each."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"expected one line {BEGIN!r} and one {END!r} in README.md, got others")
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{new}\n{END}{after}"


if __name__ == "__main__":
    sys.exit(main())
