# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Visits to problems whose responses take several steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.rollout.base import Response
from megatron_selfdistill.sources.recording import SampleKey


@dataclass(frozen=True)
class Visit:
    """A problem whose responses are under way or wait for the step that trains on them."""

    step: int
    """The step in which the responses have begun, which is part of their names."""
    problem: Problem
    first_sample: int
    """The index of the first of its samples."""
    responses: tuple[Response | None, ...]
    """The tokens so far of each sample; None where there are none."""

    def key(self, sample: int) -> SampleKey:
        """Return the name of a sample, counted from 0."""
        return SampleKey(self.step, self.problem.id, self.first_sample + sample)

    def unfinished(self, max_new_tokens: int) -> list[int]:
        """Return the samples that are not finished."""
        return [i for i, one in enumerate(self.responses) if one is None or _goes_on(one, max_new_tokens)]

    def with_response(self, sample: int, more: Response) -> Visit:
        """Return this visit with the next tokens of a sample."""
        responses = list(self.responses)
        before = responses[sample]
        responses[sample] = more if before is None else before.continued_by(more)
        return replace(self, responses=tuple(responses))

    def without_odd_lengths(self, max_new_tokens: int, round_tokens: int) -> Visit:
        """Return this visit without the responses that rounds of this length do not lead to ``max_new_tokens``.

        Those come from a run with other lengths, and begin anew.
        """

        def is_odd(one: Response) -> bool:
            return _goes_on(one, max_new_tokens) and len(one.token_ids) % round_tokens != 0

        return replace(self, responses=tuple(None if one is None or is_odd(one) else one for one in self.responses))

    def to_json(self) -> dict[str, Any]:
        """Return the visit as plain values, with the id of its problem."""
        responses = [None if one is None else asdict(one) for one in self.responses]
        return {"step": self.step, "problem_id": self.problem.id, "sample": self.first_sample, "responses": responses}

    @staticmethod
    def from_json(fields: Mapping[str, Any], problems: Mapping[str, Problem]) -> Visit:
        """Return the visit that `to_json` has described; ``problems``: those of the data, by id."""
        responses = tuple(None if one is None else Response(**one) for one in fields["responses"])
        return Visit(fields["step"], problems[fields["problem_id"]], fields["sample"], responses)


def _goes_on(response: Response, max_new_tokens: int) -> bool:
    """Return whether a response has ended with a round, and not with its last token."""
    return response.truncated and len(response.token_ids) < max_new_tokens
