# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""`ColocatedSampler` with the real vLLM: its responses, in any layout, and the trainer's state after it."""

from __future__ import annotations

import json
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import models
import numpy as np
import pytest
import torch
from responses import own, tokens

from megatron_selfdistill.config import ModelConfig, OptimizerConfig, ParallelConfig, RolloutConfig
from megatron_selfdistill.errors import ConfigError, EngineError
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams, sample_seed
from megatron_selfdistill.rollout.vllm.in_process import InProcessEngine

TIMEOUT = 600.0  # the first call on a rank imports vLLM
MAX_LENGTH = 320
SIZES: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 512}
MODELS = {
    "gqa": models.model_config("gqa", **SIZES, num_query_groups=2),
    "tied": models.model_config("tied", **SIZES, num_query_groups=2),
    "moe": models.model_config("moe", **SIZES, num_query_groups=2),
}
GREEDY = SamplingParams(max_new_tokens=40, temperature=0.0)
DRAWN = SamplingParams(max_new_tokens=24)


def requests(count: int = 8) -> list[Request]:
    """Return two samples for each prompt; every other prompt exceeds a block of vLLM's prefix cache (128 tokens)."""
    generator = torch.Generator().manual_seed(5)
    prompts = [
        torch.randint(models.VOCAB_SIZE, (270 if i % 2 else 5 + i,), generator=generator).tolist()
        for i in range(count // 2)
    ]
    return [Request(prompts[i // 2], sample_seed(3, 0, f"p{i // 2}", i % 2)) for i in range(count)]


@contextmanager
def sampler(
    model: ModelConfig, chunks: Any, grid: Any, vocab_size: int = models.VOCAB_SIZE, **options: Any
) -> Iterator[Any]:
    from megatron_selfdistill.model.hf.mapping import family_of_model
    from megatron_selfdistill.rollout.vllm.colocated import ColocatedSampler

    family = family_of_model(model)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(family.hf_config(model, "float32")))
        built = ColocatedSampler(
            chunks,
            grid,
            Path(folder),
            family.rules(model),
            RolloutConfig(engine="vllm", **{"kv_cache_gb": 0.1, **options}),
            vocab_size=vocab_size,
            max_length=MAX_LENGTH,
        )
        try:
            yield built
        finally:
            built.close()


def joined(per_rank: list[tuple[int, int, Any]], count: int) -> list[Any]:
    """Return the responses of all replicas in the order of the requests; a replica's ranks must hold equal ones."""
    found: dict[int, Any] = {}
    for dp_rank, dp_size, responses in per_rank:
        for index, response in zip(range(dp_rank, count, dp_size), responses, strict=True):
            assert found.setdefault(index, response) == response
    return [found[index] for index in range(count)]


# -- what is written -------------------------------------------------------------------------------------------------


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
    """Return, for each response, the greedy tokens of transformers' model and its log-probs of the response."""
    import transformers
    from safetensors.torch import save_file

    from megatron_selfdistill.model.export import export
    from megatron_selfdistill.model.hf.mapping import family_of_model

    model = MODELS[kind]
    chunks, grid = models.build(model, ParallelConfig())
    family = family_of_model(model)
    tensors = {name: t.clone() for bucket in export(chunks, grid, family.rules(model)) for name, t in bucket}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(family.hf_config(model, "float32")))
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    scores = []
    for request, response in zip(requests(), responses, strict=True):
        with torch.no_grad():
            logits = theirs(torch.tensor([request.prompt + response.token_ids])).logits[0].double()
        rows = logits[len(request.prompt) - 1 : -1]
        said = rows.log_softmax(-1).gather(-1, torch.tensor(response.token_ids)[:, None])
        scores.append((rows.argmax(-1).tolist(), said.squeeze(-1).tolist()))
    return scores


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_tokens_and_log_probs_are_those_of_transformers(ranks, fresh, kind):
    greedy, drawn = fresh(kind, 0)
    for responses in (greedy, drawn):
        (scores,) = ranks.run(scored_by_transformers, kind, responses, world_size=1, timeout=TIMEOUT)
        for response, (best, log_probs) in zip(responses, scores, strict=True):
            if responses is greedy:
                assert response.token_ids == best
            assert response.log_probs == pytest.approx(log_probs, abs=1e-4)
    assert {response.weight_version for response in greedy} == {7}
    assert {len(response.token_ids) for response in greedy} == {GREEDY.max_new_tokens}
    assert greedy[0].sampled_log_probs == [0.0] * 40 and drawn[0].sampled_log_probs == drawn[0].log_probs


def written_in_process(kind: str) -> list[Response]:
    from megatron_selfdistill.rollout.megatron.megatron_sampler import MegatronSampler

    chunks, grid = models.build(MODELS[kind], ParallelConfig())
    return MegatronSampler(chunks, grid, models.VOCAB_SIZE, MAX_LENGTH).generate(requests(), GREEDY)


def test_greedy_tokens_and_log_probs_are_the_trainers_own(ranks, fresh):
    (theirs,) = ranks.run(written_in_process, "moe", world_size=1)
    greedy = fresh("moe", 0)[0]
    assert tokens(greedy) == tokens(theirs)
    for response, other in zip(greedy, theirs, strict=True):
        assert response.log_probs == pytest.approx(other.log_probs, abs=1e-4)


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


def fewer_requests_than_engines() -> list[int]:
    chunks, grid = models.build(MODELS["gqa"], ParallelConfig())
    with sampler(MODELS["gqa"], chunks, grid) as it:
        it.update_weights(1)
        some = requests()[:1] if grid.dp_rank == 0 else []
        return [len(it.generate(share, DRAWN)) for share in (some, [])]


def test_replicas_and_engines_without_requests_take_part(ranks):
    assert ranks.run(fewer_requests_than_engines, world_size=2, timeout=TIMEOUT) == [[1, 0], [0, 0]]


def written_alone_stopped_and_cut() -> dict[str, list[Response]]:
    chunks, grid = models.build(MODELS["gqa"], ParallelConfig())
    stops = replace(DRAWN, stop_token_ids=tuple(range(0, models.VOCAB_SIZE, 8)))
    with sampler(MODELS["gqa"], chunks, grid) as it:
        it.update_weights(7)
        return {
            "alone": [it.generate([request], DRAWN)[0] for request in requests()],
            "stopped": it.generate(requests(), stops),
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


def dtypes() -> tuple[str, float]:
    chunks, grid = models.build(MODELS["gqa"], ParallelConfig(), optimizer=OptimizerConfig(precision="bf16"))
    with sampler(MODELS["gqa"], chunks, grid) as it:
        it.update_weights(1)
        responses = it.generate(requests(), DRAWN)
        return str(it._engine._llm.model_config.dtype), float(np.mean([np.mean(r.log_probs) for r in responses]))


def test_a_bf16_trainer_has_bf16_engines(ranks, fresh):
    ((dtype, mean),) = ranks.run(dtypes, world_size=1, timeout=TIMEOUT)
    assert dtype == "torch.bfloat16"
    assert -4 < mean < -0.5  # uniform would be -log 61 = -4.1


def mixed_requests() -> list[Request]:
    plain = requests()
    return [replace(r, teacher_prompt=plain[i - 1].prompt) if i % 3 == 0 else r for i, r in enumerate(plain)]


def guided_in_process() -> list[Response]:
    from megatron_selfdistill.rollout.megatron.megatron_sampler import MegatronSampler

    chunks, grid = models.build(MODELS["gqa"], ParallelConfig())
    pairs = [request for request in mixed_requests() if request.teacher_prompt is not None]
    return MegatronSampler(chunks, grid, models.VOCAB_SIZE, MAX_LENGTH).generate(pairs, DRAWN)


def guided_beside_plain(engine_tp: int) -> tuple[list[Response], dict[str, float]]:
    chunks, grid = models.build(MODELS["gqa"], models.parallel(tp=2))
    with sampler(MODELS["gqa"], chunks, grid, engine_tp=engine_tp, guidance="mixed") as it:
        it.update_weights(7)
        return it.generate(mixed_requests(), DRAWN), it.metrics()


@pytest.mark.parametrize("engine_tp", [1, 2])
def test_guided_requests_get_the_trainers_own_tokens_and_plain_ones_beside_them_theirs(ranks, fresh, engine_tp):
    (first, metrics), (second, other_metrics) = ranks.run(guided_beside_plain, engine_tp, world_size=2, timeout=TIMEOUT)
    assert tokens(first) == tokens(second) and metrics == other_metrics
    assert metrics["rollout/guided_repairs"] >= 0
    (theirs,) = ranks.run(guided_in_process, world_size=1)
    guided = [response for response in first if response.guided]
    assert tokens(guided) == tokens(theirs)
    for response, other in zip(guided, theirs, strict=True):
        assert response.teacher_log_probs == pytest.approx(other.teacher_log_probs, abs=1e-4)
        assert response.weight_version == 7
    for response, alone in zip(first, fresh("gqa", 0)[1], strict=True):
        assert response.guided or response.token_ids == alone.token_ids


# -- what goes wrong -------------------------------------------------------------------------------------------------


def refusals() -> list[str]:
    """Return the errors of a broken engine on this rank, and whether the next batch is right again."""
    chunks, grid = models.build(MODELS["gqa"], ParallelConfig())
    said = []
    mine = own(grid, requests())
    with sampler(MODELS["gqa"], chunks, grid) as it:
        engine = it._engine

        def refused(kind: type, share: list[Request], params: SamplingParams = DRAWN) -> None:
            with pytest.raises(kind) as error:
                it.generate(share, params)
            assert type(error.value) is kind
            said.append(str(error.value))

        refused(EngineError, mine)
        it.update_weights(4)
        right = it.generate(mine, DRAWN)
        refused(ValueError, [*mine, Request([], 1)] if grid.rank else mine)
        refused(ValueError, [Request([1] * 310, 1)] if grid.rank else mine)
        refused(ValueError, [replace(mine[0], teacher_prompt=[1])] if grid.rank else mine)
        llm = engine._llm
        if grid.rank == 1:
            with pytest.MonkeyPatch.context() as patch:
                steps = iter(range(3))
                step = llm.llm_engine.step
                patch.setattr(llm.llm_engine, "step", lambda: step() if next(steps, None) is not None else 1 / 0)
                refused(EngineError, mine)
            generate = llm.generate
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(llm, "generate", lambda *a, **k: generate(*a, **k)[:-1])
                refused(EngineError, mine)
            llm.update_weight_version("3")
        else:
            refused(EngineError, mine)
            refused(EngineError, mine)
        refused(EngineError, mine)
        it._max_staleness = 1
        late = it.generate(mine, DRAWN)
        assert it.metrics()["rollout/staleness_max"] == 1.0
        assert it.metrics()["rollout/staleness_max"] == 0.0
        it._max_staleness = 0
        with pytest.raises(EngineError, match=r"refused the weights: .*breaks off"):
            engine.load(breaking_off(it), 4)
        refused(EngineError, mine)
        it.update_weights(5)
        again = it.generate(mine, DRAWN)
        assert tokens(again) == tokens(late) == tokens(right)
        assert {response.weight_version for response in again} == {5}
    it.close()
    with pytest.raises(EngineError, match="is closed"):
        it._engine.generate([None])  # type: ignore[list-item]
    return said


def breaking_off(it: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Other weights, up to the middle of a layer, on every rank alike."""
    whole = True
    for name, tensor in it._tensors():
        whole = whole and not name.endswith("1.self_attn.k_proj.weight")
        if whole:
            yield name, 2 * tensor
    raise RuntimeError("the export breaks off")


REFUSALS = [
    "the vLLM engines have no weights yet: call update_weights before generate",
    "a request has an empty prompt; a prompt needs at least one token",
    r"the longest prompt has 310 tokens and max_new_tokens is 24, together more than the 320 that .*",
    r"a request has a teacher's prompt, but the vLLM engines were built without guided .*guidance=mixed",
    "rank 1: the vLLM engine of rank 1 failed in mid-batch: division by zero",
    "rank 1: the vLLM engine of rank 1 was asked for 4 responses and gave 3",
    r"rank 1: the vLLM engine of rank 1 generated a response with weights of version 3, expected 4 "
    r"\(rollout.max_staleness=0\)",
    "rank 0: the vLLM engine of rank 0 has a part of its weights: their update has failed; "
    "rank 1: the vLLM engine of rank 1 has a part of its weights: their update has failed",
]


def test_an_engine_that_fails_is_one_sentence_on_all_ranks_and_the_next_batch_is_whole(ranks):
    first, second = ranks.run(refusals, world_size=2, timeout=TIMEOUT)
    assert first == second
    for said, expected in zip(first, REFUSALS, strict=True):
        assert re.fullmatch(expected, said), said


STARTS = InProcessEngine.__init__


def fails_to_start(self: Any, *arguments: Any, **options: Any) -> None:
    STARTS(self, *arguments, **options)
    self.close()
    raise MemoryError("no room")


def settings_refused() -> list[str]:
    chunks, grid = models.build(MODELS["gqa"], ParallelConfig())
    said = []
    for options in (
        {"kv_cache_gb": 3e-4},
        {"engine_args": {"max_num_sequences": 3}},
        {"engine_args": {"pipeline_parallel_size": 2}},
        {"engine_args": {"tensor_parallel_size": 2}},
        {"engine_tp": 4},
        {"vocab_size": 60},
    ):
        with pytest.raises(ConfigError) as error, sampler(MODELS["gqa"], chunks, grid, **options):
            pass
        said.append(str(error.value))
    with pytest.MonkeyPatch.context() as patch:
        if grid.rank == 1:
            patch.setattr("megatron_selfdistill.rollout.vllm.in_process.InProcessEngine.__init__", fails_to_start)
        with pytest.raises(EngineError) as failure, sampler(MODELS["gqa"], chunks, grid, engine_args={"seed": 1}):
            pass
        said.append(str(failure.value))
    with sampler(MODELS["gqa"], chunks, grid, engine_args={"max_num_seqs": 2}) as it:
        it.update_weights(1)
        assert len(it.generate(requests(), DRAWN)) == 8
        assert it._engine._llm.llm_engine.vllm_config.scheduler_config.max_num_seqs == 2
        with pytest.raises(ConfigError) as error, sampler(MODELS["gqa"], chunks, grid):
            pass
        said.append(str(error.value))
    return said


SETTINGS_REFUSED = [
    r"vLLM cannot run this model with rollout.kv_cache_gb and rollout.engine_args as set: .*cache.*",
    r"vLLM cannot run .*unexpected keyword argument 'max_num_sequences'",
    r"rollout.engine_args.pipeline_parallel_size=2: a colocated engine runs on .*",
    r"rollout.engine_args.tensor_parallel_size=2: a colocated engine runs on .*",
    r"rollout.engine_tp=4 ranks form one engine, but the world size 2 is no multiple of it; .*",
    r".*/config.json has vocab_size=61, but the model has 60 tokens",
    r"rank 1: MemoryError: no room",
    r"this process has a vLLM engine already: close its sampler before the next one is built",
]


def test_settings_that_cannot_work_are_one_sentence_and_leave_room_for_those_that_do(ranks):
    for said in ranks.run(settings_refused, world_size=2, timeout=TIMEOUT):
        for sentence, expected in zip(said, SETTINGS_REFUSED, strict=True):
            assert re.fullmatch(expected, sentence), sentence


# -- what is left as it was ------------------------------------------------------------------------------------------


def draws() -> tuple[Any, ...]:
    return random.random(), float(np.random.rand()), torch.rand(2).tolist()


def state() -> tuple[Any, ...]:
    return (
        dict(os.environ),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.set_num_threads,
        torch.cuda.Event,
        torch.cuda.current_stream,
        torch.Tensor.pin_memory,
    )


def what_changed() -> None:
    """Return the state of a trainer's process before and after, without a launcher's environment."""
    from megatron_selfdistill.distributed import ranks

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = [draws() for _ in range(4)]
    for _ in range(2):  # also where the group of the first run is gone when its sampler is closed
        chunks, grid = models.build(MODELS["gqa"], ParallelConfig())
        before = state()
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        with sampler(MODELS["gqa"], chunks, grid, kv_cache_gb=None) as it:
            found = [draws()]
            it.update_weights(1)
            found.append(draws())
            responses = it.generate(requests(), DRAWN)
            found.append(draws())
            assert state() == before
            it.sleep()  # nothing to give back on a CPU
            assert tokens(it.generate(requests(), DRAWN)) == tokens(responses)
            it.close()
            found.append(draws())
            assert found == expected
            assert state() == before
            ones = torch.ones(1)
            torch.distributed.all_reduce(ones)  # the trainer's group goes on
            ranks.shutdown()


def test_random_streams_environment_and_functions_of_torch_are_kept_and_a_second_run_finds_a_clean_process(ranks):
    ranks.run(what_changed, world_size=1, timeout=TIMEOUT, init_process_group=False)


@contextmanager
def groups_end_at_shutdown() -> Iterator[None]:
    """End the groups at shutdown, as vLLM does since 0.33."""
    import vllm.distributed
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    shutdown = ExecutorWithExternalLauncher.shutdown

    def shutdown_and_end(self: Any) -> None:
        shutdown(self)
        vllm.distributed.parallel_state.destroy_model_parallel()

    with mock.patch.object(ExecutorWithExternalLauncher, "shutdown", shutdown_and_end):
        yield


def closed_last() -> list[list[int]]:
    from megatron_selfdistill.distributed import ranks

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)
    written = []
    for is_new in (False, True):
        chunks, grid = models.build(MODELS["gqa"], ParallelConfig())
        with groups_end_at_shutdown() if is_new else nullcontext(), sampler(MODELS["gqa"], chunks, grid) as it:
            it.update_weights(1)
            written.append(tokens(it.generate(requests(), DRAWN)))
            ranks.shutdown()
    return written


def test_a_sampler_may_be_closed_after_the_trainers_groups(ranks):
    ((first, second),) = ranks.run(closed_last, world_size=1, timeout=TIMEOUT, init_process_group=False)
    assert first == second


def slept() -> tuple[list[str], bool, dict[str, float]]:
    """Return the outcome for an engine that can sleep: here it loses its weights by getting others."""
    chunks, grid = models.build(MODELS["gqa"], ParallelConfig())
    happened: list[str] = []
    with sampler(MODELS["gqa"], chunks, grid) as it:
        engine, load = it._engine, it._engine.load
        it.update_weights(6)
        before = it.generate(requests(), DRAWN)
        it.metrics()

        def forget() -> None:
            happened.append("sleep")
            load(((name, torch.zeros_like(tensor)) for name, tensor in it._tensors()), -1)
            it.metrics()

        def recorded_load(tensors: Any, version: int) -> None:
            happened.append(f"load {version}")
            load(tensors, version)

        engine.can_sleep = True
        engine.sleep, engine.load = forget, recorded_load
        engine.wake = lambda what: happened.append(f"wake {what}")
        it.sleep()
        it.sleep()
        after = it.generate(requests(), DRAWN)
        again = it.generate(requests(), DRAWN)
        it.sleep()
        it.update_weights(7)
        engine.can_sleep = False
        same = tokens(after) == tokens(again) == tokens(before)
        return happened, same and {r.weight_version for r in after} == {6}, it.metrics()


def test_an_engine_that_slept_gets_its_weights_again_before_it_writes(ranks):
    happened, same, metrics = ranks.run(slept, world_size=1, timeout=TIMEOUT)[0]
    cycle = ["sleep", "wake weights", "load 6", "wake kv_cache"]
    assert happened == [*cycle, "sleep", "wake weights", "load 7", "wake kv_cache"]
    assert same
    assert metrics["rollout/sync_bytes"] > 0 and metrics["rollout/sync_seconds"] > 0


# -- what an update writes ---------------------------------------------------------------------------------------------


def parameters_of(it: Any) -> dict[str, torch.Tensor]:
    return it._engine._llm.apply_model(lambda model: dict(model.named_parameters()))[0]


def updated_twice() -> tuple[list[tuple[int, ...]], bool, int, bool]:
    """Return the shapes of the memory that an update takes, and what became of the parameters.

    After the shapes come: whether all parameters stay in their place; how many parameters have the name of a tensor
    that was sent, and whether each of these parameters holds that tensor.
    """
    import vllm._custom_ops
    from vllm.model_executor.model_loader.reload import meta

    taken: list[tuple[int, ...]] = []
    materialize = meta.materialize_meta_tensor

    def noted(tensor: torch.Tensor) -> torch.Tensor:
        taken.append(tuple(tensor.shape))
        return materialize(tensor)

    with mock.patch.object(vllm._custom_ops, "_supports_onednn", False):  # it would pack weights into others
        chunks, grid = models.build(MODELS["gqa"], ParallelConfig())
        with sampler(MODELS["gqa"], chunks, grid) as it:
            it.update_weights(1)
            before = {name: parameter.data_ptr() for name, parameter in parameters_of(it).items()}
            with torch.no_grad():
                for chunk in chunks:
                    for parameter in chunk.parameters():
                        parameter.mul_(1.5)
            with mock.patch.object(meta, "materialize_meta_tensor", noted):
                it.update_weights(2)
            sent = {name: tensor.clone() for name, tensor in it._tensors()}
            live = {parameter.untyped_storage().data_ptr() for chunk in chunks for parameter in chunk.parameters()}
            num_views = sum(tensor.untyped_storage().data_ptr() in live for _, tensor in it._tensors())
            assert num_views > len(sent) // 2  # of the trainer's own weights, which
            with torch.no_grad():  # training then changes, and the engine must not see that
                for chunk in chunks:
                    for parameter in chunk.parameters():
                        parameter.zero_()
            after = parameters_of(it)
            shared = after.keys() & sent.keys()
            stay = before == {name: parameter.data_ptr() for name, parameter in after.items()}
            equal = all(torch.equal(after[name][: len(sent[name])], sent[name]) for name in shared)  # less padding
            assert len(it.generate(requests(), GREEDY)) == len(requests())
    return taken, stay, len(shared), equal


def test_an_update_takes_no_memory_and_leaves_every_parameter_where_it_is(ranks):
    ((taken, stay, num_shared, equal),) = ranks.run(updated_twice, world_size=1, timeout=TIMEOUT)
    assert taken == []
    assert stay and equal and num_shared > 4
