# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A pass that decodes rotates its own tokens alone, with one table, and multiplies as Megatron's layers do.

A batch needs no pass beside its tokens.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from decoding import GREEDY, NEW_TOKENS, PROMPT_LENGTHS, make_requests, sampler_of
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from models import build, model_config, parallel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_selfdistill.rollout.megatron.decoding import DecodingModel, _product
from megatron_selfdistill.rollout.megatron.megatron_sampler import _MOST_PADDING, like_lengths

LAYERS = 3


class Work(TorchDispatchMode):
    """The operations of each pass of this context that a test counts, and the tokens that rotations turn."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[Counter[str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("cos", "roll", "_linear_pointwise", "mm", "addmm") and self.passes:
            self.passes[-1][name] += 1
            if name == "roll":
                self.passes[-1]["turned"] += args[0].shape[0] * args[0].shape[1]
        return func(*args, **(kwargs or {}))


def passes_of(in_rows: bool) -> tuple[list[Counter[str]], list[int]]:
    """Return the work of each pass of a batch, and the tokens that each pass reads."""
    [model], grid = build(model_config("gqa", num_layers=LAYERS), parallel())
    work, tokens_read = Work(), []
    forward = DecodingModel.forward

    def counted(self: DecodingModel, context: Any, tokens: Tensor) -> Tensor | None:
        work.passes.append(Counter())
        tokens_read.append(tokens.numel())
        return forward(self, context, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecodingModel, "forward", counted)
        patch.setattr(DecodingModel, "hides_columns_cheaply", in_rows)
        sampler = sampler_of([model], grid)
        with work:
            sampler.generate(make_requests(), GREEDY)
    return work.passes, tokens_read


@pytest.fixture(scope="module", params=[True, False], ids=["own columns", "one column"])
def found(ranks, request) -> tuple[bool, list[Counter[str]], list[int]]:
    [(passes, tokens_read)] = ranks.run(passes_of, request.param, world_size=1)
    return request.param, passes, tokens_read


def products_of(bias: dict[str, bool], onednn: bool) -> tuple[list[tuple[Tensor, Tensor, float]], Counter[str]]:
    """Return the outputs of the linear layers of a model, as Megatron and as a pass that decodes compute them.

    The third value bounds their difference: two sums of K products in any order, and a bias, differ by at most
    2 K roundings of the sum of the absolute values.  The counter has the operations of the pass that decodes.
    """
    [model], _ = build(model_config("gqa", share_embeddings_and_output_weights=False, **bias), parallel())
    found, work = [], Work()
    work.passes.append(Counter())
    linears = [module for module in model.modules() if isinstance(module, ColumnParallelLinear | RowParallelLinear)]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
        for at, linear in enumerate(linears):
            linear.requires_grad_(at % 2 == 0)
            x = torch.randn(3, 5, linear.weight.size(1))
            terms = (x.abs() @ linear.weight.abs().t()).max().item() + 1  # a bias is below 1
            bound = 2 * linear.weight.size(1) * 2**-24 * terms
            with work:
                ours = _product(linear, x)
            pairs = zip(linear(x), ours, strict=True)
            found += [(theirs, ours, bound) for theirs, ours in pairs if theirs is not None]
    return found, work.passes[0]


@pytest.mark.parametrize("onednn", [True, False], ids=["oneDNN", "PyTorch"])
@pytest.mark.parametrize("bias", [{}, {"add_bias_linear": True}, {"add_qkv_bias": True}])
def test_a_pass_multiplies_as_the_linear_layers_do_with_and_without_biases(ranks, bias, onednn):
    if onednn and not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    [(pairs, operations)] = ranks.run(products_of, bias, onednn, world_size=1)
    assert set(operations) <= ({"_linear_pointwise"} if onednn else {"mm", "addmm"}) and operations
    for theirs, ours, bound in pairs:
        assert bound < 1e-3
        torch.testing.assert_close(ours, theirs, rtol=0, atol=bound)


def test_a_pass_turns_the_queries_and_keys_of_its_own_tokens_with_one_table(found):
    """Megatron Core rotates all cached keys again in every pass."""
    _, passes, tokens_read = found
    assert [one["cos"] for one in passes] == [1] * len(passes)
    assert [one["roll"] for one in passes] == [2 * LAYERS] * len(passes)
    assert [one["turned"] for one in passes] == [2 * LAYERS * number for number in tokens_read]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_every_product_of_a_pass_with_a_weight_is_one_of_onednn(found):
    _, passes, _ = found
    assert [one["_linear_pointwise"] for one in passes] == [4 * LAYERS + 1] * len(passes)
    assert not any(one["mm"] or one["addmm"] for one in passes)


def test_each_pass_behind_the_prompts_gives_a_token_of_every_response(found):
    in_rows, passes, _ = found
    lengths = sorted(PROMPT_LENGTHS)
    if in_rows:
        assert len(passes) == len(like_lengths(lengths, _MOST_PADDING["cpu"])) + NEW_TOKENS - 1
    else:  # the tokens of longer prompts take passes of their own
        assert len(passes) == lengths[-1] - lengths[0] + NEW_TOKENS
