# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The rotary embedding of a packed row, by known positions, is Megatron's."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.packing import PackingRules, context_parallel_positions, microbatch_of, pack
from megatron_selfdistill.model import packed_sequences
from megatron_selfdistill.model.forward import hidden_states, inputs_of
from megatron_selfdistill.model.packed_sequences import PackedSequences, rope_utils
from tests.support.models import build, model_config, parallel


class Group(SimpleNamespace):
    def size(self) -> int:
        return self.cp_size

    def rank(self) -> int:
        return self.cp_rank


def row(cp_size: int):
    """Return a microbatch of three sequences, whose last segment is padding."""
    texts = [ContextPair(str(n), [1] * n, [1] * n, [2] * 3, False) for n in (9, 4, 1)]
    batch = pack(texts, PackingRules(max_tokens=48, cp_size=cp_size, tp_size=1, paired=True), seq_length=48)
    return batch.student[0]


@pytest.mark.parametrize("latent", [False, True], ids=["plain", "latent attention"])
@pytest.mark.parametrize(("cp_size", "cp_rank"), [(1, 0), (2, 0), (2, 1)])
def test_every_token_of_a_sequence_is_rotated_as_megatron_rotates_it(cp_size, cp_rank, latent):
    microbatch, group = row(cp_size), Group(cp_size=cp_size, cp_rank=cp_rank)
    held = context_parallel_positions(microbatch.cu_seqlens, cp_size, cp_rank)
    positions = microbatch.position_ids[held]
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(len(held), 2, 8, generator=generator)
    angles = torch.randn(microbatch.max_seqlen, 1, 1, 8, generator=generator)
    arguments = {"multi_latent_attention": latent, "mscale": 1.25, "cp_group": group}
    expected = packed_sequences._megatrons_rotary_embedding(states, microbatch.cu_seqlens, angles, **arguments)

    packed = PackedSequences.of(microbatch, positions, with_segment_batches=False)
    got = rope_utils._apply_rotary_pos_emb_thd(states, packed.cu_seqlens_q_padded, angles, **arguments)
    real = held < microbatch.cu_seqlens[-2]
    assert real.any() and not real.all()
    assert torch.equal(got[real], expected[real])


def test_sequences_whose_positions_nobody_knows_are_left_to_megatron():
    group, states = Group(cp_size=1, cp_rank=0), torch.randn(5, 2, 8)
    cu_seqlens, angles = torch.tensor([0, 2, 5], dtype=torch.int32), torch.randn(3, 1, 1, 8)
    got = rope_utils._apply_rotary_pos_emb_thd(states, cu_seqlens, angles, cp_group=group)
    expected = packed_sequences._megatrons_rotary_embedding(states, cu_seqlens, angles, cp_group=group)
    assert torch.equal(got, expected)


def test_host_and_device_know_the_same_segments():
    microbatch = row(1)
    packed = PackedSequences.of(microbatch, microbatch.position_ids, with_segment_batches=True)
    assert packed.segment_bounds == tuple(microbatch.cu_seqlens.tolist())
    assert packed.max_seqlen_q == microbatch.max_seqlen
    assert packed.segment_batches is not None and len(packed.segment_batches.place) == 48


def read_twice(kind):
    """Return, for padding in pieces and in one segment: states of real tokens, gradients, and the router's choices."""
    chunks, grid = build(model_config(kind), parallel())
    routers = [module for name, module in chunks[0].named_modules() if name.endswith(".router")]
    in_pieces = microbatch_of([([5, 6, 7], [8] * 37, 0), ([9] * 11, [10] * 9, 37)], 60 + 512, 1)
    assert in_pieces.cu_seqlens.tolist() == [0, 40, 60, 316, 572]
    in_one = dataclasses.replace(in_pieces, cu_seqlens=in_pieces.cu_seqlens[[0, 1, 2, 4]])
    chosen, found = [], []
    for router in routers:
        router.register_forward_hook(lambda _, __, output: chosen.extend(value[:60].detach() for value in output[:2]))
    for microbatch in (in_pieces, in_one):
        chunks[0].zero_grad()
        states = hidden_states(chunks[0], inputs_of(microbatch, grid), grid)
        states[microbatch.response_positions].square().sum().backward()
        gradients = [param.grad.clone() for param in chunks[0].parameters() if param.grad is not None]
        found.append((states[:60].detach(), gradients, list(chosen)))
        chosen.clear()
    return found


@pytest.mark.parametrize("kind", ["gqa", "moe"])
def test_padding_in_pieces_changes_no_real_token_and_no_gradient(ranks, kind):
    """The contexts are the same causal batch in both, so their attention, projections and gradients have equal bits."""
    ((states, gradients, chosen), (expected_states, expected_gradients, expected_chosen)) = ranks.run(
        read_twice, kind, world_size=1
    )[0]
    assert torch.equal(states, expected_states) and states.abs().max() > 0
    assert all(map(torch.equal, gradients, expected_gradients))
    assert len(gradients) > 10 and all(gradient.abs().max() > 0 for gradient in gradients)
    assert len(chosen) == (4 if kind == "moe" else 0) and all(map(torch.equal, chosen, expected_chosen))
