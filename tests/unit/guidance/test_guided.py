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
from megatron_selfdistill.loss import Target, mixed_target
from megatron_selfdistill.sources.configured_source import step_sampling

STUDENT = Target(anchor="student")
TARGETS = {
    "student": STUDENT,
    "student, no bound": Target(k_max=None, anchor="student"),
    "student, w = 2": Target(teacher_weight=2.0, anchor="student"),
    "student, w = 0": Target(teacher_weight=0.0, anchor="student"),
    "student, fixed": Target("fixed", k=1.3, anchor="student"),
    "student, batch": Target("batch", k=1.6, anchor="student"),
    "teacher alone": Target("teacher_alone", anchor="student"),
    "reference": Target(anchor="reference"),
    "reference, strict": Target(anchor="reference", k_max=None),
    "student's entropy": Target(anchor="reference", match="student", teacher_weight=2.0),
    "student's entropy, strict": Target(anchor="reference", match="student", k_max=None),
    "geometric mean": Target("fixed", anchor="reference"),
    "reference, batch": Target("batch", k=1.6, anchor="reference"),
    "reference, w = 0": Target(anchor="reference", teacher_weight=0.0),
    "student, controls": Target(anchor="student", num_controls=3),
    "student, strict, controls": Target(anchor="student", k_max=None, num_controls=3),
    "reference, controls": Target(num_controls=3),
    "a share of the reference, controls": Target(anchor=0.3, num_controls=3),
    "a share of the reference": Target(anchor=0.3),
}


def random_logits(rows: int, columns: int, seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(rows, columns, generator=generator) for _ in range(2))
    return student, teacher, torch.rand(rows, generator=generator, dtype=torch.float64)


def nasty_rows(target: Target, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Return logits and uniforms of sharp, flat and tied rows, forks, and a control that equals the teacher."""
    generator = torch.Generator().manual_seed(7)
    reference, *noise = torch.randn(6, 500, 41, generator=generator)
    reference *= torch.linspace(0.3, 4.0, 500)[:, None]
    teacher, student = reference + 1.5 * noise[0], reference + noise[1]
    student[0] = teacher[0] = reference[0]
    teacher[1] = 20 * reference[1]
    reference[2, :2] = teacher[2, 5:7] = 12.0  # two forks, with other columns
    reference[3] = 0.0
    student[4] = 0.1 * reference[4]
    controls = teacher + torch.stack(noise[2:])
    controls[:, 0] = teacher[0]
    roles = {"reference_logits": reference} if target.has_reference else {}
    roles |= {"control_logits": controls} if target.num_controls else {}
    uniforms = torch.rand(500, generator=generator, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype), uniforms, {role: logits.to(dtype) for role, logits in roles.items()}


DTYPES = [torch.float32, torch.bfloat16, torch.float64]
CASES = [
    (name, dtype)
    for name, target in TARGETS.items()
    for dtype in (DTYPES[:1] if target.num_controls or target.reference_share else DTYPES)
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_token_is_drawn_where_the_targets_cdf_passes_the_uniform(name: str, dtype: torch.dtype) -> None:
    target = TARGETS[name]
    student, teacher, uniforms, roles = nasty_rows(target, dtype)
    drawn = select_mixed_tokens(student, teacher, uniforms, target, greedy=False, **roles)
    wide = {role: logits.double() for role, logits in roles.items()}
    log_q = mixed_target(student.double(), teacher.double(), target, **wide).log_q
    cdf = log_q.exp().cumsum(-1)
    sure = (cdf - uniforms[:, None]).abs().amin(-1) > 1e-5
    assert sure.sum() > 480
    assert torch.equal(drawn.token_ids[sure], (cdf <= uniforms[:, None]).sum(-1)[sure])
    for mine, expected in (
        (drawn.mixed_log_probs, log_q),
        (drawn.student_log_probs, student.double().log_softmax(-1)),
        (drawn.teacher_log_probs, teacher.double().log_softmax(-1)),
    ):
        assert mine.dtype == torch.float64
        torch.testing.assert_close(mine, expected.gather(1, drawn.token_ids[:, None])[:, 0], rtol=0, atol=2e-5)
    greedy = select_mixed_tokens(student, teacher, uniforms, target, greedy=True, **roles)
    assert (log_q.gather(1, greedy.token_ids[:, None])[:, 0] > log_q.amax(-1) - 1e-5).all()
    assert not greedy.mixed_log_probs.any()


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    tied, uniform = torch.tensor([[0.0, 4.0, 1.0, 4.0]]), torch.zeros(1, dtype=torch.float64)
    assert select_mixed_tokens(tied, tied, uniform, STUDENT, greedy=True).token_ids.tolist() == [1]


def test_a_column_that_does_not_exist_is_never_drawn() -> None:
    student, teacher, _ = random_logits(400, 9)
    student[:, [0, 4, 8]] = teacher[:, [0, 4, 8]] = -torch.inf
    for uniform in (0.0, 0.5, 1 - 2**-53):
        uniforms = torch.full((400,), uniform, dtype=torch.float64)
        drawn = select_mixed_tokens(student, teacher, uniforms, STUDENT, greedy=False)
        assert not torch.isin(drawn.token_ids, torch.tensor([0, 4, 8])).any()
        assert torch.isfinite(drawn.mixed_log_probs).all()


@pytest.mark.parametrize("anchored", [False, True])
def test_ids_beyond_the_tokenizer_have_no_part_of_the_target(anchored: bool) -> None:
    student, teacher, uniforms = random_logits(400, 12)
    target = Target() if anchored else STUDENT
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
    whole = select_mixed_tokens(student, teacher, uniforms, STUDENT, greedy=False)
    student[2, 3], teacher[4, 0] = torch.nan, torch.nan
    drawn = select_mixed_tokens(student, teacher, uniforms, STUDENT, greedy=False)
    others = torch.tensor([0, 1, 3, 5])
    for field in dataclasses.fields(MixedTokens):
        assert torch.equal(getattr(drawn, field.name)[others], getattr(whole, field.name)[others])
    assert drawn.mixed_log_probs[[2, 4]].isnan().all()
    assert (drawn.token_ids < 20).all()


@pytest.mark.parametrize("greedy", [True, False])
def test_rows_are_drawn_alike_in_any_grouping(monkeypatch: pytest.MonkeyPatch, greedy: bool) -> None:
    student, teacher, uniforms = random_logits(23, 40)
    whole = select_mixed_tokens(student, teacher, uniforms, STUDENT, greedy=greedy)
    monkeypatch.setattr(guided_tokens, "_MAX_MIXED_LOGITS", {"cpu": 7 * 40, "other": 7 * 40})
    split = select_mixed_tokens(student, teacher, uniforms, STUDENT, greedy=greedy)
    for field in dataclasses.fields(MixedTokens):
        assert torch.equal(getattr(whole, field.name), getattr(split, field.name))
    none = select_mixed_tokens(student[:0], teacher[:0], uniforms[:0], STUDENT, greedy=greedy)
    assert none.token_ids.numel() == 0


RUN_DATA = SimpleNamespace(stop_token_ids=(1,), num_sampled_ids=9, num_controls=0)


def sampled_target(batch_k: float | None = None, rule: str = "entropy_matched", **teachers: object) -> Target:
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
