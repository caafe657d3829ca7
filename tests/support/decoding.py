# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Requests for tests of sampling in process, and whole forward passes without a cache, which check every token.

A whole pass over a prompt and its response gives the logits of all tokens at once.  Every token follows from the tokens
before it, so a response whose tokens are all right is the response that one whole pass per token would have generated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from models import VOCAB_SIZE
from torch import Tensor

from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams
from megatron_selfdistill.rollout.megatron.megatron_sampler import MegatronSampler
from megatron_selfdistill.rollout.sampling import sample_seed, sample_uniforms

MAX_LENGTH = 64
NEW_TOKENS = 14  # with fewer, the texts of tied embeddings repeat themselves
GREEDY = SamplingParams(NEW_TOKENS, temperature=0)
PAIR_TOKENS = 8
# Sequences that end early, and long ones that must not wait for them; seven prompts, so that no split is even.
PROMPT_LENGTHS = (2, 9, 5, 5, 12, 3, 7)
# Of student and teacher: the teacher's prompt is usually longer, but not always; a prompt of one token has no cache.
PAIR_LENGTHS = ((2, 31), (9, 12), (5, 1), (1, 5), (12, 12), (1, 1), (7, 40))
CLOSE_TO_A_TIE = "too close to a tie to tell layouts from rounding"


def make_requests() -> list[Request]:
    """Return one plain request for each of `PROMPT_LENGTHS`."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]
    return [Request(prompt, sample_seed(0, 0, f"problem {i}", 0)) for i, prompt in enumerate(prompts)]


def make_pairs(count: int = len(PAIR_LENGTHS), vocab_size: int = VOCAB_SIZE) -> list[Request]:
    """Return guided requests with prompts of `PAIR_LENGTHS`, in turn."""
    generator = torch.Generator().manual_seed(3)

    def prompt(length: int) -> list[int]:
        return torch.randint(0, vocab_size, (length,), generator=generator).tolist()

    lengths = [PAIR_LENGTHS[i % len(PAIR_LENGTHS)] for i in range(count)]
    return [
        Request(prompt(student), sample_seed(0, 0, f"problem {i}", 0), teacher_prompt=prompt(teacher))
        for i, (student, teacher) in enumerate(lengths)
    ]


def sampler_of(
    chunks: Sequence[torch.nn.Module], grid: RankGrid, kv_cache_gb: float | None = None, cuda_graphs: bool = False
) -> MegatronSampler:
    return MegatronSampler(chunks, grid, VOCAB_SIZE, MAX_LENGTH, kv_cache_gb, cuda_graphs=cuda_graphs)


@torch.no_grad()
def logits_of(model: torch.nn.Module, tokens: Sequence[int]) -> Tensor:
    """Return the logits ``[len(tokens), vocabulary]`` in float64 on the CPU of a whole model, without a cache."""
    device = next(model.parameters()).device
    ids = torch.tensor([list(tokens)], device=device)
    logits: Tensor = model(ids, torch.arange(len(tokens), device=device)[None], None)
    return logits[0, :, :VOCAB_SIZE].double().cpu()


def log_softmax_after(model: torch.nn.Module, tokens: Sequence[int]) -> Tensor:
    return logits_of(model, tokens)[-1].log_softmax(-1)


def predicting(logits: Callable[[list[int]], Tensor], prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    return logits([*prompt, *response])[len(prompt) - 1 : -1].double()


def both_logits(
    logits: Callable[[list[int]], Tensor], request: Request, response: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the logits ``[len(response), vocabulary]`` of student and teacher that predict each response token."""
    assert request.teacher_prompt is not None
    return predicting(logits, request.prompt, response), predicting(logits, request.teacher_prompt, response)


def log_probs_at(log_probs: Tensor, token_ids: Sequence[int]) -> list[float]:
    """Return the log-prob of each token under its row of ``log_probs``."""
    found: list[float] = log_probs.gather(1, torch.tensor(token_ids)[:, None])[:, 0].tolist()
    return found


def check_argmax(logits: Tensor, response: Response, gap: float) -> None:
    """Assert that each token is the argmax of its row, by a distance of at least ``gap``."""
    first, second = logits.topk(2).values.unbind(1)
    assert (first - second).min() > gap, CLOSE_TO_A_TIE
    assert response.token_ids == logits.argmax(-1).tolist()
    assert response.sampled_log_probs == [0.0] * len(response.token_ids)


def check_inversion(log_q: Tensor, request: Request, response: Response) -> None:
    """Assert that token i is where the cumulative distribution of row i passes uniform i of the request's seed."""
    uniforms = torch.from_numpy(sample_uniforms(request.seed, len(response.token_ids)))
    assert response.token_ids == (log_q.exp().cumsum(-1) <= uniforms[:, None]).sum(-1).tolist()


def check_pair_log_probs(student: Tensor, teacher: Tensor, response: Response, tolerance: float) -> None:
    """Assert that the response's log-probs are those of the student's and of the teacher's logits."""
    assert response.teacher_log_probs is not None
    for logits, found in ((student, response.log_probs), (teacher, response.teacher_log_probs)):
        assert found == pytest.approx(log_probs_at(logits.log_softmax(-1), response.token_ids), abs=tolerance)


def check_greedy_pair(
    logits: Callable[[list[int]], Tensor], request: Request, response: Response, tolerance: float, gap: float = 5e-5
) -> int:
    """Assert that each token is the argmax of w l_T + l_S; return the number of tokens."""
    student, teacher = both_logits(logits, request, response.token_ids)
    check_argmax(0.75 * teacher + student, response, gap)
    check_pair_log_probs(student, teacher, response, tolerance)
    return len(response.token_ids)
