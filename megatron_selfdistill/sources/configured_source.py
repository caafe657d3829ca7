# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The source of responses that a configuration names, with its sampler, its prompts and the data that it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from megatron_selfdistill.choices import REWARDS
from megatron_selfdistill.config import Config, EnvironmentConfig, function_named
from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.problems import Problem, ProblemSampler
from megatron_selfdistill.distributed.collectives import raise_on_all_ranks
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.evaluation.verify import check_answers, load_verifier
from megatron_selfdistill.metrics import Phases
from megatron_selfdistill.recipes.http_environment import HttpEnvironment
from megatron_selfdistill.recipes.verbal_score import QUESTION
from megatron_selfdistill.rollout.base import Request, Response
from megatron_selfdistill.rollout.factory import make_sampler, sampling_params
from megatron_selfdistill.rollout.guided import RoleWeights
from megatron_selfdistill.run_data import RunData
from megatron_selfdistill.sources.ahead import AheadOnPolicy
from megatron_selfdistill.sources.chat_logs import ChatLogs, LoggedTurns, read_all_turns, wants_all_turns_read
from megatron_selfdistill.sources.configured_hints import asked_model, hindsight_prompts, hinted_turns, skill_prompts
from megatron_selfdistill.sources.episodes import Episodes
from megatron_selfdistill.sources.explanation_rewards import ExplanationRewards, LogProbs, check_room_for_solutions
from megatron_selfdistill.sources.guidance import GuidedPrompts, SuccessRates
from megatron_selfdistill.sources.on_demand_sampler import OnDemandSampler
from megatron_selfdistill.sources.on_policy import OnPolicy, OnPolicyOptions
from megatron_selfdistill.sources.own_solutions import Finder, OwnSolutionPrompts, OwnSolutions
from megatron_selfdistill.sources.partial import PartialOnPolicy, PartialOptions
from megatron_selfdistill.sources.problem_prompts import GivenSolutions, Judge, Prompts, Rewarder
from megatron_selfdistill.sources.recording import Recording
from megatron_selfdistill.sources.replay import Replay
from megatron_selfdistill.sources.revisions import DEFAULT_REPLY_TEMPLATE, Revisions
from megatron_selfdistill.sources.selection import Balance, FunctionSelection, Select, StatedConfidence
from megatron_selfdistill.sources.solution_search import Search
from megatron_selfdistill.sources.solutions_as_responses import SolutionsAsResponses
from megatron_selfdistill.sources.source import ResponseSource, SourceState
from megatron_selfdistill.sources.step_terms import StepTerms
from megatron_selfdistill.sources.streamed import StreamedOnPolicy
from megatron_selfdistill.sources.synced_sampler import SyncedSampler
from megatron_selfdistill.sources.verbal_scores import (
    Candidates,
    Generate,
    VerbalRewards,
    VerbalScorer,
    VerbalSelection,
    check_room_for_questions,
    digit_tokens,
)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class ReadingModels(Protocol):
    """The models of a run as readers of given responses.  Every method is collective over the world."""

    def learnabilities(self, candidates: Sequence[tuple[Problem, Response]]) -> list[float]:
        """Return how learnable each response is for the student."""
        ...

    def target_log_probs(self, contexts: Sequence[ContextPair]) -> tuple[Tensor, Tensor]:
        """Return log p and log q of every response token, [R] float64 each, on the host."""
        ...

    def log_probs(self, contexts: Sequence[ContextPair], temperature: float) -> tuple[Tensor, Tensor]:
        """Return the log-probs of every response token under student and teacher, [R] float64 each, on the host."""
        ...

    def candidate_log_probs(self, prompts: Sequence[Sequence[int]], token_ids: Sequence[int]) -> Tensor:
        """Return the teacher's log-probs of n candidates for the token after each prompt, [B, n] float64."""
        ...


def configured_source(
    config: Config, run_data: RunData, grid: RankGrid, sampler: SyncedSampler, phases: Phases, models: ReadingModels
) -> ResponseSource:
    """Return the source of ``config``, at the beginning of the data.

    ``models``: the models that score solutions and measure responses; the sampler sleeps while they do.
    Raises: `ConfigError` where answers are needed and missing; ValueError for a recording that cannot be read.
    """

    def reading(read: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        def read_while_the_sampler_sleeps(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            sampler.sleep()
            return read(*args, **kwargs)

        return read_while_the_sampler_sleeps

    judge = _judge(config, run_data, grid)
    score = reading(models.learnabilities)
    finder = Finder(sampler, judge.verifier, judge.confidence, score, phases, grid, config.data.global_batch_size)
    problem_sampler = ProblemSampler(run_data.problems, batch_size=config.data.global_batch_size, seed=config.seed)
    state = SourceState(problem_sampler, _prompts(config, run_data, judge, finder))
    if config.objective == "sft":
        return SolutionsAsResponses(state, run_data.tokenizer, run_data.stop_token_ids[0], grid, phases)
    terms = StepTerms(config, reading(models.target_log_probs), grid, phases) if config.weighs_tokens else None
    if config.logged:
        hinted = None
        if config.data.solutions == "next_state":
            hinted = hinted_turns(config, run_data, asked_model(config, run_data, sampler, phases), grid, judge.reward)
        logged = LoggedTurns(config, run_data, grid)
        return ChatLogs(state, logged, config.conversations, grid, phases, hinted, terms)
    scorer = None
    if config.scores_responses:
        scorer = _scorer(config, run_data, grid, reading(models.candidate_log_probs))
    rewarder = _rewarder(config, run_data, judge, reading(models.log_probs), scorer)
    options = _on_policy_options(config, run_data, sampler, phases, rewarder, scorer, terms, grid)
    if config.rollout.replay:
        return Replay(state, options, Recording(config.rollout.replay))
    ahead = config.rollout.ahead
    if config.rollout.overlap == "stream":
        num_microbatches = config.rollout.wave_microbatches or config.parallel.pipeline_model_parallel_size
        min_tokens = num_microbatches * config.schedule.max_tokens
        return StreamedOnPolicy(state, options, sampler, ahead, config.num_steps, min_tokens)
    if ahead:
        return AheadOnPolicy(state, options, sampler, ahead, config.num_steps)
    if config.rollout.extra_problems:
        return PartialOnPolicy(state, options, _partial_options(config), run_data.problems.problems)
    return OnPolicy(state, options)


def _on_policy_options(
    config: Config,
    run_data: RunData,
    sampler: SyncedSampler,
    phases: Phases,
    rewarder: Rewarder,
    scorer: VerbalScorer | None,
    terms: StepTerms | None,
    grid: RankGrid,
) -> OnPolicyOptions:
    def generate(step: int, requests: Sequence[Request]) -> list[Response]:
        sampler.update_weights(step)
        return sampler.generate(requests, sampling_params(config, run_data))

    return OnPolicyOptions(
        sampler=sampler,
        rewarder=rewarder,
        phases=phases,
        grid=grid,
        seed=config.seed,
        num_samples=config.rollout.num_samples,
        judges=config.judges_responses,
        only_right=config.objective == "rft",
        corrects=config.loss.rollout_correction == "truncated",
        weight_cap=config.loss.rollout_correction_cap,
        terms=terms,
        select=_select(config, run_data, grid, scorer, generate, rewarder),
        edits=edits_responses(config),
        privileged=config.rollout.view == "privileged",
        views=config.contexts_per_response,
        episodes=_episodes(config, run_data, grid) if config.environment.exists else None,
        reads_one_prompt=config.reads_one_prompt,
        revisions=_revisions(config, run_data, grid),
        record=config.rollout.record,
        max_staleness=config.rollout.max_staleness,
    )


def configured_sampler(
    config: Config,
    run_data: RunData,
    chunks: Sequence[torch.nn.Module],
    grid: RankGrid,
    phases: Phases,
    role_weights: Sequence[RoleWeights] = (),
) -> SyncedSampler:
    """Return the sampler of ``config.rollout`` for the ``chunks`` of this rank.

    ``phases``: gets the time of sending weights, and the number of finished responses.  ``role_weights``: as for
    `make_sampler`.  If the responses come from a log, the first evaluation, if there is any,
    builds the sampler.
    Collectives: every rank of the world calls it.  Raises: `ConfigError`.
    """
    progress = phases.counted
    if config.logged:
        sampler = OnDemandSampler(lambda: make_sampler(config, run_data, chunks, grid, progress=progress))
        return SyncedSampler(sampler, phases)
    settles = config.rollout.ahead > 0 and config.rollout.at_update == "wait"
    return SyncedSampler(make_sampler(config, run_data, chunks, grid, role_weights, progress), phases, settles=settles)


def checked_run_data(config: Config, run_data: RunData, grid: RankGrid) -> RunData:
    """Return the data of a run that starts, after the reading that its source needs before a model is built.

    Every rank of the world calls it.  Raises: `ConfigError` on all ranks for a turn that may not be skipped.
    """
    if config.logged and wants_all_turns_read(config, run_data):
        return read_all_turns(config, run_data, grid)
    return run_data


def _partial_options(config: Config) -> PartialOptions:
    return PartialOptions(
        batch_size=config.data.global_batch_size,
        extra_problems=config.rollout.extra_problems,
        max_new_tokens=config.rollout.max_new_tokens,
        round_tokens=config.rollout.tokens_per_round,
        max_staleness=config.rollout.max_staleness,
        num_steps=config.num_steps,
    )


def _episodes(config: Config, run_data: RunData, grid: RankGrid) -> Episodes:
    wanted = config.environment
    with raise_on_all_ranks(ConfigError):
        try:
            make = function_named("environment.name", wanted.name, {"http": lambda: _endpoint(wanted)})
            environment = make(**wanted.options)
        except ConfigError:
            raise
        except Exception as error:  # the constructor of a user can raise any exception
            raise ConfigError(f"environment.name={wanted.name} failed with {type(error).__name__}: {error}") from error
        if not callable(getattr(environment, "reply", None)):
            raise ConfigError(
                f"environment.name={wanted.name} must make an object with a method reply(problem, said), got a "
                f"{type(environment).__name__}"
            )
    return Episodes(
        environment=environment,
        given=given_solutions(config, run_data),
        grid=grid,
        max_turns=wanted.max_turns,
        threads=wanted.concurrency if wanted.name == "http" else 1,
        has_teacher=config.objective == "self_distillation",
        gives_rewards=config.policy.reward is None,
    )


def _revisions(config: Config, run_data: RunData, grid: RankGrid) -> Revisions | None:
    policy = config.policy
    if not (policy.revision_weight or policy.reply_weight):
        return None
    return Revisions(
        given_solutions(config, run_data),
        run_data.stop_token_ids[0],
        policy.revision_weight > 0,
        (policy.reply_template or DEFAULT_REPLY_TEMPLATE) if policy.reply_weight > 0 else None,
        grid,
    )


def _endpoint(wanted: EnvironmentConfig) -> HttpEnvironment:
    assert wanted.url is not None, "the schema has checked the address"
    return HttpEnvironment(wanted.url, wanted.model, wanted.api_key, wanted.timeout_s, wanted.retries)


def _judge(config: Config, run_data: RunData, grid: RankGrid) -> Judge:
    name = config.policy.reward
    reward = None if name is None or name in REWARDS else function_named("policy.reward", name, {})
    pattern = config.evaluation.confidence_pattern
    return Judge(load_verifier(config.evaluation.verifier), run_data.tokenizer, grid, reward, pattern)


def _scorer(config: Config, run_data: RunData, grid: RankGrid, candidates: Candidates) -> VerbalScorer:
    template, builder, max_length = config.verbal.template or QUESTION, run_data.builder, run_data.max_length
    digits = digit_tokens(run_data.tokenizer)
    problems, max_new_tokens = run_data.problems.problems, config.rollout.max_new_tokens
    check_room_for_questions(problems, builder, template, max_length=max_length, max_new_tokens=max_new_tokens)
    return VerbalScorer(template, builder, digits, max_length, candidates, grid)


def _rewarder(config: Config, run_data: RunData, judge: Judge, read: LogProbs, scorer: VerbalScorer | None) -> Rewarder:
    if config.policy.reward == "verbal":
        assert scorer is not None
        return VerbalRewards(scorer)
    if config.policy.reward != "explanation":
        return judge
    check_room_for_solutions(
        run_data.problems.problems,
        run_data.builder,
        config.explanation.closing_tag,
        max_length=run_data.max_length,
        max_new_tokens=config.rollout.max_new_tokens,
    )
    return ExplanationRewards(config.explanation, run_data.builder, read, judge.grid)


def edits_responses(config: Config) -> bool:
    """Return whether the selection of ``config`` may edit responses, so that nobody has sampled their texts."""
    by_function = config.rollout.selects_by_function and config.sampled_log_probs_key is None
    return by_function or config.rollout.select in ("confidence", "verbal")


def _select(
    config: Config,
    run_data: RunData,
    grid: RankGrid,
    scorer: VerbalScorer | None,
    generate: Generate,
    rewarder: Rewarder,
) -> Select | None:
    if config.rollout.select == "verbal":
        assert scorer is not None
        verbal, limit = config.verbal, config.rollout.max_new_tokens
        return VerbalSelection(verbal.threshold, scorer, generate, rewarder, config.seed, verbal.step_separator, limit)
    if config.rollout.select == "none":
        return None
    if config.rollout.select == "balance":
        return Balance(config.seed)
    if config.rollout.selects_by_function:
        return FunctionSelection(
            function_named("rollout.select", config.rollout.select, {}),
            run_data.tokenizer,
            grid,
            run_data.stop_token_ids[0],
            config.rollout.max_new_tokens,
            config.sampled_log_probs_key,
        )
    return StatedConfidence(given_solutions(config, run_data), config.evaluation.confidence_pattern)


def given_solutions(config: Config, run_data: RunData) -> GivenSolutions:
    """Return the prompts with which ``config`` shows the solutions of the data."""
    return GivenSolutions(
        run_data.builder, run_data.max_length, config.rollout.max_new_tokens, config.data.on_long_context
    )


def _prompts(config: Config, run_data: RunData, judge: Judge, finder: Finder) -> Prompts:
    given, wanted, below = given_solutions(config, run_data), config.solutions, config.rollout.guide_below
    owns = config.data.solutions == "own"
    keeps_unhinted = config.policy.weight > 0 or config.distill.rule == "scope"
    judges = config.judges_responses and config.policy.reward is None and not config.environment.exists
    if owns or below is not None or judges:
        check_answers(run_data.problems.problems, judge.verifier)
    prompts: Prompts = given
    if owns:
        search = Search(wanted.num_samples, wanted.keep, wanted.pick, config.seed)
        prompts = OwnSolutionPrompts(given, OwnSolutions(search, wanted.refresh_every), finder, keeps_unhinted)
    if config.data.hints_follow_responses:
        prompts = hindsight_prompts(config, given, judge, keeps_unhinted)
    if config.data.solutions == "skill":
        asked = asked_model(config, run_data, finder.sampler, finder.phases)
        prompts = skill_prompts(config, given, judge, asked, keeps_unhinted)
    if config.rollout.guidance != "none":
        success = SuccessRates(below) if below is not None else None
        prompts = GuidedPrompts(prompts, judge, config.rollout.num_samples, success)
    return prompts
