# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The cover of `make test` has every pair, and leaves the rest of the combinations to `make test-all`."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st
from tiers import cover_of


@given(st.sets(st.tuples(*[st.sampled_from("abc")] * 4)), st.integers(1, 5))
def test_what_occurs_together_in_any_cases_occurs_together_in_their_cover(cases, strength):
    def parts(cases):
        size = min(strength, 4)
        return {frozenset(part) for case in cases for part in itertools.combinations(enumerate(case), size)}

    ordered = sorted("".join(case) for case in cases)
    assert parts(cover_of(ordered, strength)) == parts(ordered)
