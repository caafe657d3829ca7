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
import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_selfdistill.distributed.terminal import print_error, visible
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.metrics.run_log import REPORT_FILE

if TYPE_CHECKING:
    from megatron_selfdistill.trainer import Trainer

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status: 0, or 2 after a message about bad input."""
    arguments = _parser().parse_args(argv)
    from megatron_selfdistill.instruments.report.run_report import write_report

    try:
        path = write_report(arguments.run_dirs, arguments.out)
    except (ConfigError, OSError) as error:
        print_error("report:", error)
        return 2
    print(f"{visible(str(path))}: {path.stat().st_size / 1e6:.1f} MB; open it in a browser")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="selfdistill report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="directories of runs; the first is the baseline")
    parser.add_argument("-o", "--out", help="the file (default: report.html in the first run directory)")
    return parser


END_SECONDS = 20.0
"""The longest time that the end of a run waits for its last report."""


class ReportRefresh:
    """The writer of a run's own report, which calls the command in a process of its own.

    Training never waits for a report and never fails by it: the process prints on standard error why it fails.
    ``enabled``: False if this rank writes no report.
    """

    def __init__(self, run_dir: str | Path, *, enabled: bool = True) -> None:
        self.run_dir, self.enabled = Path(run_dir), enabled
        self.path = self.run_dir / REPORT_FILE if enabled else None
        """The file of the report; None if this rank writes no report."""
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start writing the report of the present files; does nothing while an earlier report is being written."""
        if not self.enabled or (self._process is not None and self._process.poll() is None):
            return
        here = str(Path(__file__).resolve().parents[3])
        places = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(self.run_dir)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
                start_new_session=True,  # a Ctrl-C is for the run
            )
        except OSError as error:
            logger.warning("the report of %s is not written: %s", self.run_dir, error)

    def finish(self, seconds: float = END_SECONDS) -> None:
        """Write the last report, and wait for it at most ``seconds``; a process that needs longer goes on alone."""
        self._wait(seconds)
        self.start()
        self._wait(seconds)

    def _wait(self, seconds: float) -> None:
        if self._process is not None:
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                logger.warning("the report of %s is not written after %.0f s", self.run_dir, seconds)


def report_run(trainer: Trainer) -> ReportRefresh:
    """Return the writer of the run's report, which starts after the steps that the configuration names from now on."""
    from megatron_selfdistill.config.due import report_due  # the command alone works without the schema's packages

    config = trainer.config
    report = ReportRefresh(trainer.run_dir, enabled=trainer.events.enabled)

    def refresh(trainer: Trainer, metrics: Mapping[str, float]) -> None:
        if report_due(config, trainer.step) and trainer.step < config.num_steps:
            report.start()

    if report.enabled:
        trainer.after_step.append(refresh)
    return report


if __name__ == "__main__":  # as `ReportRefresh` starts it, behind all other work of the machine
    os.nice(10)
    sys.exit(main())
