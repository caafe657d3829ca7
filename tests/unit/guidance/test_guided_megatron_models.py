# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Guided decoding in process on one rank: the recorded log-probs, positions of every kind, and refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from decoding import PAIR_TOKENS, both_logits, check_pair_log_probs, logits_of, make_pairs, make_requests
from guided_decoding import GREEDY_PAIRS, SAMPLED_PAIRS, guided_sampler_of
from models import ROTATIONS, build, model_config, parallel
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.models.common.embeddings import rope_utils

from megatron_selfdistill.config import OptimizerConfig, ParallelConfig
from megatron_selfdistill.loss import Target, mixed_target
from megatron_selfdistill.model.forward import unwrapped
from megatron_selfdistill.rollout.base import Response
from megatron_selfdistill.rollout.sampling import sample_uniforms
from tests.unit.rollout import test_megatron_models as without_guidance

pytestmark = pytest.mark.full


def draw_with_targets() -> list[tuple[Target, float, float]]:
    """Return the largest error of each recorded log-prob of sampled pairs, for several targets."""
    [model], grid = build(model_config(), parallel())
    sampler = guided_sampler_of([model], grid)
    found = []
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN: nobody may read a cache that nobody wrote
    for target in (
        Target(anchor="student"),
        Target(teacher_weight=2.0, k_max=None, anchor="student"),
        Target(rule="fixed", anchor="student"),
        Target(rule="teacher_alone", anchor="student"),
    ):
        responses = sampler.generate(make_pairs(), dataclasses.replace(SAMPLED_PAIRS, target=target))
        model.eval()
        worst = [0.0, 0.0]
        for request, response in zip(make_pairs(), responses, strict=True):
            student, teacher = both_logits(lambda ids: logits_of(model, ids), request, response.token_ids)
            check_pair_log_probs(student, teacher, response, 1e-4)
            log_q = mixed_target(student, teacher, target).log_q
            ids = torch.tensor(response.token_ids)[:, None]
            error = torch.tensor(response.sampled_log_probs) - log_q.gather(1, ids)[:, 0]
            worst[0] = max(worst[0], error.abs().max().item())
            cdf = log_q.exp().cumsum(-1)
            uniforms = torch.from_numpy(sample_uniforms(request.seed, PAIR_TOKENS))
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


def guide_with_the_students_own_prompt() -> tuple[list[Response], list[Response]]:
    [model], grid = build(model_config(), parallel())
    sampler = guided_sampler_of([model], grid)
    plain = [dataclasses.replace(request, teacher_prompt=None) for request in make_pairs(20)]
    guided = [dataclasses.replace(request, teacher_prompt=list(request.prompt)) for request in plain]
    responses = sampler.generate(guided, SAMPLED_PAIRS), sampler.generate(plain, SAMPLED_PAIRS)
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
    **{name: (changes, "fp32") for name, changes in ROTATIONS.items()},
    "MLA": ({"transformer": {**MLA, "rope_type": "rope"}, "num_query_groups": None}, "fp32"),
    "fused rotary embedding": ({}, "fp32"),
    "gated delta nets": (dataclasses.asdict(model_config("gated_delta")), "fp32"),
}


def fused_rope_of_one_position_for_all_rows(t: Tensor, freqs: Tensor, interleaved: bool) -> Tensor:
    """Return what Transformer Engine's kernel computes: in float32, from a table without a batch."""
    assert freqs.shape[1:3] == (1, 1) and not interleaved
    return rope_utils._apply_rotary_pos_emb_bshd(t.float(), freqs).to(t.dtype)


def write_special() -> dict[str, float]:
    """Return, for each model of `SPECIAL`, what `behind_the_best` returns."""
    return {name: write_with_positions(name, *SPECIAL[name]) for name in SPECIAL}


def write_with_positions(name: str, changes: dict[str, Any], precision: str) -> float:
    [model], grid = build(model_config(**changes), parallel(), optimizer=OptimizerConfig(precision=precision))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unwrapped(model).config, "apply_rope_fusion", name.startswith("fused"))
        patch.setattr(rope_utils, "fused_apply_rotary_pos_emb", fused_rope_of_one_position_for_all_rows)
        return behind_the_best(model, guided_sampler_of([model], grid).generate(make_pairs(), GREEDY_PAIRS), precision)


def behind_the_best(model: torch.nn.Module, responses: list[Response], precision: str) -> float:
    """Return the largest distance of a token's mixed logit from the largest mixed logit; check the log-probs."""
    model.eval()
    worst = 0.0
    for request, response in zip(make_pairs(), responses, strict=True):
        student, teacher = both_logits(lambda ids: logits_of(model, ids), request, response.token_ids)
        ids = torch.tensor(response.token_ids)[:, None]
        mix = 0.75 * teacher + student
        worst = max(worst, (mix.amax(-1) - mix.gather(1, ids)[:, 0]).max().item())
        check_pair_log_probs(student, teacher, response, 0.1 if precision == "bf16" else 1e-4)
    return worst


@pytest.fixture(scope="module")
def distances(ranks) -> dict[str, float]:
    [found] = ranks.run(write_special, world_size=1)
    return found


@pytest.mark.parametrize("name", SPECIAL)
def test_positions_of_every_kind_are_those_of_a_whole_pass(distances, name):
    _, precision = SPECIAL[name]
    assert distances[name] < (0.2 if precision == "bf16" else 1e-4)


def refuse() -> list[str]:
    [model], grid = build(model_config(), parallel())
    messages = []

    def collect(make: Callable[[], Any], error: type[Exception]) -> None:
        with pytest.raises(error) as caught:
            make()
        messages.append(str(caught.value))

    sampler, [pair, *_] = guided_sampler_of([model], grid), make_pairs()
    collect(lambda: sampler.generate([dataclasses.replace(pair, teacher_prompt=[])], SAMPLED_PAIRS), ValueError)
    collect(lambda: sampler.generate([dataclasses.replace(pair, teacher_prompt=[1] * 57)], SAMPLED_PAIRS), ValueError)
    one_sequence = 1.5 * (31 + PAIR_TOKENS) * sampler._bytes_per_token / 2**30
    collect(lambda: guided_sampler_of([model], grid, one_sequence).generate([pair], SAMPLED_PAIRS), ValueError)
    return messages


def test_guided_requests_that_cannot_be_served_are_refused_with_a_message(ranks):
    [messages] = ranks.run(refuse, world_size=1)
    for message, words in zip(messages, ("empty prompt", "57 tokens", "all its sequences"), strict=True):
        assert words in message


class OtherAttention(torch.nn.Module):
    """The place of Transformer Engine's attention, with its sinks, which must not compute a pass of decoding."""

    def __init__(self, ours: torch.nn.Module) -> None:
        super().__init__()
        self.softmax_offset, self.cp_group = getattr(ours, "softmax_offset", None), ours.cp_group

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        raise AssertionError("the attention of another program has read the cache")


def sample_beside_other_attention(name: str, config: ParallelConfig) -> None:
    changes, precision, schedule = without_guidance.SPECIAL[name]
    model = model_config(**({"num_layers": 2} | changes))
    chunks, grid = build(model, config, optimizer=OptimizerConfig(precision=precision), schedule=schedule)
    layers = [m for m in unwrapped(chunks[0]).modules() if hasattr(m, "core_attention")]
    for sinks in (sinks for layer in layers for sinks in layer.core_attention.parameters()):
        torch.nn.init.normal_(sinks)

    def sampled() -> list[Response]:
        sampler, pairs = guided_sampler_of(chunks, grid), make_pairs()
        return sampler.generate(make_requests(), without_guidance.SAMPLED) + sampler.generate(pairs, GREEDY_PAIRS)

    expected = sampled()
    for layer in layers:
        layer.core_attention = OtherAttention(layer.core_attention)
    assert sampled() == expected


@pytest.mark.parametrize(
    ("name", "cp_size"),
    [("bf16", 1), ("MLA", 1), ("windows and sinks", 1), ("gated delta nets", 1), ("windows", 2), ("YaRN", 2)],
)
def test_the_attention_of_another_program_reads_no_cache(ranks, name, cp_size):
    ranks.run(sample_beside_other_attention, name, parallel(cp=cp_size), world_size=cp_size)
