# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The experiment of gradient alignment: directions are gradients, nodes have exact probabilities, completions fit."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from explored_records import explored_of, logit_rows
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import REPOSITORY
from torch import Tensor

from megatron_selfdistill.data.contexts import PromptPair
from megatron_selfdistill.loss.target import Target, mixed_target
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams

sys.path.append(str(REPOSITORY / "experiments" / "alignment"))
import alignment_job
from alignment_job import AlignmentJob, nodes_of
from alignment_nodes import (
    CandidateToken,
    Node,
    alignment,
    chosen_nodes,
    cosine,
    descent,
    ideal_direction,
    limit_groups,
    node_groups,
    success_with_rest,
    with_rest,
)

S, T, SUCCESS = (1.2, 0.3, -0.5, 0.0), (0.2, 1.5, -1.0, 0.4), np.array([0.10, 0.80, 0.50, 0.40])


def probabilities(logits) -> np.ndarray:
    return torch.tensor(logits, dtype=torch.float64).softmax(-1).numpy()


def test_the_worked_example():
    p, teacher = probabilities(S), probabilities(T)
    g = ideal_direction(p, SUCCESS)
    assert g == pytest.approx((-0.125366, 0.099576, 0.015752, 0.010038), abs=5e-7)
    assert cosine(g, descent(p, teacher, "reverse_kl")) == pytest.approx(0.979657, abs=5e-7)
    assert cosine(g, descent(p, teacher, "forward_kl")) == pytest.approx(0.974218, abs=5e-7)
    logits = [torch.tensor([row], dtype=torch.float64) for row in (S, T)]
    mix = mixed_target(*logits, Target(anchor="student")).log_q[0].exp().numpy()
    assert cosine(g, descent(p, mix, "reverse_kl")) == pytest.approx(0.914264, abs=5e-7)
    # The same direction by hand: D = log M - log p with M = (p + q) / 2.
    gap = np.log((p + teacher) / 2) - np.log(p)
    assert cosine(g, descent(p, teacher, "jsd")) == pytest.approx(cosine(g, p * (gap - p @ gap)), abs=1e-12)
    assert alignment(p, mix, SUCCESS, "reverse_kl") == pytest.approx(0.914264, abs=5e-7), "candidates without a rest"


logits = st.lists(st.tuples(*[st.floats(-6, 6)] * 3), min_size=2, max_size=8)


@given(logits, st.floats(0.05, 0.95))
def test_directions_are_gradients(rows, lam):
    s, t, chance = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    s.requires_grad_()
    log_p, log_q, success = s.log_softmax(-1), t.log_softmax(-1), chance.sigmoid()
    log_m = (lam * log_q.exp() + (1 - lam) * log_p.exp()).log()
    values = {
        "success": (log_p.exp() * success).sum(),
        "reverse_kl": -(log_p.exp() * (log_p - log_q)).sum(),
        "forward_kl": -(log_q.exp() * (log_q - log_p)).sum(),
        "jsd": -(lam * log_q.exp() * (log_q - log_m) + (1 - lam) * log_p.exp() * (log_p - log_m)).sum(),
    }
    expected = {name: torch.autograd.grad(value, s, retain_graph=True)[0].numpy() for name, value in values.items()}
    p, q = log_p.detach().exp().numpy(), log_q.exp().numpy()
    assert ideal_direction(p, success.numpy()) == pytest.approx(expected["success"], abs=1e-14)
    for divergence in ("reverse_kl", "forward_kl", "jsd"):
        assert descent(p, q, divergence, lam) == pytest.approx(expected[divergence], abs=1e-13)


def test_the_rest_is_one_token_with_the_mean_success():
    p, q = np.array([0.5, 0.25]), np.array([0.1, 0.5])
    assert with_rest(p).tolist() == [0.5, 0.25, 0.25]
    success = success_with_rest(p, np.array([0.0, 0.75]))
    assert success.tolist() == [0.0, 0.75, 0.25]
    assert ideal_direction(with_rest(p), success)[-1] == 0, "neither more nor less of what nobody tried"
    expected = cosine(ideal_direction(with_rest(p), success), np.array([0.1 - 0.5, 0.5 - 0.25, 0.4 - 0.25]))
    assert alignment(p, q, np.array([0.0, 0.75]), "forward_kl") == pytest.approx(expected)
    assert with_rest(np.array([0.7, 0.3 + 1e-12])).tolist()[-1] == 0


def test_a_token_that_the_target_excludes_gives_no_infinity():
    p, q = np.array([0.5, 0.5]), np.array([1.0, 0.0])
    down = descent(p, q, "reverse_kl")
    assert np.isfinite(down).all() and down[0] == pytest.approx(-down[1]) and down[0] > 0
    assert alignment(p, q, np.array([1.0, 0.0]), "reverse_kl") == pytest.approx(1)
    assert alignment(p, q, np.array([0.0, 1.0]), "reverse_kl") == pytest.approx(-1)


@pytest.mark.parametrize(("target", "success"), [([0.5, 0.25], [0.0, 1.0]), ([0.1, 0.5], [0.3, 0.3])])
def test_without_a_direction_there_is_no_cosine(target, success):
    for divergence in ("reverse_kl", "forward_kl", "jsd"):
        assert alignment(np.array([0.5, 0.25]), np.array(target), np.array(success), divergence) is None
    assert cosine(np.array([1e-17, -2e-17]), np.array([1.0, -1.0])) is None, "only rounding is left"


def test_nodes_are_chosen_by_position_and_by_kl():
    kl = [0.0] * 40
    kl[7], kl[8], kl[31], kl[5] = 3.0, 2.0, 2.0, math.nan
    assert chosen_nodes(kl, 6) == {6: "position", 7: "kl", 8: "kl", 20: "position", 31: "kl", 33: "position"}
    assert chosen_nodes(kl, 2) == {7: "kl", 20: "position"}
    assert chosen_nodes([1.0, 2.0], 16) == {0: "position", 1: "position"}


@given(st.lists(st.floats(0, 5), max_size=60), st.integers(1, 20))
def test_the_number_of_nodes_is_kept(kl, number):
    chosen = chosen_nodes(kl, number)
    assert len(chosen) == min(len(kl), number) and list(chosen) == sorted(chosen)
    assert all(0 <= position < len(kl) for position in chosen)


def test_limits_are_grouped_as_far_as_there_is_room():
    assert limit_groups([3, 9, 10, 4, 9], 0) == [[10], [9], [4], [3]]
    assert limit_groups([3, 9, 10, 4, 9], 1) == [[10, 9], [4, 3]]
    assert limit_groups([3, 9, 10, 4, 9], 7) == [[10, 9, 4, 3]]
    assert limit_groups([], 7) == []


STUDENT_MIX = Target(teacher_weight=2, k_max=None, anchor="student")
ANCHORED = Target(anchor="reference")


def full_rows(rows: list[Tensor], target: Target) -> Tensor:
    """Return the probabilities [3, T, V] of student, teacher and target, float64, from full rows."""
    student, teacher, *reference = (row.double() for row in rows)
    found = mixed_target(student, teacher, target, reference[0] if target.is_anchored else None)
    return torch.stack([student.softmax(-1), teacher.softmax(-1), found.log_q.exp()])


@pytest.mark.parametrize(
    ("target", "vocab_size", "tolerance"),
    [
        (STUDENT_MIX, 40, 1e-5),  # the candidates are the whole vocabulary
        (ANCHORED, 40, 1e-5),
        (STUDENT_MIX, 3000, 2e-3),  # most tokens are in bins
        (ANCHORED, 3000, 2e-3),
        (Target("teacher_alone", anchor="student"), 3000, 2e-3),
        (Target("fixed", k=1.5, anchor="student"), 3000, 2e-3),
    ],
    ids=str,
)
def test_a_node_has_the_likely_tokens_of_every_model_with_their_probabilities(target, vocab_size, tolerance):
    rows = logit_rows(24, vocab_size, 3 if target.is_anchored else 2)
    expected, explored = full_rows(rows, target), explored_of(rows, target)
    nodes = nodes_of(explored, True, 7, 4)
    assert [node.position for node in nodes] == sorted({node.position for node in nodes}) and len(nodes) == 7
    for node in nodes:
        at = expected[:, node.position]
        tokens = [candidate.token for candidate in node.candidates]
        assert set(tokens) == {*itertools.chain(*(at[model].topk(4).indices.tolist() for model in range(3)))}
        found = np.array([[it.student, it.teacher, it.target] for it in node.candidates]).T
        assert found == pytest.approx(at[:, tokens].numpy(), rel=tolerance, abs=1e-7)
        assert sorted(found[0], reverse=True) == found[0].tolist(), "by the student's probability"
        kl = (at[0] * (at[0].log() - at[2].log())).sum()
        assert node.kl == pytest.approx(float(kl), rel=2e-3, abs=1e-5)


def chosen_node(position: int, *, correct: bool, chosen_by: str = "kl") -> Node:
    candidates = [CandidateToken(5, 0.5, 0.1, 0.2), CandidateToken(8, 0.25, 0.5, 0.4)]
    return Node("p", position, chosen_by, 0.5, 9, correct, candidates)


def test_groups_have_the_means_of_their_decided_nodes():
    measured = [
        chosen_node(0, correct=True, chosen_by="position").measured({8: 1.0, 5: 0.0}),
        chosen_node(2, correct=True).measured({8: 0.0, 5: 1.0}),
        chosen_node(3, correct=True).measured({8: 0.5, 5: 0.5}),
        chosen_node(8, correct=False).measured({8: 1.0, 5: 0.25}),
    ]
    assert [it.part for it in measured] == ["beginning", "beginning", "middle", "end"]
    groups = {group.name: group for group in node_groups(measured)}
    assert {name: (group.num_nodes, group.num_decided) for name, group in groups.items()} == {
        "all": (4, 3),
        "right": (3, 2),
        "wrong": (1, 1),
        "chosen by position": (1, 1),
        "chosen by kl": (3, 2),
        "beginning": (2, 2),
        "middle": (1, 0),
        "end": (1, 1),
        "right, beginning": (2, 2),
        "right, middle": (1, 0),
        "wrong, end": (1, 1),
    }
    for loss in measured[0].alignment:
        cosines = [measured[i].alignment[loss] for i in (0, 1, 3)]
        assert groups["all"].alignment[loss] == pytest.approx(sum(cosines) / 3)
        assert cosines[1] < 0 < cosines[0]


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


def completed(monkeypatch, end: int, max_length: int) -> tuple[dict[alignment_job.Key, Response], EndingSampler]:
    monkeypatch.setattr(alignment_job, "gather_items", list)
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
