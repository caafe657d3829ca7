# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The target that mixes the teacher with a frozen reference: closed forms, float64, shards, and the fused layer."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from logit_pairs import entropy, pair
from ranks import RankPool
from tiers import combinations
from torch import Tensor

from megatron_selfdistill.choices import FUSED_MODES
from megatron_selfdistill.loss import Divergence, Status, Target, VocabShard, distillation_loss, mixed_target
from megatron_selfdistill.loss.sharded.fused_linear import fused_distillation_loss
from megatron_selfdistill.loss.sharded.vocab_parallel import vocab_entropy

VOCAB_SIZE, PADDED_VOCAB_SIZE = 150, 192  # over 4 ranks: 48, 48, 48 and 6 valid columns
W = 0.75
TARGETS = {
    "reference's entropy": Target(anchor="reference"),
    "reference's entropy, strict": Target(anchor="reference", k_max=None),
    "student's entropy": Target(anchor="reference", match="student", teacher_weight=2.0),
    "student's entropy, strict": Target(anchor="reference", match="student", k_max=None),
    "geometric mean": Target("fixed", anchor="reference"),
    "k 1.3": Target("fixed", k=1.3, anchor="reference"),
    "batch": Target("batch", k=1.9, k_max=None, anchor="reference"),
}
DIVERGENCES = {kind: Divergence(kind, 0.3) for kind in ("reverse_kl", "forward_kl", "jsd")}


def rows(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logits [12, VOCAB_SIZE] of student, teacher and reference, and response tokens.

    Among the rows are sharp, flat and tied ones, equal models, and a student that has drifted far from the reference.
    """
    generator = torch.Generator().manual_seed(3)
    scale = torch.linspace(0.3, 5.0, 12)[:, None]
    reference = scale * torch.randn(12, VOCAB_SIZE, generator=generator)
    teacher = reference + torch.randn(reference.shape, generator=generator)
    student = reference + 0.5 * torch.randn(reference.shape, generator=generator)
    student[0] = teacher[0] = reference[0]
    student[1] = 3 * torch.randn(VOCAB_SIZE, generator=generator)
    teacher[2] = 40 * reference[2]
    reference[3, :2] = teacher[3, 5:7] = 20.0  # two forks, with other columns
    reference[4] = teacher[4] = 0.0
    student[5] += 1e4
    tokens = torch.randint(VOCAB_SIZE, (12,), generator=generator)
    return student.to(dtype), teacher.to(dtype), reference.to(dtype), tokens


def oracle(student: Tensor, teacher: Tensor, reference: Tensor, target: Target, kind: str) -> tuple[Tensor, ...]:
    """Return loss, gradient and beta in float64: k by bisection, the gradient by autograd."""
    s, r = student.double().requires_grad_(), reference.double()
    w = target.teacher_weight
    mix = w * teacher.double() + r
    if target.rule == "entropy_matched":
        wanted = entropy((s.detach() if target.match == "student" else r).log_softmax(-1)).clamp(min=1e-6)
        low = torch.full_like(wanted, 1 / 16 / (1 + w)).log()
        high = low + math.log(256)
        for _ in range(80):
            middle = (low + high) / 2
            soft = entropy((middle.exp()[:, None] * mix).log_softmax(-1)) > wanted
            low, high = torch.where(soft, middle, low), torch.where(soft, high, middle)
        beta = low.exp().clamp(min=0.0 if target.k_max is None else 1 / (1 + w))
    else:
        beta = torch.full((len(s),), 1 / (target.k or 1 + w), dtype=torch.float64)
    log_q, log_p = (beta[:, None] * mix).log_softmax(-1), s.log_softmax(-1)
    lam = 0.3
    log_m = (lam * log_q.exp() + (1 - lam) * log_p.exp()).log()

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(a > -745, a.exp() * (a - b), 0.0).sum(-1)

    loss = {
        "reverse_kl": lambda: kl(log_p, log_q),
        "forward_kl": lambda: kl(log_q, log_p),
        "jsd": lambda: lam * kl(log_q, log_m) + (1 - lam) * kl(log_p, log_m),
    }[kind]()
    (gradient,) = torch.autograd.grad(loss.sum(), s)
    return loss.detach(), gradient, beta


def sharded(target: Target, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss, gradient of this rank's columns, beta and status, with garbage in the padding."""
    group = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
    vocab = VocabShard.from_group(PADDED_VOCAB_SIZE, VOCAB_SIZE, group)
    student, teacher, reference, tokens = rows()
    w = target.teacher_weight
    padding = torch.full((len(student), PADDED_VOCAB_SIZE - VOCAB_SIZE), 77.0)
    columns = slice(vocab.start, vocab.start + vocab.size)
    s, m, r = (
        torch.cat([logits, padding], 1)[:, columns].clone()
        for logits in (student, (w * teacher + reference) / (1 + w), reference)
    )
    wanted = vocab_entropy(r, vocab) if target.needs_reference_entropy else None
    s.requires_grad_()
    stats = distillation_loss(
        s, m, tokens, target=target, divergence=DIVERGENCES[kind], vocab=vocab, reference_entropy=wanted
    )
    stats.loss.sum().backward()
    assert s.grad is not None and stats.teacher_entropy.isnan().all() and not stats.top1_agreement.any()
    return stats.loss.detach(), s.grad, stats.beta, stats.status


def test_the_match_on_a_two_way_fork_keeps_the_reference_or_returns_its_mirror_image() -> None:
    """Flips where w > w* = logit(r) / logit(t), in absolute value."""
    r, t = math.log(0.1 / 0.9), math.log(0.7 / 0.3)
    flip = abs(r / t)
    reference, teacher = (torch.tensor([[value, 0.0]], dtype=torch.float64) for value in (r, t))
    for weight, expected in ((0.5 * flip, 0.1), (1.6 * flip, 0.9)):
        target = Target(teacher_weight=weight, k_max=None, anchor="reference")
        q = mixed_target(torch.zeros(1, 2).double(), teacher, target, reference).log_q.exp()
        assert q[0, 0].item() == pytest.approx(expected, abs=1e-9)


def test_with_the_geometric_k_reverse_kl_is_distillation_with_a_penalty_to_the_reference() -> None:
    """(1 + w) KL(p || q) = w KL(p || t) + KL(p || r) + const, so the gradients are equal."""
    (s, t), (r, _) = pair(1), pair(2)
    s.requires_grad_()
    log_p, log_t, log_r = s.log_softmax(-1), t.log_softmax(-1), r.log_softmax(-1)
    log_q = mixed_target(s.detach(), t, Target("fixed", anchor="reference"), r).log_q
    ours = (1 + W) * (log_p.exp() * (log_p - log_q)).sum()
    theirs = (log_p.exp() * (W * (log_p - log_t) + (log_p - log_r))).sum()
    for a, b in zip(torch.autograd.grad(ours, s, retain_graph=True), torch.autograd.grad(theirs, s), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("weight", [0.25, 0.75, 1.0, 2.0, 8.0])
def test_with_the_geometric_k_the_target_is_that_of_beta_opsd(weight: float) -> None:
    """beta-OPSD (arXiv 2607.28582): q ~ teacher^(1 / beta) reference^(1 - 1 / beta); beta = (1 + w) / w."""
    (s, t), (r, _) = pair(1), pair(2)
    beta = (1 + weight) / weight
    interpolated = t.softmax(-1) ** (1 / beta) * r.softmax(-1) ** (1 - 1 / beta)
    expected = (interpolated / interpolated.sum(-1, keepdim=True)).log()
    for k in (None, 1 + weight):
        found = mixed_target(s, t, Target("fixed", teacher_weight=weight, k=k, anchor="reference"), r)
        torch.testing.assert_close(found.log_q, expected, rtol=1e-12, atol=1e-12)


def test_the_target_stands_still_while_the_student_moves_and_does_not_where_it_matches_the_student() -> None:
    (s, t), (r, _) = pair(3), pair(4)
    for target, stands in ((Target(anchor="reference"), True), (Target(anchor="reference", match="student"), False)):
        first, second = (mixed_target(student, t, target, r).log_q for student in (s, 0.2 * s))
        assert torch.equal(first, second) == stands


def test_equal_models_give_the_reference_itself_at_the_geometric_k() -> None:
    s, _ = pair(5)
    for target in (TARGETS["reference's entropy"], TARGETS["student's entropy, strict"], TARGETS["geometric mean"]):
        found = mixed_target(s, s, target, s)
        torch.testing.assert_close(found.log_q, s.log_softmax(-1), rtol=0, atol=1e-12)
        stats = distillation_loss(
            s.float(),
            s.float(),
            torch.zeros(16, dtype=torch.int64),
            target=target,
            divergence=Divergence(),
            vocab=VocabShard(0, 200, 200),
            reference_entropy=entropy(s.float().log_softmax(-1)) if target.needs_reference_entropy else None,
        )
        assert stats.loss.max() < 1e-6
        torch.testing.assert_close(stats.beta, torch.full((16,), 1 / target.geometric_k), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", TARGETS)
def test_the_definition_equals_float64_written_out(name: str) -> None:
    student, teacher, reference, _ = rows(torch.float64)
    target = TARGETS[name]
    _, _, beta = oracle(student, teacher, reference, target, "reverse_kl")
    found = mixed_target(student, teacher, target, reference)
    known = found.status != Status.UNDETERMINED
    torch.testing.assert_close(found.beta[known], beta[known], rtol=1e-6, atol=0)


@combinations(name=list(TARGETS), kind=list(DIVERGENCES), strength=1)
def test_loss_gradient_and_k_on_one_shard_equal_float64(name: str, kind: str) -> None:
    check(TARGETS[name], kind, [sharded(TARGETS[name], kind)])


def sharded_cases() -> list[tuple[Tensor, ...]]:
    return [sharded(target, kind) for target, kind in zip(TARGETS.values(), 3 * list(DIVERGENCES), strict=False)]


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.full)])
def test_loss_gradient_and_k_on_shards_equal_float64(ranks: RankPool, world_size: int) -> None:
    per_rank = ranks.run(sharded_cases, world_size=world_size)
    for (target, kind), *shards in zip(
        zip(TARGETS.values(), 3 * list(DIVERGENCES), strict=False), *per_rank, strict=True
    ):
        assert all(torch.equal(shard[0], shards[0][0]) for shard in shards)
        check(target, kind, shards)


def check(target: Target, kind: str, shards: list[tuple[Tensor, ...]]) -> None:
    """Assert that loss, gradient and k of the shards together are those of `oracle`."""
    student, teacher, reference, _ = rows()
    loss, gradient, beta = oracle(student, teacher, reference, target, kind)
    ours = torch.cat([shard[1] for shard in shards], 1)
    known = shards[0][3] != Status.UNDETERMINED
    known[5] = False  # its float32 logits near 1e4 have three digits behind the point
    assert known.sum() >= 9
    matters = known.clone()
    matters[4] = False  # every beta gives the same target, since all columns are tied
    torch.testing.assert_close(shards[0][2].double()[matters], beta[matters], rtol=2e-4, atol=0)
    torch.testing.assert_close(shards[0][0].double()[known], loss[known], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(ours[:, :VOCAB_SIZE].double()[known], gradient[known], rtol=2e-4, atol=2e-5)
    assert (ours[:, VOCAB_SIZE:] == 0).all()


@pytest.mark.parametrize("mode", ["keep_gradient", "low_memory"])
def test_the_fused_layer_projects_the_mixed_states_once(mode: str) -> None:
    """The states of the mix and the separately projected logits give one loss and one gradient."""
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(11, 16, generator=generator) for _ in range(3)]
    weights = [torch.randn(PADDED_VOCAB_SIZE, 16, generator=generator) for _ in range(2)]
    tokens = torch.randint(VOCAB_SIZE, (11,), generator=generator)
    vocab, target = VocabShard(0, PADDED_VOCAB_SIZE, VOCAB_SIZE), TARGETS["reference's entropy"]
    student, teacher, reference = hidden
    wanted = vocab_entropy(reference @ weights[1].t(), vocab)

    plain = student.clone().requires_grad_()
    mix = (W * (teacher @ weights[1].t()) + reference @ weights[1].t()) / (1 + W)
    expected = distillation_loss(
        plain @ weights[0].t(),
        mix,
        tokens,
        target=target,
        divergence=Divergence(),
        vocab=vocab,
        reference_entropy=wanted,
    )
    expected.loss.sum().backward()
    fused = student.clone().requires_grad_()
    got = fused_distillation_loss(
        fused,
        (W * teacher + reference) / (1 + W),
        weights[0],
        weights[1],
        tokens,
        target=target,
        divergence=Divergence(),
        vocab=vocab,
        reference_entropy=wanted,
        chunk_tokens=4,
        mode=mode,
    )
    got.loss.sum().backward()
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused.grad, plain.grad, rtol=1e-4, atol=1e-4)


def fused_with_two_weights(mode: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss and gradient of the fused layer where teacher and reference have other weights, and of float64."""
    generator = torch.Generator().manual_seed(0)
    student, teacher, reference = (torch.randn(11, 16, generator=generator).to(dtype) for _ in range(3))
    group = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
    vocab, target = VocabShard.from_group(PADDED_VOCAB_SIZE, VOCAB_SIZE, group), TARGETS["reference's entropy"]
    weights = [torch.randn(PADDED_VOCAB_SIZE, 16, generator=generator).to(dtype) for _ in range(3)]
    own = [weight[vocab.start : vocab.start + vocab.size] for weight in weights]
    tokens = torch.randint(VOCAB_SIZE, (11,), generator=generator)
    s, t, r = (
        h.double() @ w[:VOCAB_SIZE].double().t() for h, w in zip((student, teacher, reference), weights, strict=True)
    )
    hidden = student.double().clone().requires_grad_()
    expected, of_logits, _ = oracle(s, t, r, target, "reverse_kl")
    (gradient,) = torch.autograd.grad(hidden @ weights[0][:VOCAB_SIZE].double().t(), hidden, of_logits)

    cut = slice(None)
    if group is not None:  # each rank holds a slice of the width
        width = 16 // dist.get_world_size()
        cut = slice(dist.get_rank() * width, (dist.get_rank() + 1) * width)
    trained = student.clone().requires_grad_()
    got = fused_distillation_loss(
        trained,
        teacher[:, cut],
        own[0],
        own[1],
        tokens,
        target=target,
        divergence=Divergence(),
        vocab=vocab,
        reference_entropy=vocab_entropy(reference @ own[2].t(), vocab),
        reference=(reference[:, cut], own[2]),
        chunk_tokens=4,
        mode=mode,
    )
    got.loss.sum().backward()
    assert trained.grad is not None
    return got.loss.detach(), trained.grad, expected, gradient


def fused_with_two_weights_in_each_mode() -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    return [fused_with_two_weights(mode, torch.float32) for mode in FUSED_MODES]


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.full)])
def test_the_fused_layer_projects_a_reference_with_other_weights_apart(ranks: RankPool, world_size: int) -> None:
    for rank in ranks.run(fused_with_two_weights_in_each_mode, world_size=world_size):
        for loss, gradient, expected, expected_gradient in rank:
            torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", FUSED_MODES)
def test_two_projections_in_float64_equal_the_definition(mode: str) -> None:
    loss, gradient, expected, expected_gradient = fused_with_two_weights(mode, torch.float64)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)  # beta is solved to 1e-5 nats
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", FUSED_MODES)
def test_one_projection_of_the_mixed_states_equals_two_in_float64(mode: str) -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher, reference = torch.randn(3, 11, 16, generator=generator, dtype=torch.float64)
    weight, frozen = torch.randn(2, PADDED_VOCAB_SIZE, 16, generator=generator, dtype=torch.float64)
    found = []
    for states, apart in (((W * teacher + reference) / (1 + W), None), (teacher, (reference, frozen))):
        trained = student.clone().requires_grad_()
        stats = fused_distillation_loss(
            trained,
            states,
            weight,
            frozen,
            torch.zeros(11, dtype=torch.int64),
            target=TARGETS["geometric mean"],
            divergence=Divergence(),
            vocab=VocabShard(0, PADDED_VOCAB_SIZE, VOCAB_SIZE),
            reference=apart,
            chunk_tokens=4,
            mode=mode,
        )
        stats.loss.sum().backward()
        assert trained.grad is not None
        found.append((stats.loss.detach(), trained.grad))
    assert found[0][0].min() > 0.01
    for once, twice in zip(*found, strict=True):
        torch.testing.assert_close(twice, once, rtol=1e-11, atol=1e-12)


def test_a_reference_of_another_shape_or_without_its_target_is_refused() -> None:
    student, weight = torch.randn(3, 16), torch.randn(PADDED_VOCAB_SIZE, 16)
    vocab = VocabShard(0, PADDED_VOCAB_SIZE, VOCAB_SIZE)
    arguments = (student, student, weight, None, torch.zeros(3, dtype=torch.int64))
    options = {"divergence": Divergence(), "vocab": vocab}
    anchored = Target("fixed", anchor="reference")
    for target, reference, words in (
        (Target(anchor="student"), (student, weight), "reference must be None without anchor=reference"),
        (anchored, (student[:2], weight), r"reference_hidden must be \[3, r\].*got \[2, 16\]"),
        (anchored, (student, weight[:5]), r"reference_weight must be \[192, 16\].*got \[5, 16\]"),
        (anchored, (student.double(), weight), "reference_hidden must be a dense tensor of .* of one dtype"),
        (anchored, (student[:, 1:], weight), "the reference's states must be of the width 16"),
    ):
        with pytest.raises(ValueError, match=words):
            fused_distillation_loss(*arguments, target=target, reference=reference, **options)


def test_the_entropy_of_a_vocabulary_is_that_of_its_valid_columns() -> None:
    logits = torch.cat([rows()[0], torch.full((12, 42), 99.0)], 1)
    found = vocab_entropy(logits, VocabShard(0, PADDED_VOCAB_SIZE, VOCAB_SIZE))
    torch.testing.assert_close(found, entropy(rows()[0].double().log_softmax(-1)), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"logits must be \[12, 150\].*got \[12, 192\]"):
        vocab_entropy(logits, VocabShard(0, 150, 150))


def test_what_does_not_fit_is_refused() -> None:
    s, t = pair(0)
    with pytest.raises(ValueError, match="reference_logits must be given with anchor=reference only"):
        mixed_target(s, t, Target(anchor="reference"))
    with pytest.raises(ValueError, match="reference_logits must be given with anchor=reference only"):
        mixed_target(s, t, Target(anchor="student"), s)
    vocab = VocabShard(0, 200, 200)
    arguments = s, t, torch.zeros(16, dtype=torch.int64)
    for target, given in ((Target(anchor="reference"), None), (Target(anchor="student"), entropy(s))):
        with pytest.raises(ValueError, match="reference_entropy must be"):
            distillation_loss(*arguments, target=target, divergence=Divergence(), vocab=vocab, reference_entropy=given)
