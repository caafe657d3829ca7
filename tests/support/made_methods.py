# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Methods without a run: the method of a configuration, with tools that a test chooses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from characters import ONE_RANK, STOP, text_of

from megatron_selfdistill.config import Config, load, method_class
from megatron_selfdistill.data.end_tokens import EndTokens
from megatron_selfdistill.data.given_solutions import GivenSolutions
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompt_templates import PromptTemplates
from megatron_selfdistill.data.prompts import PromptBuilder
from megatron_selfdistill.evaluation.verify import exact_match
from megatron_selfdistill.metrics.phases import Phases
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams
from megatron_selfdistill.sources.judge import Judge
from megatron_selfdistill.sources.method import MethodTools
from megatron_selfdistill.sources.rollouts import Rollout

function: Any = None
"""The function of a test, under the dotted path that `named` returns."""


def named(monkeypatch: pytest.MonkeyPatch, chosen: Callable[..., Any]) -> str:
    """Return a dotted path under which a method finds the function ``chosen`` during a test."""
    monkeypatch.setattr(f"{__name__}.function", chosen)
    return f"{__name__}.function"


def given_with(
    tokenizer: Any, teacher="{problem}|{solution}", max_length=100, max_new_tokens=8, **options: Any
) -> GivenSolutions:
    """Return prompts with the wording ``teacher``; ``options``: further ones of `PromptTemplates`."""
    builder = PromptBuilder(tokenizer, PromptTemplates(teacher, **options))
    return GivenSolutions(builder, max_length, max_new_tokens, policy="error")


def method_tools(
    config: Config, given: GivenSolutions, problems: Sequence[Problem] = (), grid: Any = ONE_RANK, **parts: Any
) -> MethodTools:
    """Return tools for one rank; ``parts``: other values of the fields of `MethodTools`, such as the sampler."""
    run_data: Any = SimpleNamespace(
        **{"tokenizer": given.builder.tokenizer, "builder": given.builder, "max_length": given.max_length},
        **{"problems": SimpleNamespace(problems=list(problems)), "stop_token_ids": (STOP,)},
        ends=EndTokens((STOP,), "", None),
    )
    values: dict[str, Any] = {
        "sampler": SimpleNamespace(sleep=lambda: None),
        "sampling": SamplingParams(given.max_new_tokens),
        "readers": None,
        "judge": Judge(exact_match, given.builder.tokenizer, grid, None, config.evaluation.confidence_pattern),
    }
    return MethodTools(config=config, run_data=run_data, grid=grid, phases=Phases(), given=given, **(values | parts))


@functools.cache
def composed(*overrides: str) -> Config:
    """Return the configuration of ``overrides``, which takes a twentieth of a second to compose, and is frozen."""
    return load(overrides)


def made(overrides: Sequence[str], given: GivenSolutions, **tools: Any) -> Any:
    """Return the method of a configuration at the beginning of a run; ``tools``: as for `method_tools`."""
    config = composed(*overrides)
    return method_class(config.method.name).made(config.method, method_tools(config, given, **tools))


def response_of(text: str, log_probs: list[float] | None = None) -> Response:
    """Return a response with a token for each character, which is whole if it ends with the stop token $."""
    log_probs = log_probs if log_probs is not None else [-1.0] * len(text)
    return Response(list(map(ord, text)), log_probs, log_probs, "stop" if text.endswith("$") else "length")


def shown(one: Rollout) -> str:
    return text_of(one.prompts.teacher_prompt)


class TextSampler:
    """A sampler whose responses at ``step`` are the texts in turn; it keeps its requests."""

    def __init__(self, step: int, *texts: str) -> None:
        self.step, self.texts = step, texts
        self.requests: list[Request] = []

    def update_weights(self, step: int) -> None:
        assert step == self.step

    def generate(self, requests: Sequence[Request], params: Any) -> list[Response]:
        self.requests += requests
        assert len(requests) == len(self.texts)
        return [response_of(text) for text in self.texts]
