# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The learnability score is what its equations say, in every layout."""

from __future__ import annotations

import dataclasses
from typing import Any

import layouts
import models
import pytest
import torch
from bytes_alive import BytesAlive

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompts import PromptBuilder, PromptTemplates
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.model.build import build_chunks
from megatron_selfdistill.model.output_layer import MATERIALISED, Fusion, OutputLayer
from megatron_selfdistill.pipeline.score import Scores, ScoringModels, candidate_contexts, score_texts, with_reference
from megatron_selfdistill.rollout.base import Response

LAYOUTS = [
    (1, {}),
    (2, {}),
    (2, {"tp": 2}),
    (2, {"tp": 2, "sp": True}),
    (2, {"pp": 2}),
    (2, {"cp": 2}),
    (4, {"tp": 2, "sp": True, "pp": 2, "vpp": 2}),
]


FUSIONS = [None, *(Fusion("low_memory", tokens) for tokens in (1, 5, 1000)), Fusion("keep_gradient", 7)]
"""None first.  A microbatch has some 40 response tokens."""


def scores_in_layout(cuts: dict, count: int = 7) -> tuple[list[int], list[list[Scores]]]:
    """Return the indices of this replica's contexts and their scores by each of `FUSIONS`.

    The teacher has other weights than the student.
    """
    student, teacher, grid = student_and_teacher(cuts)
    mine = list(range(count))[grid.dp_rank :: grid.dp_size]
    return mine, [scored(mine, student, teacher, grid, fusion) for fusion in FUSIONS]


def scored(
    indices: list[int], student: list, teacher: list, grid: RankGrid, fusion: Fusion | None, max_tokens: int = 56
) -> list[Scores]:
    models = ScoringModels(
        student=student,
        teacher=teacher,
        grid=grid,
        vocab=layouts.vocab_shard(student, grid),
        max_tokens=max_tokens,
        fusion=fusion,
        backend=None,
    )
    return score_texts([layouts.contexts()[i] for i in indices], models)


def student_and_teacher(cuts: dict, **changes: Any) -> tuple[list, list, RankGrid]:
    model = models.model_config("tied", **changes)
    student, grid = models.build(model, models.parallel(**cuts))
    teacher = build_chunks(model, student[0].config, grid, models.VOCAB_SIZE)
    models.fill_from_names(teacher, seed=1)
    return student, teacher, grid


def expected_scores() -> list[tuple[float, float, float, float]]:
    """Return the scores from complete rows of logits, one context at a time, in float64."""
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
def test_scores_are_those_of_whole_rows_in_every_layout_fused_or_not(ranks, expected, world_size, cuts):
    of_replica: dict[tuple[int, ...], list[list[Scores]]] = {}
    for mine, by_fusion in ranks.run(scores_in_layout, cuts, world_size=world_size):
        assert of_replica.setdefault(tuple(mine), by_fusion) == by_fusion, "ranks of a replica disagree"
        materialised = by_fusion[0]
        for fusion, scores in zip(FUSIONS, by_fusion, strict=True):
            for i, score, plain in zip(mine, scores, materialised, strict=True):
                got = dataclasses.astuple(score)
                assert got == pytest.approx(expected[i], abs=2e-5), f"context {i}, {fusion}"
                assert got == pytest.approx(dataclasses.astuple(plain), abs=1e-6), f"context {i}, {fusion}"
    assert sorted(i for mine in of_replica for i in mine) == list(range(7))


def scores_of_one_model(cuts: dict) -> tuple[list[list[Scores]], list[Scores]]:
    """Return the scores by each of `FUSIONS` with the student as teacher, and with a teacher of other chunks."""
    student, teacher, grid = student_and_teacher(cuts)
    models.fill_from_names(teacher, seed=0)
    everything = list(range(7))
    own = [scored(everything, student, student, grid, fusion) for fusion in FUSIONS]
    return own, scored(everything, student, teacher, grid, None)


@pytest.mark.parametrize(("world_size", "cuts"), [(1, {}), (2, {"tp": 2, "sp": True}), (2, {"pp": 2})])
def test_a_model_that_is_its_own_teacher_scores_as_a_copy_of_it_would(ranks, world_size, cuts):
    for own, by_copy in ranks.run(scores_of_one_model, cuts, world_size=world_size):
        for fusion, scores in zip(FUSIONS, own, strict=True):
            for score, copy in zip(scores, by_copy, strict=True):
                got, wanted = dataclasses.astuple(score), dataclasses.astuple(copy)
                assert got == pytest.approx(wanted, abs=3e-6), str(fusion)  # a few float32 digits of 7 nats


COLUMNS, CHUNK = 8192, 3  # of the columns 61 are no padding: the logits are large, and the passes' temporaries small


def bytes_while_scoring(cuts: dict, fusion: Fusion | None) -> tuple[int, float, float]:
    """On this rank, besides weights: the most bytes alive; what a run says of its logits; one tensor of all logits."""
    student, teacher, grid = student_and_teacher(cuts, make_vocab_size_divisible_by=COLUMNS // cuts.get("tp", 1))
    known = [tensor for chunk in (*student, *teacher) for tensor in (*chunk.parameters(), *chunk.buffers())]
    with BytesAlive(known) as alive:
        scored(list(range(7)), student, teacher, grid, fusion, max_tokens=300)
    tokens = sum(len(context.response) for context in layouts.contexts())  # all in one microbatch
    token_bytes = 4 * COLUMNS // grid.tp_size
    mode = MATERIALISED if fusion is None else fusion.mode
    return alive.peak, OutputLayer(mode, CHUNK, 2, token_bytes, tokens).largest, tokens * token_bytes


@pytest.mark.parametrize(
    ("world_size", "cuts"),
    [(1, {}), *(pytest.param(2, cuts, marks=pytest.mark.full) for cuts in ({"tp": 2}, {"tp": 2, "sp": True}))],
)
def test_logits_take_what_the_run_says_and_all_of_them_never_exist_where_the_layer_is_fused(ranks, world_size, cuts):
    """Both modes are the same here: there is no gradient to keep."""
    by_fusion = [
        ranks.run(bytes_while_scoring, cuts, fusion, world_size=world_size)
        for fusion in (None, Fusion("low_memory", CHUNK), Fusion("keep_gradient", CHUNK))
    ]
    for (whole, of_all, one), low_memory, keep_gradient in zip(*by_fusion, strict=True):
        rest = one / 4  # activations
        assert of_all < whole < of_all + rest, "the materialised path"
        _, two_chunks, _ = low_memory
        for peak, announced, _ in (low_memory, keep_gradient):
            assert two_chunks < peak < two_chunks + rest and two_chunks <= announced


def test_a_replica_without_texts_waits_for_the_others_and_nobody_is_no_error(ranks, expected):
    (_, first), (_, none) = ranks.run(scores_in_layout, {}, 1, world_size=2)
    assert none == [[]] * len(FUSIONS)
    for scores in first:
        assert dataclasses.astuple(scores[0]) == pytest.approx(expected[0], abs=2e-5)
    for _, scores in ranks.run(scores_in_layout, {}, 0, world_size=2):
        assert scores == [[]] * len(FUSIONS)


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

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

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
        score_texts([context], ScoringModels([], [], grid=None, vocab=None, max_tokens=56, fusion=None, backend=None))
