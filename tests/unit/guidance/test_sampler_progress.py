# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The sampler in process reports each finished response at the pass that finishes it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from decoding import GREEDY, MAX_LENGTH, NEW_TOKENS, PROMPT_LENGTHS, make_pairs, make_requests
from models import VOCAB_SIZE, build, model_config, parallel
from responses import stops_of, tokens

from megatron_selfdistill.guidance.guided_sampler import GuidedSampler
from megatron_selfdistill.guidance.guided_tokens import GuidedParams
from megatron_selfdistill.rollout.base import Response
from megatron_selfdistill.rollout.megatron import megatron_sampler

Counts = list[tuple[int, int, str]]


def ends_in_rows(responses: list[Response]) -> list[int]:
    """Return the number of finished responses after each pass, where token i of every response comes from pass i."""
    ends = [len(response.token_ids) for response in responses]
    return [sum(end <= step for end in ends) for step in range(1, max(ends) + 1)]


def changes(counts: Counts) -> Counts:
    """Return the counts without those that repeat the count before."""
    return counts[:1] + [after for before, after in pairwise(counts) if before != after]


def check_reports() -> None:
    chunks, grid = build(model_config("gqa"), parallel())
    counts: Counts = []
    sampler = GuidedSampler(chunks, grid, VOCAB_SIZE, MAX_LENGTH, 0.1, progress=lambda *counted: counts.append(counted))
    plain, pairs = make_requests(), make_pairs(4)
    stops = stops_of(tokens(sampler.generate(plain, GREEDY)))
    params = GuidedParams(NEW_TOKENS, temperature=0, stop_token_ids=stops)
    counts.clear()
    responses = sampler.generate([*pairs, *plain], params)
    guided, rest = responses[:4], responses[4:]
    before, number = len(plain), len(plain) + len(pairs)
    passes = [*ends_in_rows(rest), *(before + finished for finished in ends_in_rows(guided))]
    assert len(set(passes)) >= 6, "the responses must end at different passes"
    assert changes(counts) == changes([(finished, number, "") for finished in [0, *passes]])
    with pytest.MonkeyPatch.context() as patch:  # a GPU knows each number one pass late
        patch.setattr(megatron_sampler, "lag_of", lambda device: 1)
        counts.clear()
        assert tokens(sampler.generate([*pairs, *plain], params)) == tokens(responses)
    assert sorted(counts) == counts and counts[-1] == (number, number, "")
    per_token = sampler._bytes_per_token
    sampler._kv_cache_gb = 2.5 * (max(PROMPT_LENGTHS) + NEW_TOKENS) * per_token / 2**30  # several batches
    counts.clear()
    sampler.generate(plain, params)
    assert sorted(counts) == counts
    assert (counts[0], counts[-1]) == ((0, before, ""), (before, before, ""))


def test_each_response_is_reported_at_the_pass_that_ends_it(ranks):
    ranks.run(check_reports, world_size=1)
