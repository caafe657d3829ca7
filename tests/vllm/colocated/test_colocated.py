# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""`ColocatedSampler` with the real vLLM: its responses, in any layout."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from colocated import DRAWN, GREEDY, MODELS, TIMEOUT, requests, sampler
from responses import own, tokens

from megatron_selfdistill.config import ParallelConfig
from megatron_selfdistill.rollout.base import Response


def joined(per_rank: list[tuple[int, int, Any]], count: int) -> list[Any]:
    """Return the responses of all replicas in the order of the requests; a replica's ranks must hold equal ones."""
    found: dict[int, Any] = {}
    for dp_rank, dp_size, responses in per_rank:
        for index, response in zip(range(dp_rank, count, dp_size), responses, strict=True):
            assert found.setdefault(index, response) == response
    return [found[index] for index in range(count)]


def written_by_a_fresh_engine(kind: str, seed: int) -> tuple[list[Response], list[Response]]:
    chunks, grid = models.build(MODELS[kind], ParallelConfig(), seed=seed)
    with sampler(MODELS[kind], chunks, grid) as it:
        it.update_weights(7)
        return it.generate(requests(), GREEDY), it.generate(requests(), DRAWN)


@pytest.fixture(scope="module")
def fresh(ranks: Any) -> Callable[[str, int], tuple[list[Response], list[Response]]]:
    """(model, weights) -> greedy and drawn responses of an engine that had no other weights, on one rank."""
    found: dict[tuple[str, int], Any] = {}

    def of(kind: str, seed: int) -> tuple[list[Response], list[Response]]:
        if (kind, seed) not in found:
            (found[kind, seed],) = ranks.run(written_by_a_fresh_engine, kind, seed, world_size=1, timeout=TIMEOUT)
        return found[kind, seed]

    return of


def scored_by_transformers(kind: str, responses: list[Response]) -> list[tuple[list[int], list[float]]]:
    """Return, for each response, the greedy tokens of transformers' model and its log-probs of the response.

    ``responses`` answer `requests`, once or several times in the same order.
    """
    import transformers
    from safetensors.torch import save_file

    from megatron_selfdistill.interop.export import Exporter
    from megatron_selfdistill.interop.hf.mapping import family_of_model

    model = MODELS[kind]
    chunks, grid = models.build(model, ParallelConfig())
    family = family_of_model(model)
    tensors = {name: t.clone() for bucket in Exporter(chunks, grid, family.rules(model)).stream() for name, t in bucket}
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(family.hf_config(model, "float32")))
        save_file(tensors, Path(directory) / "model.safetensors", metadata={"format": "pt"})
        theirs = (
            transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").float().eval()
        )
    scores = []
    for request, response in zip(cycle(requests()), responses, strict=False):
        with torch.no_grad():
            logits = theirs(torch.tensor([request.prompt + response.token_ids])).logits[0].double()
        rows = logits[len(request.prompt) - 1 : -1]
        scored = rows.log_softmax(-1).gather(-1, torch.tensor(response.token_ids)[:, None])
        scores.append((rows.argmax(-1).tolist(), scored.squeeze(-1).tolist()))
    return scores


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_tokens_and_log_probs_are_those_of_transformers(ranks, fresh, kind):
    greedy, drawn = fresh(kind, 0)
    (scores,) = ranks.run(scored_by_transformers, kind, [*greedy, *drawn], world_size=1, timeout=TIMEOUT)
    for response, (_, log_probs) in zip([*greedy, *drawn], scores, strict=True):
        assert response.log_probs == pytest.approx(log_probs, abs=1e-4)
    assert tokens(greedy) == [best for best, _ in scores[: len(greedy)]]
    assert {response.weight_version for response in greedy} == {7}
    assert {len(response.token_ids) for response in greedy} == {GREEDY.max_new_tokens}
    assert greedy[0].sampled_log_probs == [0.0] * 40 and drawn[0].sampled_log_probs == drawn[0].log_probs


LAYOUTS = {
    "TP2xPP2 to engines of 1": ("gqa", models.parallel(tp=2, pp=2), 4, 1),
    "TP2 to an engine of 2": ("gqa", models.parallel(tp=2), 2, 2),
    "TP2xDP2 to engines of 2": ("tied", models.parallel(tp=2), 4, 2),
    "EP2 to an engine of 2": ("moe", models.parallel(ep=2), 2, 2),
}


def written_in_turn(
    kind: str, parallel: ParallelConfig, engine_tp: int, count: int
) -> list[tuple[int, int, list[Response]]]:
    """Greedily by weights 0, by weights 1, drawn by weights 1, and with the requests in another order."""
    chunks, grid = models.build(MODELS[kind], parallel)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    mixed = [requests(count)[i] for i in order]
    with sampler(MODELS[kind], chunks, grid, engine_tp=engine_tp, bucket_mb=0.05) as it:
        torch.distributed.barrier()
        assert not list(Path("/dev/shm").glob(f"{it._engine.ident}-*")), "a kill would leave it there"
        it.update_weights(1)
        parts = [it.generate(own(grid, requests(count)), GREEDY)]
        models.fill_from_names(chunks, seed=1)
        it.update_weights(2)
        parts += [it.generate(own(grid, requests(count)), params) for params in (GREEDY, DRAWN)]
        parts.append(it.generate(own(grid, mixed), DRAWN))
    return [(grid.dp_rank, grid.dp_size, responses) for responses in parts]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_after_an_update_tokens_are_those_of_a_freshly_loaded_engine_in_any_layout(ranks, fresh, layout):
    kind, parallel, world_size, engine_tp = LAYOUTS[layout]
    count = len(requests())
    per_rank = ranks.run(written_in_turn, kind, parallel, engine_tp, count, world_size=world_size, timeout=TIMEOUT)
    before, after, drawn, mixed = (joined(list(part), count) for part in zip(*per_rank, strict=True))
    assert tokens(before) == tokens(fresh(kind, 0)[0])
    assert tokens(after) == tokens(fresh(kind, 1)[0]) != tokens(before)
    assert tokens(drawn) == tokens(fresh(kind, 1)[1])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    assert tokens(mixed) == [tokens(drawn)[i] for i in order]
    assert {r.weight_version for r in before} == {1} and {r.weight_version for r in after} == {2}
    for response, other in zip(after, fresh(kind, 1)[0], strict=True):
        assert response.log_probs == pytest.approx(other.log_probs, abs=1e-4)


def written_alone_stopped_and_cut() -> dict[str, list[Response]]:
    chunks, grid = models.build(MODELS["gqa"], ParallelConfig())
    stops = replace(DRAWN, stop_token_ids=tuple(range(0, models.VOCAB_SIZE, 8)))
    with sampler(MODELS["gqa"], chunks, grid) as it:
        it.update_weights(7)
        counts: list[tuple[int, int, str]] = []
        it._progress = lambda *counted: counts.append(counted)
        stopped = it.generate(requests(), stops)
        lengths = sorted(len(response.token_ids) for response in stopped)
        assert len(set(lengths)) > 2, "the responses must end at different passes"
        assert sorted(counts) == counts and len(set(counts)) >= len(set(lengths))
        assert [counts[0], counts[-1]] == [(0, 8, ""), (8, 8, "")]
        return {
            "alone": [it.generate([request], DRAWN)[0] for request in requests()],
            "stopped": stopped,
            "cut": it.generate(requests(), replace(DRAWN, top_k=1)),
            "cool": it.generate(requests(), replace(DRAWN, temperature=0.5)),
            "greedy": it.generate(requests(), replace(GREEDY, max_new_tokens=24)),
        }


def test_a_response_depends_on_its_own_stream_and_ends_at_a_stop_token(ranks, fresh):
    (found,) = ranks.run(written_alone_stopped_and_cut, world_size=1, timeout=TIMEOUT)
    drawn = fresh("gqa", 0)[1]
    assert tokens(found["alone"]) == tokens(drawn)
    assert all(tokens(drawn)[i] != tokens(drawn)[i + 1] for i in range(0, len(drawn), 2)), "samples of one problem"
    reasons = set()
    for response, whole in zip(found["stopped"], drawn, strict=True):
        places = [place for place, token in enumerate(whole.token_ids) if token % 8 == 0]
        length = places[0] + 1 if places else DRAWN.max_new_tokens
        assert response.token_ids == whole.token_ids[:length]
        assert response.finish_reason == ("stop" if places else "length")
        reasons.add(response.finish_reason)
    assert "stop" in reasons
    assert tokens(found["cut"]) == tokens(found["greedy"]) != tokens(found["cool"])
    assert np.isnan(found["cool"][0].sampled_log_probs).all() and np.isfinite(found["cool"][0].log_probs).all()
