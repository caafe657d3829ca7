# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The means over forks, rare tokens and tenths of a response are those of their definitions, in every layout."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_selfdistill.loss import Status, TokenStats
from megatron_selfdistill.metrics.step import FORK_RANGE, FORK_RESOLUTION, find_forks, response_tenths, step_metrics
from megatron_selfdistill.pipeline.token_measures import TokenMeasures
from tests.unit.metrics.test_step import LAYOUTS, ONE_RANK, all_rows

LENGTHS = [1, 37, 9, 100, 0, 10, 63, 23]
NUM_TOKENS = sum(LENGTHS)
FORKS = {"forks/entropy_student", "forks/entropy_target", "forks/capped", "forks/entropy_at_least"}


def output_of_rank(rank: int = 0, num_replicas: int = 1, cp_rank: int = 0, cp_size: int = 1) -> tuple[Any, list[int]]:
    """Return the output of a rank, whose replica has every so-many-th response, in the order of packing."""
    stats, generator = all_rows(NUM_TOKENS), torch.Generator().manual_seed(3)
    masses = torch.rand(3, NUM_TOKENS, generator=generator, dtype=torch.float64)
    spans = torch.arange(NUM_TOKENS).split(LENGTHS)[rank::num_replicas]
    held = torch.cat(spans)
    ids = torch.arange(len(held)).flip(0)[cp_rank::cp_size]
    tokens = held[ids]
    per_token = {f.name: getattr(stats, f.name) for f in dataclasses.fields(stats) if f.name != "grid_betas"}
    output = SimpleNamespace(
        stats=TokenStats(**{name: value[tokens] for name, value in per_token.items()}, grid_betas=stats.grid_betas),
        response_ids=ids,
        coefficients=None,
        measures_teacher=True,
        measures=TokenMeasures(torch.ones(len(tokens), dtype=torch.bool), *masses[:2, tokens]),
        anchor_entropy=masses[2, tokens] * stats.student_entropy[tokens],
    )
    return output, [len(span) for span in spans]


def metrics_of(output: Any, lengths: list[int] | None = None, grid: Any = ONE_RANK) -> dict[str, float]:
    return step_metrics(output, None, grid, response_lengths=lengths)


def metrics_in_layout(sizes: dict[str, int]) -> dict[str, float]:
    from megatron_selfdistill.config import ParallelConfig
    from megatron_selfdistill.distributed import ranks

    grid = ranks.initialize(ParallelConfig(**sizes), 0)
    output, lengths = output_of_rank(grid.dp_rank, grid.dp_size, grid.cp_rank, grid.cp_size)
    if not grid.is_last_stage:
        empty = torch.empty(0, dtype=torch.int64)
        nothing = {"stats": None, "weights": None, "measures": None, "anchor_entropy": None}
        output = SimpleNamespace(**nothing, response_ids=empty, measures_teacher=True)
    return metrics_of(output, lengths, grid)


def test_forks_are_the_tenth_of_the_tokens_with_the_largest_entropy_of_the_anchor():
    output, _ = output_of_rank()
    found, stats, entropy = metrics_of(output), output.stats, output.anchor_entropy
    tenth = entropy.sort(descending=True).values[math.ceil(NUM_TOKENS / 10) - 1].item()
    assert found["forks/entropy_at_least"] <= tenth < found["forks/entropy_at_least"] * (1 + FORK_RESOLUTION)
    forks = entropy >= found["forks/entropy_at_least"]
    assert 0.1 * NUM_TOKENS <= forks.sum() < 0.15 * NUM_TOKENS
    assert found["forks/entropy_student"] == pytest.approx(stats.student_entropy[forks].mean().item(), rel=1e-12)
    assert found["forks/entropy_target"] == pytest.approx(stats.target_entropy[forks].mean().item(), rel=1e-12)
    assert found["forks/capped"] == (stats.status[forks] == Status.CAPPED).double().mean().item()
    assert 0 < found["forks/capped"] < 1 and found["forks/capped"] != pytest.approx(found["status/capped"], rel=0.05)


def test_masses_on_rare_tokens_are_means_over_all_tokens():
    output, _ = output_of_rank()
    found = metrics_of(output)
    for model in ("student", "reference"):
        mean = getattr(output.measures, f"mass_on_rare_{model}").mean().item()
        assert found[f"target/mass_on_rare_{model}"] == pytest.approx(mean, rel=1e-12)
    output.measures = dataclasses.replace(output.measures, mass_on_rare_reference=None)
    assert "target/mass_on_rare_reference" not in metrics_of(output)


def test_the_reverse_kl_of_each_tenth_is_the_mean_over_its_tokens():
    output, lengths = output_of_rank()
    found = metrics_of(output, lengths)
    by_token = torch.empty(NUM_TOKENS, dtype=torch.float64)
    by_token[output.response_ids] = output.stats.reverse_kl
    responses = by_token.split(lengths)
    assert response_tenths([10, 0, 1, 4]).tolist() == [*range(10), 0, 0, 2, 5, 7]
    assert response_tenths([]).shape == (0,) and response_tenths([]).dtype == torch.int64
    for tenth in range(10):
        values = [kl[i].item() for kl in responses for i in range(len(kl)) if math.floor(10 * i / len(kl)) == tenth]
        assert found[f"reverse_kl/tenth_{tenth + 1:02d}"] == pytest.approx(sum(values) / len(values), rel=1e-12)


@pytest.mark.parametrize(("world_size", "sizes"), LAYOUTS)
def test_all_ranks_of_every_layout_have_the_numbers_of_one_rank(ranks, world_size, sizes):
    alone = metrics_of(*output_of_rank())
    found = ranks.run(metrics_in_layout, sizes, world_size=world_size)
    assert all(other == found[0] for other in found)
    assert found[0] == pytest.approx(alone, rel=1e-12) and alone.keys() > FORKS


@pytest.mark.parametrize("share_of_zeros", [0.5, 0.95, 1.0])
def test_equal_entropies_are_forks_together(share_of_zeros):
    entropy = torch.full((200,), 1.5, dtype=torch.float64)
    entropy[: int(200 * share_of_zeros)] = 0.0
    forks = find_forks(entropy, ONE_RANK)
    many = share_of_zeros == 0.5
    assert torch.equal(forks.mask, entropy > 0 if many else torch.ones(200, dtype=torch.bool))
    assert (1.4 < forks.entropy_at_least <= 1.5) if many else forks.entropy_at_least == 0


@pytest.mark.parametrize("scale", [1e-9, 1e-5, 1e-2, 10.0, 100.0])
def test_entropies_of_every_size_have_forks(scale):
    entropy = scale * torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    forks = find_forks(entropy, ONE_RANK)
    assert torch.equal(forks.mask, entropy >= forks.entropy_at_least)
    if FORK_RANGE[0] < scale < FORK_RANGE[1]:
        assert 100 <= forks.mask.sum() < 130


def test_a_token_without_an_entropy_is_no_fork_and_a_fork_with_nan_shows():
    output, _ = output_of_rank()
    before = metrics_of(output)
    forks = (output.anchor_entropy >= before["forks/entropy_at_least"]).nonzero().flatten()
    others = (output.anchor_entropy < before["forks/entropy_at_least"]).nonzero().flatten()
    output.stats.target_entropy[others[0]] = math.nan
    unchanged = metrics_of(output)
    assert {key: unchanged[key] for key in FORKS} == {key: before[key] for key in FORKS}
    output.stats.target_entropy[forks[0]] = math.nan
    assert math.isnan(metrics_of(output)["forks/entropy_target"])
    output.anchor_entropy[forks[0]] = math.nan
    assert math.isfinite(metrics_of(output)["forks/entropy_target"])


def test_what_a_step_does_not_know_has_no_key():
    output, lengths = output_of_rank()
    short = {key for key in metrics_of(output, [1] * NUM_TOKENS) if key.startswith("reverse_kl/")}
    assert short == {"reverse_kl/tenth_01"}, "short responses leave tenths empty"
    output.anchor_entropy = output.measures = None
    assert not any(key.startswith(("forks/", "reverse_kl/", "target/")) for key in metrics_of(output))
    output.stats.grid_betas = torch.empty(0)
    assert metrics_of(output, lengths).keys() == {"tokens/response", "loss/mean", "student_nll"}
