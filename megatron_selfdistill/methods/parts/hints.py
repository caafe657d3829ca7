# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Hints that follow the sampling: they enter the teacher's prompt once the responses of a step are known.

The model in training can write them (`asked`): its present weights answer requests about responses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_selfdistill.data.contexts import PromptPair
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompts import PromptBuilder
from megatron_selfdistill.methods.opsd_rl import OpsdRl
from megatron_selfdistill.rollout.base import Request, Response, response_text
from megatron_selfdistill.rollout.sampling import sample_seed
from megatron_selfdistill.sources.judge import over_replicas
from megatron_selfdistill.sources.method import MethodTools
from megatron_selfdistill.sources.rollouts import Rollout, without_hint


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


def hinted_responses(
    tools: MethodTools, rollouts: Sequence[Rollout], number: int, kind: str, step: int
) -> list[Response]:
    """Return ``number`` sampled responses to the teacher's prompt of each rollout, one rollout after the other.

    The seed of a response depends on (seed, step, kind, problem, sample of the rollout, response) alone.
    Collectives over the world: those of the sampler.
    """
    seed = tools.config.seed
    requests = []
    for one in rollouts:
        assert one.key is not None, "a sampled response has a name"
        name = f"{kind}/{one.problem.id}/{one.key.sample_index}"
        requests += [Request(one.prompts.teacher_prompt, sample_seed(seed, step, name, i)) for i in range(number)]
    return tools.generate(step, requests)


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


def asked(tools: MethodTools, step: int, inquiries: Sequence[Inquiry]) -> list[str | None]:
    """Return the text of the answer of the model in training to each of this replica's requests.

    Each request is a conversation of its own, without a system message.  ``inquiries``: the same on each rank of the
    replica, as the result is.  None stands for a request that is too long and for an answer that has no end.  The seed
    of an answer depends on (seed, step, problem, request, sample) alone.
    Collectives over the world: those of the sampler.  Raises: `EngineError` on all ranks.
    """
    run_data, sampling, seed = tools.run_data, tools.sampling, tools.config.seed
    with tools.phases("rollout"):
        tools.sampler.update_weights(step)
        prompts = [asking_prompt(run_data.builder, inquiry) for inquiry in inquiries]
        fitting = [
            i for i, prompt in enumerate(prompts) if len(prompt) <= run_data.max_length - sampling.max_new_tokens
        ]
        seeds = [sample_seed(seed, step, f"{one.kind}/{one.problem.id}/{one.text}", one.sample) for one in inquiries]
        responses = tools.sampler.generate([Request(prompts[i], seeds[i]) for i in fitting], sampling)
    texts: list[str | None] = [None] * len(inquiries)
    for i, response in zip(fitting, responses, strict=True):
        if not response.truncated:
            texts[i] = response_text(response, run_data.tokenizer)
    return texts


def asking_prompt(builder: PromptBuilder, inquiry: Inquiry) -> list[int]:
    """Return the student's prompt with the request as it is, without the wording of problems and a system message."""
    view = replace(builder.templates.student_view, system_prompt=None)
    plain = replace(builder.templates, student="{problem}", student_view=view)
    message = {"role": "user", "content": inquiry.text}
    problem = replace(inquiry.problem, messages=(message,), tools=(), reply=None, reworded=None)
    return PromptBuilder(builder.tokenizer, plain, builder.show_contents).student_prompt(problem)
