# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The learner on one rank: student, teacher, reference and optimizer, and the loss between student and target.

The step of the optimizer has two halves, so that a run can check the norm of the gradient in between.

    norm = gradient_norm(optimizer)        # prepares the gradients
    ...                                    # a guard may refuse to apply them
    apply_gradients(optimizer, norm)

``optimizer.step()`` would prepare the gradients and compute their norm a second time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megatron_selfdistill.checkpoint.external import load_weights_and_optimizer
from megatron_selfdistill.checkpoint.formats.saved_run import SavedRun
from megatron_selfdistill.checkpoint.trained_weights import TrainedWeights
from megatron_selfdistill.config import Config
from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.packed_batch import PackedBatch
from megatron_selfdistill.data.run_data import RunData
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.loss.batch_k import solve_batch_k
from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard
from megatron_selfdistill.loss.target import Divergence, Target
from megatron_selfdistill.metrics.batch_entropies import batch_entropies
from megatron_selfdistill.model.build import build_optimizer, new_chunks, wrap_for_training
from megatron_selfdistill.model.forward import unwrapped
from megatron_selfdistill.model.fused_loss import FusedLoss
from megatron_selfdistill.model.output_layer import decided_output_layer
from megatron_selfdistill.pipeline import schedule, token_losses
from megatron_selfdistill.pipeline.configured_packing import configured_packing
from megatron_selfdistill.pipeline.next_token import next_token
from megatron_selfdistill.pipeline.partial_batches import PartialBatch
from megatron_selfdistill.pipeline.schedule import Reference, StepOptions, StepTeacher
from megatron_selfdistill.pipeline.score import Reading
from megatron_selfdistill.pipeline.token_losses import StepOutput
from megatron_selfdistill.pipeline.token_measures import TokenMeasurement
from megatron_selfdistill.teacher import Teachers


class Learner:
    """Student, teacher, reference and optimizer of one rank.

    Every rank of the world makes the same calls in the same order.  `forward_backward` changes gradients only;
    `apply_gradients` changes the weights, the optimizer with its schedule, and the teacher; `set_batch_k` changes
    ``batch_k``, ``target`` and ``distillation_loss``.
    """

    def __init__(
        self,
        config: Config,
        run_data: RunData,
        grid: RankGrid,
        *,
        saved: SavedRun | None = None,
        trained: TrainedWeights,
    ) -> None:
        """Build the model with the weights of ``checkpoint.load``, or random weights where that is null.

        ``saved``: the checkpoint of the run that the caller loads afterwards, so that ``checkpoint.load`` is not read.
        ``trained``: the result of `trained_weights`.
        Raises: `ConfigError`, `CheckpointError`.
        """
        self.config, self.run_data, self.grid, self.trained = config, run_data, grid, trained

        def initial_chunks() -> list[torch.nn.Module]:
            return new_chunks(config, grid, run_data.vocab_size)

        initial, load = initial_chunks(), config.checkpoint.load
        trained.load_start(config, initial, grid, run_data.vocab_size, is_new=saved is None)
        self.chunks = wrap_for_training(initial, config.optimizer)
        self.output_layer = decided_output_layer(config, self.chunks)
        last = unwrapped(self.chunks[-1])
        self.vocab = VocabShard.from_group(last.vocab_size, run_data.vocab_size, grid.tp_group)
        self.optimizer, self.scheduler = build_optimizer(self.chunks, config.optimizer, config.num_steps)
        if load is not None and saved is None and config.checkpoint.load_optimizer:
            path, verify = Path(load), config.checkpoint.verify
            load_weights_and_optimizer(path, self.chunks, self.optimizer, run_data.vocab_size, verify)
        start = trained.start_of(self.chunks)
        self.teachers = Teachers.of(config)(config, grid, self.vocab, self.chunks, initial_chunks, saved, start)
        self.packing = configured_packing(config, grid, last.config, run_data.num_controls)
        """How the contexts of a step become microbatches."""
        self.set_batch_k(None)
        self.release_gradients()

    @property
    def stored_parts(self) -> dict[str, Any]:
        """The parts that a checkpoint holds, as `Checkpointer.save` and `Checkpointer.load` take them."""
        return {
            "chunks": self.chunks,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "teacher": self.teachers.start if self.config.keeps_teacher else None,
            "reference": self.teachers.reference,
            "trained": self.trained,
        }

    def pack(self, contexts: Sequence[ContextPair], teacher: str = "") -> PackedBatch:
        """Return the contexts of this replica as microbatches, alike in number and length on all replicas.

        ``teacher``: the name of the teacher of all contexts.  Collective.
        """
        return self.teachers.pack(contexts, self.packing, teacher)

    def forward_backward(
        self,
        packed: PackedBatch,
        token_coefficients: token_losses.TokenCoefficients | None = None,
        teacher: str = "",
        contexts: Sequence[ContextPair] = (),
        *,
        measure_every: int | None = 1,
        partial_batch: PartialBatch | None = None,
    ) -> StepOutput:
        """Leave the gradients of the batch in ``main_grad``, in place of whatever was there, and return the statistics.

        ``partial_batch``: the place of the batch in a step of several partial batches, whose gradients are added; None
        is the whole step.  ``measure_every``: n, where the step takes the `TokenMeasures` of one token in n, which with
        a reference include the numbers of the teacher and cost a projection of both; None takes none.  Without a
        reference the statistics always include the teacher.  ``teacher``: the name of the teacher of all contexts, see
        `Teachers`.  ``contexts``: those in ``packed``.
        Raises: `NoResponseTokens` on all ranks where no replica has a response token.
        """
        is_first = partial_batch is None or partial_batch.earlier is None
        if is_first:
            for chunk in self.chunks:
                chunk.restore_grad_buffers(synchronize=False)
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
        try:
            options: StepOptions = {"token_coefficients": token_coefficients, "partial_batch": partial_batch}
            if not self.config.has_teacher:
                return self.run_schedule(packed, None, next_token, options)
            if measure_every is not None:
                options["measurement"] = self._measurement(teacher, None, measure_every)
            return self._self_distillation(packed, contexts, teacher, options)
        except schedule.NoResponseTokens:
            if is_first:
                self.release_gradients()
            raise

    def measure(
        self, contexts: Sequence[ContextPair], *, summarise: Callable[..., Tensor] | None = None, teacher: str = ""
    ) -> StepOutput:
        """Return the distillation loss's statistics of ``contexts`` under the present weights; nothing is trained.

        ``summarise``: that of `TokenMeasurement`, for the logits of all models.  ``teacher``: the teacher's name.
        Raises: `NoResponseTokens` on all ranks where no replica has a response token.
        """
        return self.read(contexts, self._measurement(teacher, summarise, 1), teacher).output

    def gradient_norm(self) -> float:
        """Return the 2-norm of all gradients, unclipped, and prepare them for `apply_gradients`.  Collective."""
        return gradient_norm(self.optimizer)

    def apply_gradients(self, norm: float) -> float:
        """Update the weights with the prepared gradients, clipped by their ``norm``, and then the teacher.

        Returns the learning rate of this update.  `release_gradients` follows the update.  Collective.
        """
        self.scheduler.step(1)
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        apply_gradients(self.optimizer, norm)
        if self.teachers.start.weights == "ema":
            self.teachers.start.update(self.optimizer)
        self.release_gradients()
        return learning_rate

    def release_gradients(self) -> None:
        """Free the memory of ``main_grad``, whose values are lost, where an engine samples on this device.

        `forward_backward` takes the memory again.  The host waits for the device.  Elsewhere nothing happens.
        """
        if self.config.samples and self.config.rollout.is_colocated:
            self.optimizer.zero_grad()  # drops views of the gradients
            for chunk in self.chunks:
                chunk.offload_grad_buffers()

    def solve_k(self, output: StepOutput) -> None:
        """Set ``batch_k`` for the next step from the entropies of this step, for target.rule=batch.  Collective."""
        entropies, bound = batch_entropies(output, self.grid), self.target.k_bound
        self.set_batch_k(solve_batch_k(*entropies, bound, max_entropy=math.log(self.run_data.vocab_size)))

    def set_batch_k(self, k: float | None) -> None:
        """Set what the next steps train towards; ``k``: that of target.rule=batch, None before the first step."""
        self.batch_k = k
        self.target = Target.configured(self.config.target, k, self.run_data.num_controls)
        self.distillation_loss = self.loss_towards(self.target)

    def read(
        self, contexts: Sequence[ContextPair], measurement: TokenMeasurement | None = None, teacher: str = ""
    ) -> Reading:
        """Return what the models of a step read in ``contexts``, by the loss of a step, without training.  Collective.

        Raises: `NoResponseTokens` on all ranks where no replica has a response token.
        """
        packed = self.pack(contexts, teacher)
        options: StepOptions = {"measurement": measurement, "forward_only": True}
        return Reading(packed, self._self_distillation(packed, contexts, teacher, options), self.grid)

    def _self_distillation(
        self, packed: PackedBatch, contexts: Sequence[ContextPair], teacher: str, options: StepOptions
    ) -> StepOutput:
        part, target = options.get("partial_batch"), self.target_of(teacher)
        loss = self.distillation_loss if target is self.target else self.loss_towards(target)
        with self.teachers.models(packed, contexts, teacher, "" if part is None else part.next_teacher) as models:
            options = {**options, "reference": self.reference_of(target, models.reference)}
            return self.run_schedule(packed, models.teacher, loss, options)

    def target_of(self, teacher: str = "") -> Target:
        """Return the target of the tokens that a teacher reads; ``teacher``: its name, "" for the default one."""
        return self.teachers.target(self.target, teacher) if teacher else self.target

    def _measurement(self, teacher: str, summarise: Callable[..., Tensor] | None, every: int) -> TokenMeasurement:
        loss, phase = self.config.loss, crc32(b"%d" % self.scheduler.num_steps)
        return TokenMeasurement(self.target_of(teacher), loss.fused_chunk_tokens, loss.backend, summarise, every, phase)

    def run_schedule(
        self,
        packed: PackedBatch,
        teacher: StepTeacher | None,
        token_loss: token_losses.TokenLoss | FusedLoss,
        options: StepOptions,
    ) -> StepOutput:
        """Return the result of `schedule.run` with the student and the packing of the run."""
        return schedule.run(
            self.chunks,
            teacher,
            packed,
            token_loss,
            self.grid,
            self.vocab,
            teacher_store_bytes=self.config.schedule.teacher_store_gb * 2**30,
            backend=self.config.loss.backend,
            **options,
        )

    def reference_of(self, target: Target, chunks: Sequence[torch.nn.Module] | None) -> Reference | None:
        """Return the reference of a target with these ``chunks``; None if the target has none."""
        if not self.config.is_anchored:
            return None
        assert chunks is not None
        return Reference(target, chunks, self.config.loss.fused_chunk_tokens, self.config.loss.backend)

    def loss_towards(self, target: Target) -> token_losses.TokenLoss | FusedLoss:
        """Return the distillation loss of the run with this target."""
        loss = self.config.loss
        divergence = Divergence.configured(loss, self.config.method)
        return token_losses.self_distillation(target, divergence, loss.backend, fusion=self.output_layer.fusion)


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Prepare the gradients for `apply_gradients`, and return their 2-norm before clipping.

    Collectives: one sum over the ranks that share a model, or over the world where optimizer states are distributed;
    the host waits for it.

    Raises: RuntimeError for an overflowed loss scale, which bf16 and fp32 do not have.
    """
    if optimizer.prepare_grads():
        raise RuntimeError("gradients overflowed their loss scale; expected bf16 or fp32, which have no loss scale")
    return float(optimizer.get_grad_norm())


def apply_gradients(optimizer: MegatronOptimizer, norm: float) -> None:
    """Clip the prepared gradients by ``norm``, the result of `gradient_norm`, and update the parameters.

    The updated parameters equal those of ``optimizer.step()`` bit for bit.

    Collectives: the gather of updated parameters that Megatron's distributed optimizer makes.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        parameters = [] if getattr(part, "is_stub_optimizer", False) else part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=part.config.clip_grad,
                total_norm=norm,
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    optimizer.step_with_ready_grads()
