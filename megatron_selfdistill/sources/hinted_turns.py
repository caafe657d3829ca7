# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Logged turns with hints from their next states: the judged replies of a step become answers with prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_selfdistill.data.chat.replies import Turn, TurnReader
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.rollout.base import Response, SamplingParams
from megatron_selfdistill.sources.next_state_hints import HintJudge, JudgedReply, RewardJudge
from megatron_selfdistill.sources.problem_prompts import Answer
from megatron_selfdistill.sources.reward_metrics import over_replicas


@dataclass(frozen=True)
class HintedTurns:
    """The judges of a step's logged turns, and the reader that writes their hints into the teacher's prompts."""

    reader: TurnReader
    hint_judge: HintJudge
    reward_judge: RewardJudge | None
    """The judge of rewards; None where no reward counts.  Turns without a hint are then skipped."""
    grid: RankGrid

    def answers(
        self, step: int, sampling: SamplingParams, problems: Sequence[Problem], turns: Sequence[Turn]
    ) -> tuple[list[Answer], Mapping[str, float]]:
        """Return the turns of this replica that are trained on, as answers, and metrics of the global batch.

        ``turns[i]`` is the turn of ``problems[i]``.  The teacher of an answer sees the hint, or where there is none, or
        the contexts become too long, no hint.  The metrics: hints/share, the share of all turns with a hint; with
        rewards rewards/mean and rewards/trained_share.
        Collectives: those of the judges, and one sum over the data-parallel ranks.
        """
        decode = self.reader.builder.tokenizer.decode
        replies = [
            JudgedReply(problem, decode(turn.reply[:-1], skip_special_tokens=True))
            for problem, turn in zip(problems, turns, strict=True)
        ]
        hints = self.hint_judge(step, sampling, replies)
        rewards = self.reward_judge(step, sampling, replies) if self.reward_judge is not None else None
        hinted = self._with_hints(problems, hints)
        answers = []
        for i, (problem, turn) in enumerate(zip(problems, turns, strict=True)):
            reward = None if rewards is None else rewards[i]
            answer = Answer(problem, turn.prompts, Response.unsampled(turn.reply), group=i, reward=reward)
            if i in hinted:
                shown, prompts = hinted[i]
                answers.append(replace(answer, problem=shown, prompts=prompts.prompts))
            elif rewards is not None:
                answers.append(answer.without_hint())
        return answers, self._metrics(len(problems), answers, rewards)

    def _with_hints(self, problems: Sequence[Problem], hints: Sequence[str | None]) -> dict[int, tuple[Problem, Turn]]:
        """Return the problems with their hints as solutions, and their turns, by index, where the contexts fit."""
        shown = {
            i: replace(problem, solution=hint)
            for i, (problem, hint) in enumerate(zip(problems, hints, strict=True))
            if hint is not None
        }
        turns = self.reader.read(list(shown.values())) if shown else []
        return {
            i: (problem, turn)
            for (i, problem), turn in zip(shown.items(), turns, strict=True)
            if isinstance(turn, Turn)
        }

    def _metrics(self, number: int, answers: Sequence[Answer], rewards: Sequence[float] | None) -> dict[str, float]:
        hinted = sum(answer.hinted for answer in answers)
        counts = over_replicas((number, hinted, len(answers), sum(rewards or ())), self.grid)
        total, num_hinted, num_trained, reward = counts
        metrics = {"hints/share": num_hinted / max(total, 1)}
        if rewards is not None:
            metrics |= {"rewards/mean": reward / max(total, 1), "rewards/trained_share": num_trained / max(total, 1)}
        return metrics
