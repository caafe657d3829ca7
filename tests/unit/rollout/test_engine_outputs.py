# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What an engine in the trainer's process returns is checked as the answer of a server is."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_selfdistill.engines.vllm.engine import engine_output
from megatron_selfdistill.engines.vllm.engine_output import EngineRequest
from megatron_selfdistill.errors import EngineError

REQUEST = EngineRequest([4, 5], {"max_tokens": 3, "stop_token_ids": [9]})


def returned(
    token_ids: tuple[int, ...] = (7, 8, 9),
    log_prob: float = -0.5,
    finish_reason: str | None = "stop",
    spans: tuple[tuple[str, int, int], ...] = (("6", 0, 1), ("7", 1, 3)),
) -> Any:
    """Return an output with the form of vLLM's ``RequestOutput``."""
    entries = [{token: SimpleNamespace(logprob=log_prob)} for token in token_ids]
    versions = [SimpleNamespace(version=version, start=start, end=end) for version, start, end in spans]
    completion = SimpleNamespace(
        token_ids=token_ids, logprobs=entries, finish_reason=finish_reason, weight_versions=versions
    )
    return SimpleNamespace(outputs=[completion], prompt_token_ids=[4, 5], prompt_logprobs=None)


def test_an_output_has_the_tokens_their_log_probs_and_the_versions_of_the_weights():
    output = engine_output(returned(), REQUEST, 10, "the engine")
    assert (output.token_ids, output.log_probs, output.finish_reason) == ([7, 8, 9], [-0.5] * 3, "stop")
    assert (output.weight_version, output.weight_spans) == (6, [(6, 1), (7, 2)])


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ({"token_ids": (7, 10, 9)}, "token ids 10, expected 0 to 9"),
        ({"token_ids": (-1, 8, 9)}, "token ids -1, expected"),
        ({"log_prob": math.nan}, "log-probs nan, nan, nan, expected"),
        ({"log_prob": 3.0}, "log-probs 3.0, 3.0, 3.0, expected"),
        ({"token_ids": (7, 8, 8)}, "reason stop and the token 8, expected one of the request's stop tokens: 9"),
        ({"token_ids": (7, 8), "finish_reason": "length"}, "after 2 of 3 tokens"),
        ({"token_ids": (7, 8, 8, 9)}, "1 to 3 tokens with a log-prob each, got 4 tokens"),
        ({"finish_reason": "abort"}, "with 'abort', expected stop or length"),
        ({"finish_reason": None}, "with 'None', expected stop or length"),
        ({"spans": (("7", -5, 10**9),)}, "tokens -5 to 1000000000, expected spans that cover the 3 tokens"),
    ],
)
def test_an_output_that_no_model_can_have_generated_is_an_error_with_the_engines_name(fault, why):
    with pytest.raises(EngineError, match=f"^the vLLM engine of rank 3 .*{why}"):
        engine_output(returned(**fault), REQUEST, 10, "the vLLM engine of rank 3")
