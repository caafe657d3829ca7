# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Metrics cover the global batch in any layout, and are equal on all ranks; phases add up."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_selfdistill.config import load
from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.packed_batch import PackingRules
from megatron_selfdistill.data.packing import pack
from megatron_selfdistill.loss import Divergence, Status, Target, TokenStats, VocabShard, distillation_loss
from megatron_selfdistill.loss.weighting import Coefficients
from megatron_selfdistill.metrics.batch_entropies import batch_entropies
from megatron_selfdistill.metrics.first_checks import first_step_lines
from megatron_selfdistill.metrics.phases import Phases
from megatron_selfdistill.metrics.step import K_RESOLUTION, rollout_metrics, step_metrics
from megatron_selfdistill.pipeline.token_measures import TokenMeasures
from megatron_selfdistill.rollout.base import Response
from megatron_selfdistill.sources.source import StepBatch

VOCAB_SIZE, NUM_TOKENS = 50, 231
CPU = torch.device("cpu")
ONE_RANK = SimpleNamespace(
    world_size=1, device=CPU, is_last_stage=True, is_first_of_replica=True, tp_rank=0, cp_size=1, dp_size=1
)
LAYOUTS = [
    pytest.param(4, {"context_parallel_size": 2, "pipeline_model_parallel_size": 2}, id="cp2pp2"),
    pytest.param(4, {"tensor_model_parallel_size": 2}, id="dp2tp2"),
]


def all_logits(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(student, teacher): rows of every sharpness, that agree more or less."""
    generator = torch.Generator().manual_seed(5)

    def logits() -> torch.Tensor:
        scale = torch.rand(num_tokens, 1, generator=generator, dtype=torch.float64) * 9
        return scale * torch.randn(num_tokens, VOCAB_SIZE, generator=generator, dtype=torch.float64)

    student = logits()
    return student, student + logits() / 3


def all_rows(num_tokens: int = NUM_TOKENS) -> TokenStats:
    student, teacher = all_logits(num_tokens)
    return distillation_loss(
        student,
        teacher,
        torch.arange(num_tokens) % VOCAB_SIZE,
        target=Target(anchor="student"),
        divergence=Divergence(),
        vocab=VocabShard(0, VOCAB_SIZE, VOCAB_SIZE),
    )


def some_rows(stats: TokenStats, rows: Any) -> TokenStats:
    values = {f.name: getattr(stats, f.name) for f in dataclasses.fields(stats)}
    return TokenStats(**{k: v if k == "grid_betas" else v[rows] for k, v in values.items()})


def output_of(
    stats: TokenStats | None, ids: torch.Tensor | None = None, coefficients: Coefficients | None = None
) -> Any:
    if ids is None:
        ids = torch.arange(0 if stats is None else len(stats.loss))
    given = {"stats": stats, "response_ids": ids, "coefficients": coefficients}
    return SimpleNamespace(**given, measures_teacher=True, measures=None, anchor_entropy=None)


def two_terms(rows: Any = slice(None)) -> Coefficients:
    """Return the coefficients of some of the tokens: every third w and every second a is 0, every sixth by a clip."""
    index = torch.arange(NUM_TOKENS)[rows]
    w, a = (index % 3) / 4, (index % 2) * torch.sin(index.double())
    return Coefficients(w.double(), a, index % 6 == 2)


def sampler_log_probs(stats: TokenStats) -> torch.Tensor:
    generator = torch.Generator().manual_seed(6)
    noise = 0.01 * torch.randn(len(stats.loss), generator=generator, dtype=torch.float64)
    return stats.student_log_prob + noise


def share_of_rank(sizes: dict[str, int]) -> tuple[Any, Any, torch.Tensor]:
    """(grid, output, sampler's log-probs) of this rank; its replica holds every dp_size-th token."""
    from megatron_selfdistill.config import ParallelConfig
    from megatron_selfdistill.distributed import ranks

    grid = ranks.initialize(ParallelConfig(**sizes), 0)
    stats = all_rows()
    replica = torch.arange(NUM_TOKENS)[grid.dp_rank :: grid.dp_size]
    ids = torch.arange(len(replica)).flip(0)[grid.cp_rank :: grid.cp_size]  # packing changes the order
    rows = replica[ids]
    output = output_of(some_rows(stats, rows), ids, two_terms(rows)) if grid.is_last_stage else output_of(None)
    return grid, output, sampler_log_probs(stats)[replica]


def numbers_in_layout(sizes: dict[str, int]) -> tuple[dict[str, float], tuple, dict[str, float]]:
    grid, output, log_probs = share_of_rank(sizes)
    lengths, altered = lengths_and_log_probs(log_probs)
    found = step_metrics(output, log_probs, grid)
    found |= {WORST: step_metrics(output, altered, grid, response_lengths=lengths)[WORST]}
    of_responses = rollout_metrics(responses()[grid.dp_rank :: grid.dp_size], grid)
    return found, batch_entropies(output, grid), of_responses


WORST = "sampler/log_prob_worst_response"


def lengths_and_log_probs(log_probs: torch.Tensor) -> tuple[list[int], torch.Tensor]:
    """Return the lengths of a replica's responses, of which the first is too short to count, and altered log-probs."""
    lengths = [7, 20, 30, len(log_probs) - 57]
    index = torch.arange(len(log_probs))
    log_probs = log_probs + torch.where(index < 7, 9.0, 0.0) + torch.where((index >= 7) & (index < 27), 0.5, 0.0)
    log_probs[27:57:4] = math.inf  # the sampler did not sample these tokens
    return lengths, log_probs


def worst_mean_difference(dp_size: int) -> float:
    stats, means = all_rows(), []
    for dp_rank in range(dp_size):
        mine = stats.student_log_prob.double()[dp_rank::dp_size]
        lengths, theirs = lengths_and_log_probs(sampler_log_probs(stats)[dp_rank::dp_size])
        responses = list(zip(theirs.split(lengths), mine.split(lengths), strict=True))[1:]
        means += [(a - b)[torch.isfinite(a)].abs().mean().item() for a, b in responses]
    return max(means)


def responses() -> list[Response]:
    token_ids = [[7] * 3, [7] * 9, [7] * 26, [7], list(range(26))]
    ends = {26: "length"}
    return [Response(ids, [-1.0] * len(ids), [-1.0] * len(ids), ends.get(len(ids), "stop")) for ids in token_ids]


def nearest_rank(values: torch.Tensor, share: float) -> float:
    return float(values.sort().values[math.ceil(share * len(values)) - 1])


def test_step_metrics_are_the_means_over_tokens():
    stats = all_rows()
    found = step_metrics(output_of(stats), sampler_log_probs(stats), ONE_RANK)
    difference = (sampler_log_probs(stats) - stats.student_log_prob).abs()
    expected = {
        "tokens/response": NUM_TOKENS,
        "loss/mean": stats.loss.mean(),
        "loss/reverse_kl": stats.reverse_kl.mean(),
        "entropy/student": stats.student_entropy.mean(),
        "entropy/teacher": stats.teacher_entropy.mean(),
        "entropy/target": stats.target_entropy.mean(),
        "entropy/target_minus_student": (stats.target_entropy - stats.student_entropy).mean(),
        "k/mean": (1 / stats.beta).mean(),
        "k/p01": nearest_rank(1 / stats.beta, 0.01),
        "k/p99": nearest_rank(1 / stats.beta, 0.99),
        "top1_agreement": stats.top1_agreement.double().mean(),
        "teacher_cross_entropy": -stats.teacher_log_prob.mean(),
        "student_nll": -stats.student_log_prob.mean(),
        "sampler/log_prob_mean_abs_diff": difference.mean(),
        "sampler/log_prob_max_abs_diff": difference.max(),
    }
    expected |= {f"status/{s.name.lower()}": (stats.status == s).double().mean() for s in Status}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        tolerance = K_RESOLUTION / 2 if key.startswith("k/p") else 1e-12
        assert found[key] == pytest.approx(float(value), rel=tolerance), key


def test_a_token_that_was_sampled_after_another_prompt_is_not_compared_with_the_sampler():
    stats, sampled = all_rows(), sampler_log_probs(all_rows())
    known = torch.arange(NUM_TOKENS) % 3 > 0
    found = step_metrics(output_of(stats), torch.where(known, sampled, math.inf), ONE_RANK)
    difference = (sampled - stats.student_log_prob).abs()[known]
    assert found["sampler/log_prob_mean_abs_diff"] == pytest.approx(difference.mean().item(), rel=1e-12)
    assert found["sampler/log_prob_max_abs_diff"] == difference.max().item()
    unknown = torch.full_like(sampled, math.inf)
    assert "sampler/log_prob_mean_abs_diff" not in step_metrics(output_of(stats), unknown, ONE_RANK)


def test_a_step_with_a_policy_term_reports_both_coefficients_and_no_correction():
    terms, stats = two_terms(), all_rows()
    found = step_metrics(output_of(stats, None, terms), None, ONE_RANK)
    plain = step_metrics(output_of(stats), None, ONE_RANK)
    w, a = terms.divergence.numpy(), terms.policy.numpy()
    expected = {
        "terms/divergence_mean": w.mean(),
        "terms/policy_mean": a.mean(),
        "terms/policy_abs_mean": abs(a).mean(),
        "terms/clipped_share": sum(i % 6 == 2 for i in range(NUM_TOKENS)) / NUM_TOKENS,
        "terms/silent_share": sum(i % 6 == 0 for i in range(NUM_TOKENS)) / NUM_TOKENS,
    }
    assert {key: value for key, value in found.items() if key not in plain} == pytest.approx(expected, rel=1e-12)
    unclipped = step_metrics(output_of(stats, None, dataclasses.replace(terms, clipped=None)), None, ONE_RANK)
    assert found.keys() - unclipped.keys() == {"terms/clipped_share"}
    corrected = step_metrics(output_of(stats, None, Coefficients(terms.divergence)), None, ONE_RANK, weight_cap=0.5)
    assert corrected.keys() - plain.keys() == {"correction/weight_mean", "correction/capped"}
    assert corrected["correction/capped"] == pytest.approx((w == 0.5).mean())


@pytest.mark.parametrize(("world_size", "sizes"), LAYOUTS)
def test_all_numbers_are_equal_on_all_ranks_and_do_not_depend_on_the_layout(ranks, world_size, sizes):
    stats, worst = all_rows(), worst_mean_difference(world_size // math.prod(sizes.values()))
    found = ranks.run(numbers_in_layout, sizes, world_size=world_size)
    assert all(other == found[0] for other in found)
    of_step, (mean_entropy, betas, means), of_responses = found[0]
    alone = step_metrics(output_of(stats, None, two_terms()), sampler_log_probs(stats), ONE_RANK)
    assert "terms/policy_mean" in alone and worst == pytest.approx(0.5, abs=0.02)
    assert of_step == pytest.approx(alone | {WORST: worst}, rel=1e-12)
    assert mean_entropy == pytest.approx(float(stats.student_entropy.mean()), rel=1e-12)
    assert betas == stats.grid_betas.tolist()
    assert means == pytest.approx(stats.grid_entropies.mean(0).tolist(), rel=1e-12)
    shares = {"response/truncated_share": 0.4, "response/loop_share": 0.2}
    assert of_responses == {"tokens/rollout": 65, "response/length_mean": 13, "response/length_max": 26} | shares


def test_a_response_with_nan_is_the_worst_and_short_responses_have_none():
    stats = all_rows()
    nan = torch.where(torch.arange(NUM_TOKENS) == 100, math.nan, sampler_log_probs(stats))
    found = step_metrics(output_of(stats), nan, ONE_RANK, response_lengths=[NUM_TOKENS])
    assert found["sampler/log_prob_worst_response"] == math.inf
    short = step_metrics(output_of(stats), nan, ONE_RANK, response_lengths=[7] * (NUM_TOKENS // 7))
    assert "sampler/log_prob_worst_response" not in short


def test_a_nan_token_shows_in_the_means_and_not_in_the_percentiles():
    stats = all_rows()
    broken = {name: getattr(stats, name).detach().clone() for name in ("loss", "beta", "student_log_prob")}
    for values in broken.values():
        values[3] = math.nan
    found = step_metrics(output_of(dataclasses.replace(stats, **broken)), sampler_log_probs(stats), ONE_RANK)
    assert math.isnan(found["loss/mean"]) and math.isnan(found["k/mean"])
    assert found["sampler/log_prob_max_abs_diff"] == math.inf
    assert math.isfinite(found["entropy/student"]) and math.isfinite(found["k/p99"])
    wanted = torch.where(torch.arange(NUM_TOKENS) < 7, math.nan, stats.wanted_entropy)
    mean, _, _ = batch_entropies(output_of(dataclasses.replace(stats, wanted_entropy=wanted)), ONE_RANK)
    assert mean == pytest.approx(float(stats.student_entropy[7:].mean()), rel=1e-12)


def test_a_step_that_does_not_measure_the_teacher_has_no_metric_of_the_teacher():
    output = output_of(all_rows())
    measured = step_metrics(output, None, ONE_RANK)
    output.measures_teacher = False
    unmeasured = step_metrics(output, None, ONE_RANK)
    assert measured.keys() - unmeasured.keys() == {"entropy/teacher", "top1_agreement", "teacher_cross_entropy"}
    assert all(measured[key] == value for key, value in unmeasured.items())


def test_the_means_of_measures_are_those_of_the_measured_tokens():
    output, places = output_of(all_rows()), slice(0, None, 4)
    rare, divergences = torch.rand(2, NUM_TOKENS, 2, dtype=torch.float64)
    entropy, same = torch.rand(NUM_TOKENS), torch.arange(NUM_TOKENS) % 8 == 0
    known = {"teacher_entropy": entropy, "teacher_log_prob": -entropy, "top1_agreement": same}
    whole = vars(TokenMeasures(torch.ones_like(same), *rare.unbind(1), divergences, **known))
    chosen = TokenMeasures(**{name: None if values is None else values[places] for name, values in whole.items()})
    output.measures = chosen.spread(NUM_TOKENS, places)
    output.stats = output.measures.with_teacher(output.stats)
    found, expected = step_metrics(output, None, ONE_RANK), {"entropy/teacher": entropy, "top1_agreement": same}
    expected |= {"target/mass_on_rare_student": rare[:, 0], "target/mass_on_rare_reference": rare[:, 1]}
    for key, values in (expected | {"teacher/kl_to_anchor": divergences[:, 1]}).items():
        assert found[key] == pytest.approx(values[places].double().mean().item(), rel=1e-12)
    assert found["loss/mean"] == pytest.approx(all_rows().loss.double().mean().item(), rel=1e-12)


@pytest.mark.parametrize("sizes", [(5,), (2, 3), (1, 0, 3, 1)])
def test_partial_batches_of_a_step_have_the_shares_of_the_whole_step(sizes):
    left = iter(responses())
    batches = [StepBatch(responses=list(itertools.islice(left, size))) for size in sizes]
    assert rollout_metrics(StepBatch.joined(batches).responses, ONE_RANK) == rollout_metrics(responses(), ONE_RANK)


def test_padding_shares_are_those_of_the_packed_batch():
    contexts = [ContextPair(str(n), [1] * n, [1] * 2 * n, [2] * 5, False) for n in (3, 8, 13)]
    batch = pack(contexts, PackingRules(max_tokens=32, cp_size=1, tp_size=4, paired=False))
    found = rollout_metrics(responses(), ONE_RANK, [batch])
    for name, stream in (("student", batch.student), ("teacher", batch.teacher)):
        masks = torch.cat([microbatch.padding_mask.flatten() for microbatch in stream])
        assert found[f"padding/{name}"] == masks.double().mean().item() > 0
    assert rollout_metrics([], ONE_RANK) == {"tokens/rollout": 0}, "without responses there are no lengths"


def test_nobody_counts_cut_responses_where_some_are_unfinished():
    ends = [Response.unsampled([1] * n, reason) for n, reason in ((3, "stop"), (4, "horizon"), (4, "horizon"))]
    found = rollout_metrics(ends, ONE_RANK)
    assert found["response/unfinished_share"] == pytest.approx(2 / 3) and "response/truncated_share" not in found
    whole = rollout_metrics([replace(one, finish_reason="length") for one in ends], ONE_RANK)
    assert whole["response/truncated_share"] == 1 and "response/unfinished_share" not in whole


def test_phases_add_up_and_begin_anew(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("megatron_selfdistill.metrics.phases.time.perf_counter", lambda: now[0])
    phases = Phases(CPU)
    for name, seconds in (("rollout", 2.0), ("train", 1.0), ("rollout", 3.0)):
        with phases(name):
            now[0] += seconds
        now[0] += 0.5  # between the phases
    found = phases.metrics(rollout=1000)
    assert (found["seconds/rollout"], found["seconds/train"], found["seconds/step"]) == (5.0, 1.0, 7.5)
    assert found["tokens_per_second/rollout"] == 200 and "tokens_per_second/train" not in found
    assert next(value for key, value in found.items() if key.startswith("memory/")) > 0
    now[0] += 4.0
    again = phases.metrics(rollout=1000)
    assert again.keys() & {"seconds/rollout", "tokens_per_second/rollout"} == set() and again["seconds/step"] == 4.0


RESPONSES = [
    replace(Response.unsampled([1, 2]), weight_version=5),
    replace(Response.unsampled([1, 2, 3, 4]), weight_version=3, weight_spans=[(3, 3), (5, 1)]),
    Response.unsampled([1, 2, 3]),
    replace(Response.unsampled([1]), weight_version=4),
]


def measured() -> tuple[dict[str, float], dict[str, float]]:
    """Return the ages of all responses, and of two whose weights nobody knows."""
    from megatron_selfdistill.config import ParallelConfig
    from megatron_selfdistill.distributed import ranks
    from megatron_selfdistill.metrics.staleness import staleness_metrics

    grid = ranks.initialize(ParallelConfig(), 0)
    return staleness_metrics(RESPONSES[grid.dp_rank :: 2], 5, grid), staleness_metrics(RESPONSES[2:3], 5, grid)


def test_ages_are_means_over_the_tokens_of_known_weights_of_all_replicas(ranks):
    expected = {"rollout/staleness_mean": (3 * 2 + 1) / 7, "rollout/staleness_max": 2.0, "rollout/mixed_share": 1 / 4}
    assert ranks.run(measured, world_size=2) == [(expected, {})] * 2


SMALL = ("num_steps=12", "optimizer.lr=1e-6", "model.hidden_size=64", "data.path=x")


def test_a_learning_rate_that_hardly_moves_the_weights_is_a_warning_with_values_that_do():
    (line,) = first_step_lines(load(SMALL), {"gradient_norm": 0.016})
    assert "try optimizer.lr=4e-05, or num_steps above 50" in line
    enough = ["optimizer.lr=4.2e-5", "num_steps=51", "model.hidden_size=1280", "model.init_method_std=0.004"]
    for key in [*enough, "adapter.rank=4", "optimizer.lr=0"]:  # one factor begins at 0; on purpose
        assert first_step_lines(load([*SMALL, key]), {"gradient_norm": 0.016}) == []


class Queue:
    """A GPU that does what is queued a second later, and the events that are queued on it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.time = 0.0
        self.waits = 0
        queue = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self, stream: object) -> None:
                self.time = queue.time

            def elapsed_time(self, end: Event) -> float:
                assert queue.waits, "the events have not passed yet"
                return 1000 * (end.time - self.time)

        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "current_stream", lambda device: None)
        patch.setattr(torch.cuda, "synchronize", self.wait)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**30)

    def wait(self, device: torch.device) -> None:
        self.waits += 1


def test_phases_of_a_gpu_wait_for_it_once_per_step(monkeypatch):
    queue = Queue(monkeypatch)
    phases = Phases(torch.device("cuda"))
    for name, seconds in (("pack", 0), ("train", 3.0), ("optimizer", 0.5), ("train", 1.0)):
        with phases(name):
            queue.time += seconds
        assert queue.waits == 0, f"the end of {name} waited"
    found = phases.metrics(train=80)
    assert queue.waits == 1
    assert (found["seconds/train"], found["seconds/optimizer"], found["seconds/pack"]) == (4.0, 0.5, 0.0)
    assert found["tokens_per_second/train"] == 20 and found["memory/peak_gib"] == 1
    assert "seconds/train" not in phases.metrics()
    assert queue.waits == 1, "nothing was timed"
