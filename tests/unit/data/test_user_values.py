# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Numbers of NumPy and torch count as numbers, and a text that no tokenizer takes is refused."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from megatron_selfdistill.data.user_values import finite_number, plain, text_or_none, whole_number

NUMBERS = {
    "int": 1,
    "bool": True,
    "fraction": Fraction(1),
    "decimal": Decimal(1),
    "float32": np.float32(1),
    "float16": np.float16(1),
    "int64": np.int64(1),
    "NumPy's bool": np.bool_(True),
    "array without dimensions": np.array(1.0),
    "tensor without dimensions": torch.tensor(1.0, dtype=torch.bfloat16),
    "tensor of one number": torch.ones(1, 1),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_every_kind_of_number_is_a_float(kind):
    assert (number := finite_number(NUMBERS[kind], "reward")) == 1.0 and type(number) is float


@pytest.mark.parametrize(
    "value",
    [None, "1", b"1", 1j, [1], float("nan"), np.float32("inf"), torch.ones(2), torch.tensor(float("nan")), 10**400],
)
def test_what_is_no_finite_number_is_refused(value):
    with pytest.raises(ValueError, match=r"^expected a finite number as reward, got "):
        finite_number(value, "reward")


def test_whole_numbers_are_ints_and_booleans_and_floats_are_none():
    found = [whole_number(value) for value in (2, np.int64(2), torch.tensor(2))]
    assert found == [2, 2, 2] and {type(number) for number in found} == {int}
    assert [whole_number(value) for value in (True, np.bool_(True), 2.0, np.float32(2), "2", None)] == [None] * 6


def test_a_scalar_becomes_plain_and_everything_else_stays():
    assert plain(np.bool_(True)) is True and plain(torch.tensor(False)) is False
    several = torch.tensor([True])
    assert plain(several) is several and plain("x") == "x"


def test_a_text_with_half_of_a_surrogate_pair_is_refused():
    assert text_or_none("🙂") == "🙂" and text_or_none(None) is None
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        text_or_none("cut \ud83d")
    with pytest.raises(ValueError, match=r"^expected a text or None, got a value of type int$"):
        text_or_none(3)
