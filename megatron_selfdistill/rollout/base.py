# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A sampler turns requests into responses: its protocol, and requests and responses as values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, Self, TypeAlias

import torch

from megatron_selfdistill.choices import FINISH_REASONS as FINISH_REASONS
from megatron_selfdistill.data.thoughts import readable

if TYPE_CHECKING:
    from megatron_selfdistill.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class RoleWeights:
    """Weights other than the student's, which read some contexts of guided responses."""

    roles: tuple[str, ...]
    """The roles of `ROLES` that these weights have; roles that no weights have are the student's own."""
    chunks: Sequence[torch.nn.Module]
    """The chunks of this rank, cut like the student's; their weights may rest in host memory."""
    on_device: Callable[[], AbstractContextManager[object]]
    """Opens a context within which the weights are on the device."""


Progress: TypeAlias = Callable[[int, int, str], None]
"""A function that `Sampler.generate` calls whenever more responses are finished, on the ranks that know it.

The arguments are the number of finished responses, the number of all responses that this rank waits for, and whose
responses these are, such as ``of this replica``; empty for the responses of the whole world.  The function returns at
once and calls no collective.
"""


def ignore_progress(finished: int, total: int, whose: str) -> None:
    """Ignore how many responses are finished: the `Progress` of a sampler that nobody watches."""


class Sampler(Protocol):
    """A way to sample responses with the current weights of the student.

    Every rank of the world makes the same calls in the same order; each call is a collective.
    """

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Response]:
        """Return one response per request, in the same order.

        ``requests`` are the requests of this data-parallel replica, the same on each of its ranks.

        Raises, on all ranks alike, where a response is missing or comes from other weights than the last
        `update_weights` gave: a sampler never returns a part of a batch.
        """

    def update_weights(self, version: int) -> None:
        """Sample from now on with the student's present weights, which are its weights after ``version`` steps.

        The trainer calls this before the first `generate` and after each optimizer step.
        """

    def sleep(self) -> None:
        """Free the memory that only sampling needs (KV cache, a copy of the weights) until the next call needs it."""

    def metrics(self) -> dict[str, float]:
        """Return numbers about the time since the last call, under flat keys ``rollout/..``; equal on all ranks."""

    def close(self) -> None:
        """End the engines and processes that this sampler has started; may be called twice."""


@dataclass(frozen=True)
class SamplingParams:
    """The distribution of a token: softmax(logits / temperature), cut to num_ids, top_k and top_p, renormalised."""

    max_new_tokens: int
    """Greatest length of a response in tokens, the stop token included."""
    temperature: float = 1.0
    """Divisor of the logits; 0 is greedy: the most likely token, and the lowest id among equally likely tokens."""
    top_k: int = 0
    """Number of most likely tokens to sample from; 0 is all tokens."""
    top_p: float = 1.0
    """Probability that the smallest set of most likely tokens must hold to be sampled from."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids of the tokens that end a response; the stop token stays as the last token of the response."""
    num_ids: int | None = None
    """Number of ids that may be sampled, the first ones: those of the tokenizer; None is all ids of the model."""

    def up_to(self, horizon: int | None) -> Self:
        """Return these parameters for responses of at most ``horizon`` tokens; None changes nothing."""
        return self if horizon is None else replace(self, max_new_tokens=min(horizon, self.max_new_tokens))

    def marked(self, responses: Sequence[Response], horizon: int | None) -> list[Response]:
        """Return what was sampled with `up_to`; responses that end at a horizon below ``max_new_tokens`` say so."""
        if horizon is None or horizon >= self.max_new_tokens:
            return list(responses)
        return [replace(one, finish_reason="horizon") if one.truncated else one for one in responses]


@dataclass(frozen=True)
class Request:
    """One response to sample."""

    prompt: list[int]
    """Token ids of the student's prompt, at least one."""
    seed: int
    """Seed of 64 bits of this response, from `sample_seed`; token i uses the i-th uniform of `sample_uniforms`."""
    teacher_prompt: list[int] | None = None
    """Token ids of the teacher's prompt; None for a plain response.

    With a teacher's prompt the response is *guided*: every token is sampled from the mix of the distributions that the
    same weights have under both prompts.
    """
    control_prompts: tuple[list[int], ...] = ()
    """Token ids of the teacher's prompts with the hints of other problems, for the controls of a guided response."""
    episode: str | None = None
    """Name of the episode that is one sequence, of which this is a turn: the prompt of its next request begins with
    this prompt and its response, so that a sampler may keep what it has read.  None if nothing follows."""

    @property
    def longest_prompt(self) -> int:
        """Number of tokens of the longest prompt, which must leave room for the response."""
        return max(map(len, (self.prompt, self.teacher_prompt or (), *self.control_prompts)))


@dataclass(frozen=True)
class Response:
    """One response, with the log-probabilities of its tokens."""

    token_ids: list[int]
    """Token ids, at most ``max_new_tokens``; a stop token stays as the last id."""
    log_probs: list[float]
    """Log softmax of the model's logits at temperature 1 over the valid vocabulary, per token, in nats."""
    sampled_log_probs: list[float]
    """Log-probability of each token under the distribution from which it was sampled, in nats.

    0 for a greedy response; NaN where the sampler does not know the log-probability.
    """
    finish_reason: str
    """One of `FINISH_REASONS`: stop (the last token is a stop token), length, or, never from a sampler, horizon (the
    response is unfinished: `SamplingParams.marked`)."""
    teacher_log_probs: list[float] | None = None
    """Log softmax of the logits under the teacher's prompt, per token, in nats; None for a plain response.

    A response with these log-probs was sampled from a mix, so that it is off-policy for the student."""
    weight_version: int | None = None
    """Number of optimizer steps of the oldest weights that generated a token, as far as the sampler knows it."""
    weight_spans: Sequence[tuple[int, int]] = ()
    """Version of the weights and number of tokens of each part of the response, in order; empty where one version
    generated all tokens."""

    @classmethod
    def unsampled(cls, token_ids: list[int], finish_reason: str = "stop") -> Response:
        """Return a response whose text comes from elsewhere than a sampler, so that its log-probs are unknown."""
        unknown = [math.nan] * len(token_ids)
        return cls(token_ids, unknown, unknown, finish_reason)

    @property
    def token_versions(self) -> list[int | None]:
        """The number of optimizer steps of the weights that generated each token; None if it is unknown."""
        if not self.weight_spans:
            return [self.weight_version] * len(self.token_ids)
        return [version for version, num_tokens in self.weight_spans for _ in range(num_tokens)]

    @property
    def truncated(self) -> bool:
        """Whether the response reached rollout.max_new_tokens without a stop token; an unfinished one did not."""
        return self.finish_reason == "length"

    @property
    def unfinished(self) -> bool:
        """Whether the response ends at the horizon of its step, so that nobody knows how it would have ended."""
        return self.finish_reason == "horizon"


def response_text(response: Response, tokenizer: Tokenizer) -> str:
    """Return the text of ``response`` without special tokens, its thoughts marked as `thoughts.readable` marks them.

    A stop token is cut off too, since it may be an ordinary token.
    """
    return readable(response.token_ids[:-1] if response.finish_reason == "stop" else response.token_ids, tokenizer)
