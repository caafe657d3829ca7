# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A solution that does not fit into the teacher's prompt is skipped or cut, as the policy for long contexts says."""

from __future__ import annotations

import pytest
from characters import Characters
from sums import sums

from megatron_selfdistill.data.prompts import PromptBuilder, PromptTemplates
from megatron_selfdistill.sources.given_solutions import GivenSolutions

BUILDER = PromptBuilder(Characters(), PromptTemplates(teacher="{problem}|{solution}"))


@pytest.mark.parametrize(("policy", "fits"), [("error", False), ("drop", False), ("truncate_end", True)])
def test_a_solution_that_does_not_fit_is_skipped_or_cut(policy, fits):
    given = GivenSolutions(BUILDER, max_length=12, max_new_tokens=4, policy=policy)
    assert len(given.pair_with(sums(1)[0], "8").teacher_prompt) == len("0+8|8:")
    assert (given.pair_with(sums(1)[0], "so it is 8") is not None) is fits
