# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""One self-distillation step of a tiny model in any layout, and its gradients as full tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import models
import pytest
import torch
import torch.distributed as dist
from adapted import merge

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.tensor_parallel import ColumnParallelLinear

from megatron_selfdistill.adapters.low_rank_adapters import WithoutAdapters, add_adapters
from megatron_selfdistill.config import OptimizerConfig, OptimizerConstants, ParallelConfig, ScheduleConfig
from megatron_selfdistill.config.schema.adapter_config import AdapterConfig
from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.packed_batch import PackedBatch, PackingRules
from megatron_selfdistill.data.packing import pack, pad_to_count, required_seq_length
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard
from megatron_selfdistill.loss.target import Divergence, Target
from megatron_selfdistill.loss.token_weights import reach
from megatron_selfdistill.loss.weighting import Coefficients
from megatron_selfdistill.model import forward
from megatron_selfdistill.model.build import build_chunks, build_optimizer, wrap_for_training
from megatron_selfdistill.model.forward import Fusion, unwrapped
from megatron_selfdistill.model.local_attention import SegmentBatches, segments_by_length
from megatron_selfdistill.model.teacher_weights import Teacher
from megatron_selfdistill.pipeline import joined_batches, schedule, token_losses
from megatron_selfdistill.pipeline.batch import microbatch_multiple
from megatron_selfdistill.pipeline.joined_batches import joined_output
from megatron_selfdistill.pipeline.partial_batches import PartialBatch
from megatron_selfdistill.pipeline.schedule import Reference
from megatron_selfdistill.pipeline.score import Reading
from megatron_selfdistill.pipeline.token_losses import StepOutput, TokenCoefficients
from megatron_selfdistill.pipeline.token_measures import TokenMeasurement
from megatron_selfdistill.sources.step_terms import divided_by_sum

if TYPE_CHECKING:
    from ranks import RankPool

MAX_TOKENS = 56
GATED_DELTA_NET = "megatron_selfdistill.architectures.gated_delta_net"

ADAM = OptimizerConfig(
    **{"optimizer": "adam", "precision": "fp32", "lr": 1e-3, "clip_grad": 1.0, "use_distributed_optimizer": False},
    constants=OptimizerConstants(adam_eps=1e-4),  # so large that no rounding noise grows to a whole step
)
SGD = OptimizerConfig(optimizer="sgd", precision="fp32", lr=0.01, clip_grad=0.0, use_distributed_optimizer=False)


@dataclass(frozen=True)
class GivenCoefficients:
    """Token coefficients w and a min(p / mu, 2), [R_total], where a clip sets a to 0 at the ratios above 2."""

    w: torch.Tensor
    a: torch.Tensor
    log_mu: torch.Tensor

    @classmethod
    def of(cls, contexts: Iterable[ContextPair]) -> GivenCoefficients:
        """Return coefficients that depend on the problem and on the place in the response, and on no layout."""
        parts = []
        for context in contexts:
            generator = torch.Generator().manual_seed(zlib.crc32(context.problem_id.encode()))
            random = torch.rand(3, len(context.response), generator=generator, dtype=torch.float64)
            parts.append(torch.stack([2 * random[0], 4 * random[1] - 2, -3 - 3 * random[2]]))
            parts[-1][0, 1::4], parts[-1][1, 2::5] = 0.0, 0.0
        return cls(*torch.cat(parts, 1)) if parts else cls(*torch.zeros(3, 0, dtype=torch.float64))

    def __call__(self, student_log_prob: torch.Tensor, response_ids: torch.Tensor) -> Coefficients:
        """Return the coefficients of some of the tokens."""
        assert not student_log_prob.requires_grad
        ratio = (student_log_prob.double() - self.log_mu[response_ids]).exp()
        clipped = ratio > 2
        policy = torch.where(clipped, 0.0, self.a[response_ids] * ratio)
        return Coefficients(self.w[response_ids].to(student_log_prob), policy.to(student_log_prob), clipped)


@dataclass(frozen=True)
class Case:
    """A step to run; ``parallel``, ``pair_order`` and the cuts into microbatches must not change the gradient."""

    kind: str = "gqa"
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: SGD)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    model_changes: dict[str, Any] = field(default_factory=dict)
    divergence: str = "reverse_kl"
    target: Target = field(default_factory=lambda: Target(anchor="student"))
    pair_order: str = "teacher_first"
    paired: bool = False
    max_tokens: int = MAX_TOKENS
    seq_quantum: int | None = None
    extra_weightless: int = 1
    steps: int = 0
    teacher: str = "frozen"
    reference_copy: bool = False
    """Whether the reference has chunks of its own, rather than the teacher's."""
    reference_seed: int = 2
    """The seed of the weights of the reference's own chunks; the teacher's seed is 1, unless it is current."""
    soft_cap: float | None = None
    """The bound of the logits of all models, as c tanh(logits / c)."""
    fusion: Fusion | None = None
    two_terms: bool = False
    """Whether the tokens have the coefficients of `GivenCoefficients`."""
    reaches: bool = False
    """Whether the tokens have the weights of the `reach`, for which the schedule reads them before."""
    partial_batches: int = 1
    """Number of calls of the schedule, each with a part of the contexts, whose gradients add up to the step's."""
    replays_partial_batches: bool = False
    """Whether the microbatches of all partial batches run in one call."""
    mutation: str | None = None
    num_turns: int = 0
    """Number of turns of each episode whose turns are the contexts of the step; 0 takes the contexts of no episode."""
    joins_turns: bool = False
    """Whether the turns of an episode share a segment."""
    adapter: AdapterConfig | None = None
    """The adapters of the student, whose teacher and reference are the model without them."""
    merges_adapter: bool = False
    """Whether the factors are merged into the weights, which are trained in their place; the layout has one rank."""


@dataclass
class Outcome:
    loss: float
    """Mean divergence over the response tokens of the global batch, nats."""
    teacher_entropy: float
    """Mean entropy of the teacher, nats; NaN where the step does not measure the teacher."""
    grad_norm: float
    grads: dict[str, torch.Tensor]
    """The shards of this rank, none with the distributed optimizer; `join` makes full tensors of all ranks' shards."""
    params: dict[str, torch.Tensor]
    """The shards of the parameters after ``steps`` optimizer steps."""
    num_microbatches: int


def contexts() -> list[ContextPair]:
    """Return seven ragged contexts; the teacher's prompt is longer by a different amount in each."""
    rng = random.Random(7)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(models.VOCAB_SIZE) for _ in range(count)]

    pairs = []
    for index in range(7):
        prompt = tokens(rng.randrange(3, 12))
        pairs.append(
            ContextPair(f"p{index}", prompt, tokens(rng.randrange(2, 9)) + prompt, tokens(rng.randrange(1, 23)), False)
        )
    return pairs


def turns(num_turns: int, num_episodes: int = 3) -> list[ContextPair]:
    """Return the turns of ragged episodes, in which short replies follow the responses."""
    rng = random.Random(11)

    def tokens(most: int) -> list[int]:
        return [rng.randrange(models.VOCAB_SIZE) for _ in range(rng.randrange(1, most))]

    pairs = []
    for index in range(num_episodes):
        student, teacher = tokens(6), tokens(12)
        for _ in range(num_turns):
            response, reply = tokens(6), tokens(4)
            pairs.append(ContextPair(f"p{index}", student, teacher, response, False))
            student, teacher = [*student, *response, *reply], [*teacher, *response, *reply]
    return pairs


def contexts_of(case: Case) -> list[ContextPair]:
    """Return the `turns` of the case, or `contexts`, with the prompts of its controls."""
    pairs = turns(case.num_turns) if case.num_turns else contexts()
    rng, num_controls = random.Random(13), case.target.num_controls

    def controls(context: ContextPair) -> tuple[list[int], ...]:
        before = [[rng.randrange(models.VOCAB_SIZE) for _ in range(rng.randrange(2, 9))] for _ in range(num_controls)]
        return tuple(prefix + context.student_prompt for prefix in before)

    return [dataclasses.replace(context, control_prompts=controls(context)) for context in pairs]


def packed(case: Case, grid: RankGrid) -> PackedBatch:
    """Return this replica's share of the contexts, with as many microbatches as on other replicas and an empty one."""
    mine = contexts_of(case)[grid.dp_rank :: grid.dp_size]
    return packed_partial_batch(case, grid, mine, mine)


def contexts_of_partial_batches(case: Case, grid: RankGrid) -> list[list[ContextPair]]:
    mine = contexts_of(case)[grid.dp_rank :: grid.dp_size]
    return [mine[partial_batch :: case.partial_batches] for partial_batch in range(case.partial_batches)]


def packed_partial_batch(
    case: Case, grid: RankGrid, everything: list[ContextPair], mine: list[ContextPair]
) -> PackedBatch:
    """Return the contexts ``mine``, in microbatches of the length that ``everything`` needs."""
    rules = PackingRules(
        *(case.max_tokens, grid.cp_size, grid.tp_size, case.paired),
        **{"joins_turns": case.joins_turns, "num_controls": case.target.num_controls},
    )
    length = _max(required_seq_length(everything, rules, seq_quantum=case.seq_quantum), grid)
    batch = pack(mine, rules, seq_length=length)
    readings = 1 + case.target.num_controls
    more = (1, readings) if case.paired else (1, 1)
    counts = [
        _max(len(stream), grid) + case.extra_weightless * each
        for stream, each in zip((batch.student, batch.teacher), more, strict=True)
    ]
    roles = (2, 1) if case.target.has_reference else (1, 1)  # the reference reads the student's microbatches
    while sum(n * m for n, m in zip(counts, roles, strict=True)) % microbatch_multiple(grid):
        grown = (1, readings) if case.paired else (0, 1) if case.target.has_reference else (1, 0)
        counts = [n + m for n, m in zip(counts, grown, strict=True)]
    return dataclasses.replace(pad_to_count(batch, *counts), paired=case.pair_order == "alternating")


def run_partial_batches(case: Case, grid: RankGrid, call: Callable[..., StepOutput]) -> StepOutput:
    """Run the partial batches of a step by ``call``, or replay them in one call; return the results of the step."""
    partial_batches = contexts_of_partial_batches(case, grid)
    everything = [context for partial_batch in partial_batches for context in partial_batch]
    packs = [packed_partial_batch(case, grid, everything, partial_batch) for partial_batch in partial_batches]
    if case.replays_partial_batches:
        output = call(packs[0], partial_batches[0], partial_batch=PartialBatch(is_last=False), forward_only=True)
        first, whole = output.accumulated, one_batch(packs)
        num_tokens = call(whole, everything, forward_only=True).num_response_tokens
        nothing_yet = dataclasses.replace(first, num_response_tokens=0, divisor=num_tokens)
        return call(whole, everything, partial_batch=PartialBatch(nothing_yet))
    outputs: list[StepOutput] = []
    for i, (batch, own) in enumerate(zip(packs, partial_batches, strict=True)):
        earlier = outputs[-1].accumulated if outputs else None
        outputs.append(call(batch, own, partial_batch=PartialBatch(earlier, share=0.4, is_last=i == len(packs) - 1)))
    return joined_output(outputs, [len(batch.response_tokens) for batch in packs])


def one_batch(packs: Sequence[PackedBatch]) -> PackedBatch:
    starts = [sum(len(pack.response_tokens) for pack in packs[:i]) for i in range(len(packs))]

    def shifted(role: str) -> list[Any]:
        return [
            dataclasses.replace(one, response_ids=one.response_ids + start)
            for pack, start in zip(packs, starts, strict=True)
            for one in getattr(pack, role)
        ]

    return dataclasses.replace(
        packs[0],
        student=shifted("student"),
        teacher=shifted("teacher"),
        response_tokens=torch.cat([pack.response_tokens for pack in packs]),
        num_contexts=sum(pack.num_contexts for pack in packs),
    )


def run(case: Case) -> Outcome:
    """Run ``case`` on this rank; return the gradients of the first step and the parameters after the last step."""
    model = models.model_config(case.kind, **case.model_changes)
    chunks, grid = models.build(model, case.parallel, optimizer=case.optimizer, schedule=case.schedule)
    config = unwrapped(chunks[0]).config

    def another_copy() -> list[Any]:
        return soft_capped(build_chunks(model, config, grid, models.VOCAB_SIZE), case.soft_cap)

    if case.adapter:
        add_adapters(chunks, case.adapter, grid)
        models.fill_from_names(chunks)
        if case.merges_adapter:
            plain = models.another(model, chunks, grid, seed=0)
            merge(chunks, plain)
            chunks = plain
    student = wrap_for_training(soft_capped(chunks, case.soft_cap), case.optimizer)
    optimizer, scheduler = build_optimizer(student, case.optimizer, 10)
    if case.adapter and not case.merges_adapter:
        teacher, frozen = None, [WithoutAdapters(chunk) for chunk in student]
    else:
        teacher = Teacher(case.teacher, student, another_copy)
        frozen = teacher.chunks
        if case.teacher != "current":
            models.fill_from_names(frozen, seed=0 if case.adapter else 1)
    of_reference = frozen
    if case.reference_copy:
        of_reference = Teacher("frozen", student, another_copy).chunks
        models.fill_from_names(of_reference, seed=case.reference_seed)
    vocab = vocab_shard(student, grid)
    batch = packed(case, grid)
    mine = contexts_of(case)[grid.dp_rank :: grid.dp_size]
    with mutated(case.mutation, grid):
        if case.mutation == "padded column left in the softmax":
            vocab = dataclasses.replace(vocab, vocab_size=vocab.size * grid.tp_size)
        if case.mutation == "teacher and student swapped":
            batch = dataclasses.replace(batch, student=batch.teacher, teacher=batch.student)
        if case.mutation == "response position off by one":
            batch = dataclasses.replace(batch, student=[_off_by_one(mb) for mb in batch.student])
        outcome: Outcome | None = None
        for _ in range(max(case.steps, 1)):
            for chunk in student:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()

            def call(some: PackedBatch, own: list[ContextPair], **options: Any) -> StepOutput:
                if case.two_terms:
                    options.setdefault("token_coefficients", GivenCoefficients.of(own))
                if case.reaches and "token_coefficients" not in options:
                    read = Reading(some, call(some, own, token_coefficients=None, forward_only=True), grid)
                    options["token_coefficients"] = reach_coefficients(read, own)
                if not case.target.reads_teacher:
                    options["measurement"] = TokenMeasurement(case.target, chunk_tokens=5)
                return scheduled(case, student, frozen, of_reference, some, grid, vocab=vocab, **options)

            output = call(batch, mine) if case.partial_batches == 1 else run_partial_batches(case, grid, call)
            if outcome is None:
                outcome = first_step(student, optimizer, output, batch, grid)
            if case.steps:
                scheduler.step(1)
                optimizer.step()
                if teacher is not None:
                    teacher.update(optimizer)
    assert outcome is not None
    if case.optimizer.use_distributed_optimizer:
        outcome.grads = {}  # each rank holds only its slice of the reduced gradient
    if case.steps or case.adapter:
        for chunk in student:
            chunk.start_param_sync(force_sync=True) if case.optimizer.overlap_param_gather else None
        outcome.params = shards(student, lambda p: p.detach())
    return outcome


def scheduled(
    case: Case, student: Any, frozen: Any, of_reference: Any, batch: PackedBatch, grid: RankGrid, **options: Any
) -> StepOutput:
    """Run a batch through the schedule with the loss of the case; ``frozen``: the chunks of the teacher."""
    loss = token_losses.self_distillation(case.target, Divergence(case.divergence), fusion=case.fusion)
    arguments = {"vocab": vocab_shard(student, grid), "reference": reference(case, of_reference), **options}
    return schedule.run(student, schedule.ScheduledTeacher(frozen), batch, loss, grid, **arguments)


def reach_coefficients(read: Reading, contexts: Sequence[ContextPair]) -> TokenCoefficients:
    """Return the reach of the target against the student at each token, divided by its mean over the global batch."""
    student, target = read.numbers("student_log_prob", "target_log_prob")
    weights = reach(target, student, [len(context.response) for context in contexts])
    weights, metrics = divided_by_sum(weights, torch.ones_like(weights), weights, read.grid)
    assert 0.1 < metrics["reach/mean"] < 0.9
    return lambda log_prob, ids: Coefficients(weights[ids].to(log_prob))


class SoftCappedLayer(ColumnParallelLinear):
    """An output layer whose logits are no linear function of its input."""

    soft_cap: float

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        logits, bias = super().forward(*args, **kwargs)
        return self.soft_cap * torch.tanh(logits / self.soft_cap), bias


def soft_capped(chunks: list[Any], soft_cap: float | None) -> list[Any]:
    """Return ``chunks``, whose output layer now caps its logits; None caps nothing."""
    for model in map(unwrapped, chunks):
        if soft_cap is not None and model.post_process:
            model.output_layer.__class__, model.output_layer.soft_cap = SoftCappedLayer, soft_cap
    return chunks


def run_each(cases: Sequence[Case]) -> list[Outcome]:
    assert all(case.parallel == cases[0].parallel for case in cases), "expected one layout in a call"
    return [run(case) for case in cases]


Joined = tuple[Outcome, dict[str, torch.Tensor], dict[str, torch.Tensor]]
"""The outcome on rank 0, the gradients and the parameters of all ranks as full tensors."""


class Outcomes:
    """The outcomes of jobs in any layout, each of which runs once: a `Case`, or what ``run_jobs`` takes a list of."""

    def __init__(self, ranks: RankPool, run_jobs: Callable[..., list[Outcome]] = run_each) -> None:
        self._ranks, self._run_jobs = ranks, run_jobs
        self._known: dict[str, tuple[Outcome, ...]] = {}

    def __call__(self, job: Any, world_size: int = 1) -> Joined:
        return self.of([job], world_size)[0]

    def of(self, jobs: Sequence[Any], world_size: int = 1) -> list[Joined]:
        return [joined(outcomes) for outcomes in self.per_rank(jobs, world_size)]

    def per_rank(self, jobs: Sequence[Any], world_size: int = 1) -> list[tuple[Outcome, ...]]:
        """Return the outcomes of jobs of one layout by rank; new jobs run in one call, which takes half the time."""
        keys = [repr((job, world_size)) for job in jobs]
        missing = {key: job for key, job in zip(keys, jobs, strict=True) if key not in self._known}
        if missing:
            by_rank = self._ranks.run(self._run_jobs, list(missing.values()), world_size=world_size)
            self._known.update(zip(missing, zip(*by_rank, strict=True), strict=True))
        return [self._known[key] for key in keys]


def joined(per_rank: Sequence[Outcome]) -> Joined:
    """Return the loss, full gradients and full parameters of one case; all ranks have the same loss."""
    losses = {outcome.loss for outcome in per_rank}
    assert len(losses) == 1, f"ranks disagree about the loss: {losses}"
    grads = join([outcome.grads for outcome in per_rank])
    return per_rank[0], grads, join([outcome.params for outcome in per_rank])


def reference(case: Case, chunks: Sequence[Any]) -> Reference | None:
    """Return the reference of the case's target; None without a reference."""
    return Reference(case.target, chunks, chunk_tokens=5) if case.target.has_reference else None


def first_step(student: list[Any], optimizer: Any, output: StepOutput, batch: PackedBatch, grid: RankGrid) -> Outcome:
    """Return loss, gradients and norm of a step whose gradients are not yet used."""
    optimizer.prepare_grads()
    means = torch.zeros(2, dtype=torch.float64, device=grid.device)
    if output.stats is not None:
        sums = [values.double().sum() for values in (output.stats.loss, output.stats.teacher_entropy)]
        means += torch.stack(sums) / output.num_response_tokens
    dist.all_reduce(means, group=grid.dp_cp_group)
    dist.broadcast(means, grid.last_stage_rank, group=grid.pp_group)
    return Outcome(
        loss=float(means[0]),
        teacher_entropy=float(means[1]),
        grad_norm=float(optimizer.get_grad_norm()),
        grads=shards(student, lambda p: p.main_grad if p.requires_grad else torch.zeros_like(p)),
        params={},
        num_microbatches=len(batch.student) + len(batch.teacher),
    )


def vocab_shard(student: list[Any], grid: RankGrid) -> VocabShard:
    rows = unwrapped(student[-1]).vocab_size
    return VocabShard.from_group(rows, models.VOCAB_SIZE, grid.tp_group)


def shards(chunks: list[Any], value: Callable[[Any], Any]) -> dict[str, Any]:
    """Return ``value(parameter)`` of every parameter under its checkpoint name, with global shape and offset."""
    out: dict[str, Any] = {}
    for chunk in chunks:
        model = unwrapped(chunk)
        own = [(p, p.data) for p in model.parameters()]
        try:
            for p, _ in own:
                p.data = value(p).clone()
            for shard in models.sharded_tensors(model):
                place = (tuple(shard.global_shape), tuple(shard.global_offset), shard.prepend_axis_num)
                out[f"{shard.key}@{shard.global_offset}"] = (shard.key, *place, shard.data.detach().cpu().clone())
        finally:
            for p, data in own:
                p.data = data
    return out


def join(per_rank: list[dict[str, Any]], rows: int = models.VOCAB_SIZE) -> dict[str, torch.Tensor]:
    """Return full tensors of all ranks' shards without padding; ranks with the same shard must hold equal bits."""
    full: dict[str, torch.Tensor] = {}
    for shard_by_name in per_rank:
        for key, shape, offset, prepended, data in shard_by_name.values():
            target = full.setdefault(key, torch.full(shape, float("nan"), dtype=data.dtype))
            view = target
            for position in offset[:prepended]:
                view = view[position]
            for dim, (start, length) in enumerate(zip(offset[prepended:], data.shape, strict=True)):
                view = view.narrow(dim, start, length)
            known = ~view.isnan()
            assert torch.equal(view[known], data[known]), f"ranks disagree about {key}"
            view.copy_(data)
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if key in full:
            full[key] = full[key][:rows]
    assert not any(t.isnan().any() for t in full.values()), "some part of a tensor is on no rank, or NaN"
    return full


def worst_difference(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Return the largest |got - expected|_2 / |expected|_2 over all tensors, and the name of this tensor."""
    assert got.keys() == expected.keys()
    worst = (0.0, "")
    for key, reference in expected.items():
        norm = reference.double().norm().item()
        difference = (got[key].double() - reference.double()).norm().item()
        worst = max(worst, (difference / norm if norm else difference, key))
    return worst


@contextlib.contextmanager
def mutated(name: str | None, grid: RankGrid) -> Iterator[None]:
    """Apply the named fault inside the context; None applies nothing."""
    with pytest.MonkeyPatch.context() as patch:
        if name == "backbone gradient x TP":
            region = "gather_from_sequence_parallel_region"
            gather = vars(forward)[region]
            patch.setattr(forward, region, lambda hidden, **how: gather(hidden, True, how["group"]))
        elif name in ("gradient x CP", "gradient x num_microbatches"):
            original = schedule.ScheduledStep.__init__

            def scaled(self: Any, *args: Any, **kwargs: Any) -> None:
                original(self, *args, **kwargs)
                count = len(self.batch.student) + len(self.batch.teacher)
                self.loss_scale *= grid.cp_size if name == "gradient x CP" else count

            patch.setattr(schedule.ScheduledStep, "__init__", scaled)
        elif name == "earlier partial batches not scaled":
            patch.setattr(DistributedDataParallel, "scale_gradients", lambda self, factor: None)
        elif name == "partial batches reduced twice":
            patch.setattr(joined_batches, "_finalise_nothing", finalize_model_grads)
        elif name == "gradient of the output norm not summed":
            patch.setattr(f"{GATED_DELTA_NET}.copy_to_tensor_model_parallel_region", lambda weight, group: weight)
        elif name == "the segments of a gated delta net are one":

            def one_segment(packed: Any, device: torch.device) -> SegmentBatches:
                return segments_by_length(torch.tensor([0, packed.segment_bounds[-1]]))

            patch.setattr(f"{GATED_DELTA_NET}.segment_batches_of", one_segment)
        elif name == "layer-norm all-reduce dropped":
            finalize = sys.modules["megatron.core.distributed.finalize_model_grads"]  # the package exports a namesake
            patch.setattr(finalize, "_allreduce_non_tensor_model_parallel_grads", lambda *a, **k: None)
        yield


def _off_by_one(microbatch: Any) -> Any:
    rows = (microbatch.response_positions + 1).clamp(max=len(microbatch.tokens) - 1)
    return dataclasses.replace(microbatch, response_positions=rows)


def _max(value: int, grid: RankGrid) -> int:
    tensor = torch.tensor(value, device=grid.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=grid.dp_group)
    return int(tensor)
