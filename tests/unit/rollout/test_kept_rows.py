# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Episodes whose KV cache goes on from turn to turn: the tokens are those of a fresh prefill, and few are read."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
from decoding import check_argmax, logits_of, predicting
from models import VOCAB_SIZE, build, model_config, parallel
from responses import own
from tiers import combinations

from megatron_selfdistill.config import ParallelConfig
from megatron_selfdistill.model.forward import unwrapped
from megatron_selfdistill.rollout.base import Request, SamplingParams
from megatron_selfdistill.rollout.megatron import decoding, megatron_sampler
from megatron_selfdistill.rollout.megatron.kept_rows import KeptRows
from megatron_selfdistill.rollout.megatron.megatron_sampler import MegatronSampler
from megatron_selfdistill.rollout.sampling import sample_seed

NEW_TOKENS = 6
STOPS = tuple(range(0, VOCAB_SIZE, 4))
"""Tokens that end a response; the other responses are cut, and their episodes end."""
NUM_EPISODES, NUM_TURNS = 7, 4
GREEDY = SamplingParams(NEW_TOKENS, temperature=0, stop_token_ids=STOPS)
SAMPLED = dataclasses.replace(GREEDY, temperature=1.0)
Texts = dict[int, list[list[int]]]  # number of an episode -> the tokens of its responses


def tokens(rng: random.Random, least: int, most: int) -> list[int]:
    return [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(least, most))]


def play(
    sampler: MegatronSampler,
    episodes: list[int],
    params: SamplingParams = GREEDY,
    *,
    named: bool = True,
    num_turns: int = NUM_TURNS,
    reply_lengths: tuple[int, int] = (1, 13),
    check: Callable[[Request, Any], None] = lambda request, response: None,
) -> Texts:
    """Return the responses of all turns; a reply follows each response that a stop token ends."""
    rngs = {i: random.Random(i) for i in episodes}
    prompts = {i: tokens(rng, 2, 14) for i, rng in rngs.items()}
    texts: Texts = {i: [] for i in episodes}
    for turn in range(num_turns):
        requests = [
            Request(prompt, sample_seed(0, turn, str(i), 0), episode=f"{i}" if named else None)
            for i, prompt in prompts.items()
        ]
        responses = dict(zip(list(prompts), sampler.generate(requests, params), strict=True))
        for request, (i, response) in zip(requests, responses.items(), strict=True):
            check(request, response)
            texts[i].append(response.token_ids)
        going_on = {i: response.token_ids for i, response in responses.items() if not response.truncated}
        prompts = {i: [*prompts[i], *ids, *tokens(rngs[i], *reply_lengths)] for i, ids in going_on.items()}
    return texts


def sampler_of(kind: str, config: ParallelConfig, room: int | None = None, **changes: Any) -> tuple[Any, Any, Any]:
    """Return a sampler, the grid and the model; ``room``: the number of tokens that the KV cache may hold."""
    chunks, grid = build(model_config(kind, **changes), config)
    sampler = MegatronSampler(chunks, grid, VOCAB_SIZE, 400, continues=True)
    if room is not None:
        sampler._kv_cache_gb = room * sampler._bytes_per_column(NEW_TOKENS) / 2**30
    return sampler, grid, unwrapped(chunks[0])


def play_without_names(kind: str, changes: dict[str, Any]) -> tuple[Texts, Texts]:
    """Return greedy texts, of which a whole pass confirms each token, and sampled texts, all from whole prompts."""
    sampler, _, model = sampler_of(kind, parallel(), **changes)
    model.eval()

    def check(request: Request, response: Any) -> None:
        logits = predicting(lambda ids: logits_of(model, ids), request.prompt, response.token_ids)
        check_argmax(logits, response, gap=1e-3)

    greedy = play(sampler, list(range(NUM_EPISODES)), named=False, check=check)
    assert sampler.metrics() == {}
    return greedy, play(sampler, list(range(NUM_EPISODES)), SAMPLED, named=False)


def play_with_names(
    kind: str, config: ParallelConfig, changes: dict[str, Any], room: int | None = None
) -> tuple[Texts, Texts, dict[str, float]]:
    """Return the greedy and the sampled texts of this replica's episodes, and the metrics of the greedy ones."""
    sampler, grid, _ = sampler_of(kind, config, room, **changes)
    episodes = own(grid, list(range(NUM_EPISODES)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "_PREFILL_TOKENS", 40)  # prompts are read a few rows at a time
        greedy = play(sampler, episodes)
    metrics = sampler.metrics()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron_sampler, "lag_of", lambda device: 1)  # as on a GPU
        sampled = play(sampler, episodes, SAMPLED)
    return greedy, sampled, metrics


LATENT = {
    "multi_latent_attention": True,
    **{"q_lora_rank": None, "kv_lora_rank": 16, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 8},
}
LAYOUTS: dict[str, tuple[str, ParallelConfig, int, dict[str, Any]]] = {
    "one rank": ("shallow", parallel(), 1, {}),
    "TP2": ("shallow", parallel(tp=2), 2, {}),
    "PP2xVPP2": ("gqa", parallel(pp=2, vpp=2), 2, {}),
    "CP2": ("shallow", parallel(cp=2), 2, {}),
    "DP2": ("shallow", parallel(), 2, {}),
    "YaRN": ("yarn", parallel(), 1, {}),
    "partial rotation": ("partial", parallel(), 1, {}),
    "MoE EP2": ("moe", parallel(ep=2), 2, {}),
    "latent attention": ("shallow", parallel(), 1, {"transformer": LATENT, "num_query_groups": None}),
    "windows": ("shallow", parallel(), 1, {"transformer": {"window_size": [5, 0], "window_attn_skip_freq": 2}}),
    "linear": ("gated_delta", parallel(), 1, {}),
}


@pytest.fixture(scope="module")
def fresh(ranks):
    known: dict[str, tuple[Texts, Texts]] = {}

    def get(kind: str, changes: dict[str, Any]) -> tuple[Texts, Texts]:
        key = f"{kind} {changes}"
        if key not in known:
            [known[key]] = ranks.run(play_without_names, kind, changes, world_size=1)
        return known[key]

    return get


@combinations(layout=list(LAYOUTS), quick={"layout": ["CP2"]}, strength=1)
def test_a_cache_that_goes_on_gives_the_tokens_of_a_fresh_prefill(ranks, fresh, layout):
    kind, config, world_size, changes = LAYOUTS[layout]
    greedy, sampled = fresh(kind, changes)
    assert max(map(len, greedy.values())) == NUM_TURNS
    for found, drawn, metrics in ranks.run(play_with_names, kind, config, changes, world_size=world_size):
        assert found == {i: greedy[i] for i in found} and drawn == {i: sampled[i] for i in drawn}
        continued = sum(max(len(texts) - 1, 0) for texts in greedy.values())
        assert (metrics["rollout/kept_tokens"] > 4 * continued) == (kind != "gated_delta")


def test_rows_without_room_are_read_again(ranks, fresh):
    greedy, sampled = fresh("shallow", {})
    counts = []
    for room in (60, 120):
        [(found, drawn, metrics)] = ranks.run(play_with_names, "shallow", parallel(), {}, room, world_size=1)
        assert found == greedy and drawn == sampled
        counts.append((metrics["rollout/kept_tokens"], sum(metrics.values())))
    kept, read = zip(*counts, strict=True)
    assert kept[0] < kept[1] and len(set(read)) == 1


def forget() -> list[float]:
    """Return the tokens that are read in the second turn: with a kept row, after new weights, and after sleep."""
    sampler, _, _ = sampler_of("shallow", parallel())
    params = SamplingParams(NEW_TOKENS, temperature=0, stop_token_ids=tuple(range(VOCAB_SIZE)))
    read = []
    for between in (lambda: None, lambda: sampler.update_weights(1), sampler.sleep):
        [response] = sampler.generate([Request([1, 2, 3], 0, episode="a")], params)
        sampler.metrics()
        between()
        sampler.generate([Request([1, 2, 3, *response.token_ids, 4], 0, episode="a")], params)
        read.append(sampler.metrics()["rollout/prefilled_tokens"])
    return read


def test_new_weights_and_sleep_forget_all_rows(ranks):
    assert ranks.run(forget, world_size=1) == [[2.0, 5.0, 5.0]]


def test_the_turns_of_an_episode_stay_on_one_rank_until_it_ends():
    rows, requests = KeptRows(), [Request([1], 0, episode=name) for name in "abc"]
    rows.begin(requests)
    assert [rows.owner(request, i, 2) for i, request in enumerate(requests)] == [0, 1, 0]
    later = [requests[1], requests[2], Request([1], 0)]
    rows.begin(later)
    assert [rows.owner(request, i, 2) for i, request in enumerate(later)] == [1, 0, 0]
    rows.begin([requests[0]])
    assert rows.owner(requests[1], 0, 2) == 0, "the episode had ended"
