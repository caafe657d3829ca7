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

import base64
import contextlib
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from megatron_selfdistill.distributed.watchdog import beat
from megatron_selfdistill.errors import EngineError
from megatron_selfdistill.loss.target import Target
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams
from megatron_selfdistill.rollout.guided import longest_prompt, refuse_unguidable
from megatron_selfdistill.rollout.vllm.engine import WORKER_EXTENSION, Engine, EngineOutput, EngineRequest

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

ROLES = ("anchor", "teacher")
"""The roles of the halves of a pair; the anchor is the student or, with target.anchor=reference, the reference."""
_EXTRA_ARG = "selfdistill_pair"
# Rounds in which a pair that is sent alone may get no token.  The first round may separate its halves while the prompts
# are read in chunks; after that the prompts are cached, and only requests of other clients can still separate them.
_LONE_ATTEMPTS = 10


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


@dataclass(frozen=True)
class PairHalf:
    """One half of a pair, as the engine's processor sees it; it travels in ``SamplingParams.extra_args``."""

    pair: str
    """Name that both halves share, and no other request that the engine ever sees."""
    role: str
    """One of `ROLES`."""
    seed: int
    """Seed of the request, see `base.sample_seed`."""
    start: int
    """Number of tokens of the response that are in the prompt already."""
    max_tokens: int
    """Number of tokens that may still come."""
    stop: int
    """Token that ends this half when its partner is absent; one of its stop_token_ids."""
    target: Target
    """Target from which tokens are sampled."""
    greedy: bool
    """Whether each token is the most likely token instead of a sample."""

    def extra_args(self) -> dict[str, Any]:
        """Return the fields as JSON values, for ``SamplingParams.extra_args``."""
        return {_EXTRA_ARG: asdict(self)}

    @staticmethod
    def of(extra_args: Mapping[str, Any] | None) -> PairHalf | None:
        """Return the half that `extra_args` has encoded; None for a request that is no half.

        Raises ValueError for anything else.
        """
        fields = (extra_args or {}).get(_EXTRA_ARG)
        if fields is None:
            return None
        try:
            half = PairHalf(**{**fields, "target": Target(**fields["target"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"extra_args[{_EXTRA_ARG!r}] must hold the fields of PairHalf; {error}") from error
        if half.role not in ROLES:
            raise ValueError(f"the role of a half must be {' or '.join(ROLES)}, got {half.role!r}")
        return half


@dataclass(frozen=True)
class PairLog:
    """The record of the engine's processor about a pair whose halves have ended."""

    forced: list[int]
    """The number of tokens before a forced stop, of anchor and teacher; -1 for a half that ended by itself."""
    log_probs: np.ndarray
    """Log-probs ``[n, 3]`` float32 of each sampled token under the anchor, the teacher and the mix, in nats."""

    def to_json(self) -> dict[str, Any]:
        """Return the log as JSON values; the numbers are base64, since decimal text would be five times as long."""
        return {"forced": self.forced, "log_probs": base64.b64encode(self.log_probs.astype("<f4").tobytes()).decode()}

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> PairLog:
        """Return the log that `to_json` has encoded."""
        values = np.frombuffer(base64.b64decode(fields["log_probs"]), dtype="<f4")
        return PairLog(list(fields["forced"]), values.reshape(-1, 3))


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
    refuse_unguidable(params, has_reference="reference" in bare_roles)
    if refusal := why_not_in_pairs(params.target):
        raise ValueError(refusal)
    counts = PairCounts() if counts is None else counts
    if not requests:
        return []
    limits = engine.call("guided_limits")
    _check_lengths(requests, params, limits["max_model_len"])
    counts.pairs += len(requests)
    anchor = "reference" if params.target.is_anchored else "student"
    adapted = {"anchor": anchor not in bare_roles, "teacher": "teacher" not in bare_roles}
    pairs = [_Pair(request, adapted) for request in requests]
    counts.primed_tokens += _prime(engine, pairs, limits)
    todo, wave, attempts = pairs, len(pairs), 0
    while todo:
        batch, later = todo[:wave], todo[wave:]
        num_new = _run_round(engine, batch, params, counts)
        beat()
        unfinished = [pair for pair in batch if pair.finish_reason is None]
        todo = unfinished + later
        if num_new:
            wave, attempts = 2 * wave, 0
            continue
        # This round gave no token: fewer pairs leave each other more room.
        attempts = attempts + 1 if wave == 1 else 0
        if attempts == _LONE_ATTEMPTS:
            lengths = (len(unfinished[0].request.prompt), len(unfinished[0].request.teacher_prompt or ()))
            raise EngineError(
                f"a guided pair with prompts of {lengths[0]} and {lengths[1]} tokens got no token in {attempts} rounds "
                "in which it was sent alone: the engine's KV cache must hold both halves; raise rollout.kv_cache_gb or "
                "lower rollout.max_new_tokens"
            )
        wave = max(1, min(wave, len(batch)) // 2)
    if params.target.is_anchored:
        _read_by_student(engine, pairs)
    return [pair.response() for pair in pairs]


def why_not_in_pairs(target: Target) -> str | None:
    """Return a message where tokens of ``target`` need the logits of three contexts, None where two are enough."""
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
    longest = max(longest_prompt(request) for request in requests)
    if longest + params.max_new_tokens > max_model_len:
        raise ValueError(
            f"the longest prompt has {longest} tokens and max_new_tokens is {params.max_new_tokens}, together more "
            f"than the {max_model_len} that the engine may see; shorten the prompt or lower rollout.max_new_tokens"
        )


def _prime(engine: Engine, pairs: Sequence[_Pair], limits: Mapping[str, int]) -> int:
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
        _generate(engine, ahead)
    return sum(len(request.token_ids) for request in ahead)


# Neither temperature nor seed matter: the processor leaves one token to choose.
_PLAIN = {"temperature": 0.0, "ignore_eos": True, "logprobs": 0, "detokenize": False}


def _run_round(engine: Engine, batch: Sequence[_Pair], params: SamplingParams, counts: PairCounts) -> int:
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
        outputs = _generate(engine, halves)
    except Exception:
        with contextlib.suppress(EngineError):
            engine.call("pop_pair_logs", names)
        raise
    logs = engine.call("pop_pair_logs", names)
    counts.rounds += 1
    num_new = 0
    for index, (pair, stop) in enumerate(zip(batch, stops, strict=True)):
        if logs[index] is None:
            raise EngineError("the engine has no log of a guided pair: it was sent more pairs than it can log")
        log = PairLog.from_json(logs[index])
        num_new += _take(pair, outputs[2 * index], outputs[2 * index + 1], log, stop, params)
        counts.repairs += max(log.forced) >= 0
    return num_new


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


def _read_by_student(engine: Engine, pairs: Sequence[_Pair]) -> None:
    """Set the student's log-probs of the response of each pair.

    The engine gets the response as a prompt, without its last token, which is the only token that it may sample.
    """
    read = _generate(engine, [_student_request(pair) for pair in pairs])
    for pair, output in zip(pairs, read, strict=True):
        count = len(pair.token_ids)
        log_probs = [*output.prompt_log_probs, *output.log_probs][-count:]
        if output.token_ids != pair.token_ids[-1:] or len(log_probs) != count:
            raise EngineError(
                f"the engine was to read a response of {count} tokens for the student, and gave {len(log_probs)} "
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


def _generate(engine: Engine, requests: Sequence[EngineRequest]) -> list[EngineOutput]:
    outputs = engine.generate(requests)
    if len(outputs) != len(requests):
        raise EngineError(f"the engine returned {len(outputs)} outputs for {len(requests)} requests")
    return outputs


def _take(
    pair: _Pair, anchor: EngineOutput, teacher: EngineOutput, log: PairLog, stop: int, params: SamplingParams
) -> int:
    """Append to ``pair`` the tokens that both halves took from one sample; return their number."""
    lengths = [
        _num_own_tokens(role, half, forced)
        for role, half, forced in zip(ROLES, (anchor, teacher), log.forced, strict=True)
    ]
    common = min(lengths)
    tokens = list(anchor.token_ids[:common])
    if tokens != list(teacher.token_ids[:common]) or len(log.log_probs) < common:
        raise EngineError(
            f"the halves of a guided pair must share {common} tokens and log each; the engine returned different "
            f"tokens or {len(log.log_probs)} entries: is its processor the one of this version?"
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
            f"an engine ended both halves of a guided pair ({anchor.finish_reason}, {teacher.finish_reason}) after "
            f"{len(pair.token_ids)} of {params.max_new_tokens} tokens without a stop token"
        )
    return common


def _num_own_tokens(role: str, half: EngineOutput, forced: int) -> int:
    if forced >= 0 and len(half.token_ids) != forced + 1:
        raise EngineError(
            f"the {role}'s half of a guided pair was stopped after {forced} tokens but has {len(half.token_ids)}: "
            "the engine changed its output"
        )
    return len(half.token_ids) if forced < 0 else forced
