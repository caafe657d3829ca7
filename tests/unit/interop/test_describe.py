# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The number of rows of a vocabulary without padding follows from arguments, tokenizer and rows, or is refused."""

from __future__ import annotations

from argparse import Namespace

import pytest

from megatron_selfdistill.errors import CheckpointError
from megatron_selfdistill.interop.describe import true_vocab_size


@pytest.mark.parametrize(
    "stored, tokenizer, rows, expected",
    [
        ({"vocab_size": 1000, "padded_vocab_size": 1024}, 990, 1024, 1000),  # rows that no token has
        ({"vocab_size": None, "padded_vocab_size": 1024, "tensor_model_parallel_size": 1}, 1000, 1024, 1000),
        ({"vocab_size": None, "padded_vocab_size": 2048, "tensor_model_parallel_size": 8}, 1100, 2048, 1100),
        ({"vocab_size": None, "padded_vocab_size": None}, 1000, 1000, 1000),
        ({"vocab_size": None, "padded_vocab_size": 1024}, None, 1024, 1024),
    ],
)
def test_arguments_then_tokenizer_then_rows_decide(stored, tokenizer, rows, expected):
    assert true_vocab_size(Namespace(**stored), tokenizer, rows) == expected


@pytest.mark.parametrize(
    "stored, tokenizer, rows",
    [
        ({"vocab_size": 1000, "padded_vocab_size": 1024}, 1001, 1024),
        ({"vocab_size": 1000, "padded_vocab_size": 1024}, None, 999),
        ({"vocab_size": None, "padded_vocab_size": None}, 1000, 900),
        ({"vocab_size": None, "padded_vocab_size": None, "tensor_model_parallel_size": 1}, 1000, 1536),
    ],
)
def test_a_contradiction_is_refused(stored, tokenizer, rows):
    with pytest.raises(CheckpointError, match="the true vocabulary is unclear: the arguments say"):
        true_vocab_size(Namespace(**stored), tokenizer, rows)
