# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Skills as hints: lessons of earlier responses to a problem, kept in a bank and shown to the teacher.

Source: Skill-SD (arXiv 2604.10674).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from typing import Any

from megatron_selfdistill.data.problems import Problem, ProblemSampler
from megatron_selfdistill.data.prompts import filled, last_user_text
from megatron_selfdistill.data.tokenizer import Tokenizer
from megatron_selfdistill.data.user_values import text_or_none
from megatron_selfdistill.distributed.collectives import gather_items, max_over_ranks
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.evaluation.verify import judged_in_order
from megatron_selfdistill.rollout.base import SamplingParams, response_text
from megatron_selfdistill.sources.asked_model import AskedModel, Inquiry
from megatron_selfdistill.sources.hindsight_hints import HintedAfterSampling, chosen_with_hints
from megatron_selfdistill.sources.problem_prompts import Answer, Prompts

SUMMARIZER_TEMPLATE = """\
You have answered the problem below, and your answer has been rewarded with {reward} (1 is right, 0 is wrong).

## Problem
{problem}

## Your answer
{response}

Write what a later attempt at this problem should know. Reply with one JSON object of three texts and nothing else:
{"success_analysis": "what worked", "mistake_analysis": "what went wrong", "golden_workflow": "the steps to follow"}"""
"""The request for a skill; ``hints.summarizer_template`` replaces it."""

PARTS = ("success_analysis", "mistake_analysis", "golden_workflow")
"""The texts of a skill that the model writes."""

Summarizer = Callable[[int, SamplingParams, Sequence[Answer]], list[str | None]]
"""A function of the step, the sampling and answers of this replica that returns the skill of each; None is none.

Every rank of the world calls it, and all ranks of a replica get the same skills.
"""

SummaryFunction = Callable[[Problem, str, float], str | None]
"""The user's function ``summarize(problem, response_text, reward)`` (``hints.summarizer``)."""


@dataclass(frozen=True)
class Skill:
    """One lesson about a problem."""

    text: str
    step: int
    """Optimizer steps done when the skill was written."""
    uses: int = 0
    """Number of visits to the problem in which the teacher saw the skill."""
    total_reward: float = 0.0
    """The sum over these visits of the mean reward of their responses."""


@dataclass(frozen=True)
class SkillBank:
    """The skills of a run.  The bank is a value, the same on every rank of the world."""

    keep: int
    """The largest number of skills per problem."""
    exploration: float
    """The weight c of exploration in `chosen`."""
    skills: Mapping[str, Sequence[Skill]] = field(default_factory=dict)
    """Problem id -> its skills, oldest first."""

    def chosen(self, problem_id: str) -> int | None:
        """Return the index of the skill that the teacher sees next; None where the problem has no skill.

        Skills without a use come first.  Otherwise it is the skill with the greatest mean reward + c sqrt(ln N / n),
        for its n uses and the N uses of all skills of the problem.  Among equals the oldest one wins.
        """
        skills = self.skills.get(problem_id, ())
        total = sum(skill.uses for skill in skills)

        def worth(skill: Skill) -> float:
            if not skill.uses:
                return math.inf
            bonus = self.exploration * math.sqrt(math.log(total) / skill.uses)
            return skill.total_reward / skill.uses + bonus

        return max(range(len(skills)), key=lambda i: worth(skills[i]), default=None)

    def shown(self, problem_id: str) -> str | None:
        """Return the text of the `chosen` skill; None where the problem has no skill."""
        index = self.chosen(problem_id)
        return None if index is None else self.skills[problem_id][index].text

    def is_full(self, problem_id: str) -> bool:
        """Return whether the problem has as many skills as the bank keeps."""
        return len(self.skills.get(problem_id, ())) >= self.keep

    def used(self, problem_id: str, index: int, reward: float) -> SkillBank:
        """Return the bank after a visit in which the teacher saw skill ``index``, with the mean reward of the visit."""
        skills = list(self.skills[problem_id])
        skill = skills[index]
        skills[index] = replace(skill, uses=skill.uses + 1, total_reward=skill.total_reward + reward)
        return replace(self, skills={**self.skills, problem_id: skills})

    def with_skill(self, problem_id: str, text: str, step: int) -> SkillBank:
        """Return the bank with another skill; a full bank, and a bank with this text, stay as they are."""
        skills = self.skills.get(problem_id, ())
        if self.is_full(problem_id) or any(skill.text == text for skill in skills):
            return self
        return replace(self, skills={**self.skills, problem_id: [*skills, Skill(text, step)]})

    def state_dict(self) -> dict[str, Any]:
        """Return the skills as plain values."""
        return {name: [asdict(skill) for skill in skills] for name, skills in self.skills.items()}

    def restored(self, state: Mapping[str, Any]) -> SkillBank:
        """Return this bank with the skills of ``state``, which `state_dict` returned."""
        return replace(self, skills={name: [Skill(**skill) for skill in skills] for name, skills in state.items()})


@dataclass(frozen=True)
class SkillPrompts(HintedAfterSampling):
    """Prompts that show the teacher a skill from the bank; the student never sees a skill.

    After the responses of a visit are rewarded, the skill that was shown is credited with their mean reward, and the
    best response, the first among equals, is summarized as another skill until the bank of the problem is full.  In
    episodes of several turns, the last response stands for its episode, with the sum of the episode's rewards.
    """

    bank: SkillBank
    summarizer: Summarizer
    now: tuple[int, SamplingParams] | None = None
    """The step and the sampling of the step that is under way."""

    def prepare(
        self, step: int, sampling: SamplingParams, problem_sampler: ProblemSampler
    ) -> tuple[Prompts, Mapping[str, float]]:
        """Return the prompts of the step, and the numbers of skills and of problems with a skill."""
        counts = [len(skills) for skills in self.bank.skills.values()]
        metrics = {"skills/count": float(sum(counts)), "skills/problems": float(len(counts))}
        return replace(self, now=(step, sampling)), metrics

    def choose(self, answers: Sequence[Answer]) -> tuple[list[Answer], Mapping[str, float]]:
        """Return the answers with the skills of their problems, and hints/share, the share of all answers with one.

        Collectives: one sum over the data-parallel ranks.
        """
        skills = [self.bank.shown(answer.problem.id) for answer in answers]
        return chosen_with_hints(answers, skills, self.inner, self.grid, self.keeps_unhinted)

    def record(self, answers: Sequence[Answer], guided: Collection[str]) -> Prompts:
        """Return the prompts with the bank after this step, in the order of the visits of the global batch.

        Collectives: a maximum and an all_gather_object over the data-parallel ranks, and those of the summarizer where
        any replica has a problem without a full bank.
        """
        assert self.now is not None, "prepare has been called for the step"
        step, sampling = self.now
        visits = [list(members) for _, members in groupby(answers, key=lambda answer: answer.group)]
        returns = [_episode_returns(visit) for visit in visits]
        best = [max(episodes, key=lambda answer: answer.reward or 0.0) for episodes in returns]
        wanted = [i for i, answer in enumerate(best) if not self.bank.is_full(answer.problem.id)]
        written: list[str | None] = [None] * len(visits)
        if max_over_ranks([len(wanted)], self.grid.dp_group)[0]:
            texts = self.summarizer(step, sampling, [best[i] for i in wanted])
            for i, text in zip(wanted, texts, strict=True):
                written[i] = text
        mine = []
        for episodes, text in zip(returns, written, strict=True):
            reward = sum(answer.reward or 0.0 for answer in episodes) / len(episodes)
            place = episodes[0].group * self.grid.dp_size + self.grid.dp_rank
            mine.append((place, episodes[0].problem.id, reward, text))
        bank = self.bank
        for _, problem_id, reward, text in sorted(gather_items(mine, self.grid.dp_group), key=lambda visit: visit[0]):
            shown = self.bank.chosen(problem_id)
            if shown is not None:
                bank = bank.used(problem_id, shown, reward)
            if text is not None:
                bank = bank.with_skill(problem_id, text, step)
        return replace(self, bank=bank, now=None)

    def state_dict(self) -> dict[str, Any]:
        """Return the skills as plain values."""
        return {**self.inner.state_dict(), "skills": self.bank.state_dict()}

    def restored(self, state: Mapping[str, Any]) -> Prompts:
        """Return these prompts with the skills of ``state``."""
        skills = state.get("skills")
        return self if skills is None else replace(self, bank=self.bank.restored(skills))


@dataclass(frozen=True)
class ModelSummarizer:
    """The model itself as the writer of skills."""

    model: AskedModel
    template: str = SUMMARIZER_TEMPLATE

    def __call__(self, step: int, sampling: SamplingParams, answers: Sequence[Answer]) -> list[str | None]:
        """Return the skill that the model writes about each answer; see `skill_text`.  Collective over the world."""
        tokenizer = self.model.builder.tokenizer
        inquiries = []
        for answer in answers:
            problem = answer.problem
            slots = {
                "problem": last_user_text(problem),
                "response": response_text(answer.response, tokenizer),
                "reward": f"{answer.reward or 0.0:g}",
            }
            inquiries.append(Inquiry(problem, "skill", filled(self.template, slots)))
        texts = self.model.texts(step, sampling, inquiries)
        return [None if text is None else skill_text(text) for text in texts]


@dataclass(frozen=True)
class FunctionSummarizer:
    """The user's function as the writer of skills."""

    function: SummaryFunction
    tokenizer: Tokenizer
    grid: RankGrid

    def __call__(self, step: int, sampling: SamplingParams, answers: Sequence[Answer]) -> list[str | None]:
        """Return the text of the function about each answer; None, and white space, is no skill.

        Collectives: one all_gather_object over the world.  Raises: `VerifierError` on every rank where the function
        failed, or returned anything but a text or None.
        """

        def written(problem: Problem, content: tuple[str, float]) -> str | None:
            text = text_or_none(self.function(problem, *content))
            return text if text and text.strip() else None

        questions = [
            (answer.problem, (response_text(answer.response, self.tokenizer), answer.reward or 0.0))
            for answer in answers
        ]
        return judged_in_order(questions, written, self.grid, "summarizer")


def _episode_returns(visit: Sequence[Answer]) -> list[Answer]:
    """Return the last answer of each episode of a visit, with the sum of the episode's rewards as its reward."""
    episodes: dict[tuple[int, int], list[Answer]] = {}
    for i, answer in enumerate(visit):
        key = (0, i) if answer.episode is None else (1, answer.episode)
        episodes.setdefault(key, []).append(answer)
    return [replace(turns[-1], reward=sum(turn.reward or 0.0 for turn in turns)) for turns in episodes.values()]


def skill_text(reply: str) -> str | None:
    """Return the skill in a reply of the model: a JSON object with the texts of `PARTS`, one line for each part.

    The object is the text from the first opening brace after the thinking to the last closing brace.  Other keys are
    left out.  None stands for a reply without such an object, and for an object without any text.
    """
    answer = reply.rpartition("</think>")[2]
    start, end = answer.find("{"), answer.rfind("}")
    if start < 0 or end < start:
        return None
    try:
        parts = json.loads(answer[start : end + 1])
    except ValueError:
        return None
    if not isinstance(parts, dict) or not all(isinstance(parts.get(name), str) for name in PARTS):
        return None
    texts = {name: parts[name].strip() for name in PARTS}
    return "\n".join(f"{name}: {text}" for name, text in texts.items() if text) or None
