# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A data set that a model writes: the problems in groups, each group sampled on all ranks and kept in a journal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_selfdistill.checkpoint.directory import find, iteration_of
from megatron_selfdistill.commands.solution_journal import Journal
from megatron_selfdistill.config import Config, writable
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.distributed.collectives import gather_items, run_on_rank_0
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.evaluation.inference import Inference, open_inference
from megatron_selfdistill.run_data import RunData

STEP = 0  # the model is not trained here, so every sample belongs to step 0

Lines = list[dict[str, Any]]
"""Lines of the journal, one per problem."""


class DataSetWork(Protocol):
    """What a command does with the problems of a data set.  Every rank of the world makes the same calls."""

    def check(self, problems: Sequence[Problem]) -> None:
        """Raise `ConfigError` for problems with which the work is impossible."""
        ...

    def provenance(self) -> dict[str, Any]:
        """Return what the data set depends on besides `provenance_of`, except the layout."""
        ...

    def opened(self, inference: Inference) -> Callable[[Sequence[Problem]], Lines]:
        """Return the function that works on a group of problems with the model of ``inference``.

        The function gets the problems of all replicas and returns the lines of this replica's problems.  It is a
        collective of the world, and raises RuntimeError on every rank where an engine or the verifier failed.
        """
        ...

    def summarize(self, lines: Iterator[dict[str, Any]], out: Path) -> None:
        """Print a summary of the journal's ``lines`` and of the file ``out``; rank 0 alone calls it."""
        ...


@dataclass(frozen=True)
class DataSetJob:
    """The work on all problems of ``run_data``, on one rank."""

    config: Config
    """The configuration, whose ``checkpoint.load`` names the model."""
    run_data: RunData
    grid: RankGrid
    out: Path
    """The file that receives the data set."""
    group_size: int
    """The number of problems that are worked on, and saved in the journal, at a time."""
    work: DataSetWork

    def run(self) -> None:
        """Work on the problems that the journal lacks, then write the data set and print a summary.

        Every rank of the world calls this method; rank 0 writes and prints.  Raises: `ConfigError`, `CheckpointError`.
        """
        problems = self.run_data.problems.problems
        self.work.check(problems)
        journal = Journal(self.out, {**self.work.provenance(), "group_size": self.group_size}, self.group_size)
        done = run_on_rank_0(lambda: journal.begin(len(problems)))
        if done < len(problems):
            with open_inference(self.config, self.run_data, self.grid) as inference:
                self._solve(problems, done, inference, journal)
        run_on_rank_0(lambda: journal.finish({problem.id for problem in problems}))
        if self.grid.is_reporter:
            self.work.summarize(journal.lines(), self.out)

    def _solve(self, problems: Sequence[Problem], done: int, inference: Inference, journal: Journal) -> None:
        solve_group = self.work.opened(inference)
        with _progress_bar(len(problems), done, is_shown=self.grid.is_reporter) as advance:
            for start in range(done, len(problems), self.group_size):
                group = problems[start : start + self.group_size]
                try:
                    own = solve_group(group)
                except RuntimeError as error:  # the verifier or an engine failed: the groups in the journal are kept
                    raise ConfigError(f"{error}; after a fix, the same command continues from here") from error
                by_id = {line["problem_id"]: line for line in gather_items(own, self.grid.dp_group)}
                lines = [by_id[problem.id] for problem in group]
                run_on_rank_0(lambda lines=lines: journal.append(lines))  # type: ignore[misc]
                advance(len(lines))


def provenance_of(config: Config, run_data: RunData, model: Path | None, wording: Sequence[str]) -> dict[str, Any]:
    """Return the model, the data and the sampling that a data set depends on.

    ``model``: the model that the provenance names; None stands for ``checkpoint.load``.  ``wording``: the keys of
    ``data`` that the prompts depend on.
    """
    assert config.checkpoint.load is not None
    path, _ = find(Path(config.checkpoint.load))
    names = "engine max_new_tokens temperature top_k top_p".split()
    sampling = {name: getattr(config.rollout, name) for name in names}
    data = writable(config)["data"]
    return {
        "model": str((model or path).absolute()),
        "iteration": iteration_of(path),
        "data": run_data.problems.fingerprint,
        "seed": config.seed,
        "sampling": {**sampling, "stop_token_ids": list(run_data.stop_token_ids)},
        "prompts": {name: data[name] for name in wording},
    }


def question_of(problem: Problem) -> dict[str, Any]:
    """Return the fields of a line that ask ``problem``, as ``data.path`` reads them: its text, or its messages."""
    messages = list(problem.messages)
    is_text = len(messages) == 1 and set(messages[0]) == {"role", "content"} and messages[0]["role"] == "user"
    return {"problem": messages[0]["content"]} if is_text else {"messages": messages}


@contextmanager
def _progress_bar(total: int, done: int, *, is_shown: bool) -> Iterator[Callable[[int], None]]:
    """Show a bar with the number of problems and the remaining time, if ``is_shown`` and stderr is a terminal.

    The value of the context advances the bar by a number of problems.
    """
    console = Console(stderr=True)
    columns = (TextColumn("problems"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (is_shown and console.is_terminal)) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda number: bar.advance(task, number)
