# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Skill-SD: lessons of earlier responses to a problem, kept in a bank and shown to the teacher, beside rewards.

Algorithm: The rewards are learned as in GRPO. Beside them there is a weak pull towards the current weights that see a
skill: a lesson of an earlier response to the same problem. After each visit to a problem, the model itself (or
method.summarizer) turns the best response into a skill, until the problem has method.keep skills. The student never
sees a skill, and a response to a problem without a skill trains on its reward alone.

Equation:

    w = 0,   a = A rho with the clip of PPO (see grpo)  +  lambda rho (log q - log p);   lambda = .001
    shown skill: the greatest  mean reward + c sqrt(ln N / n),   skills without a use first

n counts the uses of a skill and N the uses of all skills of the problem; the mean reward is that of the responses to
the problem when the skill was shown. lambda is method.distill_weight, and c is method.exploration. The second part of a
is the gradient of the k3 estimator of KL(student || teacher). method.signal=full has the whole vocabulary in its place.

Paper: Skill-SD (arXiv 2604.10674). The formula, lambda, the current weights as the teacher, the parts of a skill and
the rule of choice come from descriptions of the paper that agree, and not from its code.

Differences:
- Ours are c = 1, 8 skills per problem, that no skill is written for a full bank, which response is summarized, the
  wording, 8 responses, the advantages and the clip of GRPO, and that the model writes its own skills (published: an
  external model).
- The model writes a skill as a JSON object (method.summarizer_template); a reply without such an object is no skill.
- The bank is in the checkpoint, and equal on all ranks in every layout.

Command: The data need answers and no solutions.

Expected: 100 steps of 4 x 8 responses on 100 problems raise the sampled accuracy from .32 to .80, where GRPO ends at
.84 (docs/recipes/comparison.md).

Known failure:
- lambda = .01 over-regularises, and .0005 is too weak (published).
- Responses of another policy, and a skill in the student's prompt, are worse (published).
- A small model writes no JSON: look at `skills/count` and `hints/share`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from typing import Annotated, Any

from megatron_selfdistill.config import function_named
from megatron_selfdistill.config.schema.field_checks import require_slots
from megatron_selfdistill.config.schema.method_config import LATER, Needs
from megatron_selfdistill.config.schema.ranges import NonNegativeFloat, OneOf, PositiveFloat, PositiveInt, Text
from megatron_selfdistill.data.problem_sampler import ProblemSampler
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompts import filled, last_user_text
from megatron_selfdistill.data.records import text_or_none
from megatron_selfdistill.data.thoughts import final_part
from megatron_selfdistill.distributed.collectives import gather_items
from megatron_selfdistill.distributed.integers import max_over_ranks
from megatron_selfdistill.evaluation.verify import judged_in_order
from megatron_selfdistill.methods.default import Metrics
from megatron_selfdistill.methods.parts.hints import HintedLater, Inquiry, asked, chosen_with_hints
from megatron_selfdistill.methods.parts.settings import SIGNALS, DistillAndRewardSettings
from megatron_selfdistill.rollout.base import SamplingParams, response_text
from megatron_selfdistill.sources.rollouts import Rollout

SUMMARIZER_TEMPLATE = """\
You have answered the problem below, and your answer has been rewarded with {reward} (1 is right, 0 is wrong).

## Problem
{problem}

## Your answer
{response}

Write what a later attempt at this problem should know. Reply with one JSON object of three texts and nothing else:
{"success_analysis": "what worked", "mistake_analysis": "what went wrong", "golden_workflow": "the steps to follow"}"""
"""The request for a skill; ``method.summarizer_template`` replaces it."""

PARTS = ("success_analysis", "mistake_analysis", "golden_workflow")
"""The texts of a skill that the model writes."""


@dataclass(frozen=True)
class SkillSdSettings(DistillAndRewardSettings):
    """The settings of Skill-SD."""

    distill_weight: PositiveFloat = 0.001
    """Weight of the teacher's part."""
    signal: Annotated[str, OneOf(SIGNALS)] = "sampled"
    """The form of the teacher's part: full (the divergence over the whole vocabulary), sampled (its form for the
    sampled token) or advantage (log q - log mu as an advantage)."""
    summarizer: Annotated[str, OneOf(("model",), or_dotted=True)] = "model"
    """The writer of skills: model (the present weights, asked with summarizer_template) or the dotted path of a
    function ``summarize(problem, response_text, reward) -> text or None``."""
    summarizer_template: Text | None = None
    """The request for a skill, with the slots {problem}, {response} and {reward}; it must ask for a JSON object with
    the texts success_analysis, mistake_analysis and golden_workflow.  Null takes the wording in methods/skill_sd.py."""
    keep: PositiveInt = 8
    """Number of skills per problem in the bank; no further skill is written for a problem that has so many."""
    exploration: NonNegativeFloat = 1.0
    """Weight c of exploration in the choice of a skill: of the number of its uses against its mean reward."""

    required = ("data.kind=problems",)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_slots("method.summarizer_template", self.summarizer_template, ("problem", "response", "reward"))

    @property
    def needs(self) -> Needs:
        """What the method needs from the core."""
        return replace(super().needs, rewards=True, asks_model=self.summarizer == "model", hint=LATER)

    teacher_template = (
        "{problem}\n\nHere is what an earlier attempt at this problem has taught you:\n\n{solution}\n\n"
        "Correctly solve the original question."
    )


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


def chosen(skills: Sequence[Skill], exploration: float) -> int | None:
    """Return the index of the skill that the teacher sees next, the oldest of equals; None if there is no skill."""
    total = sum(skill.uses for skill in skills)

    def worth(skill: Skill) -> float:
        if not skill.uses:
            return math.inf
        return skill.total_reward / skill.uses + exploration * math.sqrt(math.log(total) / skill.uses)

    return max(range(len(skills)), key=lambda i: worth(skills[i]), default=None)


@dataclass(frozen=True)
class SkillSd(HintedLater):
    """Skill-SD; in episodes of several turns, the last response stands for its episode, with the sum of its rewards."""

    Settings = SkillSdSettings
    bank: Mapping[str, Sequence[Skill]] = field(default_factory=dict)
    """Problem id -> its skills, oldest first: a value, the same on every rank of the world."""
    step: int = 0
    """The step that is under way."""

    def prepare(self, step: int, sampling: SamplingParams, problem_sampler: ProblemSampler) -> tuple[SkillSd, Metrics]:
        """Return the method of the step, and the numbers of skills and of problems with a skill."""
        counts = [len(skills) for skills in self.bank.values()]
        metrics = {"skills/count": float(sum(counts)), "skills/problems": float(len(counts))}
        return replace(self, step=step), metrics

    def select(self, step: int, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], Metrics]:
        """Return the rollouts with the skills of their problems, and hints/share, the share of all with one.

        Collectives: one sum over the data-parallel ranks.
        """
        selected, _ = super().select(step, rollouts)
        skills = []
        for rollout in selected:
            known = self.bank.get(rollout.problem.id, ())
            index = chosen(known, self.settings.exploration)
            skills.append(None if index is None else known[index].text)
        return chosen_with_hints(selected, skills, self.tools, self.settings.weight > 0)

    def record(self, rollouts: Sequence[Rollout]) -> SkillSd:
        """Return the method with the bank after this step, in the order of the visits of the global batch.

        Collectives: a maximum and an all_gather_object over the data-parallel ranks, and those of the summarizer where
        any replica has a problem without a full bank.
        """
        grid, own = self.tools.grid, self.settings
        visits = [list(members) for _, members in groupby(rollouts, key=lambda rollout: rollout.group)]
        returns = [_episode_returns(visit) for visit in visits]
        best = [max(episodes, key=lambda rollout: rollout.reward or 0.0) for episodes in returns]
        wanted = [i for i, rollout in enumerate(best) if len(self.bank.get(rollout.problem.id, ())) < own.keep]
        written: list[str | None] = [None] * len(visits)
        if max_over_ranks([len(wanted)], grid.dp_group)[0]:
            texts = self._summaries([best[i] for i in wanted])
            for i, text in zip(wanted, texts, strict=True):
                written[i] = text
        mine = []
        for episodes, text in zip(returns, written, strict=True):
            reward = sum(rollout.reward or 0.0 for rollout in episodes) / len(episodes)
            place = episodes[0].group * grid.dp_size + grid.dp_rank
            mine.append((place, episodes[0].problem.id, reward, text))
        bank = dict(self.bank)
        for _, problem_id, reward, text in sorted(gather_items(mine, grid.dp_group), key=lambda visit: visit[0]):
            known = list(bank.get(problem_id, ()))
            shown = chosen(self.bank.get(problem_id, ()), own.exploration)
            if shown is not None:
                skill = known[shown]
                known[shown] = replace(skill, uses=skill.uses + 1, total_reward=skill.total_reward + reward)
            if text is not None and len(known) < own.keep and all(skill.text != text for skill in known):
                known.append(Skill(text, self.step))
            if known:
                bank[problem_id] = known
        return replace(self, bank=bank)

    def state_dict(self) -> dict[str, Any]:
        """Return the skills as plain values."""
        return {"skills": {name: [asdict(skill) for skill in skills] for name, skills in self.bank.items()}}

    def restored(self, state: Mapping[str, Any]) -> SkillSd:
        """Return this method with the skills of ``state``."""
        bank = {name: [Skill(**skill) for skill in skills] for name, skills in (state.get("skills") or {}).items()}
        return replace(self, bank=bank) if bank else self

    def _summaries(self, rollouts: Sequence[Rollout]) -> list[str | None]:
        """Return the skill that the model or the user's function writes about each rollout; None is no skill.

        Collective over the world.  Raises: `VerifierError` on every rank where the function failed, or returned
        anything but a text or None.
        """
        own, tokenizer = self.settings, self.tools.run_data.tokenizer
        contents = [(response_text(one.response, tokenizer), one.reward or 0.0) for one in rollouts]
        questions = [(one.problem, content) for one, content in zip(rollouts, contents, strict=True)]
        if own.summarizer != "model":
            function = function_named("method.summarizer", own.summarizer, {})

            def written(problem: Problem, content: tuple[str, float]) -> str | None:
                text = text_or_none(function(problem, *content))
                return text if text and text.strip() else None

            return judged_in_order(questions, written, self.tools.grid, "summarizer")
        inquiries = []
        for problem, (response, reward) in questions:
            slots = {"problem": last_user_text(problem), "response": response, "reward": f"{reward:g}"}
            inquiries.append(Inquiry(problem, "skill", filled(own.summarizer_template or SUMMARIZER_TEMPLATE, slots)))
        return [None if text is None else skill_text(text) for text in asked(self.tools, self.step, inquiries)]


def _episode_returns(visit: Sequence[Rollout]) -> list[Rollout]:
    """Return the last rollout of each episode of a visit, with the sum of the episode's rewards as its reward."""
    episodes: dict[tuple[int, int], list[Rollout]] = {}
    for i, rollout in enumerate(visit):
        key = (0, i) if rollout.episode is None else (1, rollout.episode)
        episodes.setdefault(key, []).append(rollout)
    return [replace(turns[-1], reward=sum(turn.reward or 0.0 for turn in turns)) for turns in episodes.values()]


def skill_text(reply: str) -> str | None:
    """Return the skill in a reply of the model: a JSON object with the texts of `PARTS`, one line for each part.

    The object is the text from the first opening brace after the thinking to the last closing brace.  Other keys are
    left out.  None stands for a reply without such an object, and for an object without any text.
    """
    answer = final_part(reply)
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
