# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What a sampler is: requests in, responses out, and how one token is drawn from one row of logits.

A response travels as token ids.  Its seed depends on (run seed, step, problem id, sample index) and
nothing else, so that no batch, order, split or layout changes what is written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_selfdistill.loss.target import Target

if TYPE_CHECKING:
    from megatron_selfdistill.data.prompts import Tokenizer

# Elements of one float64 temporary of `select_tokens` (128 MiB): rows are processed in groups of this size.
_MAX_ELEMENTS = 2**24

FINISH_REASONS = ("stop", "length")
"""How a response ends: with a stop token, or at its greatest length."""


class Sampler(Protocol):
    """Writes responses with the current weights of the student.

    Every rank of the world makes the same calls in the same order; each call is a collective.
    """

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Response]:
        """One response per request, in the same order.  ``requests`` are those of this data-parallel replica, the same
        on each of its ranks.  Raises, on all ranks alike, where a response is missing or came from other weights than
        the last `update_weights`: never a partial batch."""
        ...

    def update_weights(self, version: int) -> None:
        """From here on responses come from the student's weights of this moment, which are those after ``version``
        optimizer steps.  Called before the first `generate` and after each step."""
        ...

    def sleep(self) -> None:
        """Give back what only sampling needs (KV cache, a copy of the weights) until it is needed again."""
        ...

    def metrics(self) -> dict[str, float]:
        """What happened since the last call, under flat keys ``rollout/..``; equal on all ranks."""
        ...

    def close(self) -> None:
        """End what was started; may be called twice."""
        ...


@dataclass(frozen=True)
class SamplingParams:
    """How a response is written: softmax(logits / temperature), cut to top_k, then to top_p, renormalised."""

    max_new_tokens: int
    """Longest response in tokens, the stop token included."""
    temperature: float = 1.0
    """0 is greedy: the most likely token, the lowest id among equals."""
    top_k: int = 0
    """Draw among the k most likely tokens; 0 is all."""
    top_p: float = 1.0
    """Draw among the fewest most likely tokens that hold this much probability."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a response; the one that did is its last token."""
    target: Target = field(default_factory=Target)
    """What guided requests are drawn from: the mixed target of both prompts' logits (rollout/guided.py)."""
    loss_backend: str | None = None
    """What solves for that target in this process, ``loss.backend``; an engine's own process chooses by itself."""

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        _require(self.temperature >= 0, f"temperature must be at least 0, got {self.temperature}")
        _require(self.top_k >= 0, f"top_k must be at least 0, got {self.top_k}")
        _require(0 < self.top_p <= 1, f"top_p must lie in (0, 1], got {self.top_p}")


@dataclass(frozen=True)
class Request:
    """One response that is wanted."""

    prompt: list[int]
    """Token ids, at least one."""
    seed: int
    """Seed of 64 bits of this response, from `sample_seed`; token i uses the i-th uniform of `sample_uniforms`."""
    teacher_prompt: list[int] | None = None
    """With it the response is *guided*: every token is drawn from the mix of what the same weights say behind both
    prompts."""


@dataclass(frozen=True)
class Response:
    """One response as it was written."""

    token_ids: list[int]
    """At most ``max_new_tokens`` ids; a stop token stays, as the last one."""
    log_probs: list[float]
    """Per token, nats: log softmax of the model's logits at temperature 1 over the valid vocabulary."""
    sampled_log_probs: list[float]
    """Per token, nats: the log-probability under the distribution it was drawn from; 0 where greedy; NaN where the
    sampler does not know it."""
    finish_reason: str
    """stop (the last token is a stop token) or length."""
    teacher_log_probs: list[float] | None = None
    """Of a guided response, per token, nats: log softmax of the logits behind the teacher's prompt."""
    weight_version: int | None = None
    """Optimizer steps behind the weights that wrote it, as the sampler that wrote it knows them."""

    @property
    def guided(self) -> bool:
        """It was drawn from a mix, so it is off-policy for the student."""
        return self.teacher_log_probs is not None

    @property
    def truncated(self) -> bool:
        """It reached ``max_new_tokens`` without a stop token."""
        return self.finish_reason == "length"


def response_text(response: Response, tokenizer: Tokenizer) -> str:
    """What the model said, without special tokens and the stop token, which may be an ordinary one."""
    ended = response.finish_reason == "stop"
    return tokenizer.decode(response.token_ids[:-1] if ended else response.token_ids, skip_special_tokens=True)


def require_room(shortest: int, longest: int, max_new_tokens: int, max_length: int) -> None:
    """Raise ValueError where the shortest of some prompts is empty, or the longest leaves no room for
    ``max_new_tokens`` within ``max_length`` (in tokens; 0 where there is no prompt)."""
    if shortest < 1:
        raise ValueError("a request has an empty prompt; a prompt needs at least one token")
    if longest and longest + max_new_tokens > max_length:
        raise ValueError(
            f"the longest prompt has {longest} tokens and max_new_tokens is {max_new_tokens}, "
            f"together more than the {max_length} that the model may see; shorten the prompt or "
            "lower rollout.max_new_tokens"
        )


def sample_seed(run_seed: int, step: int, problem_id: str, sample_index: int) -> int:
    """Return the 64-bit seed of one sample: BLAKE2b of the four arguments, equal in every process."""
    # The id comes last: it may hold any character, also the separator.
    name = f"{run_seed}\0{step}\0{sample_index}\0{problem_id}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def sample_uniforms(seed: int, count: int) -> np.ndarray:
    """Return the first ``count`` uniforms of a sample, float64 in [0, 1): Philox under the key ``seed``.

    Equals ``Generator(Philox(key=seed)).random(count)``, from the raw words, whose values numpy guarantees.
    """
    words = np.random.Philox(key=seed).random_raw(count)
    return (words >> np.uint64(11)) * 2.0**-53


def select_tokens(logits: Tensor, uniforms: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token per row by inverting the CDF, in float64.

    token = min {v : sum_{i <= v} q_i > uniform}, with q = softmax(logits / temperature) cut to ``top_k``,
    then to ``top_p``, renormalised.  Sums run over token ids, not over ranks, so a rounding error in the
    logits moves a draw only where the uniform lies within that error of a boundary.  Temperature 0 is the
    argmax, the lowest id among equals.

    Shapes: logits ``[b, V]`` of the valid vocabulary, any float dtype; uniforms ``[b]`` float64 in [0, 1),
    unused when greedy.  Returns token ids ``[b]`` int64, their log softmax(logits) and their log q, both
    ``[b]`` float64, in nats.  A NaN row gives some valid token with log-probability NaN.
    """
    rows = max(1, _MAX_ELEMENTS // logits.size(-1))
    if logits.size(0) > rows:
        groups = zip(logits.split(rows), uniforms.split(rows), strict=True)
        drawn = [select_tokens(some_logits, some_uniforms, params) for some_logits, some_uniforms in groups]
        tokens, log_probs, sampled_log_probs = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        return tokens, log_probs, sampled_log_probs
    scores = logits.double()
    if params.temperature == 0:
        tokens = scores.argmax(-1)  # torch: "the indices of the first maximal value"
        return tokens, token_log_probs(scores, tokens), scores.new_zeros(scores.size(0))
    probs = _kept(torch.softmax(scores / params.temperature, dim=-1), params)
    tokens, sampled_log_probs = invert_cdf(probs, uniforms)
    return tokens, token_log_probs(scores, tokens), sampled_log_probs


def invert_cdf(probs: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """min {v : sum_{i <= v} q_i > uniform} per row, and its log q, with q = probs / probs.sum(-1).

    Shapes: probs ``[b, V]`` float64, not negative; uniforms ``[b]`` in [0, 1); returns ``[b]`` int64 and ``[b]``
    float64.  A NaN row gives the last token with log-probability NaN.
    """
    cdf = probs.cumsum(-1)
    total = cdf[:, -1:]
    # uniform * total < total also after rounding, and a token without probability has no interval of its own.
    tokens = torch.searchsorted(cdf, uniforms.double()[:, None] * total, right=True)
    tokens = tokens.clamp_(max=probs.size(-1) - 1)  # a NaN row finds no interval
    return tokens.squeeze(-1), (probs.gather(-1, tokens) / total).log().squeeze(-1)


def token_log_probs(scores: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(scores) of one token per row: ``[b, V]`` and ``[b]`` to ``[b]``, nats."""
    return scores.gather(-1, tokens[:, None]).squeeze(-1) - scores.logsumexp(-1)


def _kept(probs: Tensor, params: SamplingParams) -> Tensor:
    """``probs``, 0 where top_k and top_p exclude, not renormalised; of equals the lowest ids stay."""
    top_k = min(params.top_k, probs.size(-1))
    if top_k in (0, probs.size(-1)) and params.top_p == 1:
        return probs
    ranked, ids = probs.sort(dim=-1, descending=True, stable=True)
    if top_k:
        ranked[:, top_k:] = 0
    if params.top_p < 1:
        before = ranked.cumsum(-1) - ranked
        ranked = ranked.masked_fill(before >= params.top_p * ranked.sum(-1, keepdim=True), 0)
    return torch.zeros_like(probs).scatter_(-1, ids, ranked)


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)
