# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The logged turns of each step: turned into tokens when they come up, so that a run on any log starts at once."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from megatron_selfdistill.config import Config, ConfigError, hidden
from megatron_selfdistill.data.chat.replies import Turn, TurnCounts, TurnReader, Unusable
from megatron_selfdistill.data.problems import Problem, ProblemStream, shard
from megatron_selfdistill.distributed import watchdog
from megatron_selfdistill.distributed.collectives import from_all_ranks
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.pipeline.batch import largest
from megatron_selfdistill.rollout.solutions import of_all_replicas
from megatron_selfdistill.run_data import RunData, turn_reader

LEFT_OUT_FILE = "left_out.txt"
_CHUNK = 64  # turns that are tokenized at a time
_REPORT_EVERY_S = 30.0


@dataclass(frozen=True)
class StepTurns:
    """This replica's turns of a step."""

    problems: list[Problem]
    turns: dict[str, Turn]
    """By problem id."""
    metrics: dict[str, float]
    """Counts over the global batch, equal on all ranks: turns/left_out_long and turns/left_out_bad, drawn for this step
    and replaced; where ``data.on_long_context`` shortens, turns/shortened, whose solution is not whole."""


class LoggedTurns:
    """Global batches of usable turns, each replica reading its own share.

    A step's batch are the next ``data.global_batch_size`` usable turns of the stream, however many replicas there are,
    and the stream's position is all the state there is.
    """

    def __init__(self, config: Config, run_data: RunData, grid: RankGrid, stream: ProblemStream) -> None:
        self._inputs, self._grid, self._stream = run_data, grid, stream
        self._reader = turn_reader(config, run_data)
        self._file = Path(config.run_dir) / LEFT_OUT_FILE
        self._unusable: dict[str, Unusable] = {}  # known so far, on all ranks; they are not read again

    def next_turns(self) -> StepTurns:
        """The turns of the next step.  An unusable turn's place is taken by the next one of the stream.

        Every rank of the world calls it.  Collectives: one maximum over the data-parallel ranks, and where a turn was
        unusable an all_gather_object and another round.
        Raises: `ConfigError` on all ranks for an unusable turn that may not be left out, and where none is left.
        """
        grid, batch = self._grid, self._stream.next_batch()
        places = list(range(len(batch)))
        mine: dict[str, Turn] = {}
        num_long = num_bad = 0
        while places:
            own = [batch[place] for place in places if place % grid.dp_size == grid.dp_rank]
            found = self._read(own)
            mine |= {p.id: turn for p, turn in zip(own, found, strict=True) if isinstance(turn, Turn)}
            refused = self._refused_anywhere([place for place in places if place % grid.dp_size == grid.dp_rank], found)
            num_long += sum(turn.too_long for turn in refused.values())
            num_bad += sum(not turn.too_long for turn in refused.values())
            places = sorted(refused)
            self._learn([(batch[place].id, refused[place]) for place in places])
            for place, problem in zip(places, self._stream.draw(len(places)), strict=True):
                batch[place] = problem
        problems = shard(batch, grid.dp_rank, grid.dp_size)
        shortened = sum(mine[problem.id].prompts.solution_truncated for problem in problems)
        metrics = {"turns/left_out_long": num_long, "turns/left_out_bad": num_bad}
        if self._reader.on_long_context.startswith("truncate"):
            metrics["turns/shortened"] = sum(of_all_replicas([shortened], grid))
        return StepTurns(problems, mine, {name: float(count) for name, count in metrics.items()})

    def _read(self, problems: Sequence[Problem]) -> list[Turn | Unusable]:
        new = [problem for problem in problems if problem.id not in self._unusable]
        found: dict[str, Turn | Unusable] = {}
        for chunk, turns in _read_by_chunks(self._reader, new):
            found |= zip((problem.id for problem in chunk), turns, strict=True)
        return [found.get(problem.id) or self._unusable[problem.id] for problem in problems]

    def _refused_anywhere(self, places: Sequence[int], found: Sequence[Turn | Unusable]) -> dict[int, Unusable]:
        """Those of all replicas, by place, the same on all ranks."""
        mine = [(place, t) for place, t in zip(places, found, strict=True) if isinstance(t, Unusable)]
        if not largest(self._grid, len(mine))[0]:
            return {}
        return dict(of_all_replicas(mine, self._grid))

    def _learn(self, refused: Sequence[tuple[str, Unusable]]) -> None:
        new = [(name, turn) for name, turn in refused if name not in self._unusable]
        self._unusable |= dict(new)
        if self._grid.is_reporter and new:
            list_left_out(self._file, [turn.sentence for _, turn in new])
        for _, turn in new:
            _checked(self._reader, turn)
        if len(self._unusable) == len(self._inputs.problems):
            first = next(iter(self._unusable.values())).sentence
            raise ConfigError(f"no turn is left of {len(self._unusable)}; the first: {first}")


def read_all_turns(config: Config, run_data: RunData, grid: RankGrid) -> RunData:
    """``run_data`` with counts of all their turns and a sentence for every unusable one; the turns stay.

    Each rank of the world reads its share, the first says every half minute how far it is.
    Raises: `ConfigError` on all ranks for the first unusable turn that may not be left out.
    """
    reader, problems = turn_reader(config, run_data), run_data.problems.problems
    counts, unusable = TurnCounts(), []
    said = time.monotonic()
    share = iter(range(grid.rank, len(problems), grid.world_size))
    for chunk, turns in _read_by_chunks(reader, problems[grid.rank :: grid.world_size]):
        numbers = list(islice(share, len(chunk)))
        counts += TurnCounts.of(turns)
        unusable += [(n, turn) for n, turn in zip(numbers, turns, strict=True) if isinstance(turn, Unusable)]
        if grid.rank == 0 and time.monotonic() - said > _REPORT_EVERY_S:
            said = time.monotonic()
            print(f"reading logged turns: {numbers[-1] + 1} of {len(problems)}", file=sys.stderr, flush=True)
    parts = from_all_ranks((counts, unusable))
    everywhere = sorted((item for _, part in parts for item in part), key=lambda item: item[0])
    for _, turn in everywhere:
        _checked(reader, turn)
    total = sum((counts for counts, _ in parts), TurnCounts())
    sentences = dict.fromkeys([*run_data.problems.skipped, *(turn.sentence for _, turn in everywhere)])
    about = f"all {len(problems)} turns were read: {total}"
    return replace(run_data, about_conversations=(*run_data.about_conversations[:-1], about), left_out=tuple(sentences))


def _read_by_chunks(
    reader: TurnReader, problems: Sequence[Problem]
) -> Iterator[tuple[Sequence[Problem], list[Turn | Unusable]]]:
    for start in range(0, len(problems), _CHUNK):
        chunk = problems[start : start + _CHUNK]
        yield chunk, reader.read(chunk)
        watchdog.beat()


def list_left_out(file: Path, sentences: Iterable[str]) -> None:
    """Append those that ``file`` does not have yet, a line each."""
    file.parent.mkdir(parents=True, exist_ok=True)  # somebody may have removed the run folder
    have = set(file.read_text(encoding="utf-8").splitlines()) if file.exists() else set()
    new = [sentence for sentence in dict.fromkeys(map(hidden, sentences)) if sentence not in have]
    with file.open("a", encoding="utf-8") as lines:
        lines.writelines(f"{sentence}\n" for sentence in new)


def _checked(reader: TurnReader, turn: Unusable) -> None:
    try:
        reader.check(turn)
    except ValueError as error:
        raise ConfigError(str(error)) from error
