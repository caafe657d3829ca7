# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The sharded loss equals float64 on full rows, for every backend, rule, divergence and split of the vocabulary."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import fields, replace

import kernel_cases
import pytest
import torch
import torch.distributed as dist
from called_collectives import COLLECTIVES, GATHER, called_collectives
from kernel_cases import BACKEND, DEVICE, every_backend, on_cpu
from logit_pairs import DIVERGENCES, TARGETS, by_bisection, divergence, entropy, kl, with_garbage
from ranks import RankPool
from torch import Tensor

from megatron_selfdistill.loss import (
    Divergence,
    Status,
    Target,
    TokenStats,
    VocabShard,
    distillation_loss,
    solve_target,
)
from megatron_selfdistill.loss.sharded.vocab_parallel import vocab_entropy

VOCAB_SIZE, PADDED_VOCAB_SIZE = 370, 512  # over 4 ranks: 128, 128, 114 and 0 valid columns
CASES = list(itertools.product(TARGETS, DIVERGENCES))
every_case = pytest.mark.parametrize(("rule", "kind"), CASES)
EXTREME = slice(14, None)
"""The rows of `kernel_cases.logits`: ramps, ties, a teacher far above the student."""


def logits(dtype: torch.dtype = torch.float32, num_rows: int = 14, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return valid columns of sharp, flat, agreeing, disagreeing and equal rows, and response tokens."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rows, VOCAB_SIZE)
    student = torch.linspace(0.3, 5.0, num_rows)[:, None] * torch.randn(shape, generator=generator)
    teacher = student + torch.randn(shape, generator=generator)
    teacher[::3] = 3 * torch.randn(teacher[::3].shape, generator=generator)
    teacher[1] = student[1]
    teacher[2] = 2 * student[2]
    return student.to(dtype), teacher.to(dtype), torch.randint(VOCAB_SIZE, (num_rows,), generator=generator)


def all_rows() -> tuple[Tensor, Tensor, Tensor]:
    pairs = zip(logits(), kernel_cases.logits(8, VOCAB_SIZE), strict=True)
    student, teacher, tokens = (torch.cat([one, other.cpu()]) for one, other in pairs)
    return student, teacher, tokens


def oracle(
    student: Tensor, teacher: Tensor, target: Target, kind: Divergence, beta: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss, gradient, log q and beta in the dtype of ``student``, by autograd through the definition."""
    s = student.clone().requires_grad_()
    t = teacher.to(s.dtype)
    beta = by_bisection(s.detach().double(), t.double(), target)[1] if beta is None else beta
    mix = t if target.rule == "teacher_alone" else target.teacher_weight * t + s.detach()
    log_q = (beta.to(s.dtype)[:, None] * mix).log_softmax(-1)
    loss = divergence(s.log_softmax(-1), log_q, kind)
    (gradient,) = torch.autograd.grad(loss.sum(), s)
    return loss.detach(), gradient, log_q, beta


def run_loss(
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor,
    rule: Target,
    kind: Divergence,
    group: dist.ProcessGroup | None = None,
) -> tuple[TokenStats, Tensor]:
    """Return the stats and the gradient of this rank's columns; padding columns are filled with garbage first."""
    vocab = VocabShard.from_group(PADDED_VOCAB_SIZE, student.shape[1], group)
    columns = slice(vocab.start, vocab.start + vocab.size)
    s, t = (with_garbage(rows.to(DEVICE), PADDED_VOCAB_SIZE)[:, columns].clone() for rows in (student, teacher))
    arguments = {"target": rule, "divergence": kind, "vocab": vocab, "backend": BACKEND}
    stats = distillation_loss(s.requires_grad_(), t, tokens.to(DEVICE), **arguments)
    stats.loss.sum().backward()
    assert s.grad is not None
    return on_cpu(stats), s.grad.cpu()


def same_bits(a: TokenStats, b: TokenStats) -> bool:
    return all(torch.equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(TokenStats))


@every_backend(cases=12, quick=2)
@every_case
def test_values_gradients_and_statistics_are_no_worse_than_float32_autograd(rule: str, kind: str) -> None:
    student, teacher, tokens = all_rows()
    target, divergence = TARGETS[rule], DIVERGENCES[kind]
    stats, gradient = run_loss(student, teacher, tokens, target, divergence)
    gradient, padding = gradient[:, :VOCAB_SIZE], gradient[:, VOCAB_SIZE:]
    assert (padding == 0).all()
    s, t = student.double(), teacher.double()
    loss, expected, log_q, beta = oracle(s, t, target, divergence)
    torch.testing.assert_close(stats.loss.double(), loss, rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-6)
    naive_loss, naive_gradient, _, _ = (
        values[: EXTREME.start] for values in oracle(student, teacher, target, divergence, beta)
    )
    error, of_naive = (stats.loss - loss)[: EXTREME.start].abs(), (naive_loss - loss[: EXTREME.start]).abs().max()
    assert (error <= of_naive + 5e-7 * (1 + loss[: EXTREME.start])).all()
    error, exact = (gradient - expected)[: EXTREME.start], expected[: EXTREME.start]
    assert error.abs().max() <= (naive_gradient - exact).abs().max() + 1e-6
    assert error.norm() <= 1e-5 * exact.norm() + 1e-6
    log_p, log_t = s.log_softmax(-1), t.log_softmax(-1)
    mix = t if rule == "teacher alone" else target.teacher_weight * t + s
    grid = stats.grid_betas.double()[:, None, None]
    statistics = {
        "reverse_kl": kl(log_p, log_q),
        "beta": beta,
        "student_entropy": entropy(log_p),
        "teacher_entropy": entropy(log_t),
        "target_entropy": entropy(log_q),
        "student_log_prob": log_p.gather(1, tokens[:, None])[:, 0],
        "teacher_log_prob": log_t.gather(1, tokens[:, None])[:, 0],
        "target_log_prob": log_q.gather(1, tokens[:, None])[:, 0],
        "grid_entropies": entropy((grid * mix).log_softmax(-1)).T,
    }
    undetermined = stats.status == Status.UNDETERMINED
    for name, value in statistics.items():
        ours = getattr(stats, name)
        assert ours.dtype == torch.float32 and not ours.requires_grad
        kept = ~undetermined if name == "beta" else slice(None)
        torch.testing.assert_close(
            ours[kept].double(), value[kept], rtol=5e-6, atol=5e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert torch.equal(stats.top1_agreement, s.argmax(-1) == t.argmax(-1))
    assert ((stats.status == Status.GIVEN) == (target.rule != "entropy_matched")).all()


@every_case
def test_float64_logits_give_float64_statistics(rule: str, kind: str) -> None:
    student, teacher, tokens = logits(torch.float64)
    target, divergence = TARGETS[rule], DIVERGENCES[kind]
    stats, gradient = run_loss(student, teacher, tokens, target, divergence)
    loss, expected, _, beta = oracle(student, teacher, target, divergence)
    # the last step of the solver leaves more than float64's rounding; a given beta does not
    tolerance = 2e-7 if target.rule == "entropy_matched" else 1e-12
    assert stats.loss.dtype == gradient.dtype == torch.float64
    torch.testing.assert_close(stats.loss, loss, rtol=0, atol=tolerance)
    torch.testing.assert_close(gradient[:, :VOCAB_SIZE], expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(stats.beta, beta, rtol=10 * tolerance, atol=0)


def on_a_rank(cases: list[tuple[str, str]]) -> tuple[list[tuple[TokenStats, Tensor]], list[bool]]:
    """Return what this rank has of each case, and the agreement of best columns of several shards.

    The best columns have one index within their shards of 128 or 256, are alike, and are tied.
    """
    found = [run_loss(*logits(), TARGETS[rule], DIVERGENCES[kind], dist.group.WORLD) for rule, kind in cases]
    student, teacher, tokens = logits(num_rows=5)
    for row, (best_of_student, best_of_teacher) in enumerate(
        [([40], [168]), ([40], [296]), ([40, 300], [40, 200]), ([40, 300], [300]), ([300], [300])]
    ):
        student[row, best_of_student], teacher[row, best_of_teacher] = 30.0, 30.0
    stats, _ = run_loss(student, teacher, tokens, Target(anchor="student"), Divergence(), dist.group.WORLD)
    return found, stats.top1_agreement.tolist()


@every_backend(cases=1, quick=0)
@pytest.mark.skipif(DEVICE.type == "cuda", reason="the ranks of tests have CPUs; tests/gpu has layouts of several GPUs")
@pytest.mark.parametrize("world_size", [4, pytest.param(2, marks=pytest.mark.full)])
def test_every_split_of_the_vocabulary_gives_the_same_and_the_same_bits_on_every_rank(
    ranks: RankPool, world_size: int
) -> None:
    """The agreement compares global columns, and counts the lowest of equal maxima."""
    cases = CASES if BACKEND == "torch" else CASES[:3]
    per_rank = ranks.run(on_a_rank, cases, world_size=world_size)
    assert [agreement for _, agreement in per_rank] == [[False, False, True, False, True]] * world_size
    for case, *shards in zip(cases, *(found for found, _ in per_rank), strict=True):
        stats, gradient = run_loss(*logits(), TARGETS[case[0]], DIVERGENCES[case[1]])
        assert all(same_bits(shards[0][0], shard[0]) for shard in shards), case
        for field in fields(TokenStats):
            values = getattr(shards[0][0], field.name), getattr(stats, field.name)
            error = {"rtol": 2e-6, "atol": 2e-6, "msg": lambda m, c=case, n=field.name: f"{c} {n}: {m}"}
            torch.testing.assert_close(*values, **error)
        joined = torch.cat([shard[1] for shard in shards], 1)
        torch.testing.assert_close(joined, gradient, rtol=2e-6, atol=1e-6)
        assert (joined[:, VOCAB_SIZE:] == 0).all()


def count_collectives(kind: Divergence, rule: Target, num_rows: int) -> tuple[list[str], list[str]]:
    student, teacher, tokens = logits(num_rows=max(num_rows, 3))
    vocab = VocabShard.from_group(PADDED_VOCAB_SIZE, VOCAB_SIZE, dist.group.WORLD)
    s = student[:num_rows, : vocab.size].clone().requires_grad_()
    with called_collectives() as called:
        arguments = {"target": rule, "divergence": kind, "vocab": vocab}
        stats = distillation_loss(s, teacher[:num_rows, : vocab.size], tokens[:num_rows], **arguments)
        forward = list(called)
        stats.loss.sum().backward()
    assert s.grad is not None and s.grad.shape == s.shape
    return forward, called[len(forward) :]


def all_collectives() -> tuple[dict[tuple[str, str, int], tuple[list[str], list[str]]], list[str]]:
    """Return the collectives of forward and backward by divergence, target and number of rows; deprecation warnings."""
    rules, found = ("capped", "strict", "fixed", "teacher alone"), {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for kind, rule, num_rows in itertools.product(DIVERGENCES, rules, (0, 3, 14)):
            found[kind, rule, num_rows] = count_collectives(DIVERGENCES[kind], TARGETS[rule], num_rows)
    return found, [str(one.message) for one in caught if "deprecated" in str(one.message)]


def test_three_collectives_forward_four_for_jsd_one_less_for_a_given_beta_and_none_backward(ranks: RankPool) -> None:
    """Without rows there is none, and their names are none that this torch deprecates."""
    assert GATHER in COLLECTIVES and "all_reduce" in COLLECTIVES
    for collectives, warned in ranks.run(all_collectives, world_size=2):
        assert not warned
        for (kind, rule, num_rows), called in collectives.items():
            count = 3 + (kind == "jsd") - (rule in ("fixed", "teacher alone"))
            assert called == ([GATHER] * count * (num_rows > 0), []), (kind, rule, num_rows)


@every_backend(cases=2, quick=0)
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_give_the_statistics_of_the_same_values_in_float32(dtype: torch.dtype, kind: str) -> None:
    student, teacher, tokens = logits(dtype)
    narrow, gradient = run_loss(student, teacher, tokens, Target(anchor="student"), DIVERGENCES[kind])
    wide, expected = run_loss(student.float(), teacher.float(), tokens, Target(anchor="student"), DIVERGENCES[kind])
    assert gradient.dtype == dtype
    if BACKEND == "torch":
        assert same_bits(narrow, wide) and torch.equal(gradient, expected.to(dtype))
    kernel_cases.assert_same(narrow, wide)
    # the interpreter cuts digits off where a GPU rounds
    torch.testing.assert_close(gradient.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@every_backend(cases=1)
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_rows_and_backward_in_place_give_the_same_bits(dtype: torch.dtype, kind: str) -> None:
    student, teacher, tokens = (rows.to(DEVICE) for rows in logits(dtype))
    vocab = VocabShard(0, VOCAB_SIZE, VOCAB_SIZE - 7)
    arguments = {"target": Target(anchor="student"), "divergence": DIVERGENCES[kind], "vocab": vocab}
    weights, results = torch.linspace(-1, 2, 14, device=DEVICE), []
    wide = torch.full((14, 400), torch.nan, dtype=dtype, device=DEVICE)
    wide[:, :VOCAB_SIZE] = student
    for rows, inplace in ((student, False), (student, True), (wide, False)):
        leaf = rows.clone().requires_grad_()
        hidden = (leaf * 1)[:, :VOCAB_SIZE] if rows is student else leaf[:, :VOCAB_SIZE]
        hidden.register_hook(results.append)
        stats = distillation_loss(hidden, teacher, tokens, **arguments, inplace_backward=inplace, backend=BACKEND)
        (stats.loss * weights).sum().backward(retain_graph=inplace)
        if inplace:
            assert results[1].data_ptr() == hidden.data_ptr()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                stats.loss.sum().backward()
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@every_backend(cases=1)
def test_no_rows_and_rows_of_one_column_have_no_loss() -> None:
    for num_rows, num_columns in ((0, 50), (2, 1)):
        student, teacher = (torch.randn(num_rows, num_columns, device=DEVICE) for _ in range(2))
        tokens = torch.zeros(num_rows, dtype=torch.int64, device=DEVICE)
        for kind in DIVERGENCES.values():
            stats, gradient = kernel_cases.run(student, teacher, tokens, Target(anchor="student"), kind)
            assert (stats.loss == 0).all() and (gradient == 0).all() and gradient.shape == student.shape


@every_backend(cases=2)
@pytest.mark.parametrize("anchored", [False, True])
def test_solve_target_finds_what_the_loss_finds_bit_for_bit(anchored: bool) -> None:
    """With a reference, the second logits are the mix already, and the entropy to match is given."""
    student, teacher, tokens = (values[:3].to(DEVICE) for values in logits())
    vocab, target = VocabShard(0, VOCAB_SIZE, VOCAB_SIZE), Target(anchor="reference" if anchored else "student")
    reference = logits(seed=1)[0][:3].to(DEVICE)
    options = {"reference_entropy": vocab_entropy(reference, vocab, backend=BACKEND) if anchored else None}
    solution = solve_target(student, teacher, target, vocab, **options, backend=BACKEND)
    arguments = {"target": target, "divergence": Divergence(), "vocab": vocab, "backend": BACKEND}
    stats = distillation_loss(student, teacher, tokens, **arguments, **options)
    assert torch.equal(solution.beta.float(), stats.beta)
    mix = 1.75 * teacher.double() if anchored else student.double() + 0.75 * teacher.double()
    log_q = solution.beta[:, None] * mix - solution.log_normaliser[:, None]
    torch.testing.assert_close(log_q.exp().sum(1).cpu(), torch.ones(3).double(), rtol=0, atol=3e-6)


def test_rows_in_chunks_equal_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [run_loss(*logits(), Target(anchor="student"), kind) for kind in DIVERGENCES.values()]
    monkeypatch.setattr(
        "megatron_selfdistill.loss.sharded.shard_sums.CHUNK_BYTES", {"cpu": 3 * 370 * 4, "other": 3 * 370 * 4}
    )
    for (stats, gradient), kind in zip(whole, DIVERGENCES.values(), strict=True):
        chunked, chunked_gradient = run_loss(*logits(), Target(anchor="student"), kind)
        assert torch.equal(chunked_gradient, gradient)
        for field in fields(TokenStats):
            assert torch.equal(getattr(chunked, field.name), getattr(stats, field.name))


def test_a_batch_target_takes_its_k_from_the_record() -> None:
    student, teacher, tokens = logits()
    first, _ = run_loss(student, teacher, tokens, Target("batch", anchor="student"), Divergence())
    later, _ = run_loss(student, teacher, tokens, replace(Target("batch", anchor="student"), k=1.25), Divergence())
    assert first.beta.unique().item() == pytest.approx(1 / 1.75)
    assert later.beta.unique().item() == pytest.approx(1 / 1.25)
    assert torch.equal(first.grid_entropies, later.grid_entropies) and len(first.grid_betas) == 5


def test_a_first_call_under_inference_mode_keeps_nothing_that_autograd_would_refuse_later() -> None:
    student, teacher, tokens = torch.randn(2, 8), torch.randn(2, 8), torch.zeros(2, dtype=torch.int64)
    target = Target(teacher_weight=0.8125, anchor="student")  # of no other test: its grid is made here
    arguments = {"target": target, "divergence": Divergence(), "vocab": VocabShard(0, 8, 8)}
    with torch.inference_mode():
        assert not distillation_loss(student, teacher, tokens, **arguments).grid_betas.is_inference()
    leaf = student.requires_grad_()
    stats = distillation_loss(leaf, teacher, tokens, **arguments)
    (stats.loss.sum() * stats.grid_betas.sum()).backward()
    assert leaf.grad is not None and torch.isfinite(leaf.grad).all()
