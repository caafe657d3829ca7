# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Completions of nodes: their prompts, their limits, and the calls of the sampler that give them."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_selfdistill.data.contexts import PromptPair
from megatron_selfdistill.instruments.alignment import alignment_job as module
from megatron_selfdistill.instruments.alignment.alignment import CandidateToken, Node
from megatron_selfdistill.instruments.alignment.alignment_job import AlignmentJob
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams

STOP, LONGEST = 7, 6
PROMPTS = [PromptPair("p", [1, 2], [1, 2, 3]), PromptPair("q", [1, 2, 3], [1, 2, 3, 4])]
RESPONSES = {
    0: Response([4, 5, 6, 4, 5, 6], [0.0] * 6, [0.0] * 6, "length"),
    1: Response([4, 7], [0.0] * 2, [], "stop"),
}


class EndingSampler:
    """Continues a prompt with 8 until the response has ``end`` tokens with its stop token."""

    def __init__(self, end: int) -> None:
        self.end, self.calls = end, []

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Response]:
        self.calls.append((params.max_new_tokens, [request.prompt for request in requests]))
        return [self._response(len(request.prompt) - prompt_length(request.prompt), params) for request in requests]

    def _response(self, num_begun: int, params: SamplingParams) -> Response:
        whole = [8] * (self.end - num_begun - 1) + [STOP]
        ids = whole[: params.max_new_tokens]
        return Response(ids, [], [], "stop" if ids == whole else "length")


def prompt_length(prompt: Sequence[int]) -> int:
    return 3 if list(prompt[:3]) == [1, 2, 3] else 2


def node(problem_id: str, position: int) -> Node:
    tokens = [CandidateToken(token, 0.3, 0.3, 0.3) for token in (4, 5, STOP)]
    return Node(problem_id, position, "kl", 0.1, 6, False, tokens)


def completed(monkeypatch, end: int, max_length: int) -> tuple[dict[module.Key, Response], EndingSampler]:
    monkeypatch.setattr(module, "gather_items", list)
    problems = [SimpleNamespace(id=prompts.problem_id) for prompts in PROMPTS]
    data: Any = SimpleNamespace(stop_token_ids=(STOP,), max_length=max_length, evaluation=problems)
    config: Any = SimpleNamespace(seed=3, rollout=SimpleNamespace(max_new_tokens=LONGEST))
    job, sampler = AlignmentJob(config, data, {"solution": PROMPTS}, 3, 3, 2), EndingSampler(end)
    nodes = [(0, node("p", 0)), (0, node("p", 3)), (0, node("p", 5)), (1, node("q", 1))]
    inference: Any = SimpleNamespace(sampler=sampler, sampling=SamplingParams(99, stop_token_ids=(STOP,)))
    return job._completed(nodes, RESPONSES, inference), sampler


@pytest.mark.parametrize("max_length", [9, 10, 30])
@pytest.mark.parametrize("end", [LONGEST, LONGEST + 1])
def test_a_completion_has_as_many_tokens_as_the_response_could_still_have(monkeypatch, end, max_length):
    found, sampler = completed(monkeypatch, end, max_length)
    assert all(len(prompt) + limit <= max_length for limit, prompts in sampler.calls for prompt in prompts)
    for (p, position, token, _), response in found.items():
        begun = [*RESPONSES[p].token_ids[:position], token]
        assert response.token_ids[: position + 1] == begun
        if token == STOP:
            assert (response.token_ids, response.finish_reason) == (begun, "stop")
        elif position == LONGEST - 1:
            assert (response.token_ids, response.finish_reason) == (begun, "length"), "there is no room for an end"
        else:
            assert len(response.token_ids) == LONGEST
            assert response.finish_reason == ("stop" if end == LONGEST else "length")


@pytest.mark.parametrize(("max_length", "limits"), [(9, [5, 4, 2]), (10, [5, 2]), (30, [5])])
def test_completions_of_several_lengths_share_a_call_as_far_as_there_is_room(monkeypatch, max_length, limits):
    _, sampler = completed(monkeypatch, LONGEST, max_length)
    assert [limit for limit, _ in sampler.calls] == limits
    assert sum(len(prompts) for _, prompts in sampler.calls) == 3 * 2 * 2, "nodes, tokens without an end, completions"


def test_a_token_that_ends_the_response_is_judged_once(monkeypatch):
    found, _ = completed(monkeypatch, LONGEST, 30)
    counts = {key[:3]: sum(other[:3] == key[:3] for other in found) for key in found}
    assert {key: count for key, count in counts.items() if count != 2} == {
        **{(0, position, STOP): 1 for position in (0, 3, 5)},
        (1, 1, STOP): 1,
        **{(0, 5, token): 1 for token in (4, 5)},
    }
