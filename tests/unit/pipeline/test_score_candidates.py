# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The log-probs of candidates are those of whole rows of logits, in every layout."""

from __future__ import annotations

import functools

import layouts
import models
import pytest
import torch
from tiers import combinations

from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard
from megatron_selfdistill.pipeline.score import candidate_log_probs, log_probs_of_columns

LAYOUTS = {
    "one rank": (1, {}),
    "DP2": (2, {}),
    "TP2+SP": (2, {"tp": 2, "sp": True}),
    "PP2": (2, {"pp": 2}),
    "CP2": (2, {"cp": 2}),
    "PP2xVPP2": (2, {"pp": 2, "vpp": 2}),
}
CANDIDATES = [0, 3, models.VOCAB_SIZE - 1, 7, 1]
Found = tuple[list[int], list[list[float]]]


def prompts() -> list[list[int]]:
    """Return prompts of different lengths, one of them of a single token."""
    return [[5], *(context.student_prompt for context in layouts.contexts()[:4])]


def found_in_layout(cuts: dict) -> Found:
    """Return the numbers of this replica's prompts, and the candidates' log-probs."""
    chunks, grid = models.build(models.model_config("tied", num_layers=num_layers_of(cuts)), models.parallel(**cuts))
    mine = list(range(len(prompts())))[grid.dp_rank :: grid.dp_size][: 2 if grid.dp_rank else None]
    vocab = layouts.vocab_shard(chunks, grid)
    values = candidate_log_probs([prompts()[i] for i in mine], CANDIDATES, chunks, grid, vocab, max_tokens=56)
    assert values.dtype == torch.float64 and values.shape == (len(mine), len(CANDIDATES))
    assert candidate_log_probs([], CANDIDATES, chunks, grid, vocab, max_tokens=56).shape == (0, len(CANDIDATES))
    return mine, values.tolist()


def num_layers_of(cuts: dict) -> int:
    return 4 if "vpp" in cuts else 2


def expected_rows(num_layers: int) -> list[list[float]]:
    """Return the candidates' log-probs from complete rows of logits in float64; one prompt runs at a time."""
    (chunk,), _ = models.build(models.model_config("tied", num_layers=num_layers), models.parallel())
    found = []
    for prompt in prompts():
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            logits = chunk(tokens, torch.arange(len(prompt))[None], None)[0, -1, : models.VOCAB_SIZE].double()
        found.append(logits.log_softmax(-1)[CANDIDATES].tolist())
    return found


@pytest.fixture(scope="module")
def expected_of(ranks):
    """Return a function from the number of layers to `expected_rows`, computed once."""
    return functools.cache(lambda num_layers: ranks.run(expected_rows, num_layers, world_size=1)[0])


@combinations(name=list(LAYOUTS), quick={"name": ["DP2", "TP2+SP", "CP2"]}, strength=1)
def test_candidates_have_the_log_probs_of_whole_rows_in_every_layout(ranks, expected_of, name):
    world_size, cuts = LAYOUTS[name]
    expected = expected_of(num_layers_of(cuts))
    of_replica: dict[tuple[int, ...], list[list[float]]] = {}
    for mine, values in ranks.run(found_in_layout, cuts, world_size=world_size):
        assert of_replica.setdefault(tuple(mine), values) == values, "ranks of a replica disagree"
        for i, row in zip(mine, values, strict=True):
            assert row == pytest.approx(expected[i], abs=2e-5)


def test_extreme_logits_and_padding_columns_do_not_spoil_the_log_probs():
    logits = torch.tensor([[400.0, -400.0, 0.0, 9e9], [-3e4, -3e4, -3e4, 9e9]])
    found = log_probs_of_columns(logits, torch.tensor([2, 0]), VocabShard(0, 4, 3))
    reference = logits[:, :3].double().log_softmax(-1)[:, [2, 0]]
    assert torch.equal(found, reference) and found[1, 0].item() == pytest.approx(-torch.tensor(3.0).log().item())


def test_a_token_that_is_no_column_is_refused():
    with pytest.raises(ValueError, match=r"expected tokens of a vocabulary of 3, got \[3\]"):
        candidate_log_probs([[1]], [3], [], None, VocabShard(0, 4, 3), max_tokens=8)
