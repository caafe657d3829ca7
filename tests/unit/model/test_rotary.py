# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The rotary embedding turns pairs of channels as float64 does, with the bits of Megatron's own functions."""

from __future__ import annotations

import importlib.util
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tiers import combinations
from torch import Tensor

from megatron_selfdistill.compat import older_megatron, repairs  # noqa: F401  isort: skip  (before megatron.core)
from megatron.core.models.common.embeddings import rope_utils

from megatron_selfdistill.data.context_parallel import context_parallel_positions
from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.packed_batch import PackingRules
from megatron_selfdistill.data.packing import pack
from megatron_selfdistill.model import rotary
from megatron_selfdistill.model.local_attention import PackedSequences

CHANNELS = 12
WIDTHS = {"all channels": 12, "half of the channels": 6, "one pair": 2}
MSCALE = 1.25
LATENT = "mla_rotary_interleaved" if older_megatron.version() >= (0, 19) else "multi_latent_attention"
"""Megatron's name of the argument for the order of channels in multi-latent attention."""


@pytest.fixture(scope="module")
def megatrons() -> ModuleType:
    """Megatron's module as it is before `rotary` replaces its functions."""
    spec = importlib.util.spec_from_file_location("rope_utils_of_megatron", rope_utils.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_definition(t: Tensor, angles: Tensor, interleaved: bool, latent: bool) -> Tensor:
    """Return the rotation of each pair of ``t [s, b, n, channels]`` by its angle, in float64.

    The first and the second channel of a pair have an angle each, which are equal in a real table.
    """
    x, width = t.double(), angles.size(-1)
    order = [*range(0, width, 2), *range(1, width, 2)] if latent else list(range(width))
    turning, half = x[..., order], width // 2
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + half) for i in range(half)]
    cos, sin = MSCALE * angles.double().cos(), MSCALE * angles.double().sin()
    columns: dict[int, Tensor] = {}
    for i, j in pairs:
        columns[i] = turning[..., i] * cos[..., i] - turning[..., j] * sin[..., i]
        columns[j] = turning[..., j] * cos[..., j] + turning[..., i] * sin[..., j]
    return torch.cat([torch.stack([columns[i] for i in range(width)], -1), x[..., width:]], -1)


def states_and_angles(width: int, dtype: torch.dtype, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return states [5, 3, 2, 12], angles [5, ``batch``, 1, width] and a gradient of the shape of the states."""
    generator = torch.Generator().manual_seed(width)
    states, upstream = (torch.randn(5, 3, 2, CHANNELS, generator=generator).to(dtype) for _ in range(2))
    return states, 3 * torch.randn(5, batch, 1, width, generator=generator), upstream


def with_gradient(rotate: Any, states: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    leaf = states.clone().requires_grad_()
    result = rotate(leaf)
    return result.detach(), *torch.autograd.grad(result, leaf, upstream)


@combinations(width=WIDTHS, interleaved=(False, True), latent=(False, True), batch=(1, 3), strength=2)
def test_each_pair_turns_by_its_angle_and_its_gradient_turns_back(width, interleaved, latent, batch):
    states, angles, upstream = states_and_angles(width, torch.float32, batch)
    kind = interleaved, latent
    expected = with_gradient(lambda t: by_definition(t, angles, *kind), states.double(), upstream.double())
    got = with_gradient(lambda t: rotary.rotated(t, angles, *kind, MSCALE), states, upstream)
    for mine, exact in zip(got, expected, strict=True):  # two products, one sum, cosines and sines of 12 radians
        torch.testing.assert_close(mine.double(), exact, rtol=0, atol=8 * 2**-24 * 10)


@pytest.mark.parametrize("changed", ["angles", "dtype", "interleaved", "mscale"])
def test_the_table_that_is_kept_is_that_of_the_call_and_what_is_given_is_left_as_it_is(changed):
    """A table that another layer, pass or dtype has asked for takes no part."""
    states, angles, _ = states_and_angles(12, torch.float32)
    before = states.clone(), angles.clone()
    call = {"angles": angles, "dtype": torch.float32, "interleaved": False, "mscale": 1.0}
    others = {"angles": angles + 1, "dtype": torch.bfloat16, "interleaved": True, "mscale": 2.0}

    def rotate(angles: Tensor, dtype: torch.dtype, interleaved: bool, mscale: float) -> Tensor:
        return rotary.rotated(states.to(dtype), angles, interleaved, mscale=mscale)

    other = call | {changed: others[changed]}
    rotary.cos_and_signed_sin.cache_clear()
    alone = rotate(**other)
    rotary.cos_and_signed_sin.cache_clear()
    rotate(**call)
    assert torch.equal(rotate(**other), alone) and not torch.equal(alone, rotate(**call))
    assert torch.equal(states, before[0]) and torch.equal(angles, before[1])


def group_of(size: int, rank: int) -> SimpleNamespace:
    return SimpleNamespace(size=lambda: size, rank=lambda: rank)


def row(cp_size: int):
    """Return a microbatch of three sequences, whose last segment is padding."""
    texts = [ContextPair(str(n), [1] * n, [1] * n, [2] * 3, False) for n in (9, 4, 1)]
    batch = pack(texts, PackingRules(max_tokens=48, cp_size=cp_size, tp_size=1, paired=True), seq_length=48)
    return batch.student[0]


@pytest.mark.parametrize("latent", [False, True], ids=["plain", "latent attention"])
@pytest.mark.parametrize(("cp_size", "cp_rank"), [(1, 0), (2, 0), (2, 1)])
def test_every_token_of_a_sequence_is_rotated_as_megatron_rotates_it(megatrons, cp_size, cp_rank, latent):
    microbatch, group = row(cp_size), group_of(cp_size, cp_rank)
    held = context_parallel_positions(microbatch.cu_seqlens, cp_size, cp_rank)
    positions = microbatch.position_ids[held]
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(len(held), 2, 8, generator=generator)
    angles = torch.randn(microbatch.max_seqlen, 1, 1, 8, generator=generator)
    arguments = {LATENT: latent, "mscale": 1.25, "cp_group": group}
    expected = megatrons._apply_rotary_pos_emb_thd(states, microbatch.cu_seqlens, angles, **arguments)

    packed = PackedSequences.of(microbatch, positions, with_segment_batches=False)
    got = rope_utils._apply_rotary_pos_emb_thd(states, packed.cu_seqlens_q_padded, angles, **arguments)
    real = held < microbatch.cu_seqlens[-2]
    assert real.any() and not real.all() and packed.pad_between_seqs is False
    assert torch.equal(got[real], expected[real])
