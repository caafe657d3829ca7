# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Write a report of one run, or of several runs over each other: one HTML file for any browser.

    selfdistill report runs/first
    selfdistill report runs/first runs/second -o comparison.html

The report says first whether each run learns and is healthy.  Then it shows what ran, the curves with what a healthy
and a sick curve look like, the differences between the runs, responses before and after, and the events.  It needs no
network and no server, and it can be written while a run trains or after the run was killed.  A run writes the report
of itself (report.every).

exit status: 0; 2 with one message for a directory that is no run directory
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.terminal import print_error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status: 0, or 2 after a message about bad input."""
    arguments = _parser().parse_args(argv)
    from megatron_selfdistill.instruments.report.run_report import write_report

    try:
        path = write_report(arguments.run_dirs, arguments.out)
    except (ConfigError, OSError) as error:
        print_error("report:", error)
        return 2
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; open it in a browser")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="selfdistill report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="directories of runs; the first is the baseline")
    parser.add_argument("-o", "--out", help="the file (default: report.html in the first run directory)")
    return parser
