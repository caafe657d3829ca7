# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The schedule against plain autograd on one context at a time, and what must not enter the gradient."""

from __future__ import annotations

import dataclasses
import random

import layouts
import models
import pytest
import torch
from layouts import Case, contexts, join, worst_difference

from megatron_selfdistill.config import OptimizerConfig, ParallelConfig
from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.packing import PackingRules, pack, pad_to_count
from megatron_selfdistill.loss.divergence import Divergence
from megatron_selfdistill.loss.target import Target
from megatron_selfdistill.loss.weighting import TruncatedImportance
from megatron_selfdistill.model.build import build_chunks, unwrapped, wrap_for_training
from megatron_selfdistill.model.output_layer import Fusion
from megatron_selfdistill.pipeline import schedule
from megatron_selfdistill.teacher import Teacher


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


def gradients_of_plain_autograd(cap: float | None, fusion: Fusion | None) -> tuple[float, dict, dict]:
    """(loss, by autograd, by the schedule); ``cap`` weights each token by min(p / mu, cap), some made-up mu."""
    model = models.model_config("tied")
    chunks, grid = models.build(model, ParallelConfig())
    teacher = build_chunks(model, chunks[0].config, grid, models.VOCAB_SIZE)
    models.fill_from_names(teacher, seed=1)
    total = sum(len(c.response) for c in contexts())
    loss = torch.zeros((), dtype=torch.float64)
    sampled = -3 - 6 * torch.rand(total, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    done = 0
    for context in contexts():
        rows = []
        for chunk, prompt in ((chunks[0], context.student_prompt), (teacher[0], context.teacher_prompt)):
            tokens = torch.tensor([prompt + context.response])
            logits = chunk(tokens, torch.arange(tokens.size(1))[None], None)[0, :, : models.VOCAB_SIZE]
            rows.append(logits[len(prompt) - 1 : -1].double())
        losses = reverse_kl_to_capped_mix(rows[0], rows[1].detach())
        if cap is not None:
            log_p = torch.log_softmax(rows[0].detach(), -1).gather(1, torch.tensor(context.response)[:, None])[:, 0]
            losses = losses * torch.minimum((log_p - sampled[done : done + len(log_p)]).exp(), torch.tensor(cap))
            done += len(log_p)
        loss = loss + losses.sum() / total
    loss.backward()
    plain = {n: p.grad.clone() for n, p in unwrapped(chunks[0]).named_parameters()}
    chunks[0].zero_grad(set_to_none=True)  # or DDP would add it to its own

    student = wrap_for_training(chunks, OptimizerConfig(precision="fp32", use_distributed_optimizer=False))
    for chunk in student:
        chunk.zero_grad_buffer()
    batch = pack(contexts(), PackingRules(max_tokens=layouts.MAX_TOKENS, cp_size=1, tp_size=1, paired=False))
    loss_of = schedule.self_distillation(Target(), Divergence(), fusion=fusion)
    weight = TruncatedImportance(sampled, cap) if cap is not None else None
    vocab = layouts.vocab_shard(student, grid)
    output = schedule.run(student, teacher, batch, loss_of, grid, vocab, token_weights=weight)
    ours = {n: p.main_grad.clone() for n, p in unwrapped(student[0]).named_parameters()}
    weights = output.weights if weight is not None else 1
    assert float((weights * output.stats.loss).mean()) == pytest.approx(float(loss), rel=1e-5)
    if cap is not None:
        assert 0.2 < (output.weights == cap).double().mean() < 0.9, "some weights are cut and some are not"
    return float(loss), plain, ours


@pytest.mark.parametrize("fusion", [None, Fusion("keep_gradient", 5), Fusion("low_memory", 5)], ids=str)
@pytest.mark.parametrize("cap", [None, 2.0])
def test_gradient_equals_plain_autograd_one_context_at_a_time(ranks, cap, fusion):
    loss, plain, ours = ranks.run(gradients_of_plain_autograd, cap, fusion, world_size=1)[0]
    assert loss > 0.005
    worst, where = worst_difference(ours, plain)
    assert worst <= 1e-5, f"{where}: {worst:.1e}"


def next_token_gradient() -> tuple[float, float, dict, dict]:
    chunks, grid = models.build(models.model_config("gqa"), ParallelConfig())
    total, loss = sum(len(c.response) for c in contexts()), torch.zeros(())
    for context in contexts():
        tokens = torch.tensor([context.student_prompt + context.response])
        logits = chunks[0](tokens, torch.arange(tokens.size(1))[None], None)[0, :, : models.VOCAB_SIZE]
        rows = logits[len(context.student_prompt) - 1 : -1]
        labels = torch.tensor(context.response)
        loss = loss + torch.nn.functional.cross_entropy(rows, labels, reduction="sum") / total
    loss.backward()
    plain = {n: p.grad.clone() for n, p in unwrapped(chunks[0]).named_parameters()}
    chunks[0].zero_grad(set_to_none=True)  # or DDP would add it to its own
    student = wrap_for_training(chunks, OptimizerConfig(precision="fp32", use_distributed_optimizer=False))
    for chunk in student:
        chunk.zero_grad_buffer()
    batch = pack(contexts(), PackingRules(max_tokens=layouts.MAX_TOKENS, cp_size=1, tp_size=1, paired=False))
    shard = layouts.vocab_shard(student, grid)
    output = schedule.run(student, None, batch, schedule.next_token, grid, shard)
    ours = {n: p.main_grad.clone() for n, p in unwrapped(student[0]).named_parameters()}
    return float(loss), float(output.stats.loss.mean()), plain, ours


def test_next_token_training_is_cross_entropy_over_the_valid_vocabulary(ranks):
    loss, got, plain, ours = ranks.run(next_token_gradient, world_size=1)[0]
    assert got == pytest.approx(loss, rel=1e-6)
    assert worst_difference(ours, plain)[0] <= 1e-5


def identity(rule: str) -> tuple[float, float]:
    """Return the largest loss and the largest gradient of one prompt for both roles, with the same weights."""
    chunks, grid = models.build(models.model_config("gqa"), ParallelConfig())
    student = wrap_for_training(chunks, OptimizerConfig(precision="fp32", use_distributed_optimizer=False))
    for chunk in student:
        chunk.zero_grad_buffer()
    same = [dataclasses.replace(c, teacher_prompt=c.student_prompt) for c in contexts()]
    batch = pack(same, PackingRules(max_tokens=layouts.MAX_TOKENS, cp_size=1, tp_size=1, paired=True))
    output = schedule.run(
        student,
        student,
        batch,
        schedule.self_distillation(Target(rule), Divergence()),
        grid,
        layouts.vocab_shard(student, grid),
        pair_order="alternating",
    )
    largest = max(float(p.main_grad.abs().max()) for p in unwrapped(student[0]).parameters())
    return float(output.stats.loss.abs().max()), largest


@pytest.mark.parametrize("rule", ["entropy_matched", "fixed", "teacher_alone"])
def test_one_prompt_read_twice_by_the_same_weights_has_no_loss_and_no_gradient(ranks, rule):
    loss, gradient = ranks.run(identity, rule, world_size=1)[0]
    assert loss <= 1e-6
    assert gradient <= 1e-5


AUXILIARY = {
    "moe_aux_loss_coeff": 0.1,
    "moe_router_enable_expert_bias": True,
    "moe_router_score_function": "sigmoid",
}


def auxiliary_gradient(
    cuts: ParallelConfig,
    changes: dict,
    weightless: int,
    max_tokens: int,
    response: int,
    finalize: bool = True,
    more_teachers: int = 0,
) -> dict:
    """Return the gradient of the router if teacher and student agree, so that only auxiliary losses remain.

    Every microbatch holds one sequence of 24 tokens, and its last ``response`` tokens are the response.
    """
    chunks, grid = models.build(models.model_config("moe", **changes), cuts)
    student = wrap_for_training(chunks, OptimizerConfig(precision="fp32", use_distributed_optimizer=False))
    for chunk in student:
        chunk.zero_grad_buffer()
    rng = random.Random(3)
    texts = [[rng.randrange(models.VOCAB_SIZE) for _ in range(24)] for _ in range(4)]
    pairs = [ContextPair(str(i), t[:-response], t[:-response], t[-response:], False) for i, t in enumerate(texts)]
    batches = [
        pack(
            [pair],
            PackingRules(max_tokens=max_tokens, cp_size=1, tp_size=grid.tp_size, paired=True),
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
    loss_of = schedule.self_distillation(Target(), Divergence())
    if not finalize:  # finalizing turns the counts into expert biases
        student[0].config.finalize_model_grads_func = lambda *args, **kwargs: None
    schedule.run(student, student, joined, loss_of, grid, layouts.vocab_shard(student, grid))
    counts = [
        buffer.clone()
        for chunk in student
        for name, buffer in unwrapped(chunk).named_buffers()
        if name.endswith("local_tokens_per_expert")
    ]
    return {"grads": layouts.shards(student, lambda p: p.main_grad), "counts": counts}


def router_gradients(per_rank: list[dict]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in join([r["grads"] for r in per_rank]).items() if "router" in key}


VARIATIONS = {
    "prompt padding": (ParallelConfig(), 1, {"max_tokens": 64}),
    "response length": (ParallelConfig(), 1, {"response": 3}),
    "weightless microbatches": (ParallelConfig(), 1, {"weightless": 3}),
    "number of teacher microbatches": (ParallelConfig(), 1, {"more_teachers": 3}),
    "PP2": (ParallelConfig(pipeline_model_parallel_size=2), 2, {}),
    "EP2": (ParallelConfig(expert_model_parallel_size=2), 2, {"weightless": 1}),
    "DP2": (ParallelConfig(), 2, {}),
}


@pytest.mark.parametrize("changes", [AUXILIARY, {"moe_z_loss_coeff": 0.1}], ids=["balance", "z"])
@pytest.mark.parametrize("variation", VARIATIONS)
def test_router_losses_do_not_depend_on(ranks, variation, changes):
    plain = {"weightless": 0, "max_tokens": 32, "response": 10}
    cuts, world_size, other = VARIATIONS[variation]
    expected = router_gradients(ranks.run(auxiliary_gradient, ParallelConfig(), changes, **plain, world_size=1))
    got = router_gradients(ranks.run(auxiliary_gradient, cuts, changes, **(plain | other), world_size=world_size))
    assert min(float(g.norm()) for g in expected.values()) > 1e-4, "there must be an auxiliary gradient to compare"
    worst, where = worst_difference(got, expected)
    assert worst <= 1e-4, f"{where}: {worst:.1e}"


def test_teachers_and_weightless_microbatches_leave_the_expert_counts_alone(ranks):
    """Expert biases follow how many tokens each expert got: those of the students' real tokens only."""
    arguments = {"max_tokens": 32, "response": 10, "finalize": False}
    counts = [
        ranks.run(auxiliary_gradient, ParallelConfig(), AUXILIARY, weightless=n, **arguments, world_size=1)[0]["counts"]
        for n in (0, 3)
    ]
    for layer in zip(*counts, strict=True):
        assert torch.equal(*layer)
        assert int(layer[0].sum()) == 4 * 24 * 2  # sequences x tokens x experts per token


def test_alternating_needs_paired_microbatches():
    batch = pack(contexts(), PackingRules(max_tokens=layouts.MAX_TOKENS, cp_size=1, tp_size=1, paired=False))
    assert len(batch.student) != len(batch.teacher)
    with pytest.raises(ValueError, match="paired=True"):
        schedule._order(batch, "alternating", with_teacher=True)


def nothing_to_learn() -> None:
    chunks, grid = models.build(models.model_config("gqa"), ParallelConfig())
    student = wrap_for_training(chunks, OptimizerConfig(precision="fp32", use_distributed_optimizer=False))
    batch = pad_to_count(pack([], PackingRules(max_tokens=layouts.MAX_TOKENS, cp_size=1, tp_size=1, paired=True)), 1, 1)
    loss_of = schedule.self_distillation(Target(), Divergence())
    with pytest.raises(RuntimeError, match="no response tokens"):
        schedule.run(student, student, batch, loss_of, grid, layouts.vocab_shard(student, grid))


def test_a_batch_without_response_tokens_is_refused(ranks):
    ranks.run(nothing_to_learn, world_size=1)


def teacher_left_in_autograd() -> int:
    chunks, grid = models.build(models.model_config("gqa"), ParallelConfig())
    student = wrap_for_training(chunks, OptimizerConfig(precision="fp32", use_distributed_optimizer=False))
    config = unwrapped(chunks[0]).config
    teacher = Teacher("frozen", student, lambda: build_chunks(models.model_config("gqa"), config, grid, 61))
    batch = pack(contexts(), PackingRules(max_tokens=layouts.MAX_TOKENS, cp_size=1, tp_size=1, paired=False))
    saved = []
    forward = schedule._Step._teacher

    def counted(self, index, chunk):  # type: ignore[no-untyped-def]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            return forward(self, index, chunk)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule._Step, "_teacher", counted)
        loss_of = schedule.self_distillation(Target(), Divergence())
        schedule.run(student, teacher.chunks, batch, loss_of, grid, layouts.vocab_shard(student, grid))
    return sum(saved)


def test_a_teacher_microbatch_keeps_no_activations(ranks):
    assert ranks.run(teacher_left_in_autograd, world_size=1) == [0]


def test_case_defaults_have_ragged_contexts_and_several_microbatches():
    """What the parity tests rely on."""
    lengths = {(len(c.student_prompt), len(c.teacher_prompt), len(c.response)) for c in contexts()}
    assert len(lengths) == len(contexts())
    batch = pack(contexts(), PackingRules(max_tokens=Case().max_tokens, cp_size=1, tp_size=1, paired=False))
    assert len(batch.student) >= 2 and len(batch.teacher) > len(batch.student)
