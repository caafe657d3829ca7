# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The assistant's turns of logged conversations as the responses of a step; a turn becomes tokens when it is needed."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from megatron_selfdistill.chat_logs.replies import SKIPPED_FILE, Turn, TurnReader, Unusable, about_turns, turn_counts
from megatron_selfdistill.config import Config
from megatron_selfdistill.data.given_solutions import build_contexts
from megatron_selfdistill.data.problem_sampler import ProblemSampler, shard
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.run_data import RunData
from megatron_selfdistill.distributed import signs_of_life
from megatron_selfdistill.distributed.collectives import gather_items, gather_objects
from megatron_selfdistill.distributed.host_to_device import to_device
from megatron_selfdistill.distributed.integers import max_over_ranks
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.distributed.terminal import visible
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.loss.weighting import Coefficients, TokenOwners
from megatron_selfdistill.metrics.phases import Phases
from megatron_selfdistill.metrics.step import over_all_ranks, step_metrics
from megatron_selfdistill.pipeline.score import over_last_stage
from megatron_selfdistill.pipeline.token_losses import StepOutput
from megatron_selfdistill.rollout.base import Response, SamplingParams
from megatron_selfdistill.sources.rollouts import Rollout
from megatron_selfdistill.sources.source import ResponseSource, SourceState, StepBatch
from megatron_selfdistill.sources.step_terms import with_metrics_of_weights


def turn_metrics(
    output: StepOutput, lengths: Sequence[int], accepted: Sequence[bool], weighted: bool, grid: RankGrid
) -> dict[str, float]:
    """Return metrics over the turns of the global batch, under flat keys; equal on all ranks.

    ``lengths``: the tokens of each logged turn of the step on this replica, in the order of
    ``PackedBatch.response_tokens``.  ``accepted``: whether each turn is the one that the user accepted.
    ``weighted``: whether the loss had weights of `LikelyTurns`.  The keys:

        turns/count
        turns/log_prob_mean, turns/log_prob_min   mean and minimum of each turn's mean log-prob per token, nats, student
        turns/accepted_share, turns/accepted_token_share   accepted turns per turn, their tokens per token
        turns/unlikely_share, turns/unlikely_token_share   the same of turns whose weight is below 1 (``weighted``)

    Collectives: one sum over CP and one broadcast over TP for the sums per turn, then `over_all_ranks`.
    """
    totals = torch.zeros(7, dtype=torch.float64, device=grid.device)
    minus_lowest = torch.full((1,), -math.inf, dtype=torch.float64, device=grid.device)
    if output.stats is not None:
        sums = torch.zeros(2, len(lengths), dtype=torch.float64, device=grid.device)
        turn_ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
        counts = torch.tensor([lengths, accepted], dtype=torch.float64)
        turn_ids, (tokens, is_accepted) = to_device((turn_ids, tuple(counts)), grid.device)
        ids = turn_ids[output.response_ids]
        sums[0].index_add_(0, ids, output.stats.student_log_prob.double())
        if output.coefficients is not None:
            sums[1].index_add_(0, ids, (output.coefficients.divergence < 1).double())
        sums = over_last_stage(sums, grid)
        if grid.tp_rank == 0 and grid.cp_rank == 0 and lengths:
            means, unlikely = sums[0] / tokens, (sums[1] > 0).double()
            shares = is_accepted, is_accepted * tokens, unlikely, unlikely * tokens
            parts = (torch.ones_like(tokens), tokens, means, *shares)
            totals += torch.stack([part.sum() for part in parts])
            minus_lowest[0] = -means.min()
    sums_over_all, (minus_lowest_of_all,) = over_all_ranks(totals, minus_lowest, grid)
    count, num_tokens, log_prob, num_accepted, accepted_tokens, num_unlikely, unlikely_tokens = sums_over_all
    if not count:
        return {}
    metrics = {
        "turns/count": count,
        "turns/log_prob_mean": log_prob / count,
        "turns/log_prob_min": -minus_lowest_of_all,
        "turns/accepted_share": num_accepted / count,
        "turns/accepted_token_share": accepted_tokens / num_tokens,
    }
    if weighted:
        metrics["turns/unlikely_share"] = num_unlikely / count
        metrics["turns/unlikely_token_share"] = unlikely_tokens / num_tokens
    return metrics


_CHUNK = 64  # turns that are tokenized at a time
_REPORT_EVERY_S = 30.0


class LoggedResponses(ResponseSource):
    """One response per problem: the reply in the log, which another policy generated; no reply is sampled."""

    def __init__(self, state: SourceState, config: Config, run_data: RunData, grid: RankGrid, phases: Phases) -> None:
        super().__init__(state)
        self._turns, self._grid, self._phases = LoggedTurns(config, run_data, grid), grid, phases

    def next_step(self, step: int, sampling: SamplingParams) -> StepBatch:
        """Return the batch of this replica's share of the next usable turns.

        Raises: `ConfigError` on all ranks for an unusable turn that may not be skipped, and where none is left;
        `EngineError` on all ranks where the model could not be asked for hints.
        """
        method, problem_sampler = self.state.method, self.state.problem_sampler.fork()
        with self._phases("read"):
            turns, counts = self._turns.next_turns(problem_sampler)
        pairs = enumerate(turns)
        rollouts = [Rollout(one, turn.prompts, Response.unsampled(turn.reply), group=i) for i, (one, turn) in pairs]
        trained, found = method.select(step, rollouts)
        with self._phases("pack"):
            responses, problems = [one.response for one in trained], [one.problem for one in trained]
            contexts = build_contexts([one.prompts for one in trained], responses)
        batch = StepBatch(
            problems=problems,
            responses=responses,
            contexts=contexts,
            solutions=[problem.solution for problem in problems],
            token_coefficients=method.coefficients(step, trained, contexts),
            metrics={**counts, **found},
            next_state=SourceState(problem_sampler, method),
        )
        return with_metrics_of_weights(batch)

    def metrics(self, batch: StepBatch, output: StepOutput) -> dict[str, float]:
        """Return `turn_metrics` and the `step_metrics` of the batch, which has no sampler.  Collective."""
        accepted = [context.problem_id in self._turns.accepted for context in batch.contexts]
        weighted = isinstance(batch.token_coefficients, LikelyTurns)
        metrics = turn_metrics(output, batch.response_lengths, accepted, weighted, self._grid)
        output = replace(output, coefficients=None) if weighted else output
        return metrics | step_metrics(output, None, self._grid, response_lengths=batch.response_lengths)


class LoggedTurns:
    """Global batches of usable turns, each replica reading its own share.

    The batch of a step is the next ``data.global_batch_size`` usable turns of the problem sampler, whatever the number
    of replicas.  Unusable turns are remembered, so that no turn is read or listed twice: this memory, equal on all
    ranks, is all that a call of `next_turns` changes here, and it changes no batch.
    """

    def __init__(self, config: Config, run_data: RunData, grid: RankGrid) -> None:
        problems = run_data.problems.problems
        self.accepted = {one.id for one in problems if one.reply is not None and one.reply.accepted}
        """The ids of the turns whose reply the user accepted."""
        self._num_problems, self._grid = len(problems), grid
        self._reader = TurnReader(run_data.builder, run_data.ends, run_data.max_length, config.data)
        self._file = Path(config.run_dir) / SKIPPED_FILE
        self._unusable: dict[str, Unusable] = {}

    def next_turns(self, problem_sampler: ProblemSampler) -> tuple[list[tuple[Problem, Turn]], dict[str, float]]:
        """Return the next turns of ``problem_sampler``, which moves on, and metrics that are equal on all ranks.

        An unusable turn is replaced by the next one.  turns/skipped_long and turns/skipped_bad count the turns that
        were replaced in this step, and turns/shortened the cut solutions, where ``data.on_long_context`` shortens.

        Every rank of the world calls it.  Collectives: one maximum over the data-parallel ranks, and where a turn was
        unusable an all_gather_object and another round.
        Raises: `ConfigError` on all ranks for an unusable turn that may not be skipped, and where none is left.
        """
        grid, batch = self._grid, problem_sampler.next_batch()
        places = list(range(len(batch)))
        mine: dict[str, Turn] = {}
        num_long = num_bad = 0
        while places:
            own_places = [place for place in places if place % grid.dp_size == grid.dp_rank]
            own = [batch[place] for place in own_places]
            found = self._read(own)
            mine |= {p.id: turn for p, turn in zip(own, found, strict=True) if isinstance(turn, Turn)}
            unusable = [(place, t) for place, t in zip(own_places, found, strict=True) if isinstance(t, Unusable)]
            any_unusable = max_over_ranks([len(unusable)], grid.dp_group)[0]
            refused = dict(gather_items(unusable, grid.dp_group)) if any_unusable else {}  # equal on all ranks
            num_long += sum(turn.too_long for turn in refused.values())
            num_bad += sum(not turn.too_long for turn in refused.values())
            places = sorted(refused)
            self._learn([(batch[place].id, refused[place]) for place in places])
            for place, problem in zip(places, problem_sampler.take(len(places)), strict=True):
                batch[place] = problem
        turns = [(problem, mine[problem.id]) for problem in shard(batch, grid.dp_rank, grid.dp_size)]
        metrics = {"turns/skipped_long": float(num_long), "turns/skipped_bad": float(num_bad)}
        if self._reader.data.on_long_context.startswith("truncate"):
            shortened = sum(turn.prompts.solution_truncated for _, turn in turns)
            metrics["turns/shortened"] = float(sum(gather_objects(shortened, grid.dp_group)))
        return turns, metrics

    def _read(self, problems: Sequence[Problem]) -> list[Turn | Unusable]:
        new = [problem for problem in problems if problem.id not in self._unusable]
        found: dict[str, Turn | Unusable] = {}
        for chunk, turns in _read_by_chunks(self._reader, new):
            found |= zip((problem.id for problem in chunk), turns, strict=True)
        return [found.get(problem.id) or self._unusable[problem.id] for problem in problems]

    def _learn(self, refused: Sequence[tuple[str, Unusable]]) -> None:
        new = [(name, turn) for name, turn in refused if name not in self._unusable]
        self._unusable |= dict(new)
        if self._grid.is_reporter and new:
            list_skipped(self._file, [turn.message for _, turn in new])
        for _, turn in new:
            self._reader.check(turn)
        if len(self._unusable) == self._num_problems:
            first = next(iter(self._unusable.values())).message
            raise ConfigError(f"no turn is left of {len(self._unusable)}; the first: {first}")


def with_all_turns_read(config: Config, run_data: RunData, grid: RankGrid) -> RunData:
    """Return ``run_data`` with counts of all turns and a message for every unusable turn; the turns themselves stay.

    It comes back as it is where a run skips unusable turns as they come up; a dry run reports all turns.
    Each rank of the world reads its share; rank 0 reports every half minute how far it is.
    Raises: `ConfigError` on all ranks for the first unusable turn that may not be skipped.
    """
    reader, problems = TurnReader(run_data.builder, run_data.ends, run_data.max_length, config.data), run_data.problems
    if not (config.dry_run or "error" in (config.data.on_long_context, config.data.on_bad_record)):
        return run_data
    counts, unusable = turn_counts(()), []
    reported_at = time.monotonic()
    share = iter(range(grid.rank, len(problems), grid.world_size))
    for chunk, turns in _read_by_chunks(reader, problems.problems[grid.rank :: grid.world_size]):
        numbers = list(islice(share, len(chunk)))
        counts += turn_counts(turns)
        unusable += [(n, turn) for n, turn in zip(numbers, turns, strict=True) if isinstance(turn, Unusable)]
        if grid.rank == 0 and time.monotonic() - reported_at > _REPORT_EVERY_S:
            reported_at = time.monotonic()
            print(f"reading logged turns: {numbers[-1] + 1} of {len(problems)}", file=sys.stderr, flush=True)
    parts = gather_objects((counts, unusable))
    everywhere = sorted((item for _, part in parts for item in part), key=lambda item: item[0])
    for _, turn in everywhere:
        reader.check(turn)
    total = sum((counts for counts, _ in parts), turn_counts(()))
    messages = dict.fromkeys([*problems.skipped, *(turn.message for _, turn in everywhere)])
    about = f"all {len(problems)} turns were read: {about_turns(total)}"
    return replace(run_data, about_records=(*run_data.about_records[:-1], about), skipped=tuple(messages))


def _read_by_chunks(
    reader: TurnReader, problems: Sequence[Problem]
) -> Iterator[tuple[Sequence[Problem], list[Turn | Unusable]]]:
    for start in range(0, len(problems), _CHUNK):
        chunk = problems[start : start + _CHUNK]
        yield chunk, reader.read(chunk)
        signs_of_life.beat()


def begun_list(run_dir: Path, messages: Sequence[str], *, anew: bool) -> list[str]:
    """List what was skipped before the first step in ``run_dir``, and return the lines that say so.

    ``anew``: whether the list of an earlier run goes.
    """
    file = run_dir / SKIPPED_FILE
    if anew:
        file.unlink(missing_ok=True)
    if not messages:
        return []
    list_skipped(file, messages)
    return [f"what was skipped, by file and line: {file}; {messages[0]}"]


def list_skipped(file: Path, messages: Iterable[str]) -> None:
    """Append the messages that ``file`` does not have yet, a line each."""
    file.parent.mkdir(parents=True, exist_ok=True)  # the user may have removed the run directory
    have = set(file.read_text(encoding="utf-8", errors="replace").split("\n")) if file.exists() else set()
    shown = dict.fromkeys(visible(message) for message in messages)  # people read the file in a terminal
    new = [message for message in shown if message not in have]
    with file.open("a", encoding="utf-8") as lines:
        lines.writelines(f"{message}\n" for message in new)


@dataclass(frozen=True)
class LikelyTurns:
    """Weights that are equal within a logged turn: 1 where the student could have generated the turn, else smaller.

    m is the mean log p per token of a turn under the student at temperature 1, from the forward pass of the step
    itself: it needs no further pass and uses the current weights.
    The weight is 1 where m >= ``min_log_prob``, else ``weight(m - min_log_prob)``.
    The weights of other tokens and the number of tokens that divides the loss do not change: a skipped turn makes the
    step smaller and the other turns no larger.
    """

    owners: TokenOwners
    """The turn of each token."""
    min_log_prob: float
    """The smallest mean log p of a turn with weight 1, in nats per token."""
    weight: Callable[[Tensor], Tensor]
    """The weight as a function of m - min_log_prob < 0: `dropped` or `down_weighted`."""

    def __call__(self, student_log_prob: Tensor, response_ids: Tensor) -> Coefficients:
        """Return the weight [R] of every response token as the coefficient of its divergence.

        student_log_prob: [R] nats, log p of the tokens; response_ids: [R], their indices among the replica's response
        tokens.
        Collectives: those of `TokenOwners.means`.
        """
        with torch.no_grad():
            excess = self.owners.means(student_log_prob, response_ids) - self.min_log_prob
            weights = torch.where(excess < 0, self.weight(excess), torch.ones_like(excess))
            return Coefficients(weights.to(student_log_prob))


def dropped(excess: Tensor) -> Tensor:
    """Return a weight of 0 for every turn."""
    return torch.zeros_like(excess)


def down_weighted(excess: Tensor) -> Tensor:
    """Return exp(excess): the geometric mean of the tokens' probabilities, divided by the threshold's."""
    return excess.exp()
