# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The sampling of one guided token where the target mixes the teacher with a frozen reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_selfdistill.guidance.guided_tokens import select_mixed_tokens
from megatron_selfdistill.loss import Divergence, Target, VocabShard, distillation_loss, mixed_target, solve_target
from megatron_selfdistill.loss.sharded.vocab_parallel import vocab_entropy
from megatron_selfdistill.rollout.base import SamplingParams
from megatron_selfdistill.rollout.sampling import select_tokens

TARGETS = {
    "reference's entropy": Target(anchor="reference"),
    "reference's entropy, strict": Target(anchor="reference", k_max=None),
    "student's entropy": Target(anchor="reference", match="student", teacher_weight=2.0),
    "student's entropy, strict": Target(anchor="reference", match="student", k_max=None),
    "geometric mean": Target("fixed", anchor="reference"),
    "batch": Target("batch", k=1.6, anchor="reference"),
    "w = 0": Target(anchor="reference", teacher_weight=0.0),
}


def rows(count: int, columns: int = 41, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logits of student, teacher and reference, among them sharp, flat and tied rows, and uniforms."""
    generator = torch.Generator().manual_seed(7)
    scale = torch.linspace(0.3, 4.0, count)[:, None]
    reference = scale * torch.randn(count, columns, generator=generator)
    teacher = reference + 1.5 * torch.randn(count, columns, generator=generator)
    student = reference + torch.randn(count, columns, generator=generator)
    student[0] = teacher[0] = reference[0]
    teacher[1] = 20 * reference[1]
    reference[2, :2] = teacher[2, 5:7] = 12.0  # two forks, with other columns
    reference[3] = 0.0
    student[4] = 0.1 * reference[4]
    uniforms = torch.rand(count, generator=generator, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype), reference.to(dtype), uniforms


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_token_is_sampled_where_the_definitions_cdf_passes_the_uniform(name: str, dtype: torch.dtype) -> None:
    target = TARGETS[name]
    student, teacher, reference, uniforms = rows(500, dtype=dtype)
    sampled = select_mixed_tokens(student, teacher, uniforms, target, greedy=False, reference_logits=reference)
    log_q = mixed_target(student.double(), teacher.double(), target, reference.double()).log_q
    cdf = log_q.exp().cumsum(-1)
    sure = (cdf - uniforms[:, None]).abs().amin(-1) > 1e-5
    assert sure.sum() > 480
    assert torch.equal(sampled.token_ids[sure], (cdf <= uniforms[:, None]).sum(-1)[sure])
    for mine, expected in (
        (sampled.mixed_log_probs, log_q),
        (sampled.student_log_probs, student.double().log_softmax(-1)),
        (sampled.teacher_log_probs, teacher.double().log_softmax(-1)),
    ):
        assert mine.dtype == torch.float64
        torch.testing.assert_close(mine, expected.gather(1, sampled.token_ids[:, None])[:, 0], rtol=0, atol=2e-5)


WITH_CONTROLS = {
    "student": Target(anchor="student", num_controls=3),
    "student, strict": Target(anchor="student", k_max=None, num_controls=3),
    "reference": Target(num_controls=3),
    "a share of the reference": Target(anchor=0.3, num_controls=3),
    "a share without controls": Target(anchor=0.3),
}


@pytest.mark.parametrize("name", WITH_CONTROLS)
@pytest.mark.parametrize("greedy", [False, True])
def test_a_token_of_a_target_with_controls_or_a_shared_anchor_is_that_of_the_definition(
    name: str, greedy: bool
) -> None:
    target = WITH_CONTROLS[name]
    student, teacher, reference, uniforms = rows(500)
    controls = None
    if target.num_controls:
        controls = teacher + torch.randn(3, *teacher.shape, generator=torch.Generator().manual_seed(3))
        controls[:, 0] = teacher[0]
    anchor = reference if target.has_reference else None
    sampled = select_mixed_tokens(
        student, teacher, uniforms, target, greedy=greedy, reference_logits=anchor, control_logits=controls
    )
    wide = [None if it is None else it.double() for it in (student, teacher, anchor, controls)]
    log_q = mixed_target(wide[0], wide[1], target, *wide[2:]).log_q
    ids = sampled.token_ids[:, None]
    if greedy:
        assert (log_q.gather(1, ids)[:, 0] > log_q.amax(-1) - 1e-5).all()
    else:
        cdf = log_q.exp().cumsum(-1)
        sure = (cdf - uniforms[:, None]).abs().amin(-1) > 1e-5
        assert sure.sum() > 480
        assert torch.equal(sampled.token_ids[sure], (cdf <= uniforms[:, None]).sum(-1)[sure])
        torch.testing.assert_close(sampled.mixed_log_probs, log_q.gather(1, ids)[:, 0], rtol=0, atol=2e-5)
    of_teacher = teacher.double().log_softmax(-1).gather(1, ids)[:, 0]
    torch.testing.assert_close(sampled.teacher_log_probs, of_teacher, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", TARGETS)
def test_the_target_is_solved_as_the_loss_solves_it_bit_for_bit(name: str) -> None:
    target = TARGETS[name]
    student, teacher, reference, _ = rows(200, 64)
    vocab, w = VocabShard(0, 64, 61), target.teacher_weight
    folded = ((w * teacher.double() + reference.double()) / (1 + w)).float()
    wanted = vocab_entropy(reference, vocab) if target.needs_reference_entropy else None
    solution = solve_target(student, folded, target, vocab, reference_entropy=wanted)
    tokens = torch.zeros(200, dtype=torch.int64)
    stats = distillation_loss(
        student, folded, tokens, target=target, divergence=Divergence(), vocab=vocab, reference_entropy=wanted
    )
    assert torch.equal(solution.beta.float(), stats.beta)
    mix = (w * teacher.double() + reference.double())[:, :61]
    normaliser = (solution.beta[:, None] * mix).logsumexp(-1)
    torch.testing.assert_close(solution.log_normaliser, normaliser, rtol=0, atol=2e-5)


def test_equal_logits_of_all_three_sample_what_the_student_samples() -> None:
    student, _, _, uniforms = rows(500)
    plain = select_tokens(student, uniforms, SamplingParams(1))
    for name in ("reference's entropy", "student's entropy, strict", "geometric mean", "w = 0"):
        sampled = select_mixed_tokens(
            student, student, uniforms, TARGETS[name], greedy=False, reference_logits=student.clone()
        )
        assert torch.equal(sampled.token_ids, plain[0])
        torch.testing.assert_close(sampled.mixed_log_probs, plain[2], rtol=0, atol=2e-6)


def test_greedy_is_the_argmax_of_teacher_and_reference_whatever_the_student_says() -> None:
    student, teacher, reference, uniforms = rows(300)
    sampled = select_mixed_tokens(
        student, teacher, uniforms, TARGETS["reference's entropy"], greedy=True, reference_logits=reference
    )
    assert torch.equal(sampled.token_ids, (0.75 * teacher.double() + reference.double()).argmax(-1))
    assert not torch.equal(sampled.token_ids, (0.75 * teacher.double() + student.double()).argmax(-1))
    assert not sampled.mixed_log_probs.any()
