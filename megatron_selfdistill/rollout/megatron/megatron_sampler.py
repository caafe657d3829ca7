# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Sampling in process with the training weights and Megatron's KV cache, in every layout that trains.

A `GeneratedBatch` is the responses while they are generated: their tokens, uniforms, log-probs, and where each ends.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)

from megatron_selfdistill.distributed.collectives import gather_objects
from megatron_selfdistill.distributed.integers import max_over_ranks
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.rollout.base import Progress, Request, Response, SamplingParams, ignore_progress
from megatron_selfdistill.rollout.megatron.decoding import DecodingModel, ForwardPasses, free_bytes, rows_of_prefill
from megatron_selfdistill.rollout.megatron.kept_rows import KeptRow, KeptRows
from megatron_selfdistill.rollout.megatron.ragged_cache import RaggedCache
from megatron_selfdistill.rollout.sampling import require_room, sample_uniforms, select_tokens


@dataclass
class GeneratedBatch:
    """Responses that are generated together; column i holds token i of each response."""

    tokens: Tensor
    """Token ids ``[b, length]`` int64."""
    ends: Tensor
    """Column behind the last token of each response, as far as it is known, ``[b]`` int64."""
    uniforms: Tensor
    """Uniform from which each token is sampled, ``[b, length]`` float64."""
    log_probs: Tensor
    """Log-probabilities ``[2, b, length]`` float64: under the model, and under the distribution sampled from.

    A third row, where there is one, has those under the teacher.
    """
    stop_token_ids: Tensor
    """Ids of the tokens that end a response, ``[n]`` int64."""

    @classmethod
    def start(
        cls, requests: Sequence[Request], params: SamplingParams, device: torch.device, num_log_probs: int = 2
    ) -> GeneratedBatch:
        """Return an empty batch, whose prompts caches alone have."""
        shape = len(requests), params.max_new_tokens
        uniforms = torch.zeros(shape, dtype=torch.float64)
        if params.temperature > 0:
            uniforms = torch.stack([torch.from_numpy(sample_uniforms(r.seed, shape[1])) for r in requests])
        return cls(
            tokens=torch.zeros(shape, dtype=torch.int64, device=device),
            ends=torch.full(shape[:1], shape[1], device=device),
            uniforms=uniforms.to(device),
            log_probs=torch.zeros(num_log_probs, *shape, dtype=torch.float64, device=device),
            stop_token_ids=torch.tensor(params.stop_token_ids, dtype=torch.int64, device=device),
        )

    def append(self, live: Tensor, step: int, tokens: Tensor) -> None:
        """Put ``tokens [n]`` into column ``step`` of the rows ``live [n]``."""
        self.tokens[live, step] = tokens
        if self.stop_token_ids.numel():
            ends = self.ends[live]
            self.ends[live] = torch.where((step < ends) & torch.isin(tokens, self.stop_token_ids), step + 1, ends)

    def responses(self) -> list[Response]:
        """Return the finished responses, in the order of the rows."""
        stops = set(self.stop_token_ids.tolist())
        return [
            Response(
                token_ids=tokens[:end],
                log_probs=log_probs[:end],
                sampled_log_probs=sampled[:end],
                finish_reason="stop" if tokens[end - 1] in stops else "length",
                teacher_log_probs=teacher[0][:end] if teacher else None,
            )
            for end, tokens, log_probs, sampled, *teacher in zip(
                self.ends.tolist(), self.tokens.tolist(), *self.log_probs.tolist(), strict=True
            )
        ]


class ContextRows:
    """The contexts of n requests in the roles that one model has: for each role n rows of one ``cache``."""

    def __init__(
        self,
        model: DecodingModel,
        by_role: Mapping[str, Sequence[list[int]]],
        max_new_tokens: int,
        passes: ForwardPasses,
        device: torch.device,
        kept: Sequence[KeptRow] = (),
    ) -> None:
        """Read the prompts of the n requests in each role of ``by_role``, each role with forward passes of its own.

        ``kept``: for each request a row with the first tokens of its prompt, after which the reading begins; then there
        is one role.  Empty reads whole prompts.
        """
        self._model, self._roles, self._passes = model, tuple(by_role), passes
        prompts = [prompt for of_role in by_role.values() for prompt in of_role]
        tokens = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(device)
        lengths, longest = torch.tensor([len(prompt) for prompt in prompts], device=device), tokens.size(1)
        self.cache = RaggedCache(len(prompts), longest + max_new_tokens - 1, lengths)  # not the last token
        if kept:
            self.cache.restore([row.memory for row in kept])
            after = self._read_later_parts(tokens, lengths.tolist(), [len(row.tokens) for row in kept])
        else:
            after = self._read_prompts(tokens, [list(map(len, of_role)) for of_role in by_role.values()])
        self.cache.start_decoding(longest)
        self._pass = passes.that_decode(model, self.cache)
        self._after_prompts = None if after[0] is None else torch.cat(after)  # type: ignore[arg-type]

    def _read_prompts(self, tokens: Tensor, lengths_by_role: Sequence[list[int]]) -> list[Tensor | None]:
        """Return the logits behind the prompts ``tokens [rows, longest]``, some rows at a time."""
        after: list[Tensor | None] = []
        first, most = 0, _MOST_PADDING[tokens.device.type]
        for count, length in (group for lengths in lengths_by_role for group in like_lengths(lengths, most)):
            after.append(self._passes.prefill(self._model, self.cache, tokens[first : first + count, :length]))
            first += count
        self.cache.batch_size_offset = 0
        return after

    def _read_later_parts(self, tokens: Tensor, lengths: list[int], known: list[int]) -> list[Tensor | None]:
        """Return the logits behind prompts whose first ``known`` tokens are in the cache, some rows at a time.

        The rows of a pass read as many tokens each, up to the ends of their prompts: a row with fewer new tokens reads
        some of its known ones again.
        """
        after: list[Tensor | None] = []
        unread, first = [length - n for length, n in zip(lengths, known, strict=True)], 0
        for count, num_tokens in like_lengths(unread, _MOST_PADDING[tokens.device.type]):
            for indices in torch.arange(first, first + count).split(rows_of_prefill(num_tokens)):
                rows = slice(int(indices[0]), int(indices[-1]) + 1)
                starts = [max(length - num_tokens, 0) for length in lengths[rows]]
                read = [row[start : start + num_tokens] for row, start in zip(tokens[rows], starts, strict=True)]
                begins = torch.tensor(starts, device=tokens.device)
                part = self.cache.later_part(rows, begins, max(starts) + num_tokens)
                after.append(self._passes.run(self._model, part, torch.stack(read)))
            first += count
        return after

    def next_logits(self, tokens: Tensor | None) -> dict[str, Tensor]:
        """Return the logits ``[n, V]`` of the next token by role; empty on stages before the last.

        ``tokens [n]``: the token that all contexts of a request read; None for the first logits, behind the prompts.
        """
        if tokens is None:
            logits, self._after_prompts = self._after_prompts, None
        else:
            logits = self._pass(tokens.repeat(len(self._roles))[:, None])
            self.cache.advance()
        return {} if logits is None else dict(zip(self._roles, logits.chunk(len(self._roles)), strict=True))

    def keep(self, kept: Tensor, num_requests: int) -> None:
        """Drop all requests but ``kept`` of the ``num_requests`` that the cache holds."""
        self.cache.keep(torch.cat([kept + role * num_requests for role in range(len(self._roles))]))
        self._pass = self._passes.that_decode(self._model, self.cache)


_MOST_PADDING = {"cpu": 1 / 10, "cuda": 1 / 5}
"""The padding of a group of prompts: on a CPU, a token costs more than its share of another pass."""


def like_lengths(lengths: Sequence[int], most_padding: float = _MOST_PADDING["cuda"]) -> list[tuple[int, int]]:
    """Return groups of successive prompts that one pass reads: the number of prompts and the longest of each group.

    Padding is at most ``most_padding`` of the tokens of a group, if each prompt has the length of the longest.
    """
    groups: list[tuple[int, int]] = []
    total = 0
    for length in lengths:
        count, longest = groups[-1] if groups else (0, 0)
        widest = max(longest, length)
        if count and (total + length) >= (1 - most_padding) * widest * (count + 1):
            groups[-1] = count + 1, widest
            total += length
        else:
            groups.append((1, length))
            total = length
    return groups


def lag_of(device: torch.device) -> int:
    """Return the number of passes by which the host's count of unfinished sequences is late."""
    return 1 if device.type == "cuda" else 0


class Survivors:
    """The number of unfinished sequences of a batch that is decoded token by token.

    On a GPU the number comes one pass late: the host queues a pass while the device computes the pass before, at the
    price of one additional pass at the end of a batch.  All ranks that decode the same batch get the same numbers.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self._num_rows = num_rows
        self._lag = lag_of(device)
        self._pending: deque[tuple[Tensor, Tensor, torch.cuda.Event | None]] = deque()

    def after_pass(self, unfinished: Tensor) -> tuple[int, Tensor | None]:
        """Return the number of sequences that are known to go on, and the rows ``[n]`` that the caller should keep.

        ``unfinished [rows]`` bool: the sequences that go on after this pass.  The rows are None while more than half of
        the sequences go on: the survivors of a long tail should not pay for the rest.  The next call has the kept rows
        only.
        """
        count, event = unfinished.sum(), None
        if unfinished.device.type == "cuda":
            count = torch.empty(count.shape, dtype=count.dtype, pin_memory=True).copy_(count, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((unfinished, count, event))
        if len(self._pending) <= self._lag:
            return self._num_rows, None
        known, number, passed = self._pending.popleft()
        if passed is not None:
            passed.synchronize()
        num_known = int(number)
        if 2 * num_known > self._num_rows or not num_known:
            return num_known, None
        rows = torch.argsort((~known).to(torch.uint8), stable=True)[:num_known]  # nonzero would wait for the device
        self._num_rows = num_known
        self._pending = deque((mask[rows], later, event) for mask, later, event in self._pending)
        return num_known, rows


_GIB = 2**30
Share = tuple[Sequence[int], Callable[[Sequence[Request], SamplingParams, Callable[[int], None]], list[Response]], int]
"""The indices of some requests, the function that samples them, and the most tokens of a batch in the KV cache."""


class MegatronSampler:
    """A sampler that decodes with the ``GPTModel`` chunks of this rank; there is no copy of the weights.

    Each data-parallel replica samples its own requests.  Tensor-parallel ranks share every forward pass, pipeline
    stages pass hidden states to the next stage, sequence parallelism is off, and each context-parallel rank decodes
    full sequences for its share of the requests.  Where expert all-to-alls join ranks that hold different requests, all
    ranks run the same number of forward passes (`ForwardPasses`).

    Prompts may have different lengths.  A batch reads them with padding behind each prompt, and then every row decodes
    at a column of its own (`RaggedCache`), so that positions are exact.

    Up to half of the KV cache keeps the rows of responses that later requests continue (`KeptRows`).
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        grid: RankGrid,
        vocab_size: int,
        max_length: int,
        kv_cache_gb: float | None = None,
        progress: Progress = ignore_progress,
        *,
        continues: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        """Prepare the ``chunks`` for decoding, as built or as wrapped for training.

        ``vocab_size``: number of valid columns; the padded columns behind them are cut off before the logits are used.
        ``max_length``: longest prompt plus response, in tokens.  ``kv_cache_gb``: GiB of KV cache on this rank.  None
        is a third of the memory that is free at each `generate`; a number makes the splits, and so the last bits of the
        log-probs, repeatable.  ``progress``: called with the responses that this rank decodes, at every pass, on every
        rank.  ``continues``: whether requests may continue earlier ones, which `metrics` counts.  ``cuda_graphs``:
        whether a GPU repeats its passes from recordings; a line on the console says where the model has none.

        Raises `ConfigError` for a model that cannot be decoded.
        """
        self._grid = grid
        self._max_length = max_length
        self._kv_cache_gb = kv_cache_gb
        self._version = 0
        self._progress = progress
        self._student = DecodingModel(chunks, grid, vocab_size)
        self._passes = ForwardPasses([self._student], cuda_graphs)
        if cuda_graphs and not self._passes.records and grid.is_reporter:
            print(
                "rollout.cuda_graphs: this model decodes without graphs, because its experts, pipeline stages or gated "
                "delta nets need the host in every pass",
                flush=True,
            )
        self._bytes_per_token = self._student.bytes_per_token
        self._kept = KeptRows()
        self._continues = continues
        self._num_read, self._num_kept = 0, 0  # tokens of the prompts of episodes since the last `metrics`

    def update_weights(self, version: int) -> None:
        """Note the version; the sampler uses the trainer's own weights, so nothing has to be sent."""
        self._version = version
        self.sleep()

    def sleep(self) -> None:
        """Free the caches of responses that requests may continue; all others live for one `generate`."""
        if self._continues:
            self._kept.clear()

    def metrics(self) -> dict[str, float]:
        """Return numbers about the prompts of episodes that are one sequence; nothing where there were none.

        rollout/prefilled_tokens: their tokens that were read.  rollout/kept_tokens: those that the KV cache still had.
        Collectives: where requests may continue earlier ones, one sum over the data- and context-parallel ranks.
        """
        if not self._continues:
            return {}
        counts = torch.tensor([self._num_read, self._num_kept], dtype=torch.float64, device=self._grid.device)
        self._num_read, self._num_kept = 0, 0
        dist.all_reduce(counts, group=self._grid.dp_cp_group)
        read, kept = counts.tolist()
        return {"rollout/prefilled_tokens": read, "rollout/kept_tokens": kept} if read else {}

    def close(self) -> None:
        """Do nothing: this sampler starts no process."""

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Response]:
        """Return one response per request, in order, on every rank of the replica.

        ``requests`` are the requests of this data-parallel replica, the same list on each of its TP x CP x PP ranks;
        the list may be empty.  The call is a collective over the world: every rank makes it the same number of times.

        Raises, on all ranks alike: ValueError for an empty prompt, for a prompt that leaves no room for
        ``max_new_tokens`` within ``max_length``, and for a request that does not fit into the KV cache alone.
        """
        owners = [i % self._grid.cp_size for i in range(len(requests))]
        if self._continues:
            self._kept.begin(requests)
            owners = [self._kept.owner(request, i, self._grid.cp_size) for i, request in enumerate(requests)]
        own = [i for i, owner in enumerate(owners) if owner == self._grid.cp_rank]
        responses: dict[int, Response] = {}
        self._report(0, len(own))
        with ExitStack() as stack:
            # torch compiles a function at most 8 times, and then no longer for the shapes of training, either.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            models = self._models_on_device(requests, params, stack)
            capacity = self._agree_on_capacity(requests, params)
            if any(requests[i].episode for i in own):  # a half is for rows that are kept
                whole, longest = capacity, max(requests[i].longest_prompt for i in own) + params.max_new_tokens
                capacity = max(whole // 2, longest)
                self._kept.room = whole - capacity
            for model in models:
                stack.enter_context(model.decoding())
            for share, sample, room in self._shares(own, requests, params, capacity):
                for batch in split_batches([requests[i].longest_prompt for i in share], params.max_new_tokens, room):
                    indices = [share[i] for i in batch]
                    report = partial(self._report, total=len(own), before=len(responses))
                    generated = sample([requests[i] for i in indices], params, report)
                    responses.update(zip(indices, generated, strict=True))
                    report(len(indices))
            self._passes.finish()
        if self._grid.cp_size > 1:
            shares = gather_objects(responses, self._grid.cp_group)
            responses = {index: response for share in shares for index, response in share.items()}
        return [replace(responses[i], weight_version=self._version) for i in range(len(requests))]

    def _report(self, finished: int, total: int, before: int = 0) -> None:
        whose = "of this rank" if self._grid.cp_size > 1 else "of this replica" if self._grid.dp_size > 1 else ""
        self._progress(before + finished, total, whose)

    def _models_on_device(
        self, requests: Sequence[Request], params: SamplingParams, stack: ExitStack
    ) -> Sequence[DecodingModel]:
        """Return the models that read ``requests``, whose weights are on the device as long as ``stack`` is open."""
        return [self._student]

    def _shares(
        self, own: Sequence[int], requests: Sequence[Request], params: SamplingParams, capacity: int
    ) -> list[Share]:
        """Return the shares of the requests ``own`` of this rank, given by their indices, that decode in one way."""
        assert not any(requests[i].teacher_prompt for i in own), "a teacher's prompt needs a sampler that mixes"
        later = {i for i in own if self._continues and self._kept.has(requests[i])}
        plain = [i for i in own if i not in later]
        return [(plain, self._sample_plain, capacity), (sorted(later), self._sample_later, capacity)]

    def _lengths(self, requests: Sequence[Request], params: SamplingParams) -> tuple[list[int], list[int]]:
        """Return the length of each prompt, and the number of tokens of each request with its response."""
        lengths = [len(request.prompt) for request in requests]
        return lengths, [length + params.max_new_tokens for length in lengths]

    def _agree_on_capacity(self, requests: Sequence[Request], params: SamplingParams) -> int:
        """Return the number of tokens that the KV cache may hold: the least over all ranks, which must split alike."""
        gib = self._kv_cache_gb
        allowed = free_bytes() // 3 if gib is None else int(gib * _GIB)
        lengths, taken = self._lengths(requests, params)
        per_token = self._bytes_per_column(params.max_new_tokens)
        mine = [-(allowed // per_token), max(lengths, default=0), -min(lengths, default=1), max(taken, default=0)]
        room, longest, shortest, needed = max_over_ranks(mine)
        capacity = -room
        require_room(-shortest, longest, params.max_new_tokens, self._max_length)
        if needed > capacity:
            raise ValueError(
                f"one request holds {needed} tokens in all its sequences, so it needs "
                f"{needed * per_token / _GIB:.3g} GiB of KV cache, but there is room for "
                f"{capacity} tokens; raise rollout.kv_cache_gb or lower rollout.max_new_tokens"
            )
        return capacity

    def _bytes_per_column(self, max_new_tokens: int) -> int:
        """Return the bytes of a sequence per token on this rank; its states are spread over the fewest tokens."""
        return self._bytes_per_token + math.ceil(self._student.state_bytes / max_new_tokens)

    def _sample_later(
        self, requests: Sequence[Request], params: SamplingParams, report: Callable[[int], None]
    ) -> list[Response]:
        """Return what `_sample_plain` returns, for requests whose prompts begin with kept rows."""
        return self._sample_plain(requests, params, report, [self._kept.taken(request) for request in requests])

    def _sample_plain(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        report: Callable[[int], None],
        kept: Sequence[KeptRow] = (),
    ) -> list[Response]:
        """Return the responses to plain requests that decode together; each pass gives one token of every row.

        ``report`` gets the number of these responses that are known to be finished, after each pass.
        ``kept``: for each request the row with the first tokens of its prompt; empty reads whole prompts.
        """
        num_kept = sum(len(row.tokens) for row in kept)
        self._num_kept += num_kept
        self._num_read += sum(len(request.prompt) for request in requests if request.episode) - num_kept
        device = self._grid.device
        batch = GeneratedBatch.start(requests, params, device)
        prompts = {"student": [request.prompt for request in requests]}
        rows = ContextRows(self._student, prompts, params.max_new_tokens, self._passes, device, kept)

        def sample(live: Tensor, step: int, logits: Mapping[str, Tensor]) -> Tensor:
            return self._sample(batch, live, step, logits.get("student"), params)

        def keep(live: Tensor, dropped: Tensor) -> None:
            for place, index in zip(live[dropped].tolist(), dropped.nonzero().flatten().tolist(), strict=True):
                request, tokens = requests[place], batch.tokens[place, : batch.ends[place]].tolist()
                if self._student.keeps_rows and request.episode and tokens[-1] in params.stop_token_ids:
                    read = [*request.prompt, *tokens[:-1]]
                    self._kept.add(request, KeptRow(read, rows.cache.row(index, len(read))))

        return self._sample_in_rows(batch, [rows], sample, report, keep)

    def _sample_in_rows(
        self,
        batch: GeneratedBatch,
        groups: Sequence[ContextRows],
        sample: Callable[[Tensor, int, Mapping[str, Tensor]], Tensor],
        report: Callable[[int], None],
        drop: Callable[[Tensor, Tensor], None] = lambda live, dropped: None,
    ) -> list[Response]:
        """Return the responses of ``batch``, whose prompts all ``groups`` have read; each pass gives one token.

        ``sample``: returns the tokens ``[n]`` of the rows ``live [n]`` at a step, from the logits of each role.
        ``report``: as for `_sample_plain`.  ``drop``: gets the rows ``live [n]`` and which of them leave the cache,
        ``[n]`` bool, before they leave it; their responses are finished.
        """
        num_requests, longest = batch.tokens.shape
        live = torch.arange(num_requests, device=self._grid.device)
        survivors = Survivors(num_requests, self._grid.device)
        tokens: Tensor | None = None
        for step in range(longest):
            logits = {role: rows for group in groups for role, rows in group.next_logits(tokens).items()}
            batch.append(live, step, sample(live, step, logits))
            num_unfinished, kept = survivors.after_pass(batch.ends[live] > step + 1)
            report(num_requests - num_unfinished)
            if num_unfinished == 0:
                break
            if kept is not None:
                drop(live, torch.ones_like(live, dtype=torch.bool).index_fill(0, kept, False))
                for group in groups:
                    group.keep(kept, live.numel())
                live = live[kept]
            tokens = batch.tokens[live, step]
        drop(live, torch.ones_like(live, dtype=torch.bool))
        if self._grid.tp_size > 1 or self._grid.pp_size > 1:
            self._broadcast(batch.log_probs)
        return batch.responses()

    def _sample(
        self, batch: GeneratedBatch, live: Tensor, step: int, logits: Tensor | None, params: SamplingParams
    ) -> Tensor:
        """Return token ``step`` of each row, ``[n]``, from the logits of the model.

        One rank samples: the sums of two GPUs may differ in the last bit, and one other token changes all later ones.
        """
        tokens = torch.empty_like(live)
        if logits is not None and self._grid.tp_rank == 0:
            tokens, *log_probs = select_tokens(logits, batch.uniforms[live, step], params)
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


def split_batches(lengths: Sequence[int], max_new_tokens: int, capacity: int) -> list[list[int]]:
    """Return the indices of ``lengths``, shortest first, in batches whose KV cache holds at most ``capacity`` tokens.

    Within a batch prompts differ by at most ``max_new_tokens``: beyond that, the passes of short sequences would read
    too many columns of long ones.  A sequence that exceeds ``capacity`` alone gets its own batch.
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
