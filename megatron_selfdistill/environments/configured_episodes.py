# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The environment that a configuration names, as players of the episodes of steps and of evaluations."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_selfdistill.config import Config, function_named, user_code
from megatron_selfdistill.config.schema.field_checks import require
from megatron_selfdistill.data.given_solutions import GivenSolutions
from megatron_selfdistill.distributed.collectives import raise_on_all_ranks
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.environments.bridges import require_bridges as require_bridges
from megatron_selfdistill.environments.environment import BUILT_IN, SessionLimits, has_sessions
from megatron_selfdistill.environments.episodes import Episodes, EvaluationPlayer, SessionEpisodes, StatelessEpisodes
from megatron_selfdistill.environments.session_processes import SessionProcesses
from megatron_selfdistill.environments.tool_calls import schemas_of as schemas_of
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.metrics.phases import Phases
from megatron_selfdistill.rollout.base import Sampler


@contextmanager
def evaluation_player(
    config: Config, given: GivenSolutions, sampler: Sampler, step: int, grid: RankGrid
) -> Iterator[EvaluationPlayer]:
    """Yield what plays the episodes of an evaluation after ``step`` steps, with an environment of its own.

    As many episodes are played at the same time as in a step of the training.
    Every rank of the world enters and leaves this context.  Raises: `ConfigError` on all ranks.
    """
    episodes = training_player(config, given, grid, Phases(grid.device))
    at_once = max(1, config.data.global_batch_size * config.rollout.num_samples // grid.dp_size)
    try:
        yield EvaluationPlayer(episodes, sampler, config.seed, step, at_once)
    finally:
        if isinstance(episodes, SessionEpisodes):
            episodes.sessions.close()


def training_player(config: Config, given: GivenSolutions, grid: RankGrid, phases: Phases) -> Episodes:
    """Return the rules of the episodes, with the environment, or with the process that makes the sessions of this rank.

    Raises: `ConfigError` on all ranks.
    """
    wanted = config.environment
    limits = dict(wanted.limits)
    rules: dict[str, Any] = {
        "given": given,
        "grid": grid,
        "phases": phases,
        "max_turns": wanted.max_turns,
        "max_tokens": limits.pop("tokens", None),
        "one_sequence": limits.pop("one_sequence", False),
        "has_teacher": config.has_teacher,
    }
    with raise_on_all_ranks(ConfigError):
        key = wanted.options.get("api_key_env")
        require(not key or bool(os.environ.get(key)), f"environment.options.api_key_env: {key} is not set: export it")
        make = function_named("environment.name", wanted.name, BUILT_IN)
        with user_code(f"environment.name={wanted.name}", ConfigError):
            if has_sessions(make):
                checked = SessionLimits(**limits)
                sessions = SessionProcesses(wanted.name, wanted.options, checked)
                return SessionEpisodes(**rules, sessions=sessions, seed=config.seed, concurrency=checked.concurrency)
            environment = make(**wanted.options)
        require(not limits, f"environment.limits: {', '.join(sorted(limits))} are for sessions, not for {wanted.name}")
    return StatelessEpisodes(**rules, environment=environment)
