# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Drawing one guided token: the distribution is the loss's own target, by tests that would notice another weight."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_selfdistill.config import Config, RolloutConfig, TargetConfig
from megatron_selfdistill.guidance import guided_tokens
from megatron_selfdistill.guidance.guided_tokens import MixedTokens, select_mixed_tokens
from megatron_selfdistill.loss import Divergence, Target, VocabShard, distillation_loss, mixed_target, solve_target
from megatron_selfdistill.rollout.base import SamplingParams
from megatron_selfdistill.rollout.sampling import select_tokens
from megatron_selfdistill.sources.configured_source import step_sampling

TARGETS = {
    "entropy matched": Target(anchor="student"),
    "no bound": Target(k_max=None, anchor="student"),
    "w = 2": Target(teacher_weight=2.0, anchor="student"),
    "w = 0": Target(teacher_weight=0.0, anchor="student"),
    "fixed": Target(rule="fixed", k=1.3, anchor="student"),
    "batch": Target(rule="batch", k=1.6, anchor="student"),
    "teacher alone": Target(rule="teacher_alone", anchor="student"),
}


def random_logits(rows: int, columns: int, seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(rows, columns, generator=generator) for _ in range(2))
    return student, teacher, torch.rand(rows, generator=generator, dtype=torch.float64)


def draw_by_bisection(student: Tensor, teacher: Tensor, uniforms: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """Return tokens and log q, in float64, by the definition in `loss.target`.

    Where the uniform is within 1e-5 of a boundary the token is -1.
    """
    log_q = mixed_target(student.double(), teacher.double(), target).log_q
    cdf = log_q.exp().cumsum(-1)
    tokens = (cdf <= uniforms[:, None]).sum(-1)
    unsure = (cdf - uniforms[:, None]).abs().amin(-1) < 1e-5
    return tokens.masked_fill(unsure, -1), log_q


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_token_is_drawn_where_the_targets_cdf_passes_the_uniform(name: str, dtype: torch.dtype) -> None:
    target = TARGETS[name]
    student, teacher, uniforms = random_logits(500, 37)
    student, teacher = student.to(dtype), teacher.to(dtype)
    drawn = select_mixed_tokens(student, teacher, uniforms, target, greedy=False)
    tokens, log_q = draw_by_bisection(student, teacher, uniforms, target)
    sure = tokens >= 0
    assert sure.sum() > 480
    assert torch.equal(drawn.token_ids[sure], tokens[sure])
    for mine, expected in (
        (drawn.mixed_log_probs, log_q),
        (drawn.student_log_probs, student.double().log_softmax(-1)),
        (drawn.teacher_log_probs, teacher.double().log_softmax(-1)),
    ):
        assert mine.dtype == torch.float64
        torch.testing.assert_close(mine, expected.gather(1, drawn.token_ids[:, None])[:, 0], rtol=0, atol=2e-5)


def test_equal_logits_behind_both_prompts_draw_what_plain_sampling_draws() -> None:
    student, _, uniforms = random_logits(2000, 101)
    for name in ("entropy matched", "no bound", "w = 2", "w = 0", "teacher alone"):
        drawn = select_mixed_tokens(student, student, uniforms, TARGETS[name], greedy=False)
        tokens, log_probs, sampled_log_probs = select_tokens(student.double(), uniforms, SamplingParams(1))
        assert torch.equal(drawn.token_ids, tokens)
        torch.testing.assert_close(drawn.student_log_probs, log_probs, rtol=0, atol=1e-12)
        torch.testing.assert_close(drawn.mixed_log_probs, sampled_log_probs, rtol=0, atol=2e-6)


def test_greedy_is_the_argmax_of_the_mixed_logits_and_the_lowest_id_among_equals() -> None:
    student, teacher, uniforms = random_logits(300, 50)
    drawn = select_mixed_tokens(student, teacher, uniforms, Target(anchor="student"), greedy=True)
    assert torch.equal(drawn.token_ids, (0.75 * teacher.double() + student.double()).argmax(-1))
    assert not drawn.mixed_log_probs.any()
    alone = select_mixed_tokens(student, teacher, uniforms, Target(rule="teacher_alone", anchor="student"), greedy=True)
    assert torch.equal(alone.token_ids, teacher.argmax(-1))
    tied = torch.tensor([[0.0, 4.0, 1.0, 4.0]])
    assert select_mixed_tokens(tied, tied, uniforms[:1], Target(anchor="student"), greedy=True).token_ids.tolist() == [
        1
    ]


def test_a_column_that_does_not_exist_is_never_drawn() -> None:
    student, teacher, _ = random_logits(400, 9)
    student[:, [0, 4, 8]] = teacher[:, [0, 4, 8]] = -torch.inf
    for uniform in (0.0, 0.5, 1 - 2**-53):
        uniforms = torch.full((400,), uniform, dtype=torch.float64)
        drawn = select_mixed_tokens(student, teacher, uniforms, Target(anchor="student"), greedy=False)
        assert not torch.isin(drawn.token_ids, torch.tensor([0, 4, 8])).any()
        assert torch.isfinite(drawn.mixed_log_probs).all()


@pytest.mark.parametrize("anchored", [False, True])
def test_ids_beyond_the_tokenizer_have_no_part_of_the_target(anchored: bool) -> None:
    student, teacher, uniforms = random_logits(400, 12)
    target = Target() if anchored else Target(anchor="student")
    models = {"reference_logits": student.roll(1, 0)} if anchored else {}
    whole = select_mixed_tokens(student, teacher, uniforms, target, greedy=False, **models)
    drawn = select_mixed_tokens(student, teacher, uniforms, target, greedy=False, num_ids=7, **models)
    assert (whole.token_ids >= 7).any() and (drawn.token_ids < 7).all()
    again = whole.token_ids == drawn.token_ids
    assert (drawn.mixed_log_probs[again] > whole.mixed_log_probs[again]).all(), "what remains is renormalised"
    assert torch.allclose(
        drawn.student_log_probs, student.double().log_softmax(-1).gather(1, drawn.token_ids[:, None])[:, 0]
    )
    greedy = select_mixed_tokens(student, teacher, uniforms, target, greedy=True, num_ids=7, **models)
    mix = 0.75 * teacher.double() + models.get("reference_logits", student).double()
    assert torch.equal(greedy.token_ids, mix[:, :7].argmax(-1))


def test_a_row_with_nan_corrupts_itself_only() -> None:
    student, teacher, uniforms = random_logits(6, 20)
    whole = select_mixed_tokens(student, teacher, uniforms, Target(anchor="student"), greedy=False)
    student[2, 3], teacher[4, 0] = torch.nan, torch.nan
    drawn = select_mixed_tokens(student, teacher, uniforms, Target(anchor="student"), greedy=False)
    others = torch.tensor([0, 1, 3, 5])
    for field in dataclasses.fields(MixedTokens):
        assert torch.equal(getattr(drawn, field.name)[others], getattr(whole, field.name)[others])
    assert drawn.mixed_log_probs[[2, 4]].isnan().all()
    assert (drawn.token_ids < 20).all()


@pytest.mark.parametrize("greedy", [True, False])
def test_rows_are_drawn_alike_in_any_grouping(monkeypatch: pytest.MonkeyPatch, greedy: bool) -> None:
    student, teacher, uniforms = random_logits(23, 40)
    whole = select_mixed_tokens(student, teacher, uniforms, Target(anchor="student"), greedy=greedy)
    monkeypatch.setattr(guided_tokens, "_MAX_MIXED_LOGITS", {"cpu": 7 * 40, "other": 7 * 40})
    split = select_mixed_tokens(student, teacher, uniforms, Target(anchor="student"), greedy=greedy)
    for field in dataclasses.fields(MixedTokens):
        assert torch.equal(getattr(whole, field.name), getattr(split, field.name))
    none = select_mixed_tokens(student[:0], teacher[:0], uniforms[:0], Target(anchor="student"), greedy=greedy)
    assert none.token_ids.numel() == 0


@pytest.mark.parametrize("name", TARGETS)
def test_the_target_is_solved_as_the_loss_solves_it_bit_for_bit(name: str) -> None:
    target = TARGETS[name]
    student, teacher, _ = random_logits(200, 64, scale=3.0)
    vocab = VocabShard(0, 64, 61)
    tokens = torch.zeros(200, dtype=torch.int64)
    solution = solve_target(student, teacher, target, vocab)
    stats = distillation_loss(student, teacher, tokens, target=target, divergence=Divergence(), vocab=vocab)
    assert torch.equal(solution.beta.float(), stats.beta)
    weight_t, weight_s = target.mix_weights
    mix = (weight_t * teacher.double() + weight_s * student.double())[:, :61]
    normaliser = (solution.beta[:, None] * mix).logsumexp(-1)
    torch.testing.assert_close(solution.log_normaliser, normaliser, rtol=0, atol=1e-5)


RUN_DATA = SimpleNamespace(stop_token_ids=(1,), num_sampled_ids=9, num_controls=0)


def sampled_target(batch_k: float | None = None, rule: str = "entropy_matched", **teachers: object) -> Target:
    """Return the target of the sampling parameters of a run with the anchor reference and ``teachers``."""
    target, rollout = TargetConfig(rule=rule, anchor="reference"), RolloutConfig(guidance="mixed")
    return step_sampling(Config(target=target, rollout=rollout, teachers=teachers), RUN_DATA, batch_k).target


def test_guided_tokens_are_sampled_with_the_weight_of_the_teacher_that_guides() -> None:
    assert sampled_target() == Target(anchor="reference", teacher_weight=0.75)
    own = sampled_target(math={"weight": 2.0}, default={}, guide="math")
    assert own == Target(anchor="reference", teacher_weight=2.0) and own.k_bound == 3.0
    assert sampled_target(math={"weight": 2.0}, default={}, guide="default") == sampled_target()


def test_guided_tokens_are_sampled_with_the_k_of_the_step() -> None:
    assert [sampled_target(k, rule="batch").k for k in (1.4, None)] == [1.4, None]


def test_a_number_that_belongs_to_one_weight_is_refused() -> None:
    for target in (
        Target(k_max=1.5, anchor="student"),
        Target("fixed", k=1.5, anchor="student"),
        Target("batch", k_max=2, k=1.1, anchor="student"),
    ):
        with pytest.raises(ValueError, match="must not be a number where tokens have different teacher weights"):
            target.with_teacher_weight(2.0)
    assert Target("fixed", k_max=1.5, anchor="student").with_teacher_weight(2.0).geometric_k == 3.0
