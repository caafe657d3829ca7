# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The journal of `selfdistill solutions`: the result of each problem, with which the command continues after a kill."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.metrics.run_log import json_object


@dataclass(frozen=True)
class Journal:
    """The file ``NAME.attempts.jsonl`` beside ``NAME.jsonl``; only rank 0 reads and writes it.

    The first line is the provenance of all solutions.  Each further line is one problem, in the order of the problems.
    """

    out: Path
    """The file of solutions, which appears when all problems are done."""
    header: dict[str, Any]
    """Everything that the solutions depend on, except the layout."""
    group_size: int
    """The number of problems that are solved, and saved, at a time."""

    @property
    def path(self) -> Path:
        """The path of the journal."""
        return self.out.with_name(f"{self.out.stem}.attempts.jsonl")

    def begin(self, num_problems: int) -> int:
        """Create the journal, or remove an unfinished group from it, and return the number of problems that are done.

        Raises: `ConfigError` if the journal, or ``out`` without a journal, belongs to another job.
        """
        if not self.path.exists():
            if self.out.exists():
                raise ConfigError(
                    f"{self.out} exists without {self.path.name} beside it: choose another --out or remove it"
                )
            self.path.write_text(json.dumps(self.header) + "\n", encoding="utf-8")
            return 0
        *lines, _ = self.path.read_bytes().split(b"\n")  # a killed process may have left a part of a line
        for number, line in enumerate(lines, 1):
            try:
                record = json_object(line)
            except ValueError as error:
                raise ConfigError(
                    f"{self.path}: line {number} {error}: remove it and the lines after it, whose problems are then "
                    "done again, or choose another --out"
                ) from None
            if number == 1:
                self._check_header(record)
        done = len(lines) - 1
        if (
            done < num_problems
        ):  # a group is solved again completely, so that its batches and their rounding are the same
            done -= done % self.group_size
        with self.path.open("r+b") as file:
            file.truncate(sum(len(line) + 1 for line in lines[: done + 1]))
        return done

    def _check_header(self, header: dict[str, Any]) -> None:
        expected = json.loads(json.dumps(self.header))
        for name in {**expected, **header}:
            if header.get(name) != expected.get(name):
                raise ConfigError(
                    f"{self.path} was begun with {name} = {header.get(name)!r}, and now it is {expected.get(name)!r}: "
                    "choose another --out or remove it"
                )

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """Append ``lines`` and wait until they are on the disk."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield the line of each problem."""
        with self.path.open(encoding="utf-8") as file:
            next(file)
            yield from map(json.loads, file)

    def finish(self, ids: set[str]) -> None:
        """Write ``out`` in one move, in the format that ``data.path`` reads: one solution per line, with a unique id.

        The best solution to a problem has the problem's id.  ``ids`` are the ids of all problems.
        """
        taken = set(ids)
        temporary = file_beside(self.out, ".partial")
        with temporary.open("w", encoding="utf-8") as file:
            for attempt in self.lines():
                for rank, solution in enumerate(attempt.pop("solutions")):
                    name = attempt["problem_id"] if rank == 0 else f"{attempt['problem_id']}#{rank + 1}"
                    while rank > 0 and name in taken:
                        name += "'"
                    taken.add(name)
                    record = {"id": name, **attempt, **solution, "provenance": self.header}
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
        temporary.replace(self.out)


def summarize(
    lines: Iterator[dict[str, Any]],
    out: Path,
    num_samples: int,
    noun: str,
    rate: str,
    good: Callable[[dict[str, Any]], int],
) -> None:
    """Print the share of good samples, which ``rate`` names, and the number of results in ``out``.

    ``noun``: a result, such as solution.  ``good``: the number of good samples of a line.
    """
    num_problems = num_good = num_kept = num_without = num_truncated = 0
    for line in lines:
        num_problems += 1
        num_good += good(line)
        num_kept += len(line["solutions"])
        num_without += not line["solutions"]
        num_truncated += sum(line["truncated"])
    number = num_problems * num_samples
    print(f"{num_problems} problems, {rate} {num_good / number:.1%}, {num_truncated / number:.1%} cut off")
    print(f"{num_without} problems without {'an' if noun[0] in 'aeiou' else 'a'} {noun}")
    print(f"{num_kept} {noun}s in {out}", flush=True)


def file_beside(out: Path, ending: str) -> Path:
    """Return the path of a hidden file in the directory of ``out``, named after ``out``."""
    return out.with_name(f".{out.name}{ending}")
