# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The sharded loss equals float64 on full rows, for every rule, divergence and split of the vocabulary."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import fields, replace

import pytest
import torch
import torch.distributed as dist
from called_collectives import COLLECTIVES, GATHER, called_collectives
from logit_pairs import DIVERGENCES, TARGETS, entropy, kl
from ranks import RankPool
from torch import Tensor

from megatron_selfdistill.loss import Divergence, Status, Target, TokenStats, VocabShard, distillation_loss

VOCAB_SIZE, PADDED_VOCAB_SIZE = 370, 512  # over 4 ranks: 128, 128, 114 and 0 valid columns
CASES = list(itertools.product(TARGETS, DIVERGENCES))
every_case = pytest.mark.parametrize(("rule", "kind"), CASES)


def logits(dtype: torch.dtype = torch.float32, num_rows: int = 14, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return the valid columns of both logits, and response tokens.

    The rows are sharp, flat, agreeing, disagreeing and equal.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rows, VOCAB_SIZE)
    student = torch.linspace(0.3, 5.0, num_rows)[:, None] * torch.randn(shape, generator=generator)
    teacher = student + torch.randn(shape, generator=generator)
    teacher[::3] = 3 * torch.randn(teacher[::3].shape, generator=generator)
    teacher[1] = student[1]
    teacher[2] = 2 * student[2]
    return student.to(dtype), teacher.to(dtype), torch.randint(VOCAB_SIZE, (num_rows,), generator=generator)


def oracle_beta(s: Tensor, t: Tensor, target: Target) -> Tensor:
    """Return beta by bisection in float64 on log beta."""
    w = target.teacher_weight
    if target.rule != "entropy_matched":
        k = 1.0 if target.rule == "teacher_alone" else target.k
        return torch.full(s.shape[:1], 1 / k, dtype=torch.float64)
    low = torch.full(s.shape[:1], 1 / 16 / (1 + w), dtype=torch.float64).log()
    high = low + torch.tensor(256.0).double().log()
    wanted = entropy(s.log_softmax(-1)).clamp(min=1e-6)
    for _ in range(70):
        middle = (low + high) / 2
        soft = entropy((middle.exp()[:, None] * (w * t + s)).log_softmax(-1)) > wanted
        low, high = torch.where(soft, middle, low), torch.where(soft, high, middle)
    k_max = {None: float("inf"), "1 + w": 1 + w}.get(target.k_max, target.k_max)
    return low.exp().clamp(min=1 / k_max)


def oracle(
    student: Tensor, teacher: Tensor, target: Target, kind: Divergence, beta: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss, gradient, log q and beta in the dtype of ``student``, by autograd through the definition."""
    s = student.clone().requires_grad_()
    t = teacher.to(s.dtype)
    beta = oracle_beta(s.detach().double(), t.double(), target) if beta is None else beta
    mix = t if target.rule == "teacher_alone" else target.teacher_weight * t + s.detach()
    log_q, log_p = (beta.to(s.dtype)[:, None] * mix).log_softmax(-1), s.log_softmax(-1)
    lam = kind.jsd_lambda
    log_m = (lam * log_q.exp() + (1 - lam) * log_p.exp()).log()
    loss = {
        "reverse_kl": lambda: kl(log_p, log_q),
        "forward_kl": lambda: kl(log_q, log_p),
        "jsd": lambda: lam * kl(log_q, log_m) + (1 - lam) * kl(log_p, log_m),
    }[kind.kind]()
    (gradient,) = torch.autograd.grad(loss.sum(), s)
    return loss.detach(), gradient, log_q, beta


def run_loss(
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor,
    rule: Target,
    kind: Divergence,
    group: dist.ProcessGroup | None = None,
    weights: Tensor | None = None,
) -> tuple[TokenStats, Tensor]:
    """Return the stats and the gradient of this rank's columns; padding columns are filled with garbage first."""
    garbage = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, 55.0]).repeat(PADDED_VOCAB_SIZE // 5 + 1)
    garbage = garbage[: PADDED_VOCAB_SIZE - student.shape[1]].expand(student.shape[0], -1).to(student.dtype)
    vocab = VocabShard.from_group(PADDED_VOCAB_SIZE, student.shape[1], group)
    columns = slice(vocab.start, vocab.start + vocab.size)
    s = torch.cat([student, garbage], 1)[:, columns].clone().requires_grad_()
    t = torch.cat([teacher, garbage.flip(1)], 1)[:, columns].clone()
    stats = distillation_loss(s, t, tokens, target=rule, divergence=kind, vocab=vocab)
    (stats.loss if weights is None else stats.loss * weights).sum().backward()
    stats = stats.detached()
    assert s.grad is not None
    return stats, s.grad


def all_cases(dtype: torch.dtype) -> list[tuple[TokenStats, Tensor]]:
    group = dist.group.WORLD if dist.get_world_size() > 1 else None
    return [run_loss(*logits(dtype), TARGETS[rule], DIVERGENCES[kind], group) for rule, kind in CASES]


def same_bits(a: TokenStats, b: TokenStats) -> bool:
    return all(torch.equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(TokenStats))


@every_case
def test_value_and_gradient_are_no_worse_than_float32_autograd(rule: str, kind: str) -> None:
    student, teacher, tokens = logits()
    target, divergence = TARGETS[rule], DIVERGENCES[kind]
    stats, gradient = run_loss(student, teacher, tokens, target, divergence)
    loss, expected, _, beta = oracle(student.double(), teacher, target, divergence)
    naive_loss, naive_gradient, _, _ = oracle(student, teacher, target, divergence, beta)
    assert ((stats.loss - loss).abs() <= (naive_loss - loss).abs().max() + 5e-7 * (1 + loss)).all()
    gradient, padding = gradient[:, :VOCAB_SIZE], gradient[:, VOCAB_SIZE:]
    assert (gradient - expected).abs().max() <= (naive_gradient - expected).abs().max() + 1e-6
    assert (padding == 0).all()
    assert (gradient - expected).norm() <= 1e-5 * expected.norm() + 1e-6


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


@pytest.mark.parametrize("rule", TARGETS)
def test_all_statistics_equal_float64(rule: str) -> None:
    student, teacher, tokens = logits()
    target = TARGETS[rule]
    stats, _ = run_loss(student, teacher, tokens, target, Divergence("forward_kl"))
    s, t = student.double(), teacher.double()
    reverse, _, log_q, beta = oracle(s, t, target, Divergence("reverse_kl"))
    log_p, log_t = s.log_softmax(-1), t.log_softmax(-1)
    mix = t if rule == "teacher alone" else target.teacher_weight * t + s
    grid = stats.grid_betas.double()[:, None, None]
    expected = {
        "reverse_kl": reverse,
        "beta": beta,
        "student_entropy": entropy(log_p),
        "teacher_entropy": entropy(log_t),
        "target_entropy": entropy(log_q),
        "student_log_prob": log_p.gather(1, tokens[:, None])[:, 0],
        "teacher_log_prob": log_t.gather(1, tokens[:, None])[:, 0],
        "target_log_prob": log_q.gather(1, tokens[:, None])[:, 0],
        "grid_entropies": entropy((grid * mix).log_softmax(-1)).T,
    }
    for name, value in expected.items():
        ours = getattr(stats, name)
        assert ours.dtype == torch.float32 and not ours.requires_grad
        torch.testing.assert_close(ours.double(), value, rtol=5e-6, atol=5e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert torch.equal(stats.top1_agreement, s.argmax(-1) == t.argmax(-1))
    matched = target.rule == "entropy_matched"
    assert ((stats.status == Status.GIVEN) == (not matched)).all()


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_split_of_the_vocabulary_gives_the_same_and_the_same_bits_on_every_rank(
    ranks: RankPool, world_size: int
) -> None:
    whole = [run_loss(*logits(), TARGETS[rule], DIVERGENCES[kind]) for rule, kind in CASES]
    per_rank = ranks.run(all_cases, torch.float32, world_size=world_size)
    for case, (stats, gradient), *shards in zip(CASES, whole, *per_rank, strict=True):
        assert all(same_bits(shards[0][0], shard[0]) for shard in shards), case
        assert torch.equal(shards[0][0].status, stats.status), case
        assert torch.equal(shards[0][0].top1_agreement, stats.top1_agreement), case
        for field in fields(TokenStats):
            values = getattr(shards[0][0], field.name), getattr(stats, field.name)
            torch.testing.assert_close(
                *values, rtol=2e-6, atol=2e-6, msg=lambda m, c=case, n=field.name: f"{c} {n}: {m}"
            )
        joined = torch.cat([shard[1] for shard in shards], 1)
        torch.testing.assert_close(joined, gradient, rtol=2e-6, atol=1e-6)
        assert (joined[:, VOCAB_SIZE:] == 0).all()


def agreement_across_shards() -> list[bool]:
    """Return the agreement for best columns with one index within their shards of 128 or 256, alike, and tied."""
    student, teacher, tokens = logits(num_rows=5)
    for row, (best_of_student, best_of_teacher) in enumerate(
        [([40], [168]), ([40], [296]), ([40, 300], [40, 200]), ([40, 300], [300]), ([300], [300])]
    ):
        student[row, best_of_student], teacher[row, best_of_teacher] = 30.0, 30.0
    stats, _ = run_loss(student, teacher, tokens, Target(anchor="student"), Divergence(), dist.group.WORLD)
    return stats.top1_agreement.tolist()


@pytest.mark.parametrize("world_size", [2, 4])
def test_agreement_compares_global_columns_and_the_lowest_of_equal_maxima(ranks: RankPool, world_size: int) -> None:
    for agreement in ranks.run(agreement_across_shards, world_size=world_size):
        assert agreement == [False, False, True, False, True]


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


Collectives = dict[tuple[str, str, int], tuple[list[str], list[str]]]


def all_collectives() -> Collectives:
    """Return the collectives of forward and backward of every divergence and target, without rows, too."""
    sizes = [(rule, num_rows) for rule in ("capped", "strict", "fixed", "teacher alone") for num_rows in (3, 14)]
    return {
        (kind, rule, num_rows): count_collectives(DIVERGENCES[kind], TARGETS[rule], num_rows)
        for kind in DIVERGENCES
        for rule, num_rows in [*sizes, ("capped", 0)]
    }


@pytest.fixture(scope="module")
def collectives(ranks: RankPool) -> list[Collectives]:
    """Return the collectives of two ranks."""
    return ranks.run(all_collectives, world_size=2)


@pytest.mark.parametrize(("rule", "less"), [("capped", 0), ("strict", 0), ("fixed", 1), ("teacher alone", 1)])
@pytest.mark.parametrize(("kind", "count"), [("reverse", 3), ("forward", 3), ("jsd", 4)])
def test_three_collectives_forward_four_for_jsd_one_less_for_a_given_beta_and_none_backward(
    collectives: list[Collectives], kind: str, count: int, rule: str, less: int
) -> None:
    assert GATHER in COLLECTIVES and "all_reduce" in COLLECTIVES
    for num_rows in (3, 14):
        for of_rank in collectives:
            assert of_rank[kind, rule, num_rows] == ([GATHER] * (count - less), [])


def warnings_of_one_call() -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_loss(*logits(), Target(anchor="student"), Divergence(), dist.group.WORLD)
    return [str(one.message) for one in caught if "deprecated" in str(one.message)]


def test_the_collectives_are_called_by_names_that_this_torch_does_not_deprecate(ranks: RankPool) -> None:
    assert ranks.run(warnings_of_one_call, world_size=2) == [[], []]


def test_no_rows_need_no_collective_and_still_take_a_backward(collectives: list[Collectives]) -> None:
    for kind in DIVERGENCES:
        assert [of_rank[kind, "capped", 0] for of_rank in collectives] == [([], []), ([], [])]


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_bf16_logits_give_the_statistics_of_the_same_values_in_float32(kind: str) -> None:
    student, teacher, tokens = logits(torch.bfloat16)
    narrow, gradient = run_loss(student, teacher, tokens, Target(anchor="student"), DIVERGENCES[kind])
    wide, expected = run_loss(student.float(), teacher.float(), tokens, Target(anchor="student"), DIVERGENCES[kind])
    assert same_bits(narrow, wide)
    assert gradient.dtype == torch.bfloat16 and torch.equal(gradient, expected.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_backward_in_place_writes_the_same_gradient_over_the_logits(dtype: torch.dtype, kind: str) -> None:
    student, teacher, tokens = logits(dtype)
    vocab = VocabShard(0, VOCAB_SIZE, VOCAB_SIZE - 7)
    arguments = {"target": Target(anchor="student"), "divergence": DIVERGENCES[kind], "vocab": vocab}
    weights = torch.linspace(-1, 2, 14)
    results = []
    for inplace in (False, True):
        leaf = student.clone().requires_grad_()
        hidden = leaf * 1
        hidden.register_hook(results.append)
        stats = distillation_loss(hidden, teacher, tokens, **arguments, inplace_backward=inplace)
        (stats.loss * weights).sum().backward(retain_graph=True)
    assert torch.equal(results[0], results[1])
    assert results[1].data_ptr() == hidden.data_ptr() and results[0].data_ptr() != hidden.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stats.loss.sum().backward()


def test_the_gradient_is_scaled_by_each_tokens_weight() -> None:
    weights = torch.linspace(-1, 2, 14)
    _, plain = run_loss(*logits(), Target(anchor="student"), Divergence())
    _, weighted = run_loss(*logits(), Target(anchor="student"), Divergence(), weights=weights)
    torch.testing.assert_close(weighted, plain * weights[:, None])


def test_the_response_token_may_lie_in_any_shard_and_an_unknown_one_has_no_log_prob() -> None:
    student, teacher, _ = logits()
    tokens = torch.tensor([0, 127, 128, 369, 370, 511, -100, 5, 5, 5, 5, 5, 5, 5])
    stats, _ = run_loss(student, teacher, tokens, Target(anchor="student"), Divergence())
    expected = student.double().log_softmax(-1).gather(1, tokens.clamp(0, 369)[:, None])[:, 0]
    unknown = torch.tensor([4, 5, 6])
    for name in ("student_log_prob", "teacher_log_prob", "target_log_prob"):
        assert torch.isnan(getattr(stats, name)[unknown]).all()
    known = torch.tensor([0, 1, 2, 3, 7, 8])
    torch.testing.assert_close(stats.student_log_prob[known].double(), expected[known], rtol=0, atol=2e-6)
    assert torch.isfinite(stats.loss).all()


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
