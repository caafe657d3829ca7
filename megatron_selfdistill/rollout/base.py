# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A sampler turns requests into responses: its protocol, and how one token is sampled from one token's logits.

A response travels as token ids.  Its seed depends on (run seed, step, problem id, sample index) and on nothing else, so
that no batch, order, split or layout changes the response.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

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


# Elements of one float64 temporary of `select_tokens`, 4 MiB and 128 MiB: rows are processed in groups of this size.
# Several temporaries of a group fit into the caches of a CPU.
_MAX_ELEMENTS = {"cpu": 2**19, "cuda": 2**24}

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
        ...

    def update_weights(self, version: int) -> None:
        """Sample from now on with the student's present weights, which are its weights after ``version`` steps.

        The trainer calls this before the first `generate` and after each optimizer step.
        """
        ...

    def sleep(self) -> None:
        """Free the memory that only sampling needs (KV cache, a copy of the weights) until the next call needs it."""
        ...

    def metrics(self) -> dict[str, float]:
        """Return numbers about the time since the last call, under flat keys ``rollout/..``; equal on all ranks."""
        ...

    def close(self) -> None:
        """End the engines and processes that this sampler has started; may be called twice."""
        ...


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

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        _require(self.temperature >= 0, f"temperature must be at least 0, got {self.temperature}")
        _require(self.top_k >= 0, f"top_k must be at least 0, got {self.top_k}")
        _require(0 < self.top_p <= 1, f"top_p must lie in (0, 1], got {self.top_p}")


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
    episode: str | None = None
    """Name of the episode that is one sequence, of which this is a turn: the prompt of its next request begins with
    this prompt and its response, so that a sampler may keep what it has read.  None if nothing follows."""

    @property
    def longest_prompt(self) -> int:
        """Number of tokens of the longer prompt, which must leave room for the response."""
        return max(len(self.prompt), len(self.teacher_prompt or ()))


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
    """One of `FINISH_REASONS`: stop (the last token is a stop token) or length."""
    teacher_log_probs: list[float] | None = None
    """Log softmax of the logits under the teacher's prompt, per token, in nats; None for a plain response."""
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
    def guided(self) -> bool:
        """Whether the response was sampled from a mix, so that it is off-policy for the student."""
        return self.teacher_log_probs is not None

    @property
    def truncated(self) -> bool:
        """Whether the response reached ``max_new_tokens`` without a stop token."""
        return self.finish_reason == "length"


def response_text(response: Response, tokenizer: Tokenizer) -> str:
    """Return the text of ``response`` without special tokens, its thoughts marked as `thoughts.readable` marks them.

    A stop token is cut off too, since it may be an ordinary token.
    """
    ended = response.finish_reason == "stop"
    return readable(response.token_ids[:-1] if ended else response.token_ids, tokenizer)


def require_room(shortest: int, longest: int, max_new_tokens: int, max_length: int) -> None:
    """Raise ValueError if a prompt is empty or leaves no room for ``max_new_tokens`` within ``max_length``.

    ``shortest`` and ``longest`` are the lengths of the shortest and the longest prompt in tokens; ``longest`` is 0
    where there is no prompt.
    """
    if shortest < 1:
        raise ValueError("a request has an empty prompt; a prompt needs at least one token")
    if longest and longest + max_new_tokens > max_length:
        raise ValueError(
            f"the longest prompt has {longest} tokens and max_new_tokens is {max_new_tokens}, "
            f"together more than the {max_length} that the model may see; shorten the prompt or "
            "lower rollout.max_new_tokens"
        )


def request_key(request: Request, params: SamplingParams) -> str:
    """Return a name of ``request`` that another process also gives it: equal names have equal responses' distributions.

    The name is a BLAKE2b digest of the seed, the prompts and the parameters, without the target of guided requests.
    """
    drawn: list[object] = [
        params.max_new_tokens,
        params.temperature,
        params.top_k,
        params.top_p,
        *params.stop_token_ids,
    ]
    drawn += [] if params.num_ids is None else [f"ids {params.num_ids}"]
    name = repr((request.seed, request.prompt, request.teacher_prompt, 0, drawn))  # 0: as in checkpoints of before
    return hashlib.blake2b(name.encode(), digest_size=16).hexdigest()


def sample_seed(run_seed: int, step: int, problem_id: str, sample_index: int) -> int:
    """Return the 64-bit seed of one sample: BLAKE2b of the four arguments, equal in every process."""
    # The id comes last: it may hold any character, also the separator.
    name = f"{run_seed}\0{step}\0{sample_index}\0{problem_id}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def sample_uniforms(seed: int, count: int) -> np.ndarray:
    """Return the first ``count`` uniforms of a sample, float64 in [0, 1): Philox under the key ``seed``.

    They equal ``Generator(Philox(key=seed)).random(count)``, but come from the raw words, whose values numpy
    guarantees.
    """
    words = np.random.Philox(key=seed).random_raw(count)
    return (words >> np.uint64(11)) * 2.0**-53


def select_tokens(logits: Tensor, uniforms: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor, Tensor]:
    """Sample one token per row of logits by inverting the cumulative distribution, in float64.

    token = min {v : sum_{i <= v} q_i > uniform}, with q = softmax(logits / temperature) cut to the first ``num_ids``
    ids, then to ``top_k``, then to ``top_p``, renormalised.  Sums run over token ids, not over ranks, so that a
    rounding error in the logits changes a sample only where the uniform lies within that error of a boundary.
    Temperature 0 is the argmax, the lowest id among equals.

    Shapes: logits ``[b, V]`` of the valid vocabulary, any float dtype; uniforms ``[b]`` float64 in [0, 1), unused when
    greedy.  Returns token ids ``[b]`` int64, their log softmax(logits) and their log q, both ``[b]`` float64, in nats.
    A row with NaN gives a valid token with log-probability NaN.
    """
    rows = max(1, _MAX_ELEMENTS[logits.device.type] // logits.size(-1))
    if logits.size(0) > rows:
        groups = zip(logits.split(rows), uniforms.split(rows), strict=True)
        sampled = [select_tokens(some_logits, some_uniforms, params) for some_logits, some_uniforms in groups]
        tokens, log_probs, sampled_log_probs = (torch.cat(parts) for parts in zip(*sampled, strict=True))
        return tokens, log_probs, sampled_log_probs
    scores = logits.double()
    if params.temperature == 0:
        tokens = logits[:, : params.num_ids].argmax(-1)  # torch: "the indices of the first maximal value"
        peaks = scores.gather(-1, tokens[:, None])  # known, so that `logsumexp` need not look for them
        log_probs = peaks - ((scores - peaks).exp_().sum(-1, keepdim=True).log_() + peaks)
        return tokens, log_probs.squeeze(-1), scores.new_zeros(scores.size(0))
    probs = _kept(torch.softmax(scores / params.temperature, dim=-1)[:, : params.num_ids], params)
    tokens, sampled_log_probs = invert_cdf(probs, uniforms)
    return tokens, token_log_probs(scores, tokens), sampled_log_probs


def invert_cdf(probs: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Return min {v : sum_{i <= v} q_i > uniform} per row, and its log q, with q = probs / probs.sum(-1).

    Shapes: probs ``[b, V]`` float64, not negative; uniforms ``[b]`` in [0, 1); returns ``[b]`` int64 and ``[b]``
    float64.  A row with NaN gives the last token with log-probability NaN.
    """
    cdf = probs.cumsum(-1)
    total = cdf[:, -1:]
    # uniform * total < total also after rounding, and a token without probability has no interval of its own.
    tokens = torch.searchsorted(cdf, uniforms.double()[:, None] * total, right=True)
    tokens = tokens.clamp_(max=probs.size(-1) - 1)  # a NaN row finds no interval
    return tokens.squeeze(-1), (probs.gather(-1, tokens) / total).log().squeeze(-1)


def token_log_probs(scores: Tensor, tokens: Tensor) -> Tensor:
    """Return log softmax(scores) of one token per row: from ``[b, V]`` and ``[b]`` to ``[b]``, in nats."""
    return scores.gather(-1, tokens[:, None]).squeeze(-1) - scores.logsumexp(-1)


def _kept(probs: Tensor, params: SamplingParams) -> Tensor:
    """Return ``probs`` with 0 where top_k and top_p exclude a token, not renormalised; of equal tokens low ids stay."""
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


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
