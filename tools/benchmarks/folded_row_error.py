# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The rounding error of the folded row: one projection of mixed hidden states in place of two projections, in bf16.

An anchored target keeps h = (w h_t + h_r) / (1 + w) of teacher and reference, rounded once, and projects h alone.  Here
the loss of that row is compared with the loss of (w t + r) / (1 + w), rounded once, where t and r are projected
separately, and both are compared with float64 products of the same states and weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_selfdistill.loss.definition import entropy, mixed_target
from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard, distillation_loss, vocab_entropy
from megatron_selfdistill.loss.target import Divergence, Target, unit_mix

ROUNDED = torch.bfloat16
FOLDED, TWO, EXACT = "one projection", "two projections", "float64"
PAIRS = ((FOLDED, TWO), (FOLDED, EXACT), (TWO, EXACT))
QUANTITIES = ("loss", "k", "entropy", "gradient")


@dataclass(frozen=True)
class States:
    """Hidden states ``[R, h]`` of R tokens in bf16: the student's, the teacher's and the reference's."""

    student: Tensor
    teacher: Tensor
    reference: Tensor


@dataclass(frozen=True)
class Row:
    """Per token: the loss [R] and the entropy [R] of the target in nats, k [R], and the gradient [R, V]."""

    loss: Tensor
    k: Tensor
    entropy: Tensor
    gradient: Tensor


def random_rows(tokens: int, hidden: int, generator: torch.Generator) -> States:
    """Return states of three related models, whose logits have a standard deviation of about 3."""
    base = torch.randn(tokens, hidden, generator=generator)
    student, teacher, reference = (
        (base + share * torch.randn(tokens, hidden, generator=generator)).to(ROUNDED) for share in (0.3, 0.5, 0.2)
    )
    return States(student, teacher, reference)


def nasty_rows(tokens: int, weight: Tensor, generator: torch.Generator) -> States:
    """Return states that rounding disturbs most, in equal parts.

    All three models equal; teacher and reference opposite; nearly one-hot; nearly uniform; a teacher that is certain of
    another token than the others; two equal columns at the maximum; and channels a hundred times as large as the rest.
    ``weight [V, h]`` has two equal columns of logits, 0 and 1.
    """
    size = -(-tokens // 7)
    rows = random_rows(7 * size, weight.shape[1], generator)
    student, teacher, reference = ([*x.float().split(size)] for x in (rows.student, rows.teacher, rows.reference))
    student[0] = teacher[0] = reference[0]
    teacher[1] = -reference[1]
    for models in (student, teacher, reference):
        models[2] *= 6
        models[3] *= 0.02
        models[6][:, :4] *= 100
    directions = weight.float() / weight.float().square().sum(1, keepdim=True)  # a state with a logit of 1 there
    count = len(teacher[4])
    chosen = torch.randint(2, len(weight), (2, count), generator=generator)
    teacher[4] = teacher[4] + 15 * directions[chosen[0]]
    student[4], reference[4] = (models[4] + 15 * directions[chosen[1]] for models in (student, reference))
    for models in (student, teacher, reference):
        models[5] = models[5] + 15 * directions[0]
    return States(*(torch.cat(parts)[:tokens].to(ROUNDED) for parts in (student, teacher, reference)))


def output_weight(vocab: int, hidden: int, generator: torch.Generator) -> Tensor:
    """Return an output weight ``[V, h]`` in bf16, with which states of size 1 have logits of size 3."""
    weight: Tensor = torch.randn(vocab, hidden, generator=generator) * 3 / hidden**0.5
    weight[1] = weight[0]
    return weight.to(ROUNDED)


def rows_of(states: States, weight: Tensor, target: Target) -> dict[str, Row]:
    """Return the loss from one projection, from two projections, and from float64 products."""
    w = target.teacher_weight
    student = (states.student @ weight.t()).float()
    teacher, reference = states.teacher @ weight.t(), states.reference @ weight.t()
    mixed = unit_mix(states.reference, states.teacher, w).to(ROUNDED)
    separately = unit_mix(reference, teacher, w).to(ROUNDED)
    exact = (states.teacher.double() @ weight.double().t(), states.reference.double() @ weight.double().t())
    return {
        FOLDED: _row_of_mix(student, (mixed @ weight.t()).float(), reference, target),
        TWO: _row_of_mix(student, separately.float(), reference, target),
        EXACT: _row_by_definition(student.double(), *exact, target),
    }


def _row_of_mix(student: Tensor, mix: Tensor, reference: Tensor, target: Target) -> Row:
    vocab = VocabShard(0, student.shape[1], student.shape[1])
    student = student.clone().requires_grad_(True)
    tokens = torch.zeros(len(student), dtype=torch.int64, device=student.device)
    wanted = vocab_entropy(reference, vocab) if target.needs_reference_entropy else None
    stats = distillation_loss(
        student, mix, tokens, target=target, divergence=Divergence(), vocab=vocab, reference_entropy=wanted
    )
    (gradient,) = torch.autograd.grad(stats.loss.sum(), student)
    return Row(stats.loss.detach(), 1 / stats.beta, stats.target_entropy, gradient)


def _row_by_definition(student: Tensor, teacher: Tensor, reference: Tensor, target: Target) -> Row:
    student.requires_grad_(True)
    found = mixed_target(student.detach(), teacher, target, reference)
    log_p = student.log_softmax(-1)
    loss = (log_p.exp() * (log_p - found.log_q)).sum(-1)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    return Row(loss.detach(), 1 / found.beta, entropy(found.log_q), gradient)


def differences(one: Row, other: Row) -> dict[str, tuple[float, float]]:
    """Return (maximum, mean) over the tokens of the absolute difference in each of `QUANTITIES`.

    A token's difference in the gradient is the largest of its entries.
    """
    found = {}
    for name in QUANTITIES:
        by_token = (getattr(one, name).double() - getattr(other, name).double()).abs()
        by_token = by_token.amax(1) if name == "gradient" else by_token
        found[name] = (float(by_token.max()), float(by_token.mean()))
    return found


def table(targets: Mapping[str, Target], tokens: int, hidden: int, vocab: int, device: torch.device) -> str:
    """Return the Markdown table of all ``targets``, on random and on nasty rows."""
    generator = torch.Generator().manual_seed(0)
    weight = output_weight(vocab, hidden, generator)
    kinds = {"random": random_rows(tokens, hidden, generator), "nasty": nasty_rows(tokens, weight, generator)}
    lines = [
        f"{tokens} tokens of each kind, hidden states of {hidden}, vocabulary {vocab}, bf16, reverse KL; maximum / "
        "mean of the absolute difference",
        "",
        "| target | rows | difference of | loss, nats | k | H(q), nats | gradient |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, target in targets.items():
        for kind, states in kinds.items():
            moved = States(*(getattr(states, each).to(device) for each in ("student", "teacher", "reference")))
            rows = rows_of(moved, weight.to(device), target)
            for one, other in PAIRS:
                found = differences(rows[one], rows[other])
                cells = " | ".join("{:.1e} / {:.1e}".format(*found[quantity]) for quantity in QUANTITIES)
                lines.append(f"| {name} | {kind} | {one} and {other} | {cells} |")
    return "\n".join(lines)
