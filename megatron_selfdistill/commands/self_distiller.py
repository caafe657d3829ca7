# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The commands of a run as the methods of an object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_selfdistill import cli
from megatron_selfdistill.config.command_line import with_files
from megatron_selfdistill.evaluation.evaluation_directory import SUMMARY
from megatron_selfdistill.metrics.run_log import REPORT_FILE, read_metrics


class SelfDistiller:
    """One run: `train`, `evaluate` and `figures` do what the commands of the same words do, in this process.

        run = SelfDistiller("my_run.yaml", run_dir="runs/first", steps=20)
        run.train()
        print(run.evaluate("test.jsonl")["metrics"]["greedy_accuracy"])
        print(run.figures()["loss/mean"], run.report())

    On several ranks, every rank under torchrun makes the same calls.
    """

    def __init__(self, *words: str, run_dir: str | Path, **settings: Any) -> None:
        """Remember the words of ``selfdistill train``: key=value, names of files, and ``settings`` by short names.

        ``run_dir``: the directory of the run, which a later object continues.
        """
        self.run_dir = Path(run_dir)
        self.words = [*words, f"run_dir={run_dir}", *(f"{name}={value}" for name, value in settings.items())]

    def train(self) -> dict[str, float]:
        """Train until ``num_steps``, from the last checkpoint of the run if there is one; return the last metrics.

        Raises: RuntimeError where the command ends with another status than 0, below its message.
        """
        _run("train", *self.words)
        return read_metrics(self.run_dir)[-1]

    def evaluate(self, data: str | Path, *words: str, out: str | Path | None = None) -> dict[str, Any]:
        """Evaluate the last checkpoint of the run on the problems in ``data``; return the summary, as ``out`` has it.

        ``words``: further words of ``selfdistill evaluate``; the keys of prompts and of sampling are those of the run.
        ``out``: null is a directory below ``evaluations`` in the directory of the run.  Raises: as `train`.
        """
        chosen = Path(out) if out is not None else self.run_dir / "evaluations" / Path(data).stem
        of_run = [
            it
            for it in with_files(self.words)
            if it.startswith(("data.", "rollout.")) and not it.startswith("data.path=")
        ]
        _run("evaluate", "--megatron", str(self.run_dir), "--data", str(data), "--out", str(chosen), *of_run, *words)
        summary: dict[str, Any] = json.loads((chosen / SUMMARY).read_text(encoding="utf-8"))
        return summary

    def figures(self) -> dict[str, list[tuple[int, float]]]:
        """Return the curves of the report: the key of each metric (docs/metrics.md) -> (step, value) of each step."""
        curves: dict[str, list[tuple[int, float]]] = {}
        for line in read_metrics(self.run_dir):
            for key, value in line.items():
                curves.setdefault(key, []).append((int(line["step"]), value))
        return curves

    def report(self) -> Path:
        """Write the report of the run; return the file.  Raises: as `train`."""
        _run("report", str(self.run_dir))
        return self.run_dir / REPORT_FILE


def _run(*words: str) -> None:
    if status := cli.main(words):
        raise RuntimeError(f"selfdistill {words[0]} ended with status {status}; its message says why")
