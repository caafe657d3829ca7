# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The learnability score is what its equations say, in every layout."""

from __future__ import annotations

import dataclasses

import layouts
import models
import pytest
import torch

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompts import PromptBuilder, PromptTemplates
from megatron_selfdistill.model.build import build_chunks
from megatron_selfdistill.parallel import Grid
from megatron_selfdistill.rollout.base import Response
from megatron_selfdistill.score import Scores, candidate_contexts, score_texts, with_reference

LAYOUTS = [
    (1, {}),
    (2, {}),
    (2, {"tp": 2}),
    (2, {"pp": 2}),
    (2, {"cp": 2}),
    (4, {"tp": 2, "sp": True, "pp": 2, "vpp": 2}),
]


def scores_in_layout(cuts: dict, count: int = 7) -> tuple[list[int], list[Scores]]:
    """(indices of this replica's contexts, their scores); the teacher has other weights."""
    student, teacher, grid = student_and_teacher(cuts)
    mine = list(range(count))[grid.dp_rank :: grid.dp_size]
    pairs = [layouts.contexts()[i] for i in mine]
    vocab = layouts.vocab_shard(student, grid)
    return mine, score_texts(pairs, student=student, teacher=teacher, grid=grid, vocab=vocab, max_tokens=56)


def student_and_teacher(cuts: dict) -> tuple[list, list, Grid]:
    student, grid = models.build(models.model_config("tied"), models.parallel(**cuts))
    teacher = build_chunks(models.model_config("tied"), student[0].config, grid, models.VOCAB_SIZE)
    models.fill_from_names(teacher, seed=1)
    return student, teacher, grid


def expected_scores() -> list[tuple[float, float, float, float]]:
    """From whole rows of logits, one context at a time, in float64."""
    student, teacher, _ = student_and_teacher({})
    found = []
    for context in layouts.contexts():
        rows = []
        for chunk, prompt in ((student[0], context.student_prompt), (teacher[0], context.teacher_prompt)):
            tokens = torch.tensor([prompt + context.response])
            with torch.no_grad():
                logits = chunk(tokens, torch.arange(tokens.size(1))[None], None)[0, :, : models.VOCAB_SIZE].double()
            log_probs = logits - logits.logsumexp(-1, keepdim=True)
            places = range(len(prompt) - 1, tokens.size(1) - 1)
            rows.append([log_probs[at, tokens[0, at + 1]].item() for at in places])
        own, ratio = rows[0], [t - s for s, t in zip(*rows, strict=True)]
        found.append((sum(own) / len(own), min(own), sum(ratio) / len(ratio), max(ratio)))
    return found


@pytest.fixture(scope="module")
def expected(ranks) -> list[tuple[float, float, float, float]]:
    return ranks.run(expected_scores, world_size=1)[0]


@pytest.mark.parametrize(("world_size", "cuts"), LAYOUTS)
def test_scores_are_those_of_whole_rows_in_every_layout(ranks, expected, world_size, cuts):
    of_replica: dict[tuple[int, ...], list[Scores]] = {}
    for mine, scores in ranks.run(scores_in_layout, cuts, world_size=world_size):
        assert len(scores) == len(mine)
        assert of_replica.setdefault(tuple(mine), scores) == scores, "ranks of a replica disagree"
        for i, score in zip(mine, scores, strict=True):
            assert dataclasses.astuple(score) == pytest.approx(expected[i], abs=2e-5), f"context {i}"
    assert sorted(i for mine in of_replica for i in mine) == list(range(7))


def test_a_replica_without_texts_waits_for_the_others_and_nobody_is_no_error(ranks, expected):
    (_, first), (_, none) = ranks.run(scores_in_layout, {}, 1, world_size=2)
    assert none == [] and dataclasses.astuple(first[0]) == pytest.approx(expected[0], abs=2e-5)
    assert [scores for _, scores in ranks.run(scores_in_layout, {}, 0, world_size=2)] == [[], []]


def test_learnability_is_the_difference_of_both_terms():
    scores = Scores(mean_log_prob=-0.5, min_log_prob=-4.0, mean_log_ratio=0.25, max_log_ratio=3.0)
    assert scores.learnability(0.01) == pytest.approx((-0.5 - 0.04) - (0.25 + 0.03))
    assert scores.learnability(0.0) == pytest.approx(-0.75)
    assert scores.learnability(0.01, ratio_weight=3.0) == pytest.approx((-0.5 - 0.04) - 3 * (0.25 + 0.03))


class Letters:
    """One token per character; the generation prompt is a colon."""

    name, vocab_size, eos_id = "letters", 128, 36

    def encode(self, text):
        return [ord(character) for character in text]

    def decode(self, ids, *, skip_special_tokens=False):
        return "".join(map(chr, ids))

    def render_chat(self, messages, *, add_generation_prompt=True, **kwargs):
        return "".join(message["content"] for message in messages) + ":" * add_generation_prompt


def contexts_of(problem: Problem, max_length: int = 100, policy: str = "error"):
    builder = PromptBuilder(Letters(), PromptTemplates(teacher="{problem}|{solution}"))
    response = Response([55, 36], [0.0, 0.0], [0.0, 0.0], "stop")
    sizes = {"max_length": max_length, "max_new_tokens": 4, "policy": policy}
    return candidate_contexts(builder, [(problem, response)], **sizes)


def problem(solution: str, answer: str | None) -> Problem:
    return Problem("p", ({"role": "user", "content": "3+4"},), solution, answer, "file.jsonl:7")


@pytest.mark.parametrize(("solution", "shown"), [("it is 7", "it is 7"), ("", "7")])
def test_the_scoring_teacher_is_shown_the_solution_or_else_the_answer(solution, shown):
    (pair,) = contexts_of(problem(solution, "7"))
    assert "".join(map(chr, pair.student_prompt)) == "3+4:"
    assert "".join(map(chr, pair.teacher_prompt)) == f"3+4|{shown}:"
    assert pair.response == [55, 36]


def test_what_cannot_be_scored_is_said_in_a_sentence():
    with pytest.raises(ValueError, match=r"^file.jsonl:7: expected a solution or an answer"):
        with_reference(problem("", None))
    with pytest.raises(ValueError, match=r"^file.jsonl:7: expected a teacher's prompt of at most 6 tokens"):
        contexts_of(problem("it is 7", None), max_length=10)
    with pytest.raises(ValueError, match=r"^file.jsonl:7: expected prompts of at most 6 tokens"):
        contexts_of(problem("it is 7", None), max_length=10, policy="drop")
    context = dataclasses.replace(layouts.contexts()[0], response=[])
    with pytest.raises(ValueError, match=r"^Problem p0: expected a text of at least one token"):
        score_texts([context], student=[], teacher=[], grid=None, vocab=None, max_tokens=56)
