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
from layouts import Case, GivenCoefficients, contexts, join, worst_difference
from logit_pairs import by_bisection, kl
from parity import TOLERANCE

from megatron_selfdistill.config import OptimizerConfig, ParallelConfig
from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.packed_batch import PackingRules
from megatron_selfdistill.data.packing import pack, pad_to_count
from megatron_selfdistill.loss import TokenStats
from megatron_selfdistill.loss.target import Divergence, Target
from megatron_selfdistill.loss.weighting import TruncatedImportance
from megatron_selfdistill.model.build import wrap_for_training
from megatron_selfdistill.model.forward import Fusion, unwrapped
from megatron_selfdistill.pipeline import schedule, token_losses
from megatron_selfdistill.pipeline.next_token import next_token

Gradients = dict[str, torch.Tensor]
RULES = PackingRules(max_tokens=layouts.MAX_TOKENS, cp_size=1, tp_size=1, paired=False)
CAPS = [None, 2.0]
FUSIONS = [None, Fusion("keep_gradient", 5), Fusion("low_memory", 5)]


def wrapped(chunks: list) -> list:
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
        log_q, _ = by_bisection(rows[0].detach(), rows[1].detach(), Target(anchor="student"))
        losses.append(kl(rows[0].log_softmax(-1), log_q))
        log_p = torch.log_softmax(rows[0].detach(), -1)
        log_probs.append(log_p.gather(1, torch.tensor(context.response)[:, None])[:, 0])
    ratio = (torch.cat(log_probs) - sampled).exp()
    names, parameters = zip(*unwrapped(student).named_parameters(), strict=True)
    plain = {}
    for cap in CAPS:
        weights = 1.0 if cap is None else ratio.clamp(max=cap)
        loss = (weights * torch.cat(losses)).mean()
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        plain[cap] = loss.item(), dict(zip(names, gradients, strict=True))
    return plain


def gradients_of_plain_autograd() -> tuple[dict, dict]:
    """Return loss and gradients by autograd for each of `CAPS`, and by the schedule for each of `FUSIONS` as well."""
    model = models.model_config("tied", num_layers=2)
    chunks, grid = models.build(model, ParallelConfig())
    teacher = models.another(model, chunks, grid)
    total = sum(len(c.response) for c in contexts())
    sampled = -3 - 6 * torch.rand(total, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    plain = plain_gradients(chunks[0], teacher[0], sampled)
    student, batch = wrapped(chunks), pack(contexts(), RULES)
    vocab, ours = layouts.vocab_shard(student, grid), {}
    for cap, fusion in itertools.product(CAPS, FUSIONS):
        clear(student)
        loss_of = token_losses.self_distillation(Target(anchor="student"), Divergence(), fusion=fusion)
        weight = TruncatedImportance(sampled, cap) if cap is not None else None
        output = schedule.run(
            student, schedule.ScheduledTeacher(teacher), batch, loss_of, grid, vocab, token_coefficients=weight
        )
        if cap is not None:
            cut = (output.coefficients.divergence == cap).double().mean()
            assert 0.2 < cut < 0.9, "some weights are cut and some are not"
        weights = 1 if output.coefficients is None else output.coefficients.divergence
        ours[cap, fusion] = float((weights * output.stats.loss).mean()), main_grads(student)
    return plain, ours


def test_gradient_equals_plain_autograd_one_context_at_a_time(ranks):
    ((plain, scheduled),) = ranks.run(gradients_of_plain_autograd, world_size=1)
    for (cap, fusion), (got, ours) in scheduled.items():
        loss, expected = plain[cap]
        assert loss > 0.005 and got == pytest.approx(loss, rel=TOLERANCE)
        worst, where = worst_difference(ours, expected)
        assert worst <= TOLERANCE, f"{cap}, {fusion}, {where}: {worst:.1e}"


def next_token_gradients() -> list[tuple[float, float, dict, dict]]:
    """Return loss and gradient by autograd and by the schedule, without coefficients and with those of two terms."""
    chunks, grid = models.build(models.model_config("shallow"), ParallelConfig())
    given, parts = GivenCoefficients.of(contexts()), []
    for context in contexts():
        text, tokens = torch.tensor([context.student_prompt + context.response]), torch.tensor(context.response)
        logits = chunks[0](text, torch.arange(text.size(1))[None], None)[0, :, : models.VOCAB_SIZE].double()
        parts.append(logits[-len(tokens) - 1 : -1].log_softmax(-1).gather(1, tokens[:, None])[:, 0])
    log_prob = torch.cat(parts)
    of_tokens = given(log_prob.detach(), torch.arange(len(log_prob)))
    names, parameters = zip(*unwrapped(chunks[0]).named_parameters(), strict=True)
    plain = []
    for factor in (torch.ones_like(log_prob), of_tokens.divergence + of_tokens.policy):
        total = -(factor * log_prob).mean()
        plain.append(dict(zip(names, torch.autograd.grad(total, parameters, retain_graph=True), strict=True)))
    student, batch, found = wrapped(chunks), pack(contexts(), RULES), []
    for expected, coefficients in zip(plain, (None, given), strict=True):
        clear(student)
        vocab = layouts.vocab_shard(student, grid)
        output = schedule.run(student, None, batch, next_token, grid, vocab, token_coefficients=coefficients)
        if coefficients is not None:
            own = coefficients(output.stats.student_log_prob, output.response_ids)
            for field in dataclasses.fields(own):
                assert torch.equal(getattr(output.coefficients, field.name), getattr(own, field.name))
            assert 0.1 < own.clipped.double().mean() < 0.9, "some tokens are clipped and some are not"
        found.append((float(-log_prob.mean()), float(output.stats.loss.mean()), expected, main_grads(student)))
    return found


def test_next_token_training_is_cross_entropy_over_the_valid_vocabulary_with_the_coefficients_of_tokens(ranks):
    """test_anchored_step.py has steps of two terms with a teacher."""
    for loss, got, plain, ours in ranks.run(next_token_gradients, world_size=1)[0]:
        assert got == pytest.approx(loss, rel=1e-6)
        assert worst_difference(ours, plain)[0] <= TOLERANCE


def refusals() -> list[str]:
    """Return the messages of steps with a policy term whose gradient the token loss does not have."""
    chunks, grid = models.build(models.model_config("shallow"), ParallelConfig())
    teacher = models.another(models.model_config("shallow"), chunks, grid)
    student, coefficients = wrapped(chunks), GivenCoefficients.of(contexts())
    own = Target(anchor="student"), Divergence()
    plain = token_losses.self_distillation(*own)

    def detached(*arguments: Any, **options: Any) -> TokenStats:
        stats = plain(*arguments, **options)
        return dataclasses.replace(stats, student_log_prob=stats.student_log_prob.detach())

    messages = []
    for token_loss in (token_losses.self_distillation(*own, fusion=Fusion("keep_gradient", 5)), detached):
        arguments = student, schedule.ScheduledTeacher(teacher), pack(contexts(), RULES), token_loss, grid
        options = {"vocab": layouts.vocab_shard(student, grid), "token_coefficients": coefficients}
        with pytest.raises(ValueError) as caught:
            schedule.run(*arguments, **options)
        messages.append(str(caught.value))
        schedule.run(*arguments, **options, forward_only=True)
    return messages


def test_a_policy_term_without_a_gradient_is_refused_and_never_left_out(ranks):
    ((keeping, detached),) = ranks.run(refusals, world_size=1)
    assert "keep_gradient holds the gradient of the divergence alone" in keeping
    assert "token_coefficients has a policy term, whose gradient the token loss does not have" in detached


def identities() -> list[tuple[float, float]]:
    """Return the largest loss and gradient of one prompt for both roles, with the same weights, for several rules."""
    chunks, grid = models.build(models.model_config("shallow"), ParallelConfig())
    student = wrapped(chunks)
    same = [dataclasses.replace(c, teacher_prompt=c.student_prompt) for c in contexts()]
    batch = pack(same, dataclasses.replace(RULES, paired=True))
    vocab, found = layouts.vocab_shard(student, grid), []
    for rule in ("entropy_matched", "fixed", "teacher_alone"):
        clear(student)
        loss_of = token_losses.self_distillation(Target(rule, anchor="student"), Divergence())
        output = schedule.run(student, schedule.ScheduledTeacher(student), batch, loss_of, grid, vocab)
        largest = max(float(gradient.abs().max()) for gradient in main_grads(student).values())
        found.append((float(output.stats.loss.abs().max()), largest))
    return found


def test_one_prompt_of_both_roles_with_the_same_weights_has_no_loss_and_no_gradient(ranks):
    for loss, gradient in ranks.run(identities, world_size=1)[0]:
        assert loss <= 1e-6 and gradient <= 1e-5


AUXILIARY = {
    "transformer": {"moe_aux_loss_coeff": 0.1},
    "moe_router_enable_expert_bias": True,
    "moe_router_score_function": "sigmoid",
}


def auxiliary_gradient(
    cuts: ParallelConfig, changes: dict, weightless=0, max_tokens=32, response=10, finalize=True, more_teachers=0
) -> dict:
    """Return the router's gradient if teacher and student agree; each microbatch has one sequence of 24 tokens."""
    chunks, grid = models.build(models.model_config("moe", **changes), cuts)
    student = wrapped(chunks)
    rng = random.Random(3)
    texts = [[rng.randrange(models.VOCAB_SIZE) for _ in range(24)] for _ in range(4)]
    pairs = [ContextPair(str(i), t[:-response], t[:-response], t[-response:], False) for i, t in enumerate(texts)]
    rules = PackingRules(max_tokens=max_tokens, cp_size=1, tp_size=grid.tp_size, paired=False)
    batches = [pack([pair], rules, seq_length=max_tokens) for pair in pairs[grid.dp_rank :: grid.dp_size]]
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
    buffers = [pair for chunk in student for pair in unwrapped(chunk).named_buffers()]
    counts = [buffer.clone() for name, buffer in buffers if name.endswith("local_tokens_per_expert")]
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


@pytest.mark.full
def test_router_losses_do_not_depend_on_padding_lengths_and_the_microbatches_of_others(on_one_rank):
    for loss, variation in itertools.product(LOSSES, ON_ONE_RANK):
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
    case = Case(kind="shallow", parallel=cuts, teacher=teacher, target=target)
    saved = ranks.run(left_in_autograd, case, world_size=world_size)
    without_gradient = [rank[role] for rank in saved for role in rank.keys() - {"student"}]
    assert without_gradient == [0] * world_size * (2 if target.is_anchored else 1)
    assert min(rank["student"] for rank in saved) > 0, "what autograd saves must be seen"
