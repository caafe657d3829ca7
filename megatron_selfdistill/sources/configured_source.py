# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The source of responses that a configuration names, with its sampler, its method and the data that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch

from megatron_selfdistill.annexes import door
from megatron_selfdistill.config import Config, method_class
from megatron_selfdistill.config.schema.data_config import joins_turns, judges_responses, plays_episodes
from megatron_selfdistill.config.schema.method_config import TEACHER
from megatron_selfdistill.data.controls import Controls
from megatron_selfdistill.data.given_solutions import GivenSolutions
from megatron_selfdistill.data.problem_sampler import ProblemSampler
from megatron_selfdistill.data.run_data import RunData
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.evaluation.held_out import Player
from megatron_selfdistill.evaluation.verify import load_verifier
from megatron_selfdistill.metrics.phases import Phases
from megatron_selfdistill.rollout.base import RoleWeights, Sampler, SamplingParams
from megatron_selfdistill.rollout.factory import make_sampler, sampling_params
from megatron_selfdistill.sources.given_responses import SolutionsAsResponses
from megatron_selfdistill.sources.judge import Judge
from megatron_selfdistill.sources.method import MethodTools, ReadingModels
from megatron_selfdistill.sources.on_policy import OnPolicy, OnPolicyOptions
from megatron_selfdistill.sources.source import ResponseSource, SourceState
from megatron_selfdistill.sources.synced_sampler import SyncedSampler


def configured_source(
    config: Config, run_data: RunData, grid: RankGrid, sampler: SyncedSampler, phases: Phases, models: ReadingModels
) -> ResponseSource:
    """Return the source of ``config``, at the beginning of the data.

    ``models``: the models that score solutions and measure responses.
    Raises: `ConfigError` where answers are needed and missing.
    """
    tools = _method_tools(config, run_data, grid, sampler, phases, models)
    problem_sampler = ProblemSampler(run_data.problems, batch_size=config.data.global_batch_size, seed=config.seed)
    state = SourceState(problem_sampler, method_class(config.method.name).made(config.method, tools))
    if config.logged:
        logged: ResponseSource = door("logged_responses").LoggedResponses(state, config, run_data, grid, phases)
        return logged
    if config.needs.samples is None:
        return SolutionsAsResponses(state, run_data.tokenizer, run_data.stop_token_ids[0], grid, phases)
    player = door("environments").training_player(config, tools.given, grid, phases) if plays_episodes(config) else None
    number = run_data.num_controls
    options = OnPolicyOptions(
        sampler=sampler,
        phases=phases,
        grid=grid,
        seed=config.seed,
        num_samples=config.rollout.num_samples,
        judges=judges_responses(config),
        weight_cap=config.loss.rollout_correction_cap,
        samples_teacher=config.needs.samples == TEACHER,
        player=player,
        max_staleness=config.rollout.max_staleness,
        controls=Controls(run_data.problems.problems, tools.given, number, config.seed) if number else None,
        horizon_at=None if config.rollout.horizon is None else config.rollout.horizon_at,
        adapts_horizon=config.rollout.horizon == "auto",
    )
    found: ResponseSource
    if config.rollout.samples_target:
        found = door("guidance").guided_source(tools, state, options)
    elif config.rollout.ahead:
        found = door("overlap").AheadOnPolicy(state, options, config.rollout.ahead, config.num_steps)
    else:
        found = OnPolicy(state, options)
    return found


def _method_tools(
    config: Config, run_data: RunData, grid: RankGrid, sampler: Sampler, phases: Phases, models: ReadingModels
) -> MethodTools:
    verifier, pattern = load_verifier(config.evaluation.verifier), config.evaluation.confidence_pattern
    return MethodTools(
        config=config,
        run_data=run_data,
        grid=grid,
        phases=phases,
        sampler=sampler,
        sampling=step_sampling(config, run_data),
        readers=models,
        judge=Judge(verifier, run_data.tokenizer, grid, None, pattern),
        given=given_solutions(config, run_data),
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

    ``phases``: gets the time of sending weights, and the number of finished responses.  ``role_weights``: those of
    `Teachers.role_weights`.  If the responses come from a log, the first evaluation, if any, builds the sampler.
    Collectives: every rank of the world calls it.  Raises: `ConfigError`.
    """
    guides = config.rollout.samples_target
    make = partial(door("guidance").guided_sampler(), role_weights=role_weights) if guides else None
    build = partial(make_sampler, config, run_data, chunks, grid, phases.counted, make)
    kind = door("overlap").synced_sampler(config.rollout) if config.rollout.ahead else SyncedSampler
    sampler: SyncedSampler = kind(build, phases)
    if not config.logged:
        _ = sampler.inner  # built now
    return sampler


def step_sampling(config: Config, run_data: RunData, batch_k: float | None = None) -> SamplingParams:
    """Return the sampling parameters of the steps of a run; ``batch_k``: the k of a step under target.rule=batch."""
    params = sampling_params(config, run_data)
    if config.rollout.samples_target:
        params = door("guidance").guided_params(params, config, batch_k, run_data.num_controls)
    return params


def checked_run_data(config: Config, run_data: RunData, grid: RankGrid) -> RunData:
    """Return the data of a run that starts, after the reading that its source needs before a model is built.

    Every rank of the world calls it.
    Raises: `ConfigError` on all ranks for a turn that may not be skipped, and for a template that rewrites turns.
    """
    if joins_turns(config):
        door("environments").require_bridges(run_data.builder, run_data.problems.problems[0], config.has_teacher)
    if not config.logged:
        return run_data
    read: RunData = door("logged_responses").with_all_turns_read(config, run_data, grid)
    return read


def begun_list(run_data: RunData, run_dir: Path, *, anew: bool) -> list[str]:
    """Begin the list of skipped records in ``run_dir``, and return lines about it; ``anew``: an earlier list goes."""
    if not run_data.about_records:
        return []
    return list(door("logged_responses").begun_list(run_dir, run_data.skipped, anew=anew))


def evaluation_player(
    config: Config, run_data: RunData, sampler: Sampler, step: int, grid: RankGrid
) -> AbstractContextManager[Player | None]:
    """Return the context with what plays the episodes of an evaluation after ``step`` steps; None for no episodes.

    Every rank of the world enters and leaves this context.  Raises: `ConfigError` on all ranks.
    """
    if not plays_episodes(config):
        return nullcontext()
    player, given = door("environments").evaluation_player, given_solutions(config, run_data)
    found: AbstractContextManager[Player] = player(config, given, sampler, step, grid)
    return found


def given_solutions(config: Config, run_data: RunData) -> GivenSolutions:
    """Return the prompts with which ``config`` shows the solutions of the data."""
    return GivenSolutions(
        run_data.builder, run_data.max_length, config.rollout.max_new_tokens, config.data.on_long_context
    )
