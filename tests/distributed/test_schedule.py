# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The schedule against plain autograd on one context at a time, and what must not enter the gradient."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterable
from typing import Any

import layouts
import models
import pytest
import torch
from layouts import Case, contexts, join, worst_difference
from parity import TOLERANCE

from megatron_selfdistill.config import OptimizerConfig, ParallelConfig
from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.packed_batch import PackingRules
from megatron_selfdistill.data.packing import pack, pad_to_count
from megatron_selfdistill.loss.target import Divergence, Target
from megatron_selfdistill.loss.weighting import TruncatedImportance
from megatron_selfdistill.model.build import build_chunks, wrap_for_training
from megatron_selfdistill.model.forward import Fusion, unwrapped
from megatron_selfdistill.pipeline import schedule, token_losses
from megatron_selfdistill.pipeline.next_token import next_token


def reverse_kl_to_capped_mix(s: torch.Tensor, t: torch.Tensor, w: float = 0.75) -> torch.Tensor:
    """KL(p || q) with H(q) = H(p), k <= 1 + w, by bisection in float64; q is a constant."""
    log_p = torch.log_softmax(s, -1)
    mix = w * t + s.detach()
    wanted = -(log_p.exp() * log_p).sum(-1).detach()
    low, high = torch.full_like(wanted, 1 / (1 + w)), torch.full_like(wanted, 16 / (1 + w))
    for _ in range(80):
        middle = (low + high) / 2
        log_q = torch.log_softmax(middle[:, None] * mix, -1)
        soft = -(log_q.exp() * log_q).sum(-1) > wanted
        low, high = torch.where(soft, middle, low), torch.where(soft, high, middle)
    log_q = torch.log_softmax(low[:, None] * mix, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


Gradients = dict[str, torch.Tensor]
CAPS = [None, 2.0]
FUSIONS = [None, Fusion("keep_gradient", 5), Fusion("low_memory", 5)]


def wrapped(chunks: list) -> list:
    """Return the chunks as a student whose gradients are zero."""
    for chunk in chunks:
        chunk.zero_grad(set_to_none=True)  # or DDP would add them to its own
    student = wrap_for_training(chunks, OptimizerConfig(precision="fp32", use_distributed_optimizer=False))
    clear(student)
    return student


def clear(student: list) -> None:
    for chunk in student:
        chunk.zero_grad_buffer()


def main_grads(student: list) -> Gradients:
    return {name: p.main_grad.clone() for name, p in unwrapped(student[0]).named_parameters()}


def plain_gradients(student: torch.nn.Module, teacher: torch.nn.Module, sampled: torch.Tensor) -> dict:
    """Return loss and gradients by autograd, for each of `CAPS`: a cap weights each token by min(p / mu, cap)."""
    losses, log_probs = [], []
    for context in contexts():
        rows = []
        for chunk, prompt in ((student, context.student_prompt), (teacher, context.teacher_prompt)):
            tokens = torch.tensor([prompt + context.response])
            logits = chunk(tokens, torch.arange(tokens.size(1))[None], None)[0, :, : models.VOCAB_SIZE]
            rows.append(logits[len(prompt) - 1 : -1].double())
        losses.append(reverse_kl_to_capped_mix(rows[0], rows[1].detach()))
        log_p = torch.log_softmax(rows[0].detach(), -1)
        log_probs.append(log_p.gather(1, torch.tensor(context.response)[:, None])[:, 0])
    ratio = (torch.cat(log_probs) - sampled).exp()
    names, parameters = zip(*unwrapped(student).named_parameters(), strict=True)
    plain = {}
    for cap in CAPS:
        weights = 1.0 if cap is None else ratio.clamp(max=cap)
        loss = (weights * torch.cat(losses)).mean()
        plain[cap] = (
            loss.item(),
            dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True)),
        )
    return plain


def gradients_of_plain_autograd() -> tuple[dict, dict]:
    """Return loss and gradients by autograd for each of `CAPS`, and by the schedule for each of `FUSIONS` as well."""
    model = models.model_config("tied", num_layers=2)
    chunks, grid = models.build(model, ParallelConfig())
    teacher = build_chunks(model, chunks[0].config, grid, models.VOCAB_SIZE)
    models.fill_from_names(teacher, seed=1)
    total = sum(len(c.response) for c in contexts())
    sampled = -3 - 6 * torch.rand(total, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    plain = plain_gradients(chunks[0], teacher[0], sampled)
    student = wrapped(chunks)
    batch = pack(contexts(), PackingRules(max_tokens=layouts.MAX_TOKENS, cp_size=1, tp_size=1, paired=False))
    vocab, ours = layouts.vocab_shard(student, grid), {}
    for cap, fusion in itertools.product(CAPS, FUSIONS):
        clear(student)
        loss_of = token_losses.self_distillation(Target(anchor="student"), Divergence(), fusion=fusion)
        weight = TruncatedImportance(sampled, cap) if cap is not None else None
        output = schedule.run(
            student, schedule.ScheduledTeacher(teacher), batch, loss_of, grid, vocab, token_coefficients=weight
        )
        if cap is not None:
            assert 0.2 < (output.coefficients.divergence == cap).double().mean() < 0.9, (
                "some weights are cut and some are not"
            )
        weights = 1 if output.coefficients is None else output.coefficients.divergence
        ours[cap, fusion] = float((weights * output.stats.loss).mean()), main_grads(student)
    return plain, ours


@pytest.fixture(scope="module")
def plain_and_scheduled(ranks) -> tuple[dict, dict]:
    return ranks.run(gradients_of_plain_autograd, world_size=1)[0]


@pytest.mark.parametrize("fusion", FUSIONS, ids=str)
@pytest.mark.parametrize("cap", CAPS)
def test_gradient_equals_plain_autograd_one_context_at_a_time(plain_and_scheduled, cap, fusion):
    plain, scheduled = plain_and_scheduled
    (loss, expected), (got, ours) = plain[cap], scheduled[cap, fusion]
    assert loss > 0.005 and got == pytest.approx(loss, rel=TOLERANCE)
    worst, where = worst_difference(ours, expected)
    assert worst <= TOLERANCE, f"{where}: {worst:.1e}"


def next_token_gradient() -> tuple[float, float, dict, dict]:
    chunks, grid = models.build(models.model_config("shallow"), ParallelConfig())
    total, loss = sum(len(c.response) for c in contexts()), torch.zeros(())
    for context in contexts():
        tokens = torch.tensor([context.student_prompt + context.response])
        logits = chunks[0](tokens, torch.arange(tokens.size(1))[None], None)[0, :, : models.VOCAB_SIZE]
        rows = logits[len(context.student_prompt) - 1 : -1]
        labels = torch.tensor(context.response)
        loss = loss + torch.nn.functional.cross_entropy(rows, labels, reduction="sum") / total
    loss.backward()
    plain = {n: p.grad.clone() for n, p in unwrapped(chunks[0]).named_parameters()}
    student = wrapped(chunks)
    batch = pack(contexts(), PackingRules(max_tokens=layouts.MAX_TOKENS, cp_size=1, tp_size=1, paired=False))
    shard = layouts.vocab_shard(student, grid)
    output = schedule.run(student, None, batch, next_token, grid, shard)
    return float(loss), float(output.stats.loss.mean()), plain, main_grads(student)


def test_next_token_training_is_cross_entropy_over_the_valid_vocabulary(ranks):
    loss, got, plain, ours = ranks.run(next_token_gradient, world_size=1)[0]
    assert got == pytest.approx(loss, rel=1e-6)
    assert worst_difference(ours, plain)[0] <= TOLERANCE


RULES = ["entropy_matched", "fixed", "teacher_alone"]


def identities() -> list[tuple[float, float]]:
    """Return the largest loss and gradient of one prompt for both roles, with the same weights, for each of `RULES`."""
    chunks, grid = models.build(models.model_config("shallow"), ParallelConfig())
    student = wrapped(chunks)
    same = [dataclasses.replace(c, teacher_prompt=c.student_prompt) for c in contexts()]
    batch = pack(same, PackingRules(max_tokens=layouts.MAX_TOKENS, cp_size=1, tp_size=1, paired=True))
    vocab, found = layouts.vocab_shard(student, grid), []
    for rule in RULES:
        clear(student)
        loss_of = token_losses.self_distillation(Target(rule, anchor="student"), Divergence())
        output = schedule.run(student, schedule.ScheduledTeacher(student), batch, loss_of, grid, vocab)
        largest = max(float(gradient.abs().max()) for gradient in main_grads(student).values())
        found.append((float(output.stats.loss.abs().max()), largest))
    return found


def test_one_prompt_of_both_roles_with_the_same_weights_has_no_loss_and_no_gradient(ranks):
    for rule, (loss, gradient) in zip(RULES, ranks.run(identities, world_size=1)[0], strict=True):
        assert loss <= 1e-6 and gradient <= 1e-5, rule


AUXILIARY = {
    "transformer": {"moe_aux_loss_coeff": 0.1},
    "moe_router_enable_expert_bias": True,
    "moe_router_score_function": "sigmoid",
}


def auxiliary_gradient(
    cuts: ParallelConfig,
    changes: dict,
    weightless: int = 0,
    max_tokens: int = 32,
    response: int = 10,
    finalize: bool = True,
    more_teachers: int = 0,
) -> dict:
    """Return the gradient of the router if teacher and student agree, so that only auxiliary losses remain.

    Every microbatch holds one sequence of 24 tokens, and its last ``response`` tokens are the response.
    """
    chunks, grid = models.build(models.model_config("moe", **changes), cuts)
    student = wrapped(chunks)
    rng = random.Random(3)
    texts = [[rng.randrange(models.VOCAB_SIZE) for _ in range(24)] for _ in range(4)]
    pairs = [ContextPair(str(i), t[:-response], t[:-response], t[-response:], False) for i, t in enumerate(texts)]
    batches = [
        pack(
            [pair],
            PackingRules(max_tokens=max_tokens, cp_size=1, tp_size=grid.tp_size, paired=False),
            seq_length=max_tokens,
        )
        for pair in pairs[grid.dp_rank :: grid.dp_size]
    ]
    offset, streams = 0, {"student": [], "teacher": []}
    for batch in batches:
        for name, stream in streams.items():
            (microbatch,) = getattr(batch, name)
            stream.append(dataclasses.replace(microbatch, response_ids=microbatch.response_ids + offset))
        offset += response
    tokens = torch.cat([batch.response_tokens for batch in batches])
    joined = dataclasses.replace(batches[0], **streams, response_tokens=tokens, num_contexts=len(batches))
    joined = pad_to_count(joined, len(batches) + weightless, len(batches) + weightless + more_teachers)
    loss_of = token_losses.self_distillation(Target(anchor="student"), Divergence())
    if not finalize:  # finalizing turns the counts into expert biases
        student[0].config.finalize_model_grads_func = lambda *args, **kwargs: None
    schedule.run(student, schedule.ScheduledTeacher(student), joined, loss_of, grid, layouts.vocab_shard(student, grid))
    counts = [
        buffer.clone()
        for chunk in student
        for name, buffer in unwrapped(chunk).named_buffers()
        if name.endswith("local_tokens_per_expert")
    ]
    return {"grads": layouts.shards(student, lambda p: p.main_grad), "counts": counts}


def auxiliary_gradients(cuts: ParallelConfig, variations: list[tuple[dict, dict]]) -> list[dict]:
    return [auxiliary_gradient(cuts, changes, **variation) for changes, variation in variations]


def router_gradients(per_rank: Iterable[dict]) -> Gradients:
    return {key: value for key, value in join([r["grads"] for r in per_rank]).items() if "router" in key}


LOSSES = {"balance": AUXILIARY, "z": {"transformer": {"moe_z_loss_coeff": 0.1}}}
PLAIN = "plain"
ON_ONE_RANK = {
    PLAIN: {},
    "prompt padding": {"max_tokens": 64},
    "response length": {"response": 3},
    "weightless microbatches": {"weightless": 3},
    "number of teacher microbatches": {"more_teachers": 3},
}
ON_TWO_RANKS = {
    "PP2": (models.parallel(pp=2), {}),
    "EP2": (models.parallel(ep=2), {"weightless": 1}),
    "DP2": (ParallelConfig(), {}),
}


@pytest.fixture(scope="module")
def on_one_rank(ranks) -> dict[tuple[str, str], Gradients]:
    """Return the gradients of the router by loss and variation."""
    names = list(itertools.product(LOSSES, ON_ONE_RANK))
    variations = [(LOSSES[loss], ON_ONE_RANK[variation]) for loss, variation in names]
    (found,) = ranks.run(auxiliary_gradients, ParallelConfig(), variations, world_size=1)
    return {name: router_gradients([outcome]) for name, outcome in zip(names, found, strict=True)}


def assert_alike(got: Gradients, expected: Gradients) -> None:
    assert min(float(g.norm()) for g in expected.values()) > 1e-4, "there must be an auxiliary gradient to compare"
    worst, where = worst_difference(got, expected)
    assert worst <= 1e-4, f"{where}: {worst:.1e}"


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("variation", [name for name in ON_ONE_RANK if name != PLAIN])
def test_router_losses_do_not_depend_on(on_one_rank, variation, loss):
    assert_alike(on_one_rank[loss, variation], on_one_rank[loss, PLAIN])


@pytest.mark.parametrize("layout", ON_TWO_RANKS)
def test_router_losses_are_those_of_one_rank(ranks, on_one_rank, layout):
    cuts, variation = ON_TWO_RANKS[layout]
    per_rank = ranks.run(auxiliary_gradients, cuts, [(c, variation) for c in LOSSES.values()], world_size=2)
    for loss, outcomes in zip(LOSSES, zip(*per_rank, strict=True), strict=True):
        assert_alike(router_gradients(outcomes), on_one_rank[loss, PLAIN])


def test_teachers_and_weightless_microbatches_leave_the_expert_counts_alone(ranks):
    """Expert biases follow how many tokens each expert got: those of the students' real tokens only."""
    variations = [(AUXILIARY, {"finalize": False, "weightless": n}) for n in (0, 3)]
    (found,) = ranks.run(auxiliary_gradients, ParallelConfig(), variations, world_size=1)
    for layer in zip(*(outcome["counts"] for outcome in found), strict=True):
        assert torch.equal(*layer)
        assert int(layer[0].sum()) == 4 * 24 * 2  # sequences x tokens x experts per token


def nothing_to_learn() -> None:
    chunks, grid = models.build(models.model_config("shallow"), ParallelConfig())
    student = wrapped(chunks)
    batch = pad_to_count(pack([], PackingRules(max_tokens=layouts.MAX_TOKENS, cp_size=1, tp_size=1, paired=True)), 1, 1)
    loss_of = token_losses.self_distillation(Target(anchor="student"), Divergence())
    with pytest.raises(RuntimeError, match="no response tokens"):
        schedule.run(
            student, schedule.ScheduledTeacher(student), batch, loss_of, grid, layouts.vocab_shard(student, grid)
        )


def test_a_batch_without_response_tokens_is_refused(ranks):
    ranks.run(nothing_to_learn, world_size=1)


def left_in_autograd(case: Case) -> dict[str, int]:
    """Return the numbers that autograd saves for the backward pass in the microbatches of each role."""
    saved = {"teacher": 0, "student": 0} | ({"reference": 0} if case.target.is_anchored else {})
    forward = {role: getattr(schedule.ScheduledStep, f"_{role}") for role in saved}

    def counted(role: str) -> Any:
        def add(tensor: torch.Tensor) -> torch.Tensor:
            saved[role] += tensor.numel()
            return tensor

        def call(step: Any, index: int, chunk: torch.nn.Module) -> Any:
            with torch.autograd.graph.saved_tensors_hooks(add, lambda tensor: tensor):
                return forward[role](step, index, chunk)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for role in saved:
            patch.setattr(schedule.ScheduledStep, f"_{role}", counted(role))
        layouts.run(case)
    return saved


@pytest.mark.parametrize(
    ("teacher", "cuts", "world_size"),
    [("current", ParallelConfig(), 1), ("frozen", models.parallel(pp=2), 2)],
    ids=["weights with gradients", "received activations with gradients"],
)
def test_a_teacher_microbatch_keeps_no_activations(ranks, teacher, cuts, world_size):
    """On one rank frozen weights keep none even with gradients enabled: nothing that they read has a gradient."""
    target = Target(anchor="reference" if teacher == "frozen" else "student")
    saved = ranks.run(
        left_in_autograd, Case(kind="shallow", parallel=cuts, teacher=teacher, target=target), world_size=world_size
    )
    without_gradient = [rank[role] for rank in saved for role in rank.keys() - {"student"}]
    assert without_gradient == [0] * world_size * (2 if target.is_anchored else 1)
    assert min(rank["student"] for rank in saved) > 0, "what autograd saves must be seen"


def test_case_defaults_have_ragged_contexts_and_several_microbatches():
    """What the parity tests rely on."""
    lengths = {(len(c.student_prompt), len(c.teacher_prompt), len(c.response)) for c in contexts()}
    assert len(lengths) == len(contexts())
    batch = pack(contexts(), PackingRules(max_tokens=Case().max_tokens, cp_size=1, tp_size=1, paired=False))
    assert len(batch.student) >= 2 and len(batch.teacher) > len(batch.student)
