# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Guided responses from a vLLM engine: each is a pair of ordinary requests, the halves, which share every token.

The engine holds `GuidedProcessor` (plugin/guided_processor.py), which samples one token for both halves of a pair
wherever they are equally long, and stops a half whose partner is absent.  When a pair is separated, the driver here
cuts it to the tokens that both halves share and sends it again, until the pair has ended by itself.  Token i comes from
the i-th uniform of the request's seed however often that happens, so the response equals the response of a pair that
was never separated.

One half reads the teacher's prompt, the other half, the anchor's, reads the student's prompt.  An engine with adapters
computes each half with or without them, in one batch, so that teacher and reference are the frozen weights themselves.
"""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_selfdistill.distributed.watchdog import beat
from megatron_selfdistill.errors import EngineError
from megatron_selfdistill.loss.target import Target
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams, refuse_unguidable
from megatron_selfdistill.rollout.vllm.coroutines import run
from megatron_selfdistill.rollout.vllm.engine import WORKER_EXTENSION, AwaitedEngine, AwaitedHere, Engine
from megatron_selfdistill.rollout.vllm.engine_output import LOG_PROB_ROUNDING, EngineOutput, EngineRequest
from megatron_selfdistill.rollout.vllm.protocol import ROLES, PairHalf, PairLog

GUIDED_ENGINE_ARGS: dict[str, Any] = {
    "logits_processors": ["megatron_selfdistill.rollout.vllm.plugin.guided_processor:GuidedProcessor"],
    "scheduler_cls": "megatron_selfdistill.rollout.vllm.plugin.pair_scheduler.PairScheduler",
    "worker_extension_cls": WORKER_EXTENSION,
    "async_scheduling": False,
    "enable_prefix_caching": True,
}
"""vLLM's engine arguments that guided requests need."""
GUIDED_ENVIRONMENT = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
"""Environment of the processes of an engine for guided requests: the second model runner takes no processor."""
_GUIDED_VERSIONS = ((0, 32),)
"""Versions of vLLM, as (major, minor), on which guided rollouts have run."""

# Rounds in which a pair that is sent alone may get no token.  The first round may separate its halves while the prompts
# are read in chunks; after that the prompts are cached, and only requests of other clients can still separate them.
_LONE_ATTEMPTS = 10
# The tokens whose log one answer of an engine may hold, unless a single pair has more: 2 MiB from each of its workers.
_LOGGED_TOKENS = 2**17


@dataclass
class PairCounts:
    """The cost of guided requests, added up over calls."""

    pairs: int = 0
    """Number of responses."""
    rounds: int = 0
    """Number of calls of the engine that generated tokens."""
    repairs: int = 0
    """Number of times that a pair was separated and sent again."""
    primed_tokens: int = 0
    """Number of prompt tokens that were read ahead, so that halves start together."""


def generate_guided(
    engine: Engine,
    requests: Sequence[Request],
    params: SamplingParams,
    counts: PairCounts | None = None,
    bare_roles: Collection[str] = (),
) -> list[Response]:
    """Return one guided response per request, in order, sampled from ``params.target`` as `select_mixed_tokens` does.

    ``engine``: made with `GUIDED_ENGINE_ARGS` in `GUIDED_ENVIRONMENT`; every request has a ``teacher_prompt``.
    ``log_probs``, ``teacher_log_probs`` and ``sampled_log_probs`` are of student, teacher and mix (0 where greedy).
    Engines of several ranks: each rank makes the same call and gets the same tokens.  ``counts`` is added to.
    ``bare_roles``: the roles of `guided.ROLES` whose contexts are read without the run's adapters.  With a target that
    is anchored to a reference, which then is one of them, the engine reads each response once more for the student.

    Raises: ValueError where a prompt leaves no room for the response, or ``params`` do not fit guided requests;
    `EngineError` where the engine fails, has no room for both halves of a pair, or changed its weights in between.
    """
    return run(guided_responses(AwaitedHere(engine), requests, params, counts, bare_roles))


async def guided_responses(
    engine: AwaitedEngine,
    requests: Sequence[Request],
    params: SamplingParams,
    counts: PairCounts | None = None,
    bare_roles: Collection[str] = (),
) -> list[Response]:
    """Return guided responses as `generate_guided` does, from an engine whose work is awaited."""
    refuse_unguidable(params, has_reference="reference" in bare_roles)
    if refusal := why_not_in_pairs(params.target):
        raise ValueError(refusal)
    counts = PairCounts() if counts is None else counts
    if not requests:
        return []
    limits = await _limits(engine)
    _check_lengths(requests, params, limits["max_model_len"])
    counts.pairs += len(requests)
    anchor = "reference" if params.target.is_anchored else "student"
    adapted = {"anchor": anchor not in bare_roles, "teacher": "teacher" not in bare_roles}
    pairs = [_Pair(request, adapted) for request in requests]
    counts.primed_tokens += await _prime(engine, pairs, limits)
    todo, size, attempts = pairs, len(pairs), 0
    while todo:
        batch, later = todo[:size], todo[size:]
        num_new = await _run_round(engine, batch, params, counts)
        beat()
        unfinished = [pair for pair in batch if pair.finish_reason is None]
        todo = unfinished + later
        if num_new:
            size, attempts = 2 * size, 0
            continue
        # This round gave no token: fewer pairs leave each other more room.
        attempts = attempts + 1 if size == 1 else 0
        if attempts == _LONE_ATTEMPTS:
            lengths = (len(unfinished[0].request.prompt), len(unfinished[0].request.teacher_prompt or ()))
            raise EngineError(
                f"a guided pair with prompts of {lengths[0]} and {lengths[1]} tokens got no token in {attempts} rounds "
                "in which it was sent alone: the engine's KV cache must hold both halves; raise rollout.kv_cache_gb or "
                "lower rollout.max_new_tokens"
            )
        size = max(1, min(size, len(batch)) // 2)
    if params.target.is_anchored:
        await _read_by_student(engine, pairs)
    return [pair.response() for pair in pairs]


def why_not_guided(version: str) -> str | None:
    """Return a message where guided rollouts have not run on this ``version`` of vLLM, None if they have.

    ``version`` is ``vllm.__version__``.  Guided rollouts take part in vLLM's scheduler, its first model runner and its
    sampling, none of which is a public interface: a change there could give wrong tokens without an error.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and (int(found[1]), int(found[2])) in _GUIDED_VERSIONS:
        return None
    known = " and ".join(f"{major}.{minor}" for major, minor in _GUIDED_VERSIONS)
    return (
        f"rollout.guidance=mixed has run on vLLM {known} and not yet on {version}, which is installed here: install "
        f"vllm=={known}.*, set rollout.engine=megatron, or set rollout.guidance=none"
    )


def why_not_in_pairs(target: Target) -> str | None:
    """Return a message where tokens of ``target`` need the logits of three contexts, None if two are enough."""
    if target.is_anchored and target.rule == "entropy_matched" and not target.matches_reference:
        return (
            "guided responses on vLLM have two contexts per token, but target.match=student with "
            "target.anchor=reference needs those of student, teacher and reference: set target.match=reference or "
            "rollout.engine=megatron"
        )
    return None


@dataclass
class _Pair:
    """A response that is being generated."""

    request: Request
    adapted: Mapping[str, bool]
    """Whether the run's adapters take part in a half, by its role."""
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[np.ndarray] = field(default_factory=list)
    weight_versions: set[int | None] = field(default_factory=set)
    finish_reason: str | None = None
    student_log_probs: list[float] | None = None
    """The student's log-probs of the response, where the anchor is another model."""

    def prompt(self, role: str) -> list[int]:
        return self.request.prompt if role == "anchor" else self.request.teacher_prompt or []

    def response(self) -> Response:
        if len(self.weight_versions) != 1:
            raise EngineError(
                "a guided response must come from one version of the weights, but the engine generated one with "
                f"versions {sorted(self.weight_versions, key=str)}; send weights only between calls"
            )
        anchor, teacher, mixed = np.concatenate(self.log_probs).T.astype(float).tolist()
        assert self.finish_reason is not None
        return Response(
            token_ids=self.token_ids,
            log_probs=anchor if self.student_log_probs is None else self.student_log_probs,
            sampled_log_probs=mixed,
            finish_reason=self.finish_reason,
            teacher_log_probs=teacher,
            weight_version=next(iter(self.weight_versions)),
        )


def _check_lengths(requests: Sequence[Request], params: SamplingParams, max_model_len: int) -> None:
    alone = sum(request.teacher_prompt is None for request in requests)
    if alone:
        raise ValueError(f"guided requests need a teacher_prompt; {alone} of {len(requests)} have none")
    longest = max(request.longest_prompt for request in requests)
    if longest + params.max_new_tokens > max_model_len:
        raise ValueError(
            f"the longest prompt has {longest} tokens and max_new_tokens is {params.max_new_tokens}, together more "
            f"than the {max_model_len} that the engine may see; shorten the prompt or lower rollout.max_new_tokens"
        )


async def _prime(engine: AwaitedEngine, pairs: Sequence[_Pair], limits: Mapping[str, int]) -> int:
    """Let the engine read prompts, and so cache them; return the number of tokens.

    Halves whose prompts end in different passes are separated at once.  A cached prompt takes one block of a pass, so
    that whole batches start in one pass, and the samples of one problem share their prompts.  The prompts take at most
    half of the KV cache: more of them would displace each other.
    """
    prompts = [(tuple(pair.prompt(role)), pair.adapted[role]) for pair in pairs for role in ROLES]
    if sum(len(prompt) for prompt, _ in prompts) <= limits["max_num_batched_tokens"]:
        return 0
    room, ahead = limits["kv_cache_tokens"] // 2, []
    for prompt, adapted in dict.fromkeys(prompts):  # a prompt with adapters and without has two places in the cache
        room -= len(prompt)
        if room < 0:
            break
        ahead.append(EngineRequest(list(prompt), {**_PLAIN, "max_tokens": 1}, adapted))
    if ahead:
        await _generate(engine, ahead)
    return sum(len(request.token_ids) for request in ahead)


# Neither temperature nor seed matter: the processor leaves one token to choose.
_PLAIN = {"temperature": 0.0, "ignore_eos": True, "logprobs": 0, "detokenize": False}


async def _run_round(engine: AwaitedEngine, batch: Sequence[_Pair], params: SamplingParams, counts: PairCounts) -> int:
    """Run one round, in which all halves go on until they end or separate; return the number of new tokens."""
    prefix = uuid.uuid4().hex
    names = [f"{prefix}-{index}" for index in range(len(batch))]
    stops = [_stop_token(pair.request, params) for pair in batch]
    halves = [
        _half_request(pair, name, role, stop, params)
        for pair, name, stop in zip(batch, names, stops, strict=True)
        for role in ROLES
    ]
    try:
        outputs = await _generate(engine, halves)
    except Exception:
        with contextlib.suppress(EngineError):
            await engine.call("pop_pair_logs", names)
        raise
    logs = await _logs(engine, names, params.max_new_tokens)
    counts.rounds += 1
    num_new = 0
    for index, (pair, stop, log) in enumerate(zip(batch, stops, logs, strict=True)):
        num_new += _take(engine.name, pair, outputs[2 * index], outputs[2 * index + 1], log, stop, params)
        counts.repairs += max(log.forced) >= 0
    return num_new


async def _limits(engine: AwaitedEngine) -> dict[str, int]:
    limits = await engine.call("guided_limits")
    wanted = ("max_model_len", "max_num_batched_tokens", "kv_cache_tokens")
    if not isinstance(limits, dict) or any(type(limits.get(name)) is not int for name in wanted):
        raise EngineError(f"{engine.name} was to state {', '.join(wanted)} as integers, got {str(limits)[:200]}")
    return limits


async def _logs(engine: AwaitedEngine, names: Sequence[str], max_new_tokens: int) -> list[PairLog]:
    """Return the log of each pair, in as many answers as keep an answer short."""
    num_together, logs = max(1, _LOGGED_TOKENS // max_new_tokens), []
    for first in range(0, len(names), num_together):
        asked = names[first : first + num_together]
        found = await engine.call("pop_pair_logs", list(asked))
        try:
            for _, fields in zip(asked, found, strict=True):
                if fields is None:
                    raise EngineError(
                        f"{engine.name} has no log of a guided pair: it was sent more pairs than it can log"
                    )
                logs.append(PairLog.from_json(fields))
        except (LookupError, TypeError, ValueError) as error:
            raise EngineError(f"{engine.name} was to return a log of each guided pair: {error}") from error
    return logs


def _half_request(pair: _Pair, name: str, role: str, stop: int, params: SamplingParams) -> EngineRequest:
    start = len(pair.token_ids)
    max_tokens = params.max_new_tokens - start
    half = PairHalf(
        name, role, pair.request.seed, start, max_tokens, stop, params.target, greedy=params.temperature == 0
    )
    sampling = {
        **_PLAIN,
        "max_tokens": max_tokens,
        "stop_token_ids": list(params.stop_token_ids or (stop,)),
        "extra_args": half.extra_args(),
    }
    return EngineRequest([*pair.prompt(role), *pair.token_ids], sampling, pair.adapted[role])


async def _read_by_student(engine: AwaitedEngine, pairs: Sequence[_Pair]) -> None:
    """Set the student's log-probs of the response of each pair.

    The engine gets the response as a prompt, without its last token, which is the only token that it may sample.
    """
    read = await _generate(engine, [_student_request(pair) for pair in pairs])
    for pair, output in zip(pairs, read, strict=True):
        count = len(pair.token_ids)
        log_probs = [*output.prompt_log_probs, *output.log_probs][-count:]
        if output.token_ids != pair.token_ids[-1:] or len(log_probs) != count:
            raise EngineError(
                f"{engine.name} was to read a response of {count} tokens for the student, and gave {len(log_probs)} "
                f"log-probs and the tokens {output.token_ids} in place of {pair.token_ids[-1:]}"
            )
        pair.student_log_probs = log_probs
        pair.weight_versions.add(output.weight_version)


def _student_request(pair: _Pair) -> EngineRequest:
    last = {"max_tokens": 1, "allowed_token_ids": pair.token_ids[-1:], "prompt_logprobs": 0}
    return EngineRequest([*pair.request.prompt, *pair.token_ids[:-1]], {**_PLAIN, **last})


def _stop_token(request: Request, params: SamplingParams) -> int:
    """Return the token with which a half ends.

    Without stop tokens another token must serve, and the pair goes on where that token was really sampled: the first
    token of a prompt is seldom sampled.
    """
    assert request.teacher_prompt is not None
    return params.stop_token_ids[0] if params.stop_token_ids else request.teacher_prompt[0]


async def _generate(engine: AwaitedEngine, requests: Sequence[EngineRequest]) -> list[EngineOutput]:
    outputs = await engine.generate(requests)
    if len(outputs) != len(requests):
        raise EngineError(f"{engine.name} returned {len(outputs)} outputs for {len(requests)} requests")
    return outputs


def _take(
    who: str,
    pair: _Pair,
    anchor: EngineOutput,
    teacher: EngineOutput,
    log: PairLog,
    stop: int,
    params: SamplingParams,
) -> int:
    """Append to ``pair`` the tokens that both halves took from one sample; return their number.

    Raises: `EngineError`, which begins with ``who``, where the halves and their log do not fit each other.
    """
    lengths = [
        _num_own_tokens(who, role, half, forced)
        for role, half, forced in zip(ROLES, (anchor, teacher), log.forced, strict=True)
    ]
    common = min(lengths)
    tokens = list(anchor.token_ids[:common])
    if tokens != list(teacher.token_ids[:common]) or len(log.log_probs) < common:
        raise EngineError(
            f"{who} returned halves of a guided pair that must share {common} tokens and log each, with different "
            f"tokens or {len(log.log_probs)} entries: is its processor the one of this version?"
        )
    if not np.all(np.isfinite(log.log_probs[:common]) & (log.log_probs[:common] <= LOG_PROB_ROUNDING)):
        raise EngineError(
            f"{who} logged log-probs of a guided pair that are NaN, infinite or above 0: are its weights whole?"
        )
    pair.token_ids += tokens
    pair.log_probs.append(log.log_probs[:common])
    pair.weight_versions |= {anchor.weight_version, teacher.weight_version}
    if tokens and tokens[-1] in params.stop_token_ids:
        pair.finish_reason = "stop"
    elif len(pair.token_ids) == params.max_new_tokens:
        pair.finish_reason = "length"
    elif max(log.forced) < 0 and (params.stop_token_ids or tokens[-1:] != [stop]):
        raise EngineError(
            f"{who} ended both halves of a guided pair ({anchor.finish_reason}, {teacher.finish_reason}) after "
            f"{len(pair.token_ids)} of {params.max_new_tokens} tokens without a stop token"
        )
    return common


def _num_own_tokens(who: str, role: str, half: EngineOutput, forced: int) -> int:
    if forced >= 0 and len(half.token_ids) != forced + 1:
        raise EngineError(
            f"{who} changed its output: the {role}'s half of a guided pair was stopped after {forced} tokens but has "
            f"{len(half.token_ids)}"
        )
    return len(half.token_ids) if forced < 0 else forced
