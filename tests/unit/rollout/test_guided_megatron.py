# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Guided decoding in process: every layout writes, token by token, what two whole forward passes would choose."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from models import VOCAB_SIZE, build, model_config, parallel
from responses import chi_square_p_value, cut_at, own, stops_of
from tiers import combinations
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.models.common.embeddings import rope_utils

from megatron_selfdistill.config import OptimizerConfig, ParallelConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.loss import Target, mixed_target
from megatron_selfdistill.model.build import unwrapped
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams, sample_seed, sample_uniforms
from megatron_selfdistill.rollout.megatron import megatron_sampler, survivors
from megatron_selfdistill.rollout.megatron.megatron_sampler import MegatronSampler

MAX_LENGTH = 64
NEW_TOKENS = 14
# Of student and teacher: the teacher's is usually longer, but not here always; a prompt of one token has no cache.
PROMPT_LENGTHS = ((2, 31), (9, 12), (5, 1), (1, 5), (12, 12), (1, 1), (7, 40))
GREEDY = SamplingParams(NEW_TOKENS, temperature=0)
SAMPLED = SamplingParams(NEW_TOKENS)


def make_pairs(count: int = len(PROMPT_LENGTHS), vocab_size: int = VOCAB_SIZE) -> list[Request]:
    generator = torch.Generator().manual_seed(3)

    def prompt(length: int) -> list[int]:
        return torch.randint(0, vocab_size, (length,), generator=generator).tolist()

    lengths = [PROMPT_LENGTHS[i % len(PROMPT_LENGTHS)] for i in range(count)]
    return [
        Request(prompt(student), sample_seed(0, 0, f"problem {i}", 0), teacher_prompt=prompt(teacher))
        for i, (student, teacher) in enumerate(lengths)
    ]


def sampler_of(chunks, grid, kv_cache_gb=None) -> MegatronSampler:
    return MegatronSampler(chunks, grid, VOCAB_SIZE, MAX_LENGTH, kv_cache_gb)


@torch.no_grad()
def logits_of(model: torch.nn.Module, tokens: Sequence[int]) -> Tensor:
    """``[len(tokens), vocabulary]`` float64 of a whole model, without a cache."""
    ids = torch.tensor([list(tokens)])
    return model(ids, torch.arange(len(tokens))[None], None)[0, :, :VOCAB_SIZE].double()


def both_logits(
    logits: Callable[[list[int]], Tensor], request: Request, response: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the logits ``[len(response), vocabulary]`` of student and teacher that predict each response token."""
    assert request.teacher_prompt is not None
    rows = []
    for prompt in (request.prompt, request.teacher_prompt):
        rows.append(logits([*prompt, *response])[len(prompt) - 1 : -1].double())
    return rows[0], rows[1]


def check_greedy(logits: Callable[[list[int]], Tensor], request: Request, response: Response, tolerance: float) -> int:
    """Each token is the argmax of w l_T + l_S behind those before it, and the log-probs are those of l_S and l_T.

    Since every token follows from those before it, this is the text that whole passes would have written.
    """
    student, teacher = both_logits(logits, request, response.token_ids)
    mix = 0.75 * teacher + student
    first, second = mix.topk(2).values.unbind(1)
    assert (first - second).min() > 5e-5, "too close to a tie to tell rounding from a mistake"
    assert response.token_ids == mix.argmax(-1).tolist()
    check_log_probs(student, teacher, response, tolerance)
    assert response.sampled_log_probs == [0.0] * len(response.token_ids)
    return len(response.token_ids)


def check_log_probs(student: Tensor, teacher: Tensor, response: Response, tolerance: float) -> None:
    ids = torch.tensor(response.token_ids)[:, None]
    assert response.teacher_log_probs is not None
    for logits, found in ((student, response.log_probs), (teacher, response.teacher_log_probs)):
        assert found == pytest.approx(logits.log_softmax(-1).gather(1, ids)[:, 0].tolist(), abs=tolerance)


def write_hf(folder: Path, config: ParallelConfig, requests: list[Request], new_tokens: int, longest: int):
    _, model, rules, tensors = hf_models.read(folder)
    chunks, grid = build(model, config)
    hf_models.fill(chunks, rules, tensors)
    sampler = MegatronSampler(chunks, grid, hf_models.VOCAB_SIZE, longest)
    return sampler.generate(requests, SamplingParams(new_tokens, temperature=0))


@pytest.mark.parametrize("kind", hf_models.CONFIGS)
def test_greedy_text_is_the_argmax_of_transformers_mixed_logits(ranks, tmp_path, kind):
    reference = hf_models.write(kind, tmp_path)
    requests = make_pairs(vocab_size=hf_models.VOCAB_SIZE)
    cuts = {"qwen3": [(parallel(tp=2, pp=2, sp=True), 4)], "deepseek_v3": [(parallel(pp=2), 2)]}
    for config, world_size in [(parallel(), 1), *cuts.get(kind, [])]:
        for written in ranks.run(write_hf, tmp_path, config, requests, NEW_TOKENS, MAX_LENGTH, world_size=world_size):
            for request, response in zip(requests, written, strict=True):
                check_greedy(lambda ids: hf_models.hf_logits(reference, [ids]), request, response, 2e-4)


def test_hundreds_of_greedy_tokens_are_the_argmax_of_transformers_mixed_logits(ranks, tmp_path):
    reference = hf_models.write("qwen3", tmp_path, max_position_embeddings=512)
    requests = make_pairs(6, hf_models.VOCAB_SIZE)
    [written] = ranks.run(write_hf, tmp_path, parallel(), requests, 120, 200, world_size=1)
    checked = [
        check_greedy(lambda ids: hf_models.hf_logits(reference, [ids]), request, response, 1e-4)
        for request, response in zip(requests, written, strict=True)
    ]
    assert sum(checked) == 720


def write_without_cache(kind: str, count: int, sampled: bool) -> list[list[int]]:
    """Per pair: each token from two whole passes on one rank and the definition of the target."""
    [model], _ = build(model_config(kind), parallel())
    model.eval()
    texts = []
    for request in make_pairs():
        text: list[int] = []
        for uniform in sample_uniforms(request.seed, count):
            student, teacher = (
                rows[-1] for rows in both_logits(lambda ids: logits_of(model, ids), request, [*text, 0])
            )
            mix = 0.75 * teacher + student
            first, second = mix.topk(2).values.tolist()
            cdf = mixed_target(student, teacher, Target()).log_q.exp().cumsum(0)
            assert first - second > 1e-3 or sampled, "too close to a tie to tell layouts from rounding"
            text.append(int((cdf <= uniform).sum()) if sampled else int(mix.argmax()))
        texts.append(text)
    return texts


@pytest.fixture(scope="module")
def without_cache(ranks):
    """(kind, sampled) -> the text of `make_pairs`, once per model."""
    known: dict[tuple[str, bool], list[list[int]]] = {}

    def get(kind: str, sampled: bool = False) -> list[list[int]]:
        if (kind, sampled) not in known:
            [known[kind, sampled]] = ranks.run(write_without_cache, kind, NEW_TOKENS, sampled, world_size=1)
        return known[kind, sampled]

    return get


def write_in_layout(kind: str, config: ParallelConfig, stops: tuple[int, ...]) -> dict[str, Any]:
    chunks, grid = build(model_config(kind), config)
    pairs = own(grid, make_pairs())
    # Plain requests of the same streams among them: each kind is written as if it were alone.
    plain = [dataclasses.replace(request, teacher_prompt=None) for request in pairs]
    mingled = [request for both in zip(pairs, plain, strict=True) for request in both]
    sampler = sampler_of(chunks, grid)
    sampler.update_weights(5)
    stopping = dataclasses.replace(GREEDY, stop_token_ids=stops)
    both = sampler.generate(mingled, GREEDY)
    alone = sampler.generate(plain, GREEDY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron_sampler, "_PREFILL_TOKENS", 30)  # prompts are read a few rows at a time
        early = sampler.generate(pairs, stopping)
    room = 2 * (40 + NEW_TOKENS) + 12  # tokens: the longest pair, or two short ones
    small = sampler_of(chunks, grid, kv_cache_gb=room * sampler._bytes_per_token / 2**30)
    batches: list[list[Request]] = []
    sample_pairs = small._sample_pairs
    small._sample_pairs = lambda some, params: batches.append(some) or sample_pairs(some, params)
    split = small.generate(pairs[::-1], stopping)[::-1]
    drawn = sampler.generate(pairs, SAMPLED)
    held = [
        2 * len(some) * (max(len(p) for r in some for p in (r.prompt, r.teacher_prompt)) + NEW_TOKENS)
        for some in batches
    ]
    assert len(held) >= 2 and max(held) <= room
    return {"replica": grid.dp_rank, "replicas": grid.dp_size} | {
        "whole": both[::2], "plain": both[1::2], "alone": alone, "early": early, "split": split, "drawn": drawn
    }  # fmt: skip


LAYOUTS = {
    "TP1": ("gqa", parallel(), 1),
    "TP2": ("gqa", parallel(tp=2), 2),
    "PP2": ("gqa", parallel(pp=2), 2),
    "PP2xVPP2": ("gqa", parallel(pp=2, vpp=2), 2),
    "TP2xPP2+SP": ("gqa", parallel(tp=2, pp=2, sp=True), 4),
    "CP2": ("gqa", parallel(cp=2), 2),
    "DP2": ("gqa", parallel(), 2),
    "tied TP2+SP": ("tied", parallel(tp=2, sp=True), 2),
    "MoE EP2": ("moe", parallel(ep=2), 2),
    "MoE EP2xPP2": ("moe", parallel(ep=2, pp=2), 4),
}


@combinations(layout=list(LAYOUTS), quick={"layout": ["TP2", "PP2xVPP2", "DP2", "MoE EP2"]}, strength=1)
def test_every_layout_writes_what_two_whole_passes_on_one_rank_choose(ranks, without_cache, layout):
    kind, config, world_size = LAYOUTS[layout]
    texts, sampled = without_cache(kind), without_cache(kind, sampled=True)
    stops = stops_of(texts)
    for result in ranks.run(write_in_layout, kind, config, stops, world_size=world_size):
        share = slice(result["replica"], None, result["replicas"])
        for text, response in zip(texts[share], result["whole"], strict=True):
            assert (response.token_ids, response.finish_reason) == (text, "length")
            assert response.weight_version == 5 and response.guided
        for name in ("early", "split"):
            for text, response, whole in zip(texts[share], result[name], result["whole"], strict=True):
                assert (response.token_ids, response.finish_reason) == cut_at(text, stops)
                count = len(response.token_ids)
                assert response.log_probs == pytest.approx(whole.log_probs[:count], abs=1e-4)
                assert response.teacher_log_probs == pytest.approx(whole.teacher_log_probs[:count], abs=1e-4)
        assert [response.token_ids for response in result["drawn"]] == sampled[share]
        assert [r.token_ids for r in result["plain"]] == [r.token_ids for r in result["alone"]]
        assert not any(response.guided for response in result["plain"])


def write_one_pass_late(kind: str, config: ParallelConfig, stops: tuple[int, ...]) -> dict[str, Any]:
    """`write_in_layout` where the host learns one pass late which pairs go on, as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(survivors, "lag_of", lambda device: 1)
        return write_in_layout(kind, config, stops)


@combinations(layout=["TP1", "MoE EP2"], quick={"layout": ["TP1"]}, strength=1)
def test_pairs_whose_end_is_known_one_pass_late_are_written_the_same(ranks, without_cache, layout):
    kind, config, world_size = LAYOUTS[layout]
    texts = without_cache(kind)
    stops = stops_of(texts)
    for result in ranks.run(write_one_pass_late, kind, config, stops, world_size=world_size):
        share = slice(result["replica"], None, result["replicas"])
        for name in ("early", "split"):
            for text, response in zip(texts[share], result[name], strict=True):
                assert (response.token_ids, response.finish_reason) == cut_at(text, stops)


def draw_with_targets() -> list[tuple[Target, float, float]]:
    """Return the largest error of each recorded log-prob of sampled pairs, for several targets."""
    [model], grid = build(model_config(), parallel())
    sampler = sampler_of([model], grid)
    found = []
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN: nobody may read a cache that nobody wrote
    for target in (
        Target(),
        Target(teacher_weight=2.0, k_max=None),
        Target(rule="fixed"),
        Target(rule="teacher_alone"),
    ):
        responses = sampler.generate(make_pairs(), dataclasses.replace(SAMPLED, target=target))
        model.eval()
        worst = [0.0, 0.0]
        for request, response in zip(make_pairs(), responses, strict=True):
            student, teacher = both_logits(lambda ids: logits_of(model, ids), request, response.token_ids)
            check_log_probs(student, teacher, response, 1e-4)
            log_q = mixed_target(student, teacher, target).log_q
            ids = torch.tensor(response.token_ids)[:, None]
            error = torch.tensor(response.sampled_log_probs) - log_q.gather(1, ids)[:, 0]
            worst[0] = max(worst[0], error.abs().max().item())
            cdf = log_q.exp().cumsum(-1)
            uniforms = torch.from_numpy(sample_uniforms(request.seed, NEW_TOKENS))
            above, below = cdf.gather(1, ids)[:, 0], (cdf - log_q.exp()).gather(1, ids)[:, 0]
            worst[1] = max(worst[1], (uniforms - above).max().item(), (below - uniforms).max().item())
        found.append((target, worst[0], worst[1]))
    torch.use_deterministic_algorithms(False)
    return found


def test_recorded_log_probs_are_those_of_the_student_the_teacher_and_the_mix(ranks):
    [found] = ranks.run(draw_with_targets, world_size=1)
    for target, error, outside in found:
        assert error < 1e-4, target
        assert outside < 1e-5, f"{target}: token i was not drawn by uniform i of its stream"


def draw_first_tokens(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first token of ``count`` guided samples of one pair of prompts, and both logits without a cache."""
    [model], grid = build(model_config(), parallel())
    pair = make_pairs()[0]
    requests = [dataclasses.replace(pair, seed=sample_seed(1, 0, "x", i)) for i in range(count)]
    responses = sampler_of([model], grid, kv_cache_gb=0.02).generate(requests, SamplingParams(1))
    model.eval()
    student, teacher = both_logits(lambda ids: logits_of(model, ids), pair, [0])
    return torch.tensor([response.token_ids[0] for response in responses]), student[0], teacher[0]


NUM_DRAWS = 30_000


@pytest.mark.full
def test_thirty_thousand_samples_of_a_model_tell_the_weight_of_the_teacher(ranks):
    [(tokens, student, teacher)] = ranks.run(draw_first_tokens, NUM_DRAWS, world_size=1)

    def p_value(target: Target) -> float:
        return chi_square_p_value(tokens, mixed_target(student, teacher, target).log_q.exp())

    assert p_value(Target()) > 1e-3
    assert p_value(Target(teacher_weight=0.70)) < 1e-6
    assert p_value(Target(rule="fixed")) < 1e-6


def guide_with_the_students_own_prompt() -> tuple[list[Response], list[Response]]:
    [model], grid = build(model_config(), parallel())
    sampler = sampler_of([model], grid)
    plain = [dataclasses.replace(request, teacher_prompt=None) for request in make_pairs(20)]
    guided = [dataclasses.replace(request, teacher_prompt=list(request.prompt)) for request in plain]
    responses = sampler.generate(guided, SAMPLED), sampler.generate(plain, SAMPLED)
    for module in unwrapped(model).modules():
        assert not {"forward", "_adjust_key_value_for_inference"} & set(module.__dict__), "attention was left changed"
    return responses


def test_a_teacher_with_the_students_prompt_changes_nothing(ranks):
    [(guided, plain)] = ranks.run(guide_with_the_students_own_prompt, world_size=1)
    for mine, expected in zip(guided, plain, strict=True):
        # The guided batch has twice the rows, for which a processor may choose other kernels: 1.7e-5 was seen on one.
        assert mine.token_ids == expected.token_ids
        assert mine.log_probs == pytest.approx(expected.log_probs, abs=5e-5)
        assert mine.teacher_log_probs == pytest.approx(expected.log_probs, abs=5e-5)
        assert mine.sampled_log_probs == pytest.approx(expected.sampled_log_probs, abs=5e-5)


MLA = {
    "multi_latent_attention": True, "q_lora_rank": None, "kv_lora_rank": 16, "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
SPECIAL: dict[str, tuple[dict[str, Any], str]] = {
    "bf16": ({}, "bf16"),
    "learned positions": ({"position_embedding_type": "learned_absolute"}, "fp32"),
    "no positions": ({"position_embedding_type": "none"}, "fp32"),
    "MLA": ({"transformer": {**MLA, "rope_type": "rope"}, "num_query_groups": None}, "fp32"),
    "fused rotary embedding": ({}, "fp32"),
}


def fused_rope_of_one_position_for_all_rows(t: Tensor, freqs: Tensor, interleaved: bool) -> Tensor:
    """Return what Transformer Engine's kernel computes: in float32, from a table without a batch."""
    assert freqs.shape[1:3] == (1, 1) and not interleaved
    return rope_utils._apply_rotary_pos_emb_bshd(t.float(), freqs).to(t.dtype)


def write_special(changes: dict[str, Any], precision: str, fused: bool) -> float:
    [model], grid = build(model_config(**changes), parallel(), optimizer=OptimizerConfig(precision=precision))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unwrapped(model).config, "apply_rope_fusion", fused)
        patch.setattr(rope_utils, "fused_apply_rotary_pos_emb", fused_rope_of_one_position_for_all_rows)
        return behind_the_best(model, sampler_of([model], grid).generate(make_pairs(), GREEDY), precision)


def behind_the_best(model: torch.nn.Module, responses: list[Response], precision: str) -> float:
    """Return the largest distance of a token's mixed logit from the largest mixed logit; check the log-probs."""
    model.eval()
    worst = 0.0
    for request, response in zip(make_pairs(), responses, strict=True):
        student, teacher = both_logits(lambda ids: logits_of(model, ids), request, response.token_ids)
        ids = torch.tensor(response.token_ids)[:, None]
        mix = 0.75 * teacher + student
        worst = max(worst, (mix.amax(-1) - mix.gather(1, ids)[:, 0]).max().item())
        check_log_probs(student, teacher, response, 0.1 if precision == "bf16" else 1e-4)
    return worst


@pytest.mark.parametrize("name", SPECIAL)
def test_positions_of_every_kind_are_those_of_a_whole_pass(ranks, name):
    changes, precision = SPECIAL[name]
    [worst] = ranks.run(write_special, changes, precision, name.startswith("fused"), world_size=1)
    assert worst < (0.2 if precision == "bf16" else 1e-4)


def refuse() -> list[str]:
    [model], grid = build(model_config(), parallel())
    sentences = []

    def collect(make: Callable[[], Any], error: type[Exception]) -> None:
        with pytest.raises(error) as caught:
            make()
        sentences.append(str(caught.value))

    sampler, [pair, *_] = sampler_of([model], grid), make_pairs()
    collect(lambda: sampler.generate([pair], dataclasses.replace(SAMPLED, temperature=0.7)), ValueError)
    collect(lambda: sampler.generate([dataclasses.replace(pair, teacher_prompt=[])], SAMPLED), ValueError)
    collect(lambda: sampler.generate([dataclasses.replace(pair, teacher_prompt=[1] * 55)], SAMPLED), ValueError)
    one_sequence = 1.5 * (31 + NEW_TOKENS) * sampler._bytes_per_token / 2**30
    collect(lambda: sampler_of([model], grid, one_sequence).generate([pair], SAMPLED), ValueError)
    return sentences


def test_guided_requests_that_cannot_be_served_are_refused_with_a_sentence(ranks):
    [sentences] = ranks.run(refuse, world_size=1)
    for sentence, word in zip(
        sentences, ("temperature 0.7", "empty prompt", "55 tokens", "two sequences"), strict=True
    ):
        assert word in sentence


def refuse_on_every_rank() -> None:
    """Refuse the first replica's guided request on every rank; the second replica must not wait in a collective."""
    chunks, grid = build(model_config(), parallel())
    requests = make_pairs()[:1] if grid.dp_rank == 0 else []
    with pytest.raises(ValueError, match="top_k 5"):
        sampler_of(chunks, grid).generate(requests, dataclasses.replace(SAMPLED, top_k=5))


def test_a_guided_request_that_one_replica_cannot_serve_is_an_error_on_all_ranks(ranks):
    ranks.run(refuse_on_every_rank, world_size=2)


def refuse_attention_without_masks() -> None:
    from megatron.core.transformer.enums import AttnBackend

    [model], grid = build(model_config(), parallel())
    attention = unwrapped(model).decoder.layers[0].self_attention
    sampler = sampler_of([model], grid)
    unwrapped(model).config.attention_backend = AttnBackend.flash
    sampler.generate(make_pairs()[:1], GREEDY)  # this project's own attention takes masks
    attention.core_attention = torch.nn.Identity()  # where Transformer Engine's would be
    with pytest.raises(ConfigError, match="attention_backend=auto"):
        sampler.generate(make_pairs()[:1], GREEDY)


def test_attention_that_takes_no_mask_is_refused(ranks):
    ranks.run(refuse_attention_without_masks, world_size=1)
