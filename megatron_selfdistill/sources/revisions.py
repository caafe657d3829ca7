# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Texts of episodes that are trained on after other prompts: last responses after the problem alone, and replies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from megatron_selfdistill.data.contexts import PromptPair
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.rollout.base import Response, response_text
from megatron_selfdistill.sources.episodes import EpisodeTurn
from megatron_selfdistill.sources.problem_prompts import Answer, GivenSolutions, without_hint
from megatron_selfdistill.sources.reward_metrics import over_replicas

DEFAULT_REPLY_TEMPLATE = """\
You are given a question and an attempt to answer it below. Write a critique of the attempt.

{problem}

Attempt: {response}

Critique:"""
"""The value of policy.reply_template for null."""


@dataclass(frozen=True)
class Revisions:
    """The texts that RLTF adds to the responses of episodes."""

    given: GivenSolutions
    """The prompts of problems, with the greatest lengths."""
    stop_token: int
    """The token that ends a reply, as it ends a response."""
    revises: bool
    """Whether the last response of an episode of several turns is trained on after the problem alone."""
    reply_template: str | None
    """The wording of the problem's message before a reply, with the slots {problem} and {response}; None trains on no
    replies."""
    grid: RankGrid

    def added(self, turns: Sequence[EpisodeTurn], answers: Sequence[Answer]) -> tuple[list[Answer], dict[str, float]]:
        """Return the texts as answers without a hint, and metrics.

        ``turns``: the turns of this replica, episode by episode.  ``answers``: their answers, with rewards.
        episodes/replies_trained_share: the share of the shown replies that are trained on; the others are too long.
        Collectives: one sum over the data-parallel ranks, where replies are trained on.
        """
        revisions: list[Answer] = []
        replies: list[Answer | None] = []
        both = zip(turns, answers, strict=True)
        for _, members in groupby(both, key=lambda pair: pair[1].episode):
            episode = list(members)
            if self.revises and len(episode) > 1:
                revisions.append(_revision(episode[0][1], episode[-1][1]))
            if self.reply_template is not None:
                replies += [self._reply(turn, answer) for turn, answer in episode[:-1]]
        known = [reply for reply in replies if reply is not None]
        if self.reply_template is None:
            return revisions, {}
        num_known, number = over_replicas((len(known), len(replies)), self.grid)
        return [*revisions, *known], {"episodes/replies_trained_share": num_known / max(number, 1)}

    def _reply(self, turn: EpisodeTurn, answer: Answer) -> Answer | None:
        """Return the reply that the next turn shows, as the answer to a request for it; None where it is too long."""
        builder, problem = self.given.builder, answer.problem
        assert turn.reply is not None and turn.reply.text is not None and self.reply_template is not None
        response = response_text(answer.response, builder.tokenizer)
        prompt = builder.filled_prompt(problem, self.reply_template, {"response": response})
        token_ids = [*builder.tokenizer.encode(turn.reply.text), self.stop_token]
        if len(prompt) + len(token_ids) > self.given.max_length:
            return None
        certain = [0.0] * len(token_ids)  # nothing was sampled, and no ratio is taken
        pair = PromptPair(problem.id, prompt, prompt)
        text = Response(token_ids, certain, certain, "stop")
        return replace(answer, prompts=pair, response=text, hinted=False, part="reply")


def _revision(first: Answer, last: Answer) -> Answer:
    return replace(last, problem=first.problem, prompts=without_hint(first.prompts), hinted=False, part="revision")
