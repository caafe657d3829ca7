# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A step of a model with gated delta nets is the same in every layout, and does not depend on packing."""

from __future__ import annotations

import dataclasses

import fla_stand_in
import pytest
import torch
from decoding import logits_of
from layouts import Case, Outcome, contexts, joined, run
from models import VOCAB_SIZE, build, model_config, parallel
from parity import LAYOUTS, bound, compare
from tiers import combinations

from megatron_selfdistill.architectures import gated_delta_net
from megatron_selfdistill.architectures.gated_delta_net import GatedDeltaKernels
from megatron_selfdistill.config import ParallelConfig, RecomputeConfig, ScheduleConfig
from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard
from megatron_selfdistill.model.forward import unwrapped
from megatron_selfdistill.pipeline.score import ScoringModels, candidate_log_probs, read_tokens

CANDIDATES = [0, 7, VOCAB_SIZE - 1]
NAMES = ["TP2", "TP2+SP", "PP2", "PP2xVPP2", "DP2", "TP2xPP2+SP"]
BOUND = bound("gated_delta")
LONGEST = max(len(prompt) + len(pair.response) for pair in contexts() for prompt in pair.readings)
ALONE = Case(kind="gated_delta", extra_weightless=0)


ORDERS = ["teacher_first", "alternating"]
QUICK = {"name": ["TP2+SP"], "pair_order": ["alternating"]}


@pytest.mark.full
@combinations(name=NAMES, pair_order=ORDERS, quick=QUICK, strength=1, full_strength=1)
def test_gradients_equal_those_of_one_rank(outcomes, name, pair_order, record_property):
    _, cuts, world_size = LAYOUTS[name]
    case = dataclasses.replace(ALONE, parallel=cuts, pair_order=pair_order, paired=True, extra_weightless=1)
    got, alone = outcomes(case, world_size), outcomes(ALONE)
    record_property("worst relative difference", compare(got, alone, BOUND))


@pytest.mark.full
def test_neither_padding_nor_packing_changes_a_gradient(outcomes):
    """No token sees a context before its own, nor the padding behind it."""
    changes: list[dict[str, int]] = [{"seq_quantum": 64}, {"max_tokens": LONGEST}, {"max_tokens": 300}]
    alone, *others = outcomes.of([ALONE, *(dataclasses.replace(ALONE, **change) for change in changes)])
    for got in others:
        compare(got, alone, BOUND)


def stepped_by_the_kernels(case: Case) -> Outcome:
    """Return the outcome of a step in which the stand-in of flash-linear-attention's kernels computes."""
    kernels = GatedDeltaKernels(fla_stand_in.causal_conv1d, fla_stand_in.chunk_gated_delta_rule)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gated_delta_net, "kernels_for", lambda config: kernels)
        return run(case)


@pytest.mark.parametrize("name", ["TP2+SP", pytest.param("PP2xVPP2", marks=pytest.mark.full)])
def test_the_kernels_get_the_segments_of_every_microbatch(ranks, outcomes, name):
    _, cuts, world_size = LAYOUTS[name]
    case = dataclasses.replace(ALONE, parallel=cuts)
    compare(joined(ranks.run(stepped_by_the_kernels, case, world_size=world_size)), outcomes(ALONE), BOUND)


@pytest.mark.full
def test_recomputed_layers_have_the_same_gradients(outcomes):
    schedule = ScheduleConfig(recompute=RecomputeConfig(granularity="full", method="uniform", num_layers=1))
    compare(outcomes(dataclasses.replace(ALONE, schedule=schedule)), outcomes(ALONE))


def test_every_weight_of_the_layer_has_a_gradient(outcomes):
    _, gradients, _ = outcomes(ALONE)
    names = "in_proj.weight in_proj.layer_norm_weight conv1d.weight A_log dt_bias out_norm.weight out_proj.weight"
    for name in names.split():
        for layer in (0, 2):
            assert gradients[f"decoder.layers.{layer}.self_attention.{name}"].abs().max() > 1e-6


@pytest.mark.parametrize(
    ("name", "mutation"),
    [("one rank", "the segments of a gated delta net are one"), ("TP2", "gradient of the output norm not summed")],
)
def test_the_comparison_catches(outcomes, name, mutation):
    _, cuts, world_size = LAYOUTS[name]
    case = dataclasses.replace(ALONE, parallel=cuts, mutation=mutation)
    with pytest.raises(AssertionError, match=r"differ|disagree"):
        compare(outcomes(case, world_size), outcomes(ALONE), BOUND)


def measured(cuts: ParallelConfig) -> tuple[list[float], list[float], list[list[float]]]:
    """Return the log-probs of the contexts' responses under both prompts, and those of candidates after each prompt."""
    chunks, grid = build(model_config("gated_delta"), cuts)
    vocab = VocabShard.from_group(unwrapped(chunks[-1]).vocab_size, VOCAB_SIZE, grid.tp_group)
    reading = ScoringModels(chunks, chunks, grid, vocab, max_tokens=56, fusion=None, backend=None)
    student, teacher, _ = read_tokens(contexts(), reading)
    prompts = [pair.student_prompt for pair in contexts()]
    found = candidate_log_probs(prompts, CANDIDATES, chunks, grid, vocab, max_tokens=56)
    return student.tolist(), teacher.tolist(), found.tolist()


def measured_one_by_one() -> tuple[list[float], list[float], list[list[float]]]:
    """Return the same from a pass over each text alone."""
    [model], _ = build(model_config("gated_delta"), parallel())

    def rows(prompt: list[int], response: list[int]) -> torch.Tensor:
        return logits_of(model.eval(), prompt + response).log_softmax(-1)[len(prompt) - 1 :]

    def log_probs(prompt: list[int], response: list[int]) -> list[float]:
        return rows(prompt, response)[:-1].gather(1, torch.tensor(response)[:, None])[:, 0].tolist()

    student, teacher = (
        [value for pair in contexts() for value in log_probs(getattr(pair, prompt), pair.response)]
        for prompt in ("student_prompt", "teacher_prompt")
    )
    return student, teacher, [rows(pair.student_prompt, [])[0][CANDIDATES].tolist() for pair in contexts()]


@pytest.mark.full
def test_texts_and_candidates_are_scored_as_each_text_alone_is(ranks):
    (expected,) = ranks.run(measured_one_by_one, world_size=1)
    for found in ranks.run(measured, parallel(tp=2, sp=True), world_size=2):
        for values, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.tensor(values), torch.tensor(wanted), rtol=0, atol=1e-4)
