# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Guided decoding on the real vLLM against transformers in float64: every token, whatever the engine does in between.

The reference reads each response behind both prompts, mixes the two rows by its own bisection and inverts the CDF at
the uniform of the request's seed.  That every token follows from the ones before it makes the whole response right.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from guided_reference import assert_each_token_is_the_references, mixed_log_q
from ranks import RankPool
from responses import chi_square_p_value

pytest.importorskip("vllm")
from transformers import Qwen2Config, Qwen2ForCausalLM
from vllm import SamplingParams as EngineParams
from vllm.v1.core.sched.scheduler import Scheduler

from megatron_selfdistill.loss.target import Target
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams, sample_seed
from megatron_selfdistill.rollout.vllm import pairs
from megatron_selfdistill.rollout.vllm.engine_output import EngineOutput, EngineRequest
from megatron_selfdistill.rollout.vllm.pairs import PairCounts, generate_guided
from megatron_selfdistill.rollout.vllm.plugin import guided_processor
from megatron_selfdistill.rollout.vllm.plugin.guided_processor import PairStore
from megatron_selfdistill.rollout.vllm.protocol import PairHalf

VOCAB_SIZE = 64
BLOCK_TOKENS = 32
_BYTES_PER_TOKEN = 2 * 2 * 64 * 4  # keys and values, layers, width, float32
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunked": {"max_num_batched_tokens": 128},
    "preempting": {"kv_cache_memory_bytes": 40 * BLOCK_TOKENS * _BYTES_PER_TOKEN, "disable_log_stats": False},
}
SAMPLED = SamplingParams(max_new_tokens=40, stop_token_ids=(1,))
GREEDY = replace(SAMPLED, temperature=0.0)


class LLMEngine:
    """vLLM's ``LLM`` in this process as an `Engine`; keeps what it was asked and answered last."""

    name = "the vLLM engine of this test"

    def __init__(self, directory: Path, **settings: Any) -> None:
        os.environ.update(
            VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1"
        )
        os.environ.update(pairs.GUIDED_ENVIRONMENT)
        import vllm

        defaults = {
            "dtype": "float32",
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            "max_model_len": 512,
            "max_num_seqs": 64,
            "max_num_batched_tokens": 4096,
            "kv_cache_memory_bytes": 32 << 20,
            "block_size": BLOCK_TOKENS,
            "disable_log_stats": True,
            "seed": 0,
        }
        self._sampling_params = vllm.SamplingParams
        self.llm = vllm.LLM(str(directory), **{**defaults, **pairs.GUIDED_ENGINE_ARGS, **settings})
        self.outputs: list[EngineOutput] = []

    def generate(self, requests: Sequence[EngineRequest]) -> list[EngineOutput]:
        prompts = [{"prompt_token_ids": request.token_ids} for request in requests]
        params = [self._sampling_params(**request.sampling) for request in requests]
        written = [output.outputs[0] for output in self.llm.generate(prompts, params, use_tqdm=False)]
        self.outputs = [
            EngineOutput(
                list(output.token_ids),
                [entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True)],
                output.finish_reason,
                weight_version=3,
            )
            for output in written
        ]
        return self.outputs

    def call(self, method: str, *args: Any) -> Any:
        return self.llm.collective_rpc(method, args=args)[0]

    @property
    def store(self) -> PairStore:
        runner = self.llm.llm_engine.model_executor.driver_worker.worker.model_runner
        return guided_processor.guided_processor(runner.input_batch.logitsprocs.all)._store

    def num_preemptions(self) -> int:
        return sum(metric.value for metric in self.llm.get_metrics() if metric.name == "vllm:num_preemptions")


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    """Large weights: student and teacher disagree, and no two logits are nearly equal."""
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5, generator=generator)
        model.lm_head.weight.mul_(2)
        for parameter in model.parameters():
            parameter.copy_(parameter.float())  # what vLLM reads, exactly
    return model


@pytest.fixture(scope="module")
def directory(model: Qwen2ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    Qwen2ForCausalLM(model.config).float().save_pretrained(path)  # for its config.json
    from safetensors.torch import save_file

    save_file(
        {name: value.float().contiguous() for name, value in model.state_dict().items()}, path / "model.safetensors"
    )
    return path


@pytest.fixture(scope="module")
def engine(directory: Path) -> Iterator[Callable[[str], LLMEngine]]:
    """Return a function that gives the engine of some settings; all engines live until the end.

    The end of one engine would tear down vLLM's process groups, which the other engines share.
    """
    engines: dict[str, LLMEngine] = {}

    def get(name: str) -> LLMEngine:
        if name not in engines:
            engines[name] = LLMEngine(directory, **SETTINGS[name])
        return engines[name]

    yield get


def make_requests(count: int = 16, seed: int = 0) -> list[Request]:
    """Prompts of 3 to 19 tokens, teachers' of 20 to 89; seeds also beyond 2^63."""
    rng = np.random.default_rng(seed)
    return [
        Request(
            prompt=rng.integers(2, VOCAB_SIZE, rng.integers(3, 20)).tolist(),
            seed=sample_seed(seed, 0, "problem", index),
            teacher_prompt=rng.integers(2, VOCAB_SIZE, rng.integers(20, 90)).tolist(),
        )
        for index in range(count)
    ]


def token_ids(responses: Sequence[Response]) -> list[list[int]]:
    return [response.token_ids for response in responses]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_every_token_is_the_one_that_transformers_gives_also_when_halves_are_parted(
    model: Qwen2ForCausalLM, engine: Callable[[str], LLMEngine], settings: str, params: SamplingParams
) -> None:
    params = replace(params, max_new_tokens=64, stop_token_ids=(1,) if params is SAMPLED else (0,))
    used, counts = engine(settings), PairCounts()
    requests = make_requests(16, seed=1)
    responses = generate_guided(used, requests, params, counts)
    total = assert_each_token_is_the_references(model, requests, responses, params)
    assert total > 400
    assert {response.weight_version for response in responses} == {3}
    assert (counts.repairs > 0) == (settings != "plain"), counts
    if settings == "preempting":
        assert used.num_preemptions() > 0
    assert len(used.store) == used.store.num_bytes == 0, "logs outlive the call"


def test_log_probs_are_the_engines_own_raw_ones(engine: Callable[[str], LLMEngine]) -> None:
    used = engine("plain")
    responses = generate_guided(used, make_requests(), SAMPLED)
    for index, response in enumerate(responses):
        student, teacher = used.outputs[2 * index : 2 * index + 2]
        np.testing.assert_allclose(response.log_probs, student.log_probs, rtol=0, atol=1e-5)
        np.testing.assert_allclose(response.teacher_log_probs, teacher.log_probs, rtol=0, atol=1e-5)


def test_order_company_and_waiting_in_line_change_no_token(engine: Callable[[str], LLMEngine]) -> None:
    requests = make_requests(80, seed=2)  # 160 halves, 64 seats
    params = replace(SAMPLED, stop_token_ids=(1, 5, 9))  # lengths from 1 token on
    counts = PairCounts()
    together = token_ids(generate_guided(engine("plain"), requests, params, counts))
    assert len({len(tokens) for tokens in together}) > 10
    order = np.random.default_rng(0).permutation(80)
    shuffled = token_ids(generate_guided(engine("plain"), [requests[i] for i in order], params))
    assert shuffled == [together[i] for i in order]
    alone = [token_ids(generate_guided(engine("plain"), [request], params))[0] for request in requests[:5]]
    assert alone == together[:5]


def test_without_stop_tokens_a_response_runs_to_its_full_length(
    model: Qwen2ForCausalLM, engine: Callable[[str], LLMEngine]
) -> None:
    params = replace(SAMPLED, stop_token_ids=())
    requests = [replace(request, teacher_prompt=[9, *(request.teacher_prompt or [])]) for request in make_requests()]
    responses = generate_guided(engine("chunked"), requests, params)
    assert any(9 in tokens for tokens in token_ids(responses)), "the token that serves as stop was never drawn"
    assert assert_each_token_is_the_references(model, requests, responses, params) == 16 * 40


def test_one_batch_holds_pairs_of_several_targets_and_plain_requests(engine: Callable[[str], LLMEngine]) -> None:
    used = engine("plain")
    requests = make_requests(6)
    targets = [
        Target(anchor="student"),
        Target("fixed", k=1.2, anchor="student"),
        Target("teacher_alone", anchor="student"),
    ]
    apart = [generate_guided(used, requests, replace(SAMPLED, target=target)) for target in targets]
    plain = EngineRequest(
        requests[0].prompt,
        {"max_tokens": 40, "temperature": 0.0, "ignore_eos": True, "logprobs": 0, "detokenize": False},
    )
    plain_alone = used.generate([plain])[0].token_ids
    halves, names = [plain], []
    for number, target in enumerate(targets):
        for index, request in enumerate(requests):
            names.append(f"{number}-{index}")
            for role, prompt in zip(pairs.ROLES, (request.prompt, request.teacher_prompt), strict=True):
                half = PairHalf(names[-1], role, request.seed, 0, 40, 1, target, greedy=False)
                sampling = {**plain.sampling, "stop_token_ids": [1], "extra_args": half.extra_args()}
                halves.append(EngineRequest(list(prompt or []), sampling))
    outputs = used.generate(halves)
    used.call("pop_pair_logs", names)
    assert outputs[0].token_ids == plain_alone
    expected = [tokens for responses in apart for tokens in token_ids(responses)]
    assert [output.token_ids for output in outputs[1::2]] == expected
    assert len({tuple(tokens) for tokens in expected}) == len(expected), "the targets made no difference"


def lone_half(name: str, role: str) -> dict[str, Any]:
    half = PairHalf(name, role, 7, 0, 40, 1, Target(anchor="student"), greedy=False)
    sampling = {"temperature": 0.0, "max_tokens": 40, "stop_token_ids": [1], "logprobs": 0, "ignore_eos": True}
    return {**sampling, "extra_args": half.extra_args()}


def test_a_half_that_has_begun_without_its_partner_writes_nothing_but_its_stop(
    engine: Callable[[str], LLMEngine],
) -> None:
    used = engine("plain")
    scheduler = used.llm.llm_engine.engine_core.engine_core.scheduler
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            scheduler, "add_request", Scheduler.add_request.__get__(scheduler)
        )  # vLLM's own, which waits for nobody
        output = used.generate([EngineRequest([4, 5, 6], lone_half("lonely", "teacher"))])[0]
    assert output.token_ids == [1]
    assert used.call("pop_pair_logs", ["lonely", "unknown"])[0]["forced"] == [-1, 0]
    assert used.call("pop_pair_logs", ["lonely"]) == [None]


def test_a_half_waits_for_its_partner_and_leaves_nothing_behind_when_it_is_given_up(
    engine: Callable[[str], LLMEngine],
) -> None:
    llm = engine("plain").llm.llm_engine
    scheduler = llm.engine_core.engine_core.scheduler

    def add(name: str, pair: str, role: str) -> None:
        llm.add_request(name, {"prompt_token_ids": [4, 5, 6]}, EngineParams(**lone_half(pair, role)))

    def written() -> dict[str, list[int]]:
        """Return, by request, the results that end within 50 steps."""
        ended = [output for _ in range(50) for output in llm.step() if output.finished]
        return {output.request_id: list(output.outputs[0].token_ids) for output in ended}

    add("a", "first", "teacher")
    add("b", "second", "anchor")
    assert written() == {} and not scheduler.requests
    add("c", "first", "anchor")
    tokens = written()
    assert set(tokens) == {"a", "c"} and len(tokens["a"]) > 1 and tokens["a"] == tokens["c"]
    llm.abort_request(["b"])
    add("d", "second", "teacher")  # its partner has gone: it waits
    assert written() == {} and list(scheduler._waits_for_partner) == ["second"]
    llm.abort_request(["d"])
    assert not scheduler._waits_for_partner and not llm.has_unfinished_requests()
    engine("plain").call("pop_pair_logs", ["first", "second"])


NUM_DRAWS = 3000


def test_first_tokens_fit_the_weight_they_were_drawn_with_and_not_a_slightly_smaller_one(
    model: Qwen2ForCausalLM, engine: Callable[[str], LLMEngine]
) -> None:
    """3000 draws of one pair of prompts, chosen among 10 000 for the most that one draw tells of w."""
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(2, VOCAB_SIZE, (200, 8), generator=generator)
    with torch.no_grad():
        last = model(prompts).logits[:, -1].double()
    student, teacher = last[:100, None].expand(-1, 100, -1), last[None, 100:].expand(100, -1, -1)
    right, wrong = (mixed_log_q(student, teacher, w).exp() for w in (0.75, 0.70))
    information = ((right - wrong) ** 2 / wrong.clamp_min(1e-3)).sum(-1)
    i, j = divmod(int(information.argmax()), 100)
    requests = [
        Request(prompts[i].tolist(), sample_seed(0, 1, "chi", n), prompts[100 + j].tolist()) for n in range(NUM_DRAWS)
    ]
    params = SamplingParams(max_new_tokens=1, stop_token_ids=(1,))
    counts = PairCounts()
    first = [response.token_ids[0] for response in generate_guided(engine("plain"), requests, params, counts)]
    p_right, p_wrong = (chi_square_p_value(torch.tensor(first), probs[i, j]) for probs in (right, wrong))
    print(f"n = {NUM_DRAWS}: p(w = 0.75) = {p_right:.3g}, p(w = 0.70) = {p_wrong:.3g}, {counts}")
    assert p_right > 1e-3
    assert p_wrong < 1e-6


def write_with_two_ranks(ident: str, directory: str, requests: list[Request], params: SamplingParams) -> list[Response]:
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    rank = dist.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        # vLLM names its shared memory after the address, which by default is one for all runs on a machine.
        where = (f"env://:{ident}", rank, rank)
        patch.setattr(ExecutorWithExternalLauncher, "_distributed_args", lambda self: where)
        used = LLMEngine(
            Path(directory),
            tensor_parallel_size=2,
            distributed_executor_backend="external_launcher",
            max_num_batched_tokens=512,
        )
        return generate_guided(used, requests, params)


def test_an_engine_of_two_ranks_writes_the_same_tokens_on_both(
    model: Qwen2ForCausalLM, directory: Path, ranks: RankPool
) -> None:
    requests, ident = make_requests(16), uuid.uuid4().hex
    try:
        first, second = ranks.run(
            write_with_two_ranks, ident, str(directory), requests, SAMPLED, world_size=2, timeout=400
        )
    finally:
        for left in Path("/dev/shm").glob(f"{ident}*"):  # the ranks end by a signal
            left.unlink()
    assert first == second
    assert assert_each_token_is_the_references(model, requests, first, SAMPLED) > 200
