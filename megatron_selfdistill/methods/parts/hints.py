# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Hints that follow the sampling: they enter the teacher's prompt once the responses of a step are known.

The model in training can write them (`AskedModel`): its present weights answer requests about responses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron_selfdistill.data.contexts import PromptPair
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompts import PromptBuilder
from megatron_selfdistill.methods.opsd_rl import OpsdRl
from megatron_selfdistill.rollout.base import Request, Sampler, SamplingParams, response_text, sample_seed
from megatron_selfdistill.sources.judge import over_replicas
from megatron_selfdistill.sources.method import MethodTools
from megatron_selfdistill.sources.rollouts import Rollout, without_hint

if TYPE_CHECKING:
    from megatron_selfdistill.metrics.phases import Phases


class HintedLater(OpsdRl):
    """The base of methods whose teacher sees a hint only once the responses are sampled.

    A response without a hint, or whose hint does not fit into the teacher's prompt, has no teacher.
    """

    def prompts(self, problem: Problem) -> PromptPair:
        """Return both prompts of a problem before it is answered; the teacher's prompt is the student's."""
        return without_hint(self.tools.given.pair(problem))

    def has_solution(self, problem: Problem) -> bool:
        """Return False: the teacher sees no hint before the responses are sampled."""
        return False


def chosen_with_hints(
    rollouts: Sequence[Rollout], hints: Sequence[str | None], tools: MethodTools, keeps_unhinted: bool
) -> tuple[list[Rollout], Mapping[str, float]]:
    """Return the rollouts whose teacher sees their hint, and hints/share, the share of all rollouts with a hint.

    ``hints[i]`` belongs to ``rollouts[i]``; None is no hint, and so is a hint that does not fit into the teacher's
    prompt.  ``keeps_unhinted``: whether rollouts without a hint stay, without a teacher; else they are left out.
    Collectives: one sum over the data-parallel ranks.
    """
    chosen = []
    for rollout, hint in zip(rollouts, hints, strict=True):
        pair = tools.given.pair_with(rollout.problem, hint) if hint is not None else None
        if hint is not None and pair is not None:
            chosen.append(replace(rollout, problem=replace(rollout.problem, solution=hint), prompts=pair))
        elif keeps_unhinted:
            chosen.append(rollout.without_hint())
    num_hinted, number = over_replicas((sum(rollout.hinted for rollout in chosen), len(rollouts)), tools.grid)
    return chosen, {"hints/share": num_hinted / max(number, 1)}


def hinted_requests(rollouts: Sequence[Rollout], number: int, kind: str, step: int, seed: int) -> list[Request]:
    """Return ``number`` requests after the teacher's prompt of each rollout, one rollout after the other.

    The seed of a response depends on (seed, step, kind, problem, sample of the rollout, response) alone.
    """
    requests = []
    for one in rollouts:
        assert one.key is not None, "a sampled response has a name"
        name = f"{kind}/{one.problem.id}/{one.key.sample_index}"
        requests += [Request(one.prompts.teacher_prompt, sample_seed(seed, step, name, i)) for i in range(number)]
    return requests


@dataclass(frozen=True)
class Inquiry:
    """One request for a text, about a problem."""

    problem: Problem
    kind: str
    """The kind of the request, which its random stream depends on."""
    text: str
    """The request, which becomes the only message of a conversation."""
    sample: int = 0
    """The index among equal requests."""


@dataclass(frozen=True)
class AskedModel:
    """The sampler of a run, which answers requests in a conversation of their own."""

    sampler: Sampler
    builder: PromptBuilder
    """The builder of the prompts; a request becomes the student's prompt without the wording of problems."""
    phases: Phases
    sampling: SamplingParams
    """How answers are sampled."""
    seed: int
    """The seed of the run."""
    max_length: int
    """The greatest length of request and answer together, in tokens."""

    def texts(self, step: int, inquiries: Sequence[Inquiry]) -> list[str | None]:
        """Return the text of the answer to each of this replica's requests, equal on all ranks of the replica.

        ``inquiries``: the same on each rank of the replica.  None stands for a request that is too long and for an
        answer that has no end.  The seed of an answer depends on (seed, step, problem, request, sample) alone.
        Collectives over the world: those of the sampler.  Raises: `EngineError` on all ranks.
        """
        with self.phases("rollout"):
            self.sampler.update_weights(step)
            prompts = [self._prompt(inquiry) for inquiry in inquiries]
            room = self.max_length - self.sampling.max_new_tokens
            asked = [i for i, prompt in enumerate(prompts) if len(prompt) <= room]
            seeds = [
                sample_seed(self.seed, step, f"{inquiry.kind}/{inquiry.problem.id}/{inquiry.text}", inquiry.sample)
                for inquiry in inquiries
            ]
            responses = self.sampler.generate([Request(prompts[i], seeds[i]) for i in asked], self.sampling)
        texts: list[str | None] = [None] * len(inquiries)
        for i, response in zip(asked, responses, strict=True):
            if not response.truncated:
                texts[i] = response_text(response, self.builder.tokenizer)
        return texts

    def _prompt(self, inquiry: Inquiry) -> list[int]:
        message = {"role": "user", "content": inquiry.text}
        return self.builder.student_prompt(
            replace(inquiry.problem, messages=(message,), tools=(), reply=None, reworded=None)
        )


def asking_builder(builder: PromptBuilder) -> PromptBuilder:
    """Return a builder whose student's prompt shows a message as it is, without a system message."""
    view = replace(builder.templates.student_view, system_prompt=None)
    plain = replace(builder.templates, student="{problem}", student_view=view)
    return PromptBuilder(builder.tokenizer, plain, builder.show_contents)


def asked_model(tools: MethodTools) -> AskedModel:
    """Return the model in training of a run as a writer of hints."""
    run_data = tools.run_data
    builder = asking_builder(run_data.builder)
    return AskedModel(tools.sampler, builder, tools.phases, tools.sampling, tools.config.seed, run_data.max_length)
