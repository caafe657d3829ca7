# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The tables "What runs where", from docs/support.json and from the results of GPUs in docs/support.jsonl.

    python tools/support_table.py            writes README's short table, the page docs/support.md and the sentence
    python tools/support_table.py --check    changes nothing, and exits with 1 if one of these files differs

The sentence says what has run on GPUs, and what has not.  It is the same in README and in every page of docs/ that has
its two markers (`STATUS`).

docs/support.json has the groups and the rows.  A row names its group, its claim, the result on a CPU, the test files
that are the evidence of this result, and levels of checks of ``make test-gpu``, weakest first.  A row is green if the
last run of each check of one of its levels has passed, and the row names what this level covers.  A row is red if the
last run of one of its checks has failed.  docs/support.md has every row.  README has one line per
group with the number of its rows that have passed.  The cell of a GPU is always computed and never written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
ROWS, RESULTS, README, PAGE = (
    REPOSITORY / name for name in ("docs/support.json", "docs/support.jsonl", "README.md", "docs/support.md")
)
BEGIN = "<!-- tools/support_table.py writes this table from docs/support.json and docs/support.jsonl. -->"
END = "<!-- The end of the table of tools/support_table.py. -->"
STATUS = "<!--GPUs-->", "<!--/GPUs-->"
"""The marks around the sentence of `gpu_status`, which is wrapped if it was.  No line begins with one (CommonMark)."""
PARTS = {
    "the loss": r"kernels of the loss|fused .*",
    "training steps": r"step: bf16|one: .*",
    "Transformer Engine's layers": r"step: Transformer Engine.*",
    "layouts as ranks of one GPU": r"several: .*",
    "sampling in process": r"guided sampling in process|colocated engine: the trainer's own sampler",
    "saving and resuming": r"saving in the background and resuming",
    "several GPUs (NCCL)": r"eight: .*|self-test of 8 ranks: .*|a rank that stops",
    "vLLM": r".*vLLM.*",
    "FP8": r"fp8 .*",
    "gated delta nets": r".*gated delta nets",
}
"""A part of the project, as `gpu_status` names it -> the expression of the names of its checks."""
LEGEND = (
    "✅ tested in CI (CPU, gloo, the real megatron-core) · 🟢 tested on a GPU (which, when) ·\n"
    "🔴 failed on a GPU · ⚪ written, never run · \u2013 not possible on a CPU"
)
SHORT_NOTE = "*2 of 4*: two of the four [claims](docs/support.md) of this line"
Row = Mapping[str, Any]
LastRuns = Mapping[str, Sequence[Mapping[str, Any]]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write README's table and the page, or compare them with --check; return 1 if one of them differs, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args(arguments)
    support, last = json.loads(ROWS.read_text(encoding="utf-8")), last_runs(read_results(RESULTS))
    wanted = {
        README: with_table(README.read_text(encoding="utf-8"), short_table(support, last)),
        PAGE: with_table(PAGE.read_text(encoding="utf-8"), long_tables(support, last)),
    }
    for path in (README, *sorted((REPOSITORY / "docs").rglob("*.md"))):
        text = wanted.get(path) or path.read_text(encoding="utf-8")
        wanted[path] = with_status(text, gpu_status(support, last)) if STATUS[0] in text else text
    status = 0
    for path, text in wanted.items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        if options.check:
            print(
                f"{path.name} differs from what tools/support_table.py writes: run python tools/support_table.py",
                file=sys.stderr,
            )
            status = 1
        else:
            path.write_text(text, encoding="utf-8")
    return status


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return the results of all runs on GPUs, oldest first; an empty list if the file does not exist."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def last_runs(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return, for each check, the results of the last run that did not skip the check."""
    done = [result for result in results if result["verdict"] != "skipped"]
    newest = {result["check"]: result["run"] for result in done}
    last: dict[str, list[dict[str, Any]]] = {}
    for result in done:
        if result["run"] == newest[result["check"]]:
            last.setdefault(result["check"], []).append(result)
    return last


def gpu_status(support: Mapping[str, Any], last: LastRuns) -> str:
    """Return what to say of GPUs: the devices, the `PARTS` whose checks have passed, and those that never ran."""
    if not last:
        return "Nothing has run on a GPU yet."
    results = [result for runs in last.values() for result in runs]
    known = {check for row in support["rows"] for level in row["levels"] for check in level["checks"]} | last.keys()
    found: dict[str, list[str]] = {}
    for part, expression in PARTS.items():
        checks = [check for check in known if re.fullmatch(expression, check)]
        ran = [check for check in checks if check in last]
        failed = any(result["verdict"] != "ok" for check in ran for result in last[check])
        state = "failed" if failed else "never" if not ran else "passed" if ran == checks else "partly"
        found.setdefault(state, []).append(part)
    devices = " and ".join(sorted({result["device"] for result in results}))
    words = {
        "passed": f"Passed on {devices} ({max(result['date'] for result in results)})",
        "failed": "Failed on a GPU",
        "partly": "Run on a GPU only in part",
        "never": "Never run on a GPU",
    }
    return " ".join(f"{text}: {', '.join(found[state])}." for state, text in words.items() if state in found)


def with_status(text: str, sentence: str) -> str:
    """Return the text of a page with ``sentence`` between the marks `STATUS`."""
    begin, end = STATUS
    before, _, rest = text.partition(begin)
    old, _, after = rest.partition(end)
    wrapped = re.search(r"\n( *)", old)
    if wrapped is None:
        return f"{before}{begin}{sentence}{end}{after}"
    above, newline, line = before.rpartition("\n")
    glued = f"{line.rstrip()}\0{begin}{sentence}{end}"
    lines = textwrap.wrap(glued, 100, subsequent_indent=wrapped[1], break_on_hyphens=False)
    return above + newline + "\n".join(lines).replace("\0", " ") + after


def short_table(support: Mapping[str, Any], last: LastRuns) -> str:
    """Return README's legend and its table as Markdown: one line per group of ``support``."""
    lines = [f"| {SHORT_NOTE} | CPU | GPU |", "|---|---|---|"]
    for group, rows in grouped(support):
        cells = short_cell([row["cpu"] for row in rows], "✅"), short_cell([gpu_cell(row, last) for row in rows], "🟢")
        lines.append(f"| {group['claim']} | {cells[0]} | {cells[1]} |")
    return "\n".join([LEGEND, "", *lines])


def short_cell(cells: Sequence[str], passed: str) -> str:
    """Return one cell for a group: the number of its ``cells`` that have failed, or else that begin with ``passed``."""
    for mark in ("🔴", passed):
        number = sum(cell.startswith(mark) for cell in cells)
        if number:
            return mark if number == len(cells) else f"{mark} {number} of {len(cells)}"
    return "⚪"


def long_tables(support: Mapping[str, Any], last: LastRuns) -> str:
    """Return the tables of docs/support.md: for each group one of its rows."""
    lines = [LEGEND]
    for group, rows in grouped(support):
        lines += ["", f"## {capitalised(group['claim'])}", "", "| | CPU | GPU |", "|---|---|---|"]
        lines += [f"| {row['claim']} | {row['cpu']} | {gpu_cell(row, last)} |" for row in rows]
    return "\n".join(lines)


def grouped(support: Mapping[str, Any]) -> list[tuple[Row, list[Row]]]:
    """Return each group with its rows, both in the order of docs/support.json."""
    return [(group, [row for row in support["rows"] if row["group"] == group["id"]]) for group in support["groups"]]


def capitalised(claim: str) -> str:
    """Return the claim with a capital first letter, or unchanged if it begins with a name of the code."""
    return claim if claim.startswith(("`", "torch_dist", "vLLM", "bf16")) else claim[0].upper() + claim[1:]


def gpu_cell(row: Row, last: LastRuns) -> str:
    """Return the cell of a row for GPUs: a verdict with device and date, or the mark of a row that has not run."""
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


def with_table(text: str, new: str) -> str:
    """Return a page with ``new`` between its two marker lines.  Raises: ValueError unless each occurs exactly once."""
    found = text.count(BEGIN), text.count(END)
    if found != (1, 1):
        raise ValueError(f"expected one line {BEGIN!r} and one line {END!r}, got {found[0]} and {found[1]}")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{new}\n{END}{after}"


if __name__ == "__main__":
    sys.exit(main())
