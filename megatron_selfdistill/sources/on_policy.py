# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Responses that the student samples with its weights of this moment, to the problems of the data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_selfdistill.data.contexts import PromptPair, build_contexts
from megatron_selfdistill.data.problems import Problem, ProblemSampler, shard
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.loss.weighting import TruncatedImportance
from megatron_selfdistill.metrics import Phases, step_metrics
from megatron_selfdistill.metrics.staleness import staleness_metrics
from megatron_selfdistill.model.host_to_device import to_device_in_one_copy
from megatron_selfdistill.pipeline.step_output import StepOutput
from megatron_selfdistill.pipeline.token_losses import TokenCoefficients
from megatron_selfdistill.recipes.environments import Reply
from megatron_selfdistill.rollout.base import Request, Response, Sampler, SamplingParams
from megatron_selfdistill.sources.episodes import Episode, Episodes, EpisodeTurn, episode_metrics
from megatron_selfdistill.sources.problem_prompts import Answer, Prompts, Rewarder
from megatron_selfdistill.sources.recording import SampleKey, record
from megatron_selfdistill.sources.revisions import Revisions
from megatron_selfdistill.sources.reward_metrics import reward_metrics
from megatron_selfdistill.sources.selection import Select
from megatron_selfdistill.sources.source import CommittedState, SourceState, StepBatch
from megatron_selfdistill.sources.step_terms import StepTerms


@dataclass(frozen=True)
class OnPolicyOptions:
    """The options with which the student's own responses become batches."""

    sampler: Sampler
    rewarder: Rewarder
    phases: Phases
    grid: RankGrid
    seed: int
    """The seed of the run."""
    num_samples: int
    """The number of responses per problem and step."""
    judges: bool
    """Whether all responses of a step get rewards."""
    only_right: bool
    """Whether the run trains only on right responses, which needs ``judges``."""
    corrects: bool
    """Whether token weights correct for the difference of student and sampler (`TruncatedImportance`)."""
    weight_cap: float
    """The largest token weight of this correction."""
    terms: StepTerms | None
    """The rule that gives the coefficients of the tokens in place of this correction; None where all of them are 1."""
    select: Select | None
    """The selection among the responses of a step, which needs ``judges``; None trains on all."""
    edits: bool
    """Whether the selection edits or replaces responses, so that the sampler's log-probs describe other contexts."""
    privileged: bool
    """Whether responses are sampled after the teacher's prompt."""
    views: int
    """The number of contexts in which a response is trained on: 2 adds the privileged view to the plain one."""
    episodes: Episodes | None
    """The rules by which responses become episodes with an environment; None where nothing replies."""
    reads_one_prompt: bool
    """Whether student and teacher read a response after the prompt that it was sampled after."""
    revisions: Revisions | None
    """The texts of episodes that are trained on after other prompts, which needs ``episodes``; None adds none."""
    record: str | None
    """The file to which the responses of all steps are appended; None records nothing."""
    max_staleness: int
    """The number of steps by which the weights that sampled a response may be older than the student's."""

    @property
    def gives_rewards(self) -> bool:
        """Whether the environment's replies are the rewards, so that the judge is not asked."""
        return self.episodes is not None and self.episodes.gives_rewards

    @property
    def compares(self) -> bool:
        """Whether the sampler's log-probs are those of the student for the tokens that are trained on."""
        return not (self.edits or (self.privileged and not self.reads_one_prompt))


@dataclass(frozen=True)
class AskedProblems:
    """The problems of a step on this replica, and the samples of their first responses."""

    problems: list[Problem]
    guided: Collection[str]
    """The ids of the problems whose responses are sampled with guidance."""
    samples: list[tuple[SampleKey, Problem, PromptPair]]
    """Each sample with its problem and the problem's prompts."""


class OnPolicy(CommittedState):
    """Responses of the student to the problems of the data, ``num_samples`` per problem, problem by problem."""

    def __init__(self, state: SourceState, options: OnPolicyOptions) -> None:
        super().__init__(state)
        self._options = options

    def next_step(self, step: int, sampling: SamplingParams) -> StepBatch:
        """Return the batch of this replica's share of the next global batch of problems.

        Raises: `EngineError` on all ranks where responses could not be sampled.
        """
        prompts, found = self.state.prompts.prepare(step, sampling, self.state.problem_sampler)
        problem_sampler = self.state.problem_sampler.fork()
        asked = self._asked(step, problem_sampler.next_batch(), prompts)
        turns, num_cut = self._turns(step, asked, prompts, sampling)
        return self._step_batch(step, asked, turns, num_cut, prompts, found, problem_sampler)

    def _step_batch(
        self,
        step: int,
        asked: AskedProblems,
        turns: Sequence[EpisodeTurn],
        num_cut: int,
        prompts: Prompts,
        found: Mapping[str, float],
        problem_sampler: ProblemSampler,
    ) -> StepBatch:
        """Return the batch of the responses ``turns``.  Collective.

        ``num_cut``: the number of episodes that end early.  ``found``: metrics of the making of ``prompts``.
        ``problem_sampler``: the position in the data after this step.
        """
        options = self._options
        answers, rewarded = self._rewarded(turns)
        with options.phases("rollout"):
            self._record(turns)
            prompts_after = prompts.record(answers, asked.guided)
            selected, counts = self._selected(step, answers)
        with options.phases("pack"):
            trained, chosen = prompts.choose(selected)
            if options.judges:
                rewarded = {**rewarded, **reward_metrics(answers, trained, options.grid)}
            if options.episodes is not None:
                rewarded = {**rewarded, **episode_metrics(turns, answers, num_cut, options.grid)}
            trained = self._in_views(trained)
            if options.revisions is not None:
                extra, counted = options.revisions.added(turns, answers)
                trained, rewarded = [*trained, *extra], {**rewarded, **counted}
            guided = {problem.id for problem in asked.problems if prompts.is_guided(problem)}
        return replace(
            self._batch(step, trained, guided),
            problems=asked.problems,
            responses=[answer.response for answer in answers],
            metrics={**found, **counts, **chosen, **rewarded, **self._staleness(step, answers)},
            next_state=SourceState(problem_sampler, prompts_after),
        )

    def metrics(self, batch: StepBatch, output: StepOutput) -> dict[str, float]:
        """Return the `step_metrics` of the batch, which compare student and sampler.  Collective."""
        options = self._options
        return step_metrics(output, batch.sampler_log_probs, options.grid, options.weight_cap, batch.response_lengths)

    def _rewarded(self, turns: Sequence[EpisodeTurn]) -> tuple[list[Answer], Mapping[str, float]]:
        """Return the answers of ``turns``, judged where the run judges them, and metrics of their rewards.

        Collective over the world.
        """
        answers, options = [turn.answer for turn in turns], self._options
        if not options.judges or options.gives_rewards:
            return answers, {}
        with options.phases(options.rewarder.phase):
            return options.rewarder.rewarded(answers)

    def _staleness(self, step: int, answers: Sequence[Answer]) -> Mapping[str, float]:
        """Return the `staleness_metrics` of a step, where the run allows older weights.  Collective."""
        if not self._options.max_staleness:
            return {}
        return staleness_metrics([answer.response for answer in answers], step, self._options.grid)

    def _record(self, turns: Sequence[EpisodeTurn]) -> None:
        """Append the responses and replies of ``turns`` to the file of the run, if it has one.  Collective."""
        options = self._options
        if options.record is not None:
            keys, replies = [turn.key for turn in turns], [turn.reply for turn in turns]
            responses = [turn.answer.response for turn in turns]
            record(options.record, keys, responses, replies, options.grid.dp_group, options.grid.is_reporter)

    def _batch(self, step: int, trained: Sequence[Answer], guided: Collection[str]) -> StepBatch:
        """Return the contexts of the answers that are trained on, and the coefficients of their tokens.

        ``guided``: the ids of the problems whose tokens have a weight and a divergence of their own.  Collective.
        """
        options = self._options
        with options.phases("pack"):
            responses = [answer.response for answer in trained]
            contexts = build_contexts([answer.prompts for answer in trained], responses, guided)
        coefficients: TokenCoefficients | None = self._corrections(responses) if options.corrects else None
        if options.terms is not None:
            coefficients = options.terms.coefficients(step, trained, contexts)
        return StepBatch(
            contexts=contexts,
            solutions=[answer.problem.solution for answer in trained],
            sampler_log_probs=self._on_device(map(_comparable, trained)) if options.compares else None,
            token_coefficients=coefficients,
        )

    def _asked(self, step: int, global_batch: Sequence[Problem], prompts: Prompts) -> AskedProblems:
        grid, num_samples = self._options.grid, self._options.num_samples
        problems = shard(global_batch, grid.dp_rank, grid.dp_size)
        first = shard(first_sample_indices(global_batch, num_samples), grid.dp_rank, grid.dp_size)
        guided = {problem.id for problem in problems if prompts.guides(problem)}
        samples = []
        for problem, start in zip(problems, first, strict=True):
            pair = prompts.pair(problem)
            samples += [(SampleKey(step, problem.id, start + i), problem, pair) for i in range(num_samples)]
        return AskedProblems(problems, guided, samples)

    def _turns(
        self, step: int, asked: AskedProblems, prompts: Prompts, sampling: SamplingParams
    ) -> tuple[list[EpisodeTurn], int]:
        """Return the turns of all episodes, and how many episodes end early; see `Episodes.played`."""

        def generate(
            keys: Sequence[SampleKey], pairs: Sequence[PromptPair], guided: Collection[str] = ()
        ) -> list[Response]:
            requests = [
                self._request(key, pair, key.problem_id in guided) for key, pair in zip(keys, pairs, strict=True)
            ]
            return self._responses(step, keys, requests, sampling)

        responses = generate([key for key, _, _ in asked.samples], [pair for _, _, pair in asked.samples], asked.guided)
        first = [self._turn(asked, i, response) for i, response in enumerate(responses)]
        if self._options.episodes is None:
            return first, 0
        return self._options.episodes.played(first, prompts, generate, self._replies)

    def _turn(self, asked: AskedProblems, index: int, response: Response) -> EpisodeTurn:
        """Return the turn of the response to ``asked.samples[index]``."""
        key, problem, pair = asked.samples[index]
        return EpisodeTurn(key, Answer(problem, pair, response, group=index // self._options.num_samples))

    def _request(self, key: SampleKey, pair: PromptPair, is_guided: bool) -> Request:
        prompt = pair.teacher_prompt if self._options.privileged else pair.student_prompt
        return Request(prompt, key.seed(self._options.seed), pair.teacher_prompt if is_guided else None)

    def _responses(
        self, step: int, keys: Sequence[SampleKey], requests: Sequence[Request], sampling: SamplingParams
    ) -> list[Response]:
        """Return one response per request, sampled with the weights of this moment."""
        self._options.sampler.update_weights(step)
        with self._options.phases("rollout"):
            return self._options.sampler.generate(requests, sampling)

    def _replies(self, episodes: Sequence[Episode]) -> list[Reply]:
        """Return the environment's reply to the last response of each episode."""
        assert self._options.episodes is not None
        with self._options.phases("environment"):
            return self._options.episodes.replies(episodes)

    def _selected(self, step: int, answers: Sequence[Answer]) -> tuple[Sequence[Answer], Mapping[str, float]]:
        """Return the answers that may be trained on, and metrics of the selection.  Collective."""
        if self._options.only_right:
            answers = [answer for answer in answers if answer.correct]
        return (answers, {}) if self._options.select is None else self._options.select(step, answers)

    def _in_views(self, answers: Sequence[Answer]) -> list[Answer]:
        """Return the answers with the prompts of the views that they are trained in."""
        options = self._options
        if options.reads_one_prompt:
            return [answer.in_sampled_view(privileged=options.privileged) for answer in answers]
        if options.views == 2:
            return [*(answer.in_privileged_view() for answer in answers), *answers]
        return list(answers)

    def _corrections(self, responses: Sequence[Response]) -> TruncatedImportance:
        sampled = self._on_device(response.sampled_log_probs for response in responses)
        return TruncatedImportance(sampled, self._options.weight_cap)

    def _on_device(self, log_probs: Iterable[Sequence[float]]) -> torch.Tensor:
        """Return ``log_probs``, one sequence per response, as [R_total] float64 on the device, without a wait."""
        joined = torch.tensor([value for values in log_probs for value in values], dtype=torch.float64)
        return to_device_in_one_copy(joined, self._options.grid.device)


def first_sample_indices(batch: Sequence[Problem], num_samples: int) -> list[int]:
    """Return the index of each problem's first sample: 0, or more where the problem comes again in the same batch.

    An epoch can end within a batch; the samples of a problem that comes twice then count on.
    """
    seen: Counter[str] = Counter()
    first = []
    for problem in batch:
        first.append(seen[problem.id])
        seen[problem.id] += num_samples
    return first


def _comparable(answer: Answer) -> Sequence[float]:
    """Return the sampler's log-probs of an answer's tokens; infinity where they are those after another prompt."""
    response = answer.response
    return response.log_probs if answer.part == "response" else [math.inf] * len(response.token_ids)
