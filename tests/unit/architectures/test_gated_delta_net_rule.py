# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The gated delta rule in chunks is the recurrence of its definition, after any state, and holds little memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_selfdistill.architectures.gated_delta_net import CHUNK, chunk_gated_delta_rule

ROWS, HEADS, KEYS, VALUES = 2, 3, 4, 5


def inputs(length: int, keys: int = KEYS, values: int = VALUES) -> list[Tensor]:
    """Return query, key, value, log a, beta and the state before."""
    generator = torch.Generator().manual_seed(0)
    query, key = (F.normalize(torch.randn(ROWS, length, HEADS, keys, generator=generator), dim=-1) for _ in range(2))
    value = torch.randn(ROWS, length, HEADS, values, generator=generator)
    decay, beta = torch.rand(2, ROWS, length, HEADS, generator=generator)
    return [query, key, value, -decay, beta, torch.randn(ROWS, HEADS, keys, values, generator=generator)]


def by_definition(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    out = []
    for q, k, v, g, b in zip(*(x.unbind(1) for x in (query, key, value, decay, beta)), strict=True):
        state = g.exp()[..., None, None] * state
        correction = b[..., None] * (v - torch.einsum("bhkv,bhk->bhv", state, k))
        state = state + torch.einsum("bhk,bhv->bhkv", k, correction)
        out.append(torch.einsum("bhkv,bhk->bhv", state, q) / query.size(-1) ** 0.5)
    return torch.stack(out, dim=1), state


def with_gradients(rule, tensors: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    out, state = rule(*leaves)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().add(state.sum()).backward()
    return [out.detach(), state.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("length", [1, 5, CHUNK, 2 * CHUNK + 7])
def test_values_and_gradients_are_those_of_the_definition_in_float64(length):
    """The weights of tokens decay, so that the sums are of a few dozen terms: 2e-6 are 30 roundings to float32."""
    found = with_gradients(lambda *x: chunk_gated_delta_rule(*x, output_final_state=True), inputs(length))
    exact = with_gradients(by_definition, [x.double() for x in inputs(length)])
    for number, (value, wanted) in enumerate(zip(found, exact, strict=True)):
        assert (value.double() - wanted).abs().max() <= 2e-6 * wanted.abs().max(), number


def test_the_backward_pass_needs_less_than_ten_kilobytes_per_token_and_head():
    """Copies of the system of a chunk for each of its rows would be 5.5 more."""
    tensors = [x.requires_grad_() for x in inputs(4 * CHUNK, keys=128, values=128)]
    held: dict[int, Tensor] = {}

    def hold(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        chunk_gated_delta_rule(*tensors[:5])
    size = sum(tensor.untyped_storage().nbytes() for tensor in held.values())
    assert size < 10_000 * 4 * CHUNK * ROWS * HEADS
