# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Tokens with their own weight of the teacher and their own divergence in one call of the loss, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from logit_pairs import entropy
from ranks import RankPool
from torch import Tensor

from megatron_selfdistill.loss import Divergence, Status, Target, VocabShard, distillation_loss, mixed_target
from megatron_selfdistill.loss.sharded.fused_linear import fused_distillation_loss
from megatron_selfdistill.loss.sharded.target_measures import RARE, target_measures
from megatron_selfdistill.loss.sharded.vocab_parallel import vocab_entropy
from megatron_selfdistill.loss.target import split_divergence, token_groups

VOCAB_SIZE, PADDED_VOCAB_SIZE = 150, 192  # over 4 ranks: 48, 48, 48 and 6 valid columns
NUM_TOKENS = 12
WEIGHTS = torch.tensor([0.75, 2.0, 0.25, 0.75, 2.0, 0.3] * 2, dtype=torch.float64)
REVERSE, FORWARD, JSD = Divergence("reverse_kl"), Divergence("forward_kl"), Divergence("jsd", 0.3)
CASES = {
    "reference's entropy": (Target(anchor="reference"), [(5, REVERSE), (7, FORWARD)]),
    "strict, student's entropy": (Target(anchor="reference", match="student", k_max=None), [(3, JSD), (9, REVERSE)]),
    "geometric mean": (Target("fixed", anchor="reference"), [(8, FORWARD), (4, JSD)]),
    "batch": (Target("batch", k=1.9, anchor="reference"), [(0, JSD), (6, REVERSE), (6, FORWARD)]),
}
Groups = list[tuple[int, Divergence]]


def rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return float32 logits [NUM_TOKENS, VOCAB_SIZE] of student, teacher and reference, and response tokens.

    Among the rows are equal models, forks, ties at every column, a huge teacher and a student with huge logits.
    """
    generator = torch.Generator().manual_seed(11)
    scale = torch.linspace(0.3, 5.0, NUM_TOKENS)[:, None]
    reference = scale * torch.randn(NUM_TOKENS, VOCAB_SIZE, generator=generator)
    teacher = reference + torch.randn(reference.shape, generator=generator)
    student = reference + 0.5 * torch.randn(reference.shape, generator=generator)
    student[0] = teacher[0] = reference[0]
    student[6] = teacher[6] = reference[6]
    teacher[2] = 40 * reference[2]
    reference[3, :2] = teacher[3, 5:7] = 20.0  # two forks, with other columns
    reference[10, :2] = teacher[10, 5:7] = 20.0
    reference[4] = teacher[4] = 0.0
    student[5] += 1e4
    return student, teacher, reference, torch.randint(VOCAB_SIZE, (NUM_TOKENS,), generator=generator)


def one_token_target(target: Target, weight: float) -> Target:
    """Return the target of a token with its own w, written out."""
    k = None if target.k is None else target.k * (1 + weight) / (1 + target.teacher_weight)
    return Target(target.rule, weight, k_max=target.k_max, k=k, anchor="reference", match=target.match)


def kl(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a > -745, a.exp() * (a - b), 0.0).sum(-1)


def by_definition(
    student: Tensor, teacher: Tensor, reference: Tensor, target: Target, groups: Groups
) -> tuple[Tensor, Tensor]:
    """Return loss and beta [T] in float64, token by token; the loss has a gradient to the student's logits."""
    kinds = [kind for count, kind in groups for _ in range(count)]
    losses, betas = [], []
    for s, t, r, weight, kind in zip(student, teacher, reference, WEIGHTS.tolist(), kinds, strict=True):
        found = mixed_target(s.detach(), t, one_token_target(target, weight), r)
        log_p, log_q, lam = s.log_softmax(-1), found.log_q, kind.jsd_lambda
        log_m = (lam * log_q.exp() + (1 - lam) * log_p.exp()).log()
        loss = {
            "reverse_kl": lambda p=log_p, q=log_q: kl(p, q),
            "forward_kl": lambda p=log_p, q=log_q: kl(q, p),
            "jsd": lambda p=log_p, q=log_q, m=log_m, lam=lam: lam * kl(q, m) + (1 - lam) * kl(p, m),
        }[kind.kind]
        losses.append(loss())
        betas.append(found.beta)
    return torch.stack(losses), torch.stack(betas)


def mixed(teacher: Tensor, reference: Tensor) -> Tensor:
    """Return (w t + r) / (1 + w) with each token's own w."""
    return ((WEIGHTS[:, None] * teacher.double() + reference.double()) / (1 + WEIGHTS[:, None])).to(teacher.dtype)


def sharded(target: Target, groups: Groups, inplace: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss, gradient of this rank's columns, beta and status, with garbage in the padding."""
    group = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
    vocab = VocabShard.from_group(PADDED_VOCAB_SIZE, VOCAB_SIZE, group)
    student, teacher, reference, tokens = rows()
    padding = torch.full((NUM_TOKENS, PADDED_VOCAB_SIZE - VOCAB_SIZE), 77.0)
    columns = slice(vocab.start, vocab.start + vocab.size)
    s, m, r = (
        torch.cat([logits, padding], 1)[:, columns].clone()
        for logits in (student, mixed(teacher, reference), reference)
    )
    s.requires_grad_()
    stats = distillation_loss(
        s * 1,
        m,
        tokens,
        target=target,
        divergence=groups,
        vocab=vocab,
        reference_entropy=vocab_entropy(r, vocab) if target.needs_reference_entropy else None,
        teacher_weights=WEIGHTS,
        inplace_backward=inplace,
    )
    (stats.loss * factors()).sum().backward()
    assert s.grad is not None
    return stats.loss.detach(), s.grad, stats.beta, stats.status


def factors() -> Tensor:
    """Return a different incoming gradient for every token."""
    return torch.linspace(0.5, 2.0, NUM_TOKENS)


def check(target: Target, groups: Groups, shards: list[tuple[Tensor, ...]]) -> None:
    """Assert that loss, gradient and k of the shards together are those of `by_definition`."""
    student, teacher, reference, _ = rows()
    s = student.double().requires_grad_()
    loss, beta = by_definition(s, teacher.double(), reference.double(), target, groups)
    (gradient,) = torch.autograd.grad((loss * factors().double()).sum(), s)
    known = shards[0][3] != Status.UNDETERMINED
    known[5] = False  # its float32 logits near 1e4 have three digits behind the point
    matters = known.clone()
    matters[4] = False  # every beta gives the same target, since all columns are tied
    assert matters.sum() >= 8
    ours = torch.cat([shard[1] for shard in shards], 1)
    torch.testing.assert_close(shards[0][2].double()[matters], beta[matters], rtol=2e-4, atol=0)
    torch.testing.assert_close(shards[0][0].double()[known], loss.detach()[known], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(ours[:, :VOCAB_SIZE].double()[known], gradient[known], rtol=2e-4, atol=4e-5)
    assert (ours[:, VOCAB_SIZE:] == 0).all()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("inplace", [False, True])
def test_loss_gradient_and_k_of_every_token_equal_float64(name: str, inplace: bool) -> None:
    check(*CASES[name], [sharded(*CASES[name], inplace)])


def sharded_cases() -> list[tuple[Tensor, ...]]:
    return [sharded(target, groups, inplace=True) for target, groups in CASES.values()]


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.full)])
def test_loss_gradient_and_k_on_shards_equal_float64(ranks: RankPool, world_size: int) -> None:
    per_rank = ranks.run(sharded_cases, world_size=world_size)
    for (target, groups), *shards in zip(CASES.values(), *per_rank, strict=True):
        assert all(torch.equal(shard[0], shards[0][0]) for shard in shards)
        check(target, groups, shards)


def test_one_call_of_two_groups_equals_one_call_per_token() -> None:
    """The statistics of every token are those of a call of this token alone, to rounding."""
    target, groups = CASES["reference's entropy"]
    student, teacher, reference, tokens = rows()
    vocab, mix = VocabShard(0, VOCAB_SIZE, VOCAB_SIZE), mixed(teacher, reference)
    wanted = vocab_entropy(reference, vocab)

    def call(rows: slice, divergence: Divergence | Groups) -> dict[str, Tensor]:
        stats = distillation_loss(
            student[rows],
            mix[rows],
            tokens[rows],
            target=target,
            divergence=divergence,
            vocab=vocab,
            reference_entropy=wanted[rows],
            teacher_weights=WEIGHTS[rows],
        )
        return vars(stats)

    together = call(slice(None), groups)
    kinds = [kind for count, kind in groups for _ in range(count)]
    for index, kind in enumerate(kinds):
        for name, value in call(slice(index, index + 1), kind).items():
            if name != "grid_betas":
                torch.testing.assert_close(
                    together[name][index], value[0], rtol=1e-6, atol=1e-7, equal_nan=True, msg=f"{name} of {index}"
                )


@pytest.mark.parametrize("mode", ["keep_gradient", "low_memory"])
@pytest.mark.parametrize("chunk_tokens", [4, 64])
@pytest.mark.parametrize("shared", [True, False])
def test_the_fused_layer_gives_every_token_its_own_weight_and_divergence(
    mode: str, chunk_tokens: int, shared: bool
) -> None:
    """Teacher and reference share one output weight, or each has its own."""
    generator = torch.Generator().manual_seed(0)
    student, teacher, reference = (torch.randn(NUM_TOKENS, 16, generator=generator) for _ in range(3))
    weights = [0.5 * torch.randn(PADDED_VOCAB_SIZE, 16, generator=generator) for _ in range(3)]
    of_reference = weights[1] if shared else weights[2]
    tokens = torch.randint(VOCAB_SIZE, (NUM_TOKENS,), generator=generator)
    vocab, (target, groups) = VocabShard(0, PADDED_VOCAB_SIZE, VOCAB_SIZE), CASES["reference's entropy"]

    hidden, weight = student.double().requires_grad_(), weights[0].double().requires_grad_()
    s, t, r = (
        states.double() @ matrix.double()[:VOCAB_SIZE].t()
        for states, matrix in ((hidden, weight), (teacher, weights[1]), (reference, of_reference))
    )
    expected, beta = by_definition(s, t, r, target, groups)
    (expected * factors().double()).sum().backward()

    ours, our_weight = student.clone().requires_grad_(), weights[0].clone().requires_grad_()
    stats = fused_distillation_loss(
        ours,
        mixed(teacher, reference) if shared else teacher,
        our_weight,
        weights[1],
        tokens,
        target=target,
        divergence=groups,
        vocab=vocab,
        reference_entropy=entropy(r.log_softmax(-1)),
        reference=None if shared else (reference, of_reference),
        teacher_weights=WEIGHTS.float(),
        chunk_tokens=chunk_tokens,
        mode=mode,
    )
    (stats.loss * factors()).sum().backward()
    torch.testing.assert_close(stats.loss.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(stats.beta.double(), beta, rtol=1e-4, atol=0)
    torch.testing.assert_close(ours.grad.double(), hidden.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(our_weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-5)


def test_the_grid_of_a_token_is_in_proportion_to_its_weight() -> None:
    """The entropies of the grid are those of the mix at the betas of the token's own w."""
    target = Target("batch", anchor="reference", k_max=None)
    student, teacher, reference, tokens = rows()
    vocab = VocabShard(0, VOCAB_SIZE, VOCAB_SIZE)
    stats = distillation_loss(
        student,
        mixed(teacher, reference),
        tokens,
        target=target,
        divergence=REVERSE,
        vocab=vocab,
        reference_entropy=vocab_entropy(reference, vocab),
        teacher_weights=WEIGHTS,
    )
    w = WEIGHTS[:, None]
    betas = stats.grid_betas.double() * (1 + target.teacher_weight) / (1 + w)
    mix = w * teacher.double() + reference.double()
    expected = entropy((betas[:, :, None] * mix[:, None]).log_softmax(-1))
    torch.testing.assert_close(stats.grid_entropies.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats.beta.double(), 1 / (1 + WEIGHTS), rtol=1e-6, atol=0)


def test_the_mass_on_rare_tokens_is_that_of_each_tokens_own_target() -> None:
    target, groups = CASES["batch"]
    student, teacher, reference, _ = rows()
    _, beta = by_definition(student.double(), teacher.double(), reference.double(), target, groups)
    mass, _ = target_measures(
        student,
        mixed(teacher, reference),
        beta,
        target=target,
        vocab=VocabShard(0, VOCAB_SIZE, VOCAB_SIZE),
        reference_logits=reference,
        teacher_weights=WEIGHTS,
    )
    mix = WEIGHTS[:, None] * teacher.double() + reference.double()
    q = (beta[:, None] * mix).softmax(-1)
    rare = [logits.double().softmax(-1) < RARE for logits in (student, reference)]
    expected = torch.stack([(q * where).sum(-1) for where in rare], 1)
    known = torch.arange(NUM_TOKENS) != 5  # its float32 logits near 1e4 have three digits behind the point
    torch.testing.assert_close(mass[known], expected[known], rtol=1e-4, atol=1e-6)


def test_groups_are_consecutive_slices_and_without_tokens_one_slice_is_left() -> None:
    assert token_groups(FORWARD, 3) == [(slice(0, 3), FORWARD)]
    assert token_groups([(2, JSD), (0, REVERSE), (3, FORWARD)], 5) == [(slice(0, 2), JSD), (slice(2, 5), FORWARD)]
    assert token_groups([(0, JSD), (0, FORWARD)], 0) == [(slice(0, 0), JSD)]
    for wrong in ([(2, JSD)], [], [(6, JSD), (-1, FORWARD)]):
        with pytest.raises(ValueError, match=r"must have 5 tokens together, got \["):
            token_groups(wrong, 5)


def test_what_does_not_fit_is_refused() -> None:
    student, teacher, _, tokens = rows()
    vocab = VocabShard(0, VOCAB_SIZE, VOCAB_SIZE)

    def call(target: Target, weights: Tensor) -> None:
        wanted = torch.ones(NUM_TOKENS) if target.needs_reference_entropy else None
        distillation_loss(
            student,
            teacher,
            tokens,
            target=target,
            divergence=REVERSE,
            vocab=vocab,
            reference_entropy=wanted,
            teacher_weights=weights,
        )

    for target, weights, message in (
        (Target(anchor="student"), WEIGHTS, "teacher_weights per token need a target with anchor=reference"),
        (Target(anchor="reference"), WEIGHTS[1:], r"teacher_weights must be \[12\].*got \[11\]"),
        (
            Target(anchor="reference"),
            WEIGHTS.long(),
            r"teacher_weights must be .*floating-point.*got torch.int64 \[12\]",
        ),
        (Target("fixed", k=1.3, anchor="reference"), WEIGHTS, "Target.k must not be a number.*got 1.3. Use None"),
        (Target(k_max=1.5, anchor="reference"), WEIGHTS, r"Target.k_max must not be a number.*Use '1 \+ w' or None"),
    ):
        with pytest.raises(ValueError, match=message):
            call(target, weights)


@pytest.mark.parametrize("num_last", [0, 1, 5])
def test_the_last_tokens_have_the_other_divergence_and_the_first_ones_the_divergence_of_all(num_last):
    """A microbatch has its plain tokens first and the tokens of guided problems last."""
    found = token_groups(split_divergence(REVERSE, 5, (num_last, FORWARD)), 5)
    kinds = [kind for tokens, kind in found for _ in range(5)[tokens]]
    assert kinds == [REVERSE] * (5 - num_last) + [FORWARD] * num_last
    assert token_groups(split_divergence(REVERSE, 5, None), 5) == [(slice(0, 5), REVERSE)]
