# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The fused output layer takes the GEMMs and the memory that its docstrings name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fused_layer import NUM_TOKENS, PADDED_VOCAB_SIZE, WIDTH, Example, call, every_mode, every_tying, fused
from torch.utils.flop_counter import FlopCounterMode

from megatron_selfdistill.choices import FUSED_MODES
from megatron_selfdistill.loss import Divergence, Target, VocabShard, distillation_loss
from megatron_selfdistill.loss.sharded import shard_sums
from megatron_selfdistill.loss.sharded.fused_linear import fused_distillation_loss


@every_tying
@every_mode
@pytest.mark.parametrize("frozen", ["hidden", "weight", "both", "nothing"])
def test_what_needs_no_gradient_gets_none_and_costs_no_gemm(mode: str, frozen: str, tied: bool) -> None:
    example = Example(tied)
    _, *expected = fused(example, Target(anchor="student"), Divergence(), mode)
    inputs = [example.student.clone(), example.weight.clone()]
    for name, value in zip(("hidden", "weight"), inputs, strict=True):
        value.requires_grad_(frozen not in (name, "both"))
    with counting_flops() as counter:
        loss = call(example, *inputs, mode=mode).loss
        assert gemms(counter) == 2
        if frozen == "both":
            assert not loss.requires_grad
        else:
            (loss * example.row_weights).sum().backward()
    for value, gradient in zip(inputs, expected, strict=True):
        assert value.grad is None or torch.equal(value.grad, gradient)
    assert [value.grad is None for value in inputs] == [not value.requires_grad for value in inputs]
    again = 2 if mode == "low_memory" and frozen != "both" else 0
    assert gemms(counter) == 2 + again + {"both": 0, "nothing": 2}.get(frozen, 1)


def counting_flops() -> FlopCounterMode:
    in_place = {torch.ops.aten.addmm_: lambda _, first, second, **__: 2 * first[0] * first[1] * second[1]}
    return FlopCounterMode(display=False, custom_mapping=in_place)


def gemms(counter: FlopCounterMode) -> float:
    """Return the work in units of one GEMM of all tokens, the width and the columns."""
    return counter.get_total_flops() / (2 * NUM_TOKENS * WIDTH * PADDED_VOCAB_SIZE)


def memory_of(mode: str | None, num_tokens: int, chunk: int, columns: int) -> tuple[float, float, float]:
    """Return, in rows of logits, the memory left after forward, the peak in forward and the peak in backward."""
    hidden = torch.randn(num_tokens, 8, requires_grad=True)
    weight = torch.randn(columns, 8, requires_grad=True)
    teacher, tokens = torch.randn(num_tokens, 8), torch.zeros(num_tokens, dtype=torch.int64)
    options: dict[str, Any] = {
        "target": Target(anchor="student"),
        "divergence": Divergence(),
        "vocab": VocabShard(0, columns, columns),
    }
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as of_forward:
        if mode is None:
            logits = hidden @ weight.T, teacher @ weight.detach().T
            loss = distillation_loss(*logits, tokens, inplace_backward=True, **options).loss
            del logits
        else:
            options |= {"mode": mode, "chunk_tokens": chunk}
            loss = fused_distillation_loss(hidden, teacher, weight, None, tokens, **options).loss
    with torch.profiler.profile(activities=activities, profile_memory=True) as of_backward:
        loss.sum().backward()
    left, peak = allocated(of_forward)
    return left / (columns * 4), peak / (columns * 4), (left + allocated(of_backward)[1]) / (columns * 4)


def allocated(profile: torch.profiler.profile) -> tuple[int, int]:
    """Return the bytes (at the end, at most), relative to the start."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return total, peak


@pytest.mark.full
def test_memory_is_one_tensor_of_logits_and_a_chunk_or_two_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shard_sums.CHUNK_BYTES, "cpu", 1 << 16)  # temporaries of the passes: a row or two each
    num_tokens, chunk, columns = 192, 48, 8192
    rest = 40  # rows: what has no column, both gradients of width 8, temporaries
    sizes = {mode: memory_of(mode, num_tokens, chunk, columns) for mode in (None, *FUSED_MODES)}
    left, in_forward, in_backward = sizes[None]
    assert 2 * num_tokens <= left and 2 * num_tokens <= min(in_forward, in_backward), "the materialised path"
    left, in_forward, in_backward = sizes["keep_gradient"]
    assert num_tokens <= left < num_tokens + rest
    assert num_tokens + chunk <= in_forward < num_tokens + chunk + rest
    assert in_backward < num_tokens + rest
    left, in_forward, in_backward = sizes["low_memory"]
    assert left < rest
    assert 2 * chunk <= in_forward < 2 * chunk + rest and 2 * chunk <= in_backward < 2 * chunk + rest
