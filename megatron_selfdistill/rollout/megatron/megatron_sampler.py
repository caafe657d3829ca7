# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Sampling in process with the training weights and Megatron's KV cache, in every layout that trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.inference.contexts import StaticInferenceContext

from megatron_selfdistill.distributed.collectives import gather_objects, max_over_ranks
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.distributed.watchdog import beat
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.build import unwrapped
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams, require_room, select_tokens
from megatron_selfdistill.rollout.guided import longest_prompt, refuse_unguidable, select_mixed_tokens
from megatron_selfdistill.rollout.megatron.decoding import decoding, decoding_overrides, refuse_undecodable, takes_masks
from megatron_selfdistill.rollout.megatron.generated import GeneratedBatch, PromptPairs
from megatron_selfdistill.rollout.megatron.kv_cache import (
    RaggedCache,
    cache_bytes_per_token,
    free_bytes,
    keep_rows,
    ragged_decoding,
)
from megatron_selfdistill.rollout.megatron.survivors import Survivors

_GIB = 2**30
# Prompt tokens of one forward pass: activations of a long prefill would outgrow the cache itself.
_PREFILL_TOKENS = 2**15


class MegatronSampler:
    """A sampler that decodes with the ``GPTModel`` chunks of this rank; there is no copy of the weights.

    Each data-parallel replica samples its own requests.  Tensor-parallel ranks share every forward pass, pipeline
    stages pass hidden states to the next stage (under VPP several times around), sequence parallelism is off, and each
    context-parallel rank decodes full sequences for its share of the requests.  Where expert all-to-alls join ranks
    that hold different requests, all ranks run the same number of forward passes: a rank that has finished feeds one
    token whose output is unused.

    Prompts may have different lengths: a batch reads the length of its shortest prompt in one pass, then one token per
    pass, where the tokens of a longer prompt take the place of sampled tokens.  So positions are exact and there is no
    padding.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        grid: RankGrid,
        vocab_size: int,
        max_length: int,
        kv_cache_gb: float | None = None,
    ) -> None:
        """Prepare the ``chunks`` for decoding, as built or as wrapped for training.

        ``vocab_size``: number of valid columns; the padded columns behind them are cut off before the logits are used.
        ``max_length``: longest prompt plus response, in tokens.  ``kv_cache_gb``: GiB of KV cache on this rank.  None
        is a third of the memory that is free at each `generate`; a number makes the splits, and so the last bits of the
        log-probs, repeatable.

        Raises `ConfigError` for a model that cannot be decoded.
        """
        self._chunks = list(chunks)
        self._models = [unwrapped(chunk) for chunk in chunks]
        refuse_undecodable(self._models, grid)
        self._grid = grid
        self._vocab_size = vocab_size
        self._max_length = max_length
        self._kv_cache_gb = kv_cache_gb
        self._version = 0
        self._overrides = decoding_overrides(self._models, grid)
        config = self._models[0].config
        self._hidden_size = config.hidden_size
        self._hidden_dtype = config.pipeline_dtype or config.params_dtype
        self._bytes_per_token = cache_bytes_per_token(self._models, config.params_dtype)
        # Expert groups reach beyond the ranks that share this rank's requests, along DP, CP or both.  An expert group
        # need not cover a replica, yet the replica's pipeline ties its groups together; the world covers every case.
        self._lock_step = config.num_moe_experts is not None and (
            config.expert_model_parallel_size > 1
            or config.expert_tensor_parallel_size not in (None, config.tensor_model_parallel_size)
        )

    def update_weights(self, version: int) -> None:
        """Note the version; the sampler uses the trainer's own weights, so nothing has to be sent."""
        self._version = version

    def sleep(self) -> None:
        """Do nothing: the KV cache lives for one `generate`."""

    def metrics(self) -> dict[str, float]:
        """Return an empty dictionary: this sampler has no metrics."""
        return {}

    def close(self) -> None:
        """Do nothing: this sampler starts no process."""

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Response]:
        """Return one response per request, in order, on every rank of the replica.

        ``requests`` are the requests of this data-parallel replica, the same list on each of its TP x CP x PP ranks;
        the list may be empty.  The call is a collective over the world: every rank makes it the same number of times.

        Raises, on all ranks alike: ValueError for an empty prompt, for a prompt that leaves no room for
        ``max_new_tokens`` within ``max_length``, for a request that does not fit into the KV cache alone, and for
        guided requests with a temperature, top_k or top_p of their own; ConfigError for guided requests where the
        model's attention takes no mask.
        """
        capacity = self._agree_on_capacity(requests, params)
        own = list(range(self._grid.cp_rank, len(requests), self._grid.cp_size))
        plain = [i for i in own if requests[i].teacher_prompt is None]
        pairs = [i for i in own if requests[i].teacher_prompt is not None]
        responses: dict[int, Response] = {}
        with decoding(self._chunks, self._models, self._overrides):
            for share, sample, room in (
                (plain, self._sample_batch, capacity),
                (pairs, self._sample_pairs, capacity // 2),
            ):
                lengths = [longest_prompt(requests[i]) for i in share]
                for batch in split_batches(lengths, params.max_new_tokens, room):
                    indices = [share[i] for i in batch]
                    generated = sample([requests[i] for i in indices], params)
                    responses.update(zip(indices, generated, strict=True))
            while self._lock_step and self._anyone_is_busy():
                self._run_model(StaticInferenceContext(1, 1), self._new_tensor([[0]]))
        if self._grid.cp_size > 1:
            shares = gather_objects(responses, self._grid.cp_group)
            responses = {index: response for share in shares for index, response in share.items()}
        return [replace(responses[i], weight_version=self._version) for i in range(len(requests))]

    def _agree_on_capacity(self, requests: Sequence[Request], params: SamplingParams) -> int:
        """Return the number of tokens that the KV cache may hold: the least over all ranks, which must split alike."""
        gib = self._kv_cache_gb
        allowed = free_bytes() // 3 if gib is None else int(gib * _GIB)
        prompts = [p for r in requests for p in (r.prompt, r.teacher_prompt) if p is not None]
        lengths = [len(prompt) for prompt in prompts]
        taken = [(longest_prompt(r) + params.max_new_tokens) * (1 if r.teacher_prompt is None else 2) for r in requests]
        room, num_guided = allowed // self._bytes_per_token, len(prompts) - len(requests)
        maskless = not takes_masks(self._models)
        mine = [-room, max(lengths, default=0), -min(lengths, default=1), max(taken, default=0), num_guided, maskless]
        room, longest, shortest, needed, num_guided, num_maskless = max_over_ranks(mine)
        capacity, shortest = -room, -shortest
        if num_guided:
            refuse_unguidable(params)
        if num_guided and num_maskless:
            raise ConfigError(
                "guided responses cannot be sampled in process with Transformer Engine's flash or fused attention, "
                "which take no arbitrary mask; set model.transformer.attention_backend=auto"
            )
        require_room(shortest, longest, params.max_new_tokens, self._max_length)
        if needed > capacity:
            raise ValueError(
                f"one request holds {needed} tokens (a guided request in two sequences), so it needs "
                f"{needed * self._bytes_per_token / _GIB:.3g} GiB of KV cache, but there is room for "
                f"{capacity} tokens; raise rollout.kv_cache_gb or lower rollout.max_new_tokens"
            )
        return capacity

    def _sample_batch(self, requests: Sequence[Request], params: SamplingParams) -> list[Response]:
        """Return the responses to plain requests that decode together; each pass gives one token of every row."""
        batch = GeneratedBatch.after_prompts(requests, params, self._grid.device)
        length, position = batch.tokens.size(1), min(len(request.prompt) for request in requests)
        live = torch.arange(len(requests), device=self._grid.device)  # rows of the batch that are in the cache
        survivors = Survivors(len(requests), self._grid.device)
        context = StaticInferenceContext(len(requests), length - 1)  # the last token is not fed to the model
        logits = self._prefill(context, batch.tokens[:, :position])
        while True:
            batch.append(live, position, self._sample(batch, live, position, logits, params))
            position += 1
            num_unfinished, kept = survivors.after_pass(batch.ends[live] > position)
            if num_unfinished == 0 or position == length:
                break
            if kept is not None:
                keep_rows(context, kept)
                live = live[kept]
            logits = self._next_logits(context, batch.tokens[live, position - 1 : position])
            context.sequence_len_offset += 1
        if self._grid.tp_size > 1 or self._grid.pp_size > 1:
            self._broadcast(batch.log_probs)
        return batch.responses()

    def _sample_pairs(self, requests: Sequence[Request], params: SamplingParams) -> list[Response]:
        """Return the responses to guided requests that decode together; pass i gives token i of every pair."""
        batch = GeneratedBatch.guided(requests, params, self._grid.device)
        prompts = PromptPairs.of(requests, self._grid.device)
        live, longest = torch.arange(len(requests), device=self._grid.device), prompts.tokens.size(1)
        cache = RaggedCache(2 * len(requests), longest + params.max_new_tokens - 1)  # not the last token
        self._prefill_pairs(cache, prompts)
        cache.start_decoding(prompts.lengths, longest)
        survivors = Survivors(len(requests), self._grid.device)
        tokens = prompts.last_tokens
        with ragged_decoding(self._models, cache):
            for step in range(params.max_new_tokens):
                logits = self._next_logits(cache, tokens[:, None], cache.columns[:, None], cache.hidden)
                batch.append(live, step, self._sample_mixed(batch, live, step, logits, params))
                cache.advance()
                num_unfinished, kept = survivors.after_pass(batch.ends[live] > step + 1)
                if num_unfinished == 0:
                    break
                if kept is not None:
                    cache.keep(torch.cat([kept, kept + live.numel()]))
                    live = live[kept]
                tokens = batch.tokens[live, step].repeat(2)
        if self._grid.tp_size > 1 or self._grid.pp_size > 1:
            self._broadcast(batch.log_probs)
        return batch.responses()

    def _prefill_pairs(self, cache: RaggedCache, prompts: PromptPairs) -> None:
        """Fill the cache with every prompt, some rows at a time; the students' prompts come first."""
        num_pairs = prompts.lengths.numel() // 2
        for role, longest in enumerate(prompts.longest_by_role):
            tokens = prompts.tokens[role * num_pairs : (role + 1) * num_pairs, :longest]
            cache.batch_size_offset = role * num_pairs
            for rows in tokens.split(max(1, _PREFILL_TOKENS // longest)):
                self._next_logits(cache, rows)
                cache.batch_size_offset += len(rows)
        cache.batch_size_offset = 0

    def _prefill(self, context: StaticInferenceContext, tokens: Tensor) -> Tensor | None:
        """Fill the cache with ``tokens [b, s]``, some rows at a time; return the logits ``[b, V]``."""
        num_rows = max(1, _PREFILL_TOKENS // tokens.size(1))
        parts = []
        for rows in tokens.split(num_rows):
            parts.append(self._next_logits(context, rows))
            context.batch_size_offset += len(rows)
        context.batch_size_offset = 0
        context.sequence_len_offset = tokens.size(1)
        context.enable_decode_mode()
        return None if parts[0] is None else torch.cat(parts)  # type: ignore[arg-type]

    def _next_logits(
        self,
        context: StaticInferenceContext,
        tokens: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | None:
        beat()
        if self._lock_step:
            max_over_ranks([1])  # matches `_anyone_is_busy` on the ranks that are done
        return self._run_model(context, tokens, position_ids, attention_mask)

    def _run_model(
        self,
        context: StaticInferenceContext,
        tokens: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | None:
        """Run a forward pass of ``tokens [b, s]`` after the cached tokens; return the last logits ``[b, V]``.

        Stages before the last return None.  ``position_ids [b, s]``: by default the columns of the cache.
        ``attention_mask``: True is hidden.
        """
        start = context.sequence_len_offset
        if position_ids is None:
            position_ids = torch.arange(start, start + tokens.size(1), device=tokens.device).expand_as(tokens)
        output: Tensor | None = None
        for model in self._models:
            if not model.pre_process:
                shape = (tokens.size(1), tokens.size(0), self._hidden_size)
                hidden_states = torch.empty(shape, dtype=self._hidden_dtype, device=tokens.device)
                dist.recv(hidden_states, src=self._stage_rank(-1), group=self._grid.pp_group)
                model.set_input_tensor(hidden_states)
            output = model(tokens, position_ids, attention_mask, inference_context=context, runtime_gather_output=True)
            if not model.post_process:
                output = output.to(self._hidden_dtype).contiguous()
                dist.send(output, dst=self._stage_rank(1), group=self._grid.pp_group)
                output = None
        return None if output is None else output[:, -1, : self._vocab_size]

    def _sample(
        self, batch: GeneratedBatch, live: Tensor, position: int, logits: Tensor | None, params: SamplingParams
    ) -> Tensor:
        """Return the tokens ``[b]`` that the model gives at ``position``.

        One rank samples the tokens: the sums of two GPUs may differ in the last bit, and one different token would make
        all later tokens differ.
        """
        tokens = torch.empty_like(live)
        if logits is not None and self._grid.tp_rank == 0:
            tokens, *log_probs = select_tokens(logits, batch.uniforms[live, position], params)
            batch.log_probs[:, live, position] = torch.stack(log_probs)
        self._broadcast(tokens)
        return tokens

    def _sample_mixed(
        self, batch: GeneratedBatch, live: Tensor, step: int, logits: Tensor | None, params: SamplingParams
    ) -> Tensor:
        """Return token ``step`` of each pair, sampled as `_sample` does from the logits under both of its prompts."""
        tokens = torch.empty_like(live)
        if logits is not None and self._grid.tp_rank == 0:
            student_logits, teacher_logits = logits.chunk(2)
            sampled = select_mixed_tokens(
                student_logits,
                teacher_logits,
                batch.uniforms[live, step],
                params.target,
                greedy=params.temperature == 0,
                backend=params.loss_backend,
            )
            tokens = sampled.token_ids
            log_probs = [sampled.student_log_probs, sampled.mixed_log_probs, sampled.teacher_log_probs]
            batch.log_probs[:, live, step] = torch.stack(log_probs)
        self._broadcast(tokens)
        return tokens

    def _broadcast(self, tensor: Tensor) -> None:
        """Send ``tensor`` from tensor-parallel rank 0 of the last stage to all ranks that share its requests."""
        grid = self._grid
        if grid.tp_size > 1 and grid.is_last_stage:
            dist.broadcast(tensor, src=dist.get_global_rank(grid.tp_group, 0), group=grid.tp_group)
        if grid.pp_size > 1:
            dist.broadcast(tensor, src=grid.last_stage_rank, group=grid.pp_group)

    def _anyone_is_busy(self) -> bool:
        return max_over_ranks([0]) == [1]

    def _stage_rank(self, step: int) -> int:
        """Return the global rank of the stage ``step`` stages ahead, in a ring: interleaved chunks go round."""
        return dist.get_global_rank(self._grid.pp_group, (self._grid.pp_rank + step) % self._grid.pp_size)

    def _new_tensor(self, values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._grid.device)


def split_batches(lengths: Sequence[int], max_new_tokens: int, capacity: int) -> list[list[int]]:
    """Return the indices of ``lengths``, shortest first, in batches whose KV cache holds at most ``capacity`` tokens.

    Within a batch prompts differ by at most ``max_new_tokens``: beyond that, two batches take fewer passes than one
    that steps through the difference token by token.  A sequence that exceeds ``capacity`` alone gets its own batch.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches:
            batch = batches[-1]
            fits = (len(batch) + 1) * (lengths[index] + max_new_tokens) <= capacity
            if fits and lengths[index] - lengths[batch[0]] <= max_new_tokens:
                batch.append(index)
                continue
        batches.append([index])
    return batches
