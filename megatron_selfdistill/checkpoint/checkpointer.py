# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Save a run in Megatron's torch_dist format, at once or in the background, and resume it in any layout."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_selfdistill.checkpoint import sharded_io, state
from megatron_selfdistill.checkpoint.formats import directory
from megatron_selfdistill.checkpoint.formats.saved_run import SECTION, SavedRun, read_saved_run
from megatron_selfdistill.checkpoint.formats.torch_dist import CONTENT
from megatron_selfdistill.checkpoint.frozen_weights import (
    TEACHER,
    StateDict,
    TeacherState,
    has_frozen_weights,
    load_frozen_teacher,
    save_frozen_weights,
)
from megatron_selfdistill.checkpoint.trained_weights import TrainedWeights
from megatron_selfdistill.config import CheckpointConfig
from megatron_selfdistill.distributed.collectives import run_on_each_rank, run_on_rank_0
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.distributed.signs_of_life import moving_files
from megatron_selfdistill.errors import CheckpointError

logger = logging.getLogger(__name__)

Chunks = Sequence[torch.nn.Module]
ALL = TrainedWeights()
"""A run trains all weights."""


class Checkpointer:
    """The checkpoints of one run, in ``run_dir/checkpoints``, with Megatron-LM's names of directories and files.

    All methods are collective: every rank calls them, in the same order.  They raise `CheckpointError` on all ranks.
    """

    def __init__(
        self, run_dir: Path, grid: RankGrid, config: CheckpointConfig, prove_ownership: Callable[[], None] | None = None
    ) -> None:
        """Open the checkpoints of ``run_dir``.

        ``prove_ownership``: a function that rank 0 calls before it publishes a checkpoint or a teacher and before it
        removes older checkpoints; it raises `CheckpointError` where another run has taken the run directory over
        (`RunLock.renew`).  Null where nothing locks the directory.
        """
        self.run_dir, self.grid = Path(run_dir), grid
        self.directory = self.run_dir / "checkpoints"
        self.config = config
        self.prove_ownership: Callable[[], None] = prove_ownership or (lambda: None)
        self._ids: dict[str, str] = {}
        """The ids of the weights that are kept beside the checkpoints, by the names of their directories."""
        # Forked writers: a persistent writer would share memory with weights that change during the save.
        self._queue = AsyncCallsQueue(persistent=False)
        self._pending: Path | None = None  # the directory of the background save
        self._lost: str | None = None  # why the last background save left no checkpoint
        self._validated = False

    def latest(self) -> Path | None:
        """Return the first of `directory.candidates` without a fault, on all ranks; None if there is no checkpoint.

        One warning names the skipped checkpoints and the number of lost steps.

        Raises: CheckpointError where all checkpoints have faults; the method then changes nothing.
        """
        faults: dict[str, str] = {}
        reasons = ""
        for path in run_on_rank_0(lambda: directory.candidates(self.directory)):
            fault = sharded_io.integrity_fault(path, self.config.verify)
            if fault is None:
                if faults and self.grid.is_reporter:
                    lost = max(map(directory.iteration_of, map(Path, faults))) - directory.iteration_of(path)
                    again = f", {lost} steps earlier" if lost > 0 else ""
                    logger.warning("%s in %s: the run continues from %s%s", reasons, self.directory, path.name, again)
                return path
            faults[path.name] = fault
            reasons = "; ".join(f"{name} {why}" for name, why in faults.items())
        if not faults:
            return None
        raise CheckpointError(
            f"none of the checkpoints in {self.directory} can be used: {reasons}; restore one, or move {self.run_dir} "
            "away"
        )

    @moving_files()
    def save(
        self,
        step: int,
        *,
        chunks: Chunks,
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        teacher: TeacherState | None,
        reference: TeacherState | None = None,
        trained: TrainedWeights = ALL,
        trainer_state: dict[str, Any],
        args: argparse.Namespace,
    ) -> Path:
        """Write ``iter_<step>``, make it the latest checkpoint, then delete all but the last ``keep_last``.

        With ``async_save`` the method returns as soon as the tensors may change again; `poll` or `finish` completes the
        save.  ``trainer_state``: plain values (`saved_run.encode`), stored from rank 0.  ``args``: the result of
        `megatron_args`.  The checkpoint holds an ``ema`` teacher.  Frozen weights, those of a ``frozen`` teacher or of
        the reference, are saved once, beside the checkpoints, and the checkpoint refers to them.  ``trained``: which
        weights the checkpoint holds.
        """
        self._finalize(blocking=True)
        self._lost = None  # this save replaces the lost one
        target = self.directory / directory.iteration_name(step)
        frozen = _frozen(teacher, reference)
        if frozen is not None:
            self.save_frozen(TEACHER, frozen.sharded_state_dict)
        common = {"args": args, "checkpoint_version": 3.0, "num_floating_point_operations_so_far": 0}
        texts = trained.texts(self.save_frozen, target, chunks, common)
        with state.gathered_parameters(chunks):
            model = state.model_state(chunks, CONTENT)
            contents = {
                **common,
                "iteration": step,
                **trained.stored(model),
                "optimizer": state.optimizer_state(optimizer, model, CONTENT),
                "opt_param_scheduler": scheduler.state_dict(),
                **state.random_states(self.grid),
                SECTION: {
                    "trainer_state": json.dumps(trainer_state | {"step": step}),  # which no reader can execute
                    "layout": state.layout(self.grid),
                    "optimizer_steps": state.optimizer_steps(optimizer),
                    "teacher_id": self._ids[TEACHER] if frozen is not None else None,
                },
            }
            if teacher is not None and teacher.weights == "ema":
                contents |= teacher.sharded_state_dict()
            self._start_writing(contents, target, texts)
        return target

    def read(self, path: Path) -> SavedRun:
        """Return the state of the run in the checkpoint at ``path``, on every rank; `load` then restores the run."""
        found = run_on_rank_0(lambda: directory.resolve(path))
        return run_on_each_rank(lambda: read_saved_run(found))

    @moving_files()
    def load(
        self,
        saved: SavedRun,
        *,
        chunks: Chunks,
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        teacher: TeacherState | None,
        reference: TeacherState | None = None,
        trained: TrainedWeights = ALL,
    ) -> None:
        """Restore weights, optimizer, schedule, teacher and reference of `save`, in the same layout or another one.

        ``saved`` holds the state of the trainer, which the caller restores.  Random states are restored in the layout
        that saved them only.  ``trained``: which weights are restored; the chunks have all others already.
        """
        found, common, own = saved.path, saved.common, saved.own
        frozen = _frozen(teacher, reference)
        if frozen is not None and own["teacher_id"] is None:  # other weights may be in the directory of the teacher
            raise CheckpointError(
                f"{found} was saved without the initial weights that target.anchor=reference needs, as does "
                "teacher.weights=frozen: set these keys back, or start in a new run directory"
            )
        content = common.get("content_metadata") or CONTENT
        same_layout = own["layout"] == state.layout(self.grid)
        with state.gathered_parameters(chunks):
            model = state.model_state(chunks, content)
            optimizer_state = state.optimizer_state(optimizer, model, content, is_loading=True)
            wanted = {**trained.stored(model), "optimizer": optimizer_state}
            if teacher is not None and teacher.weights == "ema":
                wanted |= teacher.sharded_state_dict()
            if same_layout:
                wanted |= state.wanted_random_state(self.grid)
            sharded_io.check_shapes(wanted, found)
            loaded = sharded_io.read(wanted, found)
            trained.load(chunks, loaded)
            state.load_optimizer_state(optimizer, optimizer_state, loaded["optimizer"], own["optimizer_steps"])
        scheduler.num_steps = 0  # load_state_dict adds the stored number of steps
        scheduler.load_state_dict(common["opt_param_scheduler"])
        if teacher is not None and teacher.weights == "ema":
            teacher.load_state_dict(loaded)
        if frozen is not None:
            run_dir = found.parents[1]  # the frozen weights are always in the same run directory
            self._ids[TEACHER] = load_frozen_teacher(run_dir, frozen, own["teacher_id"], self.config.verify)
        if same_layout:  # last, because no code may draw a random number afterwards
            state.load_random_state(loaded)
        elif self.grid.is_reporter:
            logger.warning("%s comes from the layout %s: random states start afresh", found, own["layout"])

    def poll(self) -> None:
        """Complete a background save if the writers of all ranks are done; else return at once.

        Collectives: one small all-reduce while a save is in progress, none otherwise.
        """
        self._finalize(blocking=False)

    @moving_files()
    def finish(self) -> None:
        """Wait for a background save, and complete it.

        Raises: CheckpointError where the save failed, or where its directory was removed and no save followed.
        """
        self._finalize(blocking=True)
        if self._lost is not None:
            raise CheckpointError(self._lost)

    def _start_writing(self, contents: dict[str, Any], target: Path, texts: Mapping[str, str]) -> None:
        def make_latest() -> None:
            self.prove_ownership()
            directory.set_latest(target)
            directory.prune(target, self.config.keep_last)

        request, temporary = sharded_io.begin_write(
            contents,
            target,
            replicas=self.grid.dp_cp_group,
            validate=not self._validated,
            prove_ownership=self.prove_ownership,
            published=make_latest,
            texts=texts,
        )
        self._validated = True
        if not self.config.async_save:
            sharded_io.write_now(request, target)
            return
        self._pending = temporary
        run_on_each_rank(lambda: self._queue.schedule_async_request(request))

    def _finalize(self, blocking: bool) -> None:
        if self._pending is None:
            return
        calls = self._queue.async_calls
        process = calls[0].async_caller.process if calls else None  # which Megatron forgets
        if calls and not calls[0].async_caller.is_current_async_call_done(blocking):
            return  # on all ranks
        place = self._pending
        if calls and not run_on_rank_0(place.is_dir):  # removed, perhaps with the complete run directory
            calls.popleft()
            sharded_io.forget_results()
            self._pending = None
            self._lost = f"{place} was removed while a checkpoint was being written there in the background"
            if self.grid.is_reporter:
                logger.warning("%s: the next save takes its place", self._lost)
            return
        try:
            if process is not None and process.exitcode:
                sharded_io.report_death(process.exitcode)
            if self._queue.maybe_finalize_async_calls(blocking=blocking):
                self._pending = None
        except sharded_io.WRITE_ERRORS as error:
            self._pending = None
            raise sharded_io.unwritten("a checkpoint in the background", error) from error

    def save_frozen(self, name: str, weights: StateDict, known: str | None = None, **more: Any) -> str:
        """Save frozen weights as ``run_dir/name`` at the first save, and again if their directory was removed since.

        Return their id.  ``known``: the id of the weights that an earlier launch has saved.  ``more``: further
        arguments of `save_frozen_weights`.
        """
        target, known = self.run_dir / name, self._ids.get(name, known)
        lost = known is not None and not run_on_rank_0(lambda: has_frozen_weights(target))
        if lost and self.grid.is_reporter:
            logger.warning("%s is not there any more: it is written again", target)
        if lost or known is None:
            known = save_frozen_weights(
                target, weights, known, replicas=self.grid.dp_cp_group, prove_ownership=self.prove_ownership, **more
            )
        self._ids[name] = known
        return known


def _frozen(teacher: TeacherState | None, reference: TeacherState | None) -> TeacherState | None:
    """Return the frozen weights of a run, which may be its teacher, its reference or both; None without any."""
    if reference is not None:
        return reference if reference.is_copy else None
    return teacher if teacher is not None and teacher.weights == "frozen" and teacher.is_copy else None
