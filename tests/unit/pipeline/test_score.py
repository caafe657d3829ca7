# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The measured log-probs, those of candidates and the learnability are what their equations say, in every layout."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import layouts
import models
import pytest
import torch
from bytes_alive import BytesAlive
from characters import Characters
from tiers import combinations

from megatron_selfdistill.config import load
from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompt_templates import PromptTemplates
from megatron_selfdistill.data.prompts import PromptBuilder
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard
from megatron_selfdistill.methods.parts.learnability import (
    Scores,
    _scores,
    candidate_contexts,
    score_texts,
    with_reference,
)
from megatron_selfdistill.model.build import build_chunks
from megatron_selfdistill.model.forward import Fusion
from megatron_selfdistill.model.output_layer import MATERIALISED, OutputLayer
from megatron_selfdistill.pipeline.score import (
    ScoringModels,
    _reading_loss,
    candidate_log_probs,
    log_probs_of_columns,
    read_tokens,
)
from megatron_selfdistill.rollout.base import Response

LAYOUTS = {
    "one rank": (1, {}),
    "DP2": (2, {}),
    "TP2+SP": (2, {"tp": 2, "sp": True}),
    "CP2": (2, {"cp": 2}),
    "PP2": (2, {"pp": 2}),
    "PP2xVPP2": (2, {"pp": 2, "vpp": 2}),
    "TP2xPP2xVPP2+SP": (4, {"tp": 2, "sp": True, "pp": 2, "vpp": 2}),
}

CHUNKS = [Fusion("low_memory", tokens) for tokens in (1, 1000)]
FUSIONS = [None, Fusion("low_memory", 5), Fusion("keep_gradient", 7)]
"""None first.  A microbatch has some 40 response tokens."""


@dataclass(frozen=True)
class Scored:
    """The scores of a replica's contexts by each of the fusions, None first."""

    contexts: list[int]
    by_other: list[list[Scores]]
    """The teacher has other weights than the student."""
    by_itself: list[list[Scores]]
    """The student is its own teacher."""
    by_copy: list[Scores]
    """The teacher is a copy of the student."""
    log_probs: list[list[list[float]]]
    """The log-probs of all response tokens under student and teacher, by each of the fusions."""


def scores_in_layout(cuts: dict, fusions: list[Fusion | None], count: int = 7) -> Scored:
    student, teacher, grid = student_and_teacher(cuts, num_layers_of(cuts))
    mine = list(range(count))[grid.dp_rank :: grid.dp_size]
    by_other = [scored(mine, student, teacher, grid, fusion) for fusion in fusions]
    by_itself = [scored(mine, student, student, grid, fusion) for fusion in fusions]
    measured = [read_tokens(measured_contexts(mine), scoring(student, teacher, grid, fusion))[:2] for fusion in fusions]
    assert all(values.dtype == torch.float64 for both in measured for values in both)
    models.fill_from_names(teacher, seed=0)
    by_copy = scored(mine, student, teacher, grid, None)
    return Scored(mine, by_other, by_itself, by_copy, [[values.tolist() for values in both] for both in measured])


def measured_contexts(indices: list[int]) -> list[ContextPair]:
    """Return these contexts, with a response without tokens after each."""
    contexts = [layouts.contexts()[i] for i in indices]
    return [pair for context in contexts for pair in (context, dataclasses.replace(context, response=[]))]


def scored(
    indices: list[int], student: list, teacher: list, grid: RankGrid, fusion: Fusion | None, max_tokens: int = 56
) -> list[Scores]:
    contexts = [layouts.contexts()[i] for i in indices]
    return score_texts(contexts, partial(read_tokens, models=scoring(student, teacher, grid, fusion, max_tokens)))


def scoring(student: list, teacher: list, grid: RankGrid, fusion: Fusion | None, max_tokens: int = 56) -> ScoringModels:
    return ScoringModels(
        student=student,
        teacher=teacher,
        grid=grid,
        vocab=layouts.vocab_shard(student, grid),
        max_tokens=max_tokens,
        fusion=fusion,
        backend=None,
    )


def num_layers_of(cuts: dict) -> int:
    return 4 if "vpp" in cuts else 2


def student_and_teacher(cuts: dict, num_layers: int, **changes: Any) -> tuple[list, list, RankGrid]:
    model = models.model_config("tied", num_layers=num_layers, **changes)
    student, grid = models.build(model, models.parallel(**cuts))
    teacher = build_chunks(model, student[0].config, grid, models.VOCAB_SIZE)
    models.fill_from_names(teacher, seed=1)
    return student, teacher, grid


def expected_rows(num_layers: int, temperature: float = 1.0) -> list[tuple[list[float], ...]]:
    """Return the log-probs of both models and their divergences in float64, with one context at a time."""
    student, teacher, _ = student_and_teacher({}, num_layers)
    found = []
    for context in layouts.contexts():
        both = []
        for chunk, prompt in ((student[0], context.student_prompt), (teacher[0], context.teacher_prompt)):
            tokens = torch.tensor([prompt + context.response])
            with torch.no_grad():
                logits = chunk(tokens, torch.arange(tokens.size(1))[None], None)[0, :, : models.VOCAB_SIZE].double()
            logits = logits[len(prompt) - 1 : -1] / temperature
            both.append(logits - logits.logsumexp(-1, keepdim=True))
        p, q = both
        read = [rows.gather(1, torch.tensor(context.response)[:, None])[:, 0].tolist() for rows in both]
        found.append((*read, (p.exp() * (p - q)).sum(-1).tolist()))
    return found


def scores_of_rows(
    own: list[float], of_teacher: list[float], divergences: list[float]
) -> tuple[float, float, float, float]:
    return sum(own) / len(own), min(own), sum(divergences) / len(divergences), max(divergences)


@pytest.fixture(scope="module")
def rows(ranks) -> Callable[[int], list[tuple[list[float], ...]]]:
    """Return a function from the number of layers to the log-probs of student and teacher, and their divergences."""
    return functools.cache(lambda num_layers: ranks.run(expected_rows, num_layers, world_size=1)[0])


@combinations(name=list(LAYOUTS), quick={"name": ["TP2+SP"]}, strength=1)
def test_scores_and_log_probs_are_those_of_whole_rows_in_every_layout(ranks, rows, name):
    """A model that is its own teacher scores as a copy of the model would."""
    world_size, cuts = LAYOUTS[name]
    fusions = FUSIONS + (CHUNKS if name == "one rank" else [])
    of_replica: dict[tuple[int, ...], Scored] = {}
    for found in ranks.run(scores_in_layout, cuts, fusions, world_size=world_size):
        assert of_replica.setdefault(tuple(found.contexts), found) == found, "ranks of a replica disagree"
        materialised = found.by_other[0]
        whole_rows = rows(num_layers_of(cuts))
        wanted = [scores_of_rows(*whole_rows[i]) for i in found.contexts]
        for fusion, by_other, by_itself in zip(fusions, found.by_other, found.by_itself, strict=True):
            assert_near(by_other, wanted, 2e-5, f"of whole rows, {fusion}")
            # A few float32 digits of 7 nats.
            assert_near(by_other, astuples(materialised), 3e-6, f"as without fusion, {fusion}")
            assert_near(by_itself, astuples(found.by_copy), 3e-6, f"by a model that is its own teacher, {fusion}")
        of_contexts = [whole_rows[i][:2] for i in found.contexts]
        for both in found.log_probs:
            for values, of_model in zip(both, zip(*of_contexts, strict=True), strict=True):
                assert values == pytest.approx([value for row in of_model for value in row], abs=2e-5)
    assert sorted(i for mine in of_replica for i in mine) == list(range(7))


def astuples(scores: list[Scores]) -> list[tuple[float, ...]]:
    return [dataclasses.astuple(score) for score in scores]


def assert_near(got: list[Scores], wanted: list[tuple[float, ...]], tolerance: float, what: str) -> None:
    for score, values in zip(got, wanted, strict=True):
        assert dataclasses.astuple(score) == pytest.approx(values, abs=tolerance), what


COLUMNS, CHUNK = 8192, 3  # of the columns 61 are no padding: the logits are large, and the passes' temporaries small
MEMORY_FUSIONS = [None, Fusion("low_memory", CHUNK), Fusion("keep_gradient", CHUNK)]


def bytes_while_scoring(cuts: dict) -> list[tuple[int, float, float]]:
    """Return the most bytes alive beside weights, those that a run announces, and those of all logits."""
    changes = {"make_vocab_size_divisible_by": COLUMNS // cuts.get("tp", 1)}
    student, teacher, grid = student_and_teacher(cuts, num_layers=1, **changes)
    known = [tensor for chunk in (*student, *teacher) for tensor in (*chunk.parameters(), *chunk.buffers())]
    tokens = sum(len(context.response) for context in layouts.contexts())  # all in one microbatch
    token_bytes = 4 * COLUMNS // grid.tp_size
    found = []
    for fusion in MEMORY_FUSIONS:
        with BytesAlive(known) as alive:
            scored(list(range(7)), student, teacher, grid, fusion, max_tokens=300)
        mode = MATERIALISED if fusion is None else fusion.mode
        found.append((alive.peak, OutputLayer(mode, CHUNK, 2, token_bytes, tokens).largest, tokens * token_bytes))
    return found


@pytest.mark.parametrize(
    ("world_size", "cuts"),
    [(1, {}), *(pytest.param(2, cuts, marks=pytest.mark.full) for cuts in ({"tp": 2}, {"tp": 2, "sp": True}))],
)
def test_logits_take_what_the_run_says_and_all_of_them_never_exist_where_the_layer_is_fused(ranks, world_size, cuts):
    """Both modes are the same here: there is no gradient to keep."""
    for of_rank in ranks.run(bytes_while_scoring, cuts, world_size=world_size):
        (whole, of_all, one), low_memory, keep_gradient = of_rank
        rest = one / 4  # activations
        assert of_all < whole < of_all + rest, "the materialised path"
        _, two_chunks, _ = low_memory
        for peak, announced, _ in (low_memory, keep_gradient):
            assert two_chunks < peak < two_chunks + rest and two_chunks <= announced


def scores_of_few(counts: list[int]) -> tuple[list[list[Scores]], list[list[list[float]]]]:
    """Return scores and log-probs of this replica's contexts of the first ``count``, for each count."""
    student, teacher, grid = student_and_teacher({}, num_layers=2)
    few = [list(range(count))[grid.dp_rank :: 2] for count in counts]
    by_tokens = [read_tokens(measured_contexts(mine), scoring(student, teacher, grid, None))[:2] for mine in few]
    nothing = [dataclasses.replace(layouts.contexts()[0], response=[])]
    by_tokens.append(read_tokens(nothing, scoring(student, teacher, grid, None))[:2])
    scores = [scored(mine, student, teacher, grid, None) for mine in few]
    return scores, [[values.tolist() for values in both] for both in by_tokens]


def test_a_replica_without_texts_waits_for_the_others_and_no_text_at_all_is_no_error(ranks, rows):
    (first, of_first), (second, of_second) = ranks.run(scores_of_few, [1, 0], world_size=2)
    assert_near(first[0], [scores_of_rows(*rows(2)[0])], 2e-5, "of the only text")
    assert second[0] == first[1] == second[1] == []
    for values, wanted in zip(of_first[0], rows(2)[0][:2], strict=True):
        assert values == pytest.approx(wanted, abs=2e-5)
    assert of_second == [[[], []]] * 3 and of_first[1:] == [[[], []]] * 2


def log_probs_at(temperature: float) -> list[list[list[float]]]:
    """Return the log-probs of both models at a temperature, without fusion and fused, and last those at 1."""
    student, teacher, grid = student_and_teacher({}, num_layers=2)
    contexts = layouts.contexts()
    found = [read_tokens(contexts, scoring(student, teacher, grid, f), temperature)[:2] for f in FUSIONS[:2]]
    found.append(read_tokens(contexts, scoring(student, teacher, grid, None))[:2])
    return [[values.tolist() for values in both] for both in found]


def test_log_probs_at_a_temperature_are_those_of_divided_logits(ranks, rows):
    """A pass at another temperature leaves the next pass as it was."""
    [*found, at_one] = ranks.run(log_probs_at, 0.7, world_size=1)[0]
    divided = ranks.run(expected_rows, 2, 0.7, world_size=1)[0]
    for both, wanted in ((found[0], divided), (found[1], divided), (at_one, rows(2))):
        for values, of_model in zip(both, list(zip(*wanted, strict=True))[:2], strict=True):
            assert values == pytest.approx([value for row in of_model for value in row], abs=3e-5)


def test_learnability_is_the_difference_of_both_terms():
    scores = Scores(mean_log_prob=-0.5, min_log_prob=-4.0, mean_kl=0.25, max_kl=3.0)
    assert scores.learnability(0.01, ratio_weight=1.0) == pytest.approx((-0.5 - 0.04) - (0.25 + 0.03))
    assert scores.learnability(0.0, ratio_weight=1.0) == pytest.approx(-0.75)
    assert scores.learnability(0.01, ratio_weight=3.0) == pytest.approx((-0.5 - 0.04) - 3 * (0.25 + 0.03))
    assert scores.learnability(0.01, ratio_weight=0.0) == pytest.approx(-0.5 - 0.04)


def contexts_of(problem: Problem, max_length: int = 100, policy: str = "error"):
    builder = PromptBuilder(Characters(), PromptTemplates(teacher="{problem}|{solution}"))
    response = Response([55, 36], [0.0, 0.0], [0.0, 0.0], "stop")
    run_data: Any = SimpleNamespace(builder=builder, max_length=max_length)
    config = load(["rollout.max_new_tokens=4", f"data.on_long_context={policy}"])
    return candidate_contexts([(problem, response)], config, run_data)


def problem(solution: str, answer: str | None) -> Problem:
    return Problem("p", ({"role": "user", "content": "3+4"},), solution, answer, "file.jsonl:7")


@pytest.mark.parametrize(("solution", "shown"), [("it is 7", "it is 7"), ("", "7")])
def test_the_scoring_teacher_is_shown_the_solution_or_else_the_answer(solution, shown):
    (pair,) = contexts_of(problem(solution, "7"))
    assert "".join(map(chr, pair.student_prompt)) == "3+4:"
    assert "".join(map(chr, pair.teacher_prompt)) == f"3+4|{shown}:"
    assert pair.response == [55, 36]


@pytest.mark.parametrize(
    ("solution", "answer", "options", "words"),
    [
        ("", None, {}, "a solution or an answer"),
        ("it is 7", None, {"max_length": 10}, "a teacher's prompt of at most 6 tokens"),
        ("it is 7", None, {"max_length": 10, "policy": "drop"}, "prompts of at most 6 tokens"),
    ],
)
def test_what_cannot_be_scored_is_refused(solution, answer, options, words):
    with pytest.raises(ValueError, match=rf"^file.jsonl:7: expected {words}"):
        (contexts_of if options else with_reference)(problem(solution, answer), **options)


# Candidates after a prompt.

CANDIDATES = [0, 3, models.VOCAB_SIZE - 1, 7, 1]


def prompts() -> list[list[int]]:
    return [[5], *(context.student_prompt for context in layouts.contexts()[:4])]


def candidates_in_layout(cuts: dict) -> tuple[list[int], list[list[float]]]:
    chunks, grid = models.build(models.model_config("tied", num_layers=num_layers_of(cuts)), models.parallel(**cuts))
    mine = list(range(len(prompts())))[grid.dp_rank :: grid.dp_size][: 2 if grid.dp_rank else None]
    vocab = layouts.vocab_shard(chunks, grid)
    values = candidate_log_probs([prompts()[i] for i in mine], CANDIDATES, chunks, grid, vocab, max_tokens=56)
    assert values.dtype == torch.float64 and values.shape == (len(mine), len(CANDIDATES))
    assert candidate_log_probs([], CANDIDATES, chunks, grid, vocab, max_tokens=56).shape == (0, len(CANDIDATES))
    return mine, values.tolist()


def candidates_of_whole_rows(num_layers: int) -> list[list[float]]:
    """Return the candidates' log-probs from complete rows of logits in float64; one prompt runs at a time."""
    (chunk,), _ = models.build(models.model_config("tied", num_layers=num_layers), models.parallel())
    found = []
    for prompt in prompts():
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            logits = chunk(tokens, torch.arange(len(prompt))[None], None)[0, -1, : models.VOCAB_SIZE].double()
        found.append(logits.log_softmax(-1)[CANDIDATES].tolist())
    return found


@combinations(name=list(LAYOUTS), quick={"name": ["DP2", "TP2+SP", "CP2"]}, strength=1)
def test_candidates_have_the_log_probs_of_whole_rows_in_every_layout(ranks, name):
    world_size, cuts = LAYOUTS[name]
    [expected] = ranks.run(candidates_of_whole_rows, num_layers_of(cuts), world_size=1)
    of_replica: dict[tuple[int, ...], list[list[float]]] = {}
    for mine, values in ranks.run(candidates_in_layout, cuts, world_size=world_size):
        assert of_replica.setdefault(tuple(mine), values) == values, "ranks of a replica disagree"
        for i, row in zip(mine, values, strict=True):
            assert row == pytest.approx(expected[i], abs=2e-5)


def test_extreme_logits_and_padding_columns_do_not_spoil_the_log_probs():
    logits = torch.tensor([[400.0, -400.0, 0.0, 9e9], [-3e4, -3e4, -3e4, 9e9]])
    found = log_probs_of_columns(logits, torch.tensor([2, 0]), VocabShard(0, 4, 3))
    reference = logits[:, :3].double().log_softmax(-1)[:, [2, 0]]
    assert torch.equal(found, reference) and found[1, 0].item() == pytest.approx(-torch.tensor(3.0).log().item())


def test_a_token_that_is_no_column_is_refused():
    with pytest.raises(ValueError, match=r"expected tokens of a vocabulary of 3, got \[3\]"):
        candidate_log_probs([[1]], [3], [], None, VocabShard(0, 4, 3), max_tokens=8)


STUDENT, TEACHER = torch.tensor([[1.2, 0.3, -0.5, 0.0], [0.2, 1.5, -1.0, 0.4]], dtype=torch.float64)


def score_against(teacher: torch.Tensor) -> tuple[float, float]:
    """Return the divergence and the expected learnability of one token that the student samples from `STUDENT`."""
    tokens, count = torch.arange(4), 4
    stats = _reading_loss(None, "torch", 1.0)(
        STUDENT.repeat(count, 1), teacher.repeat(count, 1), tokens, VocabShard(0, 4, 4)
    )
    scores = [_scores(stats.student_log_prob[i : i + 1], stats.reverse_kl[i : i + 1]) for i in range(count)]
    learnability = [score.learnability(alpha=0.01, ratio_weight=3.0) for score in scores]
    expected = (STUDENT.softmax(0) * torch.tensor(learnability, dtype=torch.float64)).sum().item()
    return scores[0].mean_kl, expected


def test_the_score_of_sampled_tokens_falls_as_the_hinted_teacher_moves_away():
    """The sampled log-ratio, whose mean is the negative divergence here, would raise the score instead."""
    p, t = STUDENT.log_softmax(0), TEACHER.log_softmax(0)
    wanted = (p.exp() * (p - t)).sum().item()
    assert wanted == pytest.approx(0.442, abs=5e-4)
    assert score_against(TEACHER)[0] == pytest.approx(wanted, rel=1e-12)
    assert (t.exp() * (t - p)).sum().item() == pytest.approx(0.418, abs=5e-4)
    path = [STUDENT + share * (TEACHER - STUDENT) for share in (0.0, 0.25, 0.5, 1.0, 2.0)]
    divergences, scores = zip(*map(score_against, path), strict=True)
    assert divergences[0] == pytest.approx(0, abs=1e-12) and list(divergences) == sorted(divergences)
    assert list(scores) == sorted(scores, reverse=True) and len(set(scores)) == len(path)
    by_log_ratio = [-3 * (p.exp() * (logits.log_softmax(0) - p)).sum().item() for logits in path]
    assert by_log_ratio == sorted(by_log_ratio)
