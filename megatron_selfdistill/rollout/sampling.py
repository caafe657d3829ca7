# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The random numbers of a sample, and how one token is sampled from one token's logits.

The seed of a response depends on (run seed, step, problem id, sample index) and on nothing else, so that no batch,
order, split or layout changes the response.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_selfdistill.rollout.base import SamplingParams

# Elements of one temporary of `select_tokens`, 1 MiB and 64 MiB: rows are processed in groups of this size.
# Several temporaries of a group fit into the caches of a CPU.
_MAX_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}
_BLOCK = 512  # token ids, about the root of the size of a vocabulary


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
    return (np.random.Philox(key=seed).random_raw(count) >> np.uint64(11)) * 2.0**-53


def select_tokens(logits: Tensor, uniforms: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor, Tensor]:
    """Sample one token per row of logits by inverting the cumulative distribution.

    token = min {v : sum_{i <= v} q_i > uniform}, with q = softmax(logits / temperature) cut to the first ``num_ids``
    ids, then to ``top_k``, then to ``top_p``, renormalised.  Sums run over token ids, not over ranks, so that a
    rounding error in the logits changes a sample only where the uniform lies within that error of a boundary.
    Temperature 0 is the argmax, the lowest id among equals.

    Shapes: logits ``[b, V]`` of the valid vocabulary, any float dtype; uniforms ``[b]`` float64 in [0, 1), unused when
    greedy.  Returns token ids ``[b]`` int64, their log softmax(logits) and their log q, both ``[b]`` float64, in nats.
    A row with NaN gives a valid token with log-probability NaN.

    Exponentials are float32, or float64 for such logits, and sums float64: with d = (max - logit) / temperature, the
    log-probability of a token has an error of at most 2^-23 (d + E[d] + 2).
    """
    rows = max(1, _MAX_ELEMENTS[logits.device.type] // logits.size(-1))
    if logits.size(0) > rows:
        groups = zip(logits.split(rows), uniforms.split(rows), strict=True)
        sampled = [select_tokens(some_logits, some_uniforms, params) for some_logits, some_uniforms in groups]
        tokens, log_probs, sampled_log_probs = (torch.cat(parts) for parts in zip(*sampled, strict=True))
        return tokens, log_probs, sampled_log_probs
    below = logits.to(torch.promote_types(logits.dtype, torch.float32))
    below = below - below.amax(-1, keepdim=True)
    weights = below.exp()
    if params.temperature == 0:
        tokens = logits[:, : params.num_ids].argmax(-1)  # torch: "the indices of the first maximal value"
        sampled_log_probs = uniforms.new_zeros(len(tokens), dtype=torch.float64)
    else:
        powers = weights if params.temperature == 1 else (below / params.temperature).exp_()
        tokens, sampled_log_probs = invert_cdf(_kept(powers[:, : params.num_ids], params), uniforms)
    log_probs = below.gather(-1, tokens[:, None]).squeeze(-1) - weights.sum(-1, dtype=torch.float64).log()
    return tokens, log_probs, sampled_log_probs


def invert_cdf(probs: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Return min {v : sum_{i <= v} q_i > uniform} per row, and its log q, with q = probs / probs.sum(-1).

    Shapes: probs ``[b, V]``, not negative, any float dtype; uniforms ``[b]`` in [0, 1); returns ``[b]`` int64 and
    ``[b]`` float64.  Sums are float64: those of blocks of `_BLOCK` ids, and of the ids of the block with the token.  A
    row with NaN gives the last token with log-probability NaN.
    """
    blocks = F.pad(probs, (0, -probs.size(-1) % _BLOCK)).unflatten(-1, (-1, _BLOCK))
    bounds = F.pad(blocks.sum(-1, dtype=torch.float64).cumsum(-1), (1, 0))
    total = bounds[:, -1:]
    # uniform * total < total also after rounding, and a block without probability has no interval of its own.
    place = uniforms.double()[:, None] * total
    block = torch.searchsorted(bounds, place, right=True).sub_(1).clamp_(max=blocks.size(1) - 1)
    within = blocks.take_along_dim(block[:, :, None], 1).squeeze(1).cumsum(-1, dtype=torch.float64)
    # The sum of a block may be rounded otherwise than that of its ids.
    rest = torch.minimum(place - bounds.gather(-1, block), within[:, -1:] * (1 - 2.0**-52))
    tokens = torch.add(torch.searchsorted(within, rest, right=True), block, alpha=_BLOCK)
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
    probs = probs.double()
    ranked, ids = probs.sort(dim=-1, descending=True, stable=True)
    if top_k:
        ranked[:, top_k:] = 0
    if params.top_p < 1:
        before = ranked.cumsum(-1) - ranked
        ranked = ranked.masked_fill(before >= params.top_p * ranked.sum(-1, keepdim=True), 0)
    return torch.zeros_like(probs).scatter_(-1, ids, ranked)


class SampleKey(NamedTuple):
    """The name of a sample, and of its random numbers."""

    step: int
    problem_id: str
    sample_index: int
    turn: int = 0
    """The number of the response within its episode."""

    def seed(self, run_seed: int) -> int:
        """Return the seed of the sample, from `sample_seed`; each turn of an episode has a seed of its own."""
        name = f"{self.problem_id}/turn{self.turn}" if self.turn else self.problem_id
        return sample_seed(run_seed, self.step, name, self.sample_index)

    def __str__(self) -> str:
        turn = f", turn {self.turn}" if self.turn else ""
        return f"step {self.step} to problem {self.problem_id!r}, sample {self.sample_index}{turn}"
