# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The hints that a configuration names beside the solutions of the data: after sampling, from skills, from logs."""

from __future__ import annotations

from megatron_selfdistill.config import Config, function_named
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.evaluation.verify import Reward
from megatron_selfdistill.metrics import Phases
from megatron_selfdistill.rollout.base import Sampler
from megatron_selfdistill.run_data import RunData, turn_reader
from megatron_selfdistill.sources.asked_model import AskedModel, asking_builder
from megatron_selfdistill.sources.hindsight_hints import (
    FunctionHints,
    HindsightPrompts,
    Hints,
    PeerHints,
    PeerOrFeedbackHints,
    feedback_hints,
)
from megatron_selfdistill.sources.hinted_turns import HintedTurns
from megatron_selfdistill.sources.next_state_hints import (
    JUDGE_TEMPLATE,
    FunctionHintJudge,
    FunctionRewardJudge,
    HintJudge,
    ModelHintJudge,
    ModelRewardJudge,
    RewardJudge,
)
from megatron_selfdistill.sources.problem_prompts import GivenSolutions, Judge
from megatron_selfdistill.sources.skills import (
    SUMMARIZER_TEMPLATE,
    FunctionSummarizer,
    ModelSummarizer,
    SkillBank,
    SkillPrompts,
    Summarizer,
)


def asked_model(config: Config, run_data: RunData, sampler: Sampler, phases: Phases) -> AskedModel:
    """Return the model in training as a writer of hints."""
    return AskedModel(sampler, asking_builder(run_data.builder), phases, config.seed, run_data.max_length)


def hinted_turns(
    config: Config, run_data: RunData, asked: AskedModel, grid: RankGrid, reward: Reward | None
) -> HintedTurns:
    """Return the judges of logged turns under ``data.solutions=next_state``; ``reward``: the user's reward function."""
    hints, quotes = config.hints, config.conversations.show_contents
    hint_judge: HintJudge
    if hints.judge == "model":
        hint_judge = ModelHintJudge(asked, hints.judge_template or JUDGE_TEMPLATE, hints.votes, hints.min_length)
    else:
        hint_judge = FunctionHintJudge(function_named("hints.judge", hints.judge, {}), hints.min_length, grid, quotes)
    reward_judge: RewardJudge | None = None
    if config.policy.weight > 0:
        by_model = ModelRewardJudge(asked, hints.votes)
        reward_judge = by_model if reward is None else FunctionRewardJudge(reward, grid, quotes)
    return HintedTurns(turn_reader(config, run_data), hint_judge, reward_judge, grid)


def skill_prompts(
    config: Config, given: GivenSolutions, judge: Judge, asked: AskedModel, keeps_unhinted: bool
) -> SkillPrompts:
    """Return the prompts with skills, whose bank is empty at the start."""
    hints = config.hints
    summarizer: Summarizer
    if hints.summarizer == "model":
        summarizer = ModelSummarizer(asked, hints.summarizer_template or SUMMARIZER_TEMPLATE)
    else:
        function = function_named("hints.summarizer", hints.summarizer, {})
        summarizer = FunctionSummarizer(function, judge.tokenizer, judge.grid)
    return SkillPrompts(given, judge.grid, keeps_unhinted, SkillBank(hints.keep, hints.exploration), summarizer)


def hindsight_prompts(config: Config, given: GivenSolutions, judge: Judge, keeps_unhinted: bool) -> HindsightPrompts:
    """Return the prompts with the hints of ``data.solutions`` that are known once the responses are sampled."""
    return HindsightPrompts(given, judge.grid, keeps_unhinted, _hints(config, judge))


def _hints(config: Config, judge: Judge) -> Hints:
    """Return the hints of ``data.solutions``, which are known once the responses are sampled."""
    name, tokenizer = config.data.solutions, judge.tokenizer
    if name == "peer":
        return PeerHints(tokenizer)
    if name == "feedback":
        return feedback_hints
    if name == "peer_or_feedback":
        return PeerOrFeedbackHints(PeerHints(tokenizer))
    return FunctionHints(function_named("data.solutions", name, {}), tokenizer, judge.grid)
