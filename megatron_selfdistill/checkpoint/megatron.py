# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Megatron's torch_dist checkpoints: saving a run (in the background when asked), resuming it in any layout, and reading
weights that Megatron-LM wrote."""

from __future__ import annotations

import argparse
import logging
import os
import pickle
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from megatron_selfdistill import cpu, repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_selfdistill.checkpoint import folder, state
from megatron_selfdistill.checkpoint.folder import CheckpointError, Temporary
from megatron_selfdistill.parallel import Grid

logger = logging.getLogger(__name__)

T = TypeVar("T")
Chunks = Sequence[torch.nn.Module]

# In a checkpoint beside the model; no part of a model that is only read for its weights.
_NOT_WEIGHTS = ("optimizer.", "chained_", "rng_state", "rerun_state_machine", "teacher.")
_SHOWN = 4


class TeacherState(Protocol):
    """What is asked of a teacher (teacher.py): ``weights`` is frozen, ema or current."""

    weights: str

    def sharded_state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Checkpointer:
    """The checkpoints of one run, in ``run_dir/checkpoints``, in Megatron-LM's own layout.

    All methods are collective: every rank calls them, in the same order; they raise `CheckpointError` on all ranks.
    """

    def __init__(self, run_dir: Path, grid: Grid, *, keep_last: int | None, async_save: bool) -> None:
        if not filesystem_async.HAVE_PSUTIL:
            raise CheckpointError("saving torch_dist checkpoints needs psutil, without which Megatron's writers hang: "
                                  "pip install psutil")  # fmt: skip
        self.run_dir, self.grid = Path(run_dir), grid
        self.folder = self.run_dir / "checkpoints"
        self.keep_last, self.async_save = keep_last, async_save
        self._teacher_id: str | None = None
        self._queue = AsyncCallsQueue(persistent=False)  # forks: a persistent worker would share memory with training
        self._pending: Temporary | None = None
        self._validated = False

    def latest(self) -> Path | None:
        """The checkpoint to resume from (see `folder.latest`), equal on all ranks; None where there is none."""
        return _on_rank_0(lambda: folder.latest(self.folder))

    def save(
        self,
        step: int,
        *,
        chunks: Chunks,
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        teacher: TeacherState | None,
        trainer_state: dict[str, Any],
        args: argparse.Namespace,
    ) -> Path:
        """Write ``iter_<step>``, then make it the latest, then prune; with ``async_save`` return once the tensors are
        safe from change, and do the rest within `poll` or `finish`.

        ``trainer_state``: anything that pickles; rank 0's is kept.  ``args``: see arguments.py.  An ``ema`` teacher is
        written along; a ``frozen`` one is written once, beside the checkpoints, and referred to.
        """
        self.finish()
        target = self.folder / folder.iteration_name(step)
        if teacher is not None and teacher.weights == "frozen" and self._teacher_id is None:
            self._teacher_id = save_frozen_teacher(self.run_dir, teacher)
        with state.gathered_parameters(chunks):
            model = state.model_state(chunks, self.grid, state.CONTENT)
            contents: dict[str, Any] = {
                "args": args,
                "checkpoint_version": 3.0,
                "iteration": step,
                "num_floating_point_operations_so_far": 0,
                **model,
                "optimizer": state.optimizer_state(optimizer, model, state.CONTENT),
                "opt_param_scheduler": scheduler.state_dict(),
                "rng_state": state.random_state(self.grid),
                "selfdistill": self._own_state(trainer_state | {"step": step}, optimizer, teacher),
            }
            if teacher is not None and teacher.weights == "ema":
                contents |= teacher.sharded_state_dict()
            request, self._pending = _prepare(contents, target, self.grid, validate=not self._validated)
            request.add_finalize_fn(lambda temporary=self._pending: self._publish(temporary, target))
            self._validated = True
            self._queue.schedule_async_request(request) if self.async_save else self._write(request, target)
        return target

    def load(
        self,
        path: Path,
        *,
        chunks: Chunks,
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        teacher: TeacherState | None,
    ) -> dict[str, Any]:
        """Put everything back as `save` found it, in this or another layout; returns ``trainer_state`` with ``step``.

        Random states come back only in the layout that wrote them.
        """
        path = _on_rank_0(lambda: folder.resolve(path))
        common = dist_checkpointing.load_common_state_dict(str(path))
        own = self._check_own_state(path, common.get("selfdistill"), optimizer, teacher)
        content = common.get("content_metadata") or state.CONTENT
        with state.gathered_parameters(chunks):
            model = state.model_state(chunks, self.grid, content)
            wanted = {**model, "optimizer": state.optimizer_state(optimizer, model, content, is_loading=True)}
            if teacher is not None and teacher.weights == "ema":
                wanted |= teacher.sharded_state_dict()
            same_layout = own["layout"] == state.layout(self.grid)
            if same_layout:
                wanted["rng_state"] = state.random_state(self.grid)
            _require_fit(wanted, path)
            loaded = dist_checkpointing.load(wanted, str(path), validate_access_integrity=False)
            state.load_model_state(chunks, loaded)
            state.load_optimizer_state(optimizer, loaded["optimizer"])
        scheduler.num_steps = 0  # its load_state_dict counts on from where it is
        scheduler.load_state_dict(loaded["opt_param_scheduler"])
        if teacher is not None and teacher.weights == "ema":
            teacher.load_state_dict(loaded)
        if teacher is not None and teacher.weights == "frozen":
            self._teacher_id = _load_frozen_teacher(path / own["teacher_folder"], teacher, own["teacher_id"])
        if same_layout:  # last: building the state above may have drawn numbers
            state.load_random_state(loaded["rng_state"])
        elif self.grid.is_reporter:
            logger.warning("%s was written in the layout %s: random states are not restored", path, own["layout"])
        return pickle.loads(own["trainer_state"])

    def poll(self) -> None:
        """Complete a background save if its writers are done on all ranks; else return at once.  One small all-reduce
        while a save is under way, nothing otherwise."""
        self._finalize(blocking=False)

    def finish(self) -> None:
        """Wait for the background save and complete it."""
        self._finalize(blocking=True)

    def _own_state(
        self, trainer_state: dict[str, Any], optimizer: MegatronOptimizer, teacher: TeacherState | None
    ) -> dict[str, Any]:
        frozen = teacher is not None and teacher.weights == "frozen"
        return {
            # Bytes, since Megatron-LM reads this file too, and refuses classes that it does not know.
            "trainer_state": pickle.dumps(trainer_state),
            "layout": state.layout(self.grid),
            "distributed_optimizer": state.uses_distributed_optimizer(optimizer),
            "teacher": teacher.weights if teacher is not None else None,
            "teacher_folder": os.path.join("..", "..", "teacher") if frozen else None,
            "teacher_id": self._teacher_id if frozen else None,
        }

    def _check_own_state(
        self, path: Path, own: dict[str, Any] | None, optimizer: MegatronOptimizer, teacher: TeacherState | None
    ) -> dict[str, Any]:
        if own is None:
            raise CheckpointError(
                f"{path} was not written by a self-distillation run: give it as checkpoint.load to start from its weights"
            )
        weights = teacher.weights if teacher is not None else None
        if own["teacher"] != weights:
            raise CheckpointError(f"{path} was written with teacher.weights={own['teacher']}, this run has {weights}: "
                                  "set it back, or start a new run folder")  # fmt: skip
        distributed = state.uses_distributed_optimizer(optimizer)
        if own["distributed_optimizer"] != distributed:
            raise CheckpointError(
                f"{path} was written with optimizer.use_distributed_optimizer={own['distributed_optimizer']}, "
                f"this run has {distributed}: set it back, for the state has other names"
            )
        return own

    def _write(self, request: Any, target: Path) -> None:
        try:
            request.execute_sync()
        except Exception as error:
            raise CheckpointError(f"could not write {target}: {_describe(error)}") from error
        finally:
            self._release()

    def _finalize(self, blocking: bool) -> None:
        if self._pending is None:
            return
        try:
            self._queue.maybe_finalize_async_calls(blocking=blocking)
        except Exception as error:
            self._release()
            raise CheckpointError(f"could not write a checkpoint in the background: {_describe(error)}") from error
        if self._queue.get_num_unfinalized_calls() == 0:
            self._release()

    def _release(self) -> None:
        if self._pending is not None:
            self._pending.release()
            self._pending = None

    def _publish(self, temporary: Temporary, target: Path) -> None:
        def make_latest() -> None:
            folder.publish(temporary, target)
            folder.set_latest(target)
            folder.prune(target, self.keep_last)

        _on_rank_0(make_latest)


def load_weights(path: Path, chunks: Chunks, grid: Grid, vocab_size: int | None = None) -> int:
    """Read only the model's weights from a torch_dist checkpoint, which Megatron-LM or anyone wrote; returns its
    iteration (0 for ``release``).

    ``path``: an ``iter_`` folder, or the folder with Megatron's tracker file.  ``vocab_size``: the valid rows, which the
    checkpoint must have; padding rows that it lacks become zero.  Nothing of its pickled ``args`` is executed.
    Raises: CheckpointError before anything is loaded, naming the first tensors that are missing, unexpected or of
    another shape.
    """
    path = _on_rank_0(lambda: folder.resolve(path))
    wanted = state.model_state(chunks, grid, state.CONTENT)
    _require_fit(wanted, path, weights_only=True, vocab_size=vocab_size)
    with state.gathered_parameters(chunks):
        loaded = dist_checkpointing.load(
            wanted, str(path), common_strategy=_NothingInCommon(), validate_access_integrity=False
        )
        state.load_model_state(chunks, loaded)
    return folder.iteration_of(path)


def save_frozen_teacher(run_dir: Path, teacher: TeacherState) -> str:
    """Write a frozen teacher into ``run_dir/teacher``, unless exactly these weights are there; returns their mark, by
    which checkpoints know them again.  Collective."""
    target = Path(run_dir) / "teacher"
    if _on_rank_0(lambda: folder.incomplete(target)) is None:
        mark = dist_checkpointing.load_common_state_dict(str(target)).get("teacher_id")
        if mark is not None and _holds_same_weights(target, teacher):
            return mark
        logger.warning("%s holds other weights, of an earlier start in this run folder: it is replaced", target)
    contents = {"teacher_id": _on_rank_0(lambda: uuid.uuid4().hex), **teacher.sharded_state_dict()}
    mark = contents["teacher_id"]
    request, temporary = _prepare(contents, target, None, validate=False)
    request.add_finalize_fn(lambda: _on_rank_0(lambda: folder.publish(temporary, target)))
    try:
        request.execute_sync()
    except Exception as error:
        raise CheckpointError(f"could not write {target}: {_describe(error)}") from error
    finally:
        temporary.release()
    return mark


def load_frozen_teacher(run_dir: Path, teacher: TeacherState) -> str:
    """The inverse of `save_frozen_teacher`, in any layout.  Collective."""
    return _load_frozen_teacher(Path(run_dir) / "teacher", teacher)


def _load_frozen_teacher(path: Path, teacher: TeacherState, expected: str | None = None) -> str:
    path = _on_rank_0(lambda: folder.resolve(path.resolve()))
    mark = dist_checkpointing.load_common_state_dict(str(path)).get("teacher_id")
    if expected is not None and mark != expected:
        raise CheckpointError(
            f"{path} is not the teacher of this checkpoint: it was replaced by a later start in the same run folder"
        )
    wanted = teacher.sharded_state_dict()
    _require_fit(wanted, path)
    teacher.load_state_dict(dist_checkpointing.load(wanted, str(path), validate_access_integrity=False))
    return mark


def _holds_same_weights(path: Path, teacher: TeacherState) -> bool:
    """Whether every tensor of ``teacher`` is on disk, bit for bit; reads all of it."""
    wanted, _, _ = load_preprocess(teacher.sharded_state_dict())
    wanted = {key: value for key, value in enumerate(nested_values(wanted)) if isinstance(value, ShardedTensor)}
    own = {key: value.data for key, value in wanted.items()}
    try:
        _require_fit(wanted, path)
    except CheckpointError:  # raised on all ranks: another model
        return False
    for value in wanted.values():
        value.data = torch.empty_like(value.data)
    loaded = dist_checkpointing.load(wanted, str(path), validate_access_integrity=False)
    differs = any(not torch.equal(loaded[key], own[key]) for key in own)
    return not any(_from_all_ranks(differs))


def _prepare(contents: dict[str, Any], target: Path, grid: Grid | None, validate: bool) -> tuple[Any, Temporary]:
    """A locked temporary folder beside ``target``, and Megatron's request that fills it when executed."""
    needed = sum(_from_all_ranks(_num_bytes(contents)))
    # Before the lock: the process that passes the writers' results on lives as long as this one, and must not share it.
    _on_each_rank(filesystem_async._get_write_results_queue)
    begun = _on_rank_0_keeping(lambda: folder.begin(target.parent, target.name, needed))
    path = _on_rank_0(lambda: begun.path)
    temporary = begun if begun is not None else Temporary(path)
    try:
        if begun is None:
            temporary.hold()
        strategy = get_default_save_sharded_strategy()
        if grid is not None and grid.dp_cp_group.size() > 1:  # replicas share the writing
            strategy = FullyParallelSaveStrategyWrapper(strategy, grid.dp_cp_group)
        request = dist_checkpointing.save(
            contents,
            str(path),
            strategy,
            validate_access_integrity=validate,
            async_sharded_save=True,
            content_metadata=dict(state.CONTENT),
        )
    except Exception as error:
        temporary.release()
        raise CheckpointError(f"could not write {target}: {_describe(error)}") from error
    return request, temporary


def _require_fit(
    wanted: dict[str, Any], path: Path, *, weights_only: bool = False, vocab_size: int | None = None
) -> None:
    """Raise one sentence on all ranks unless the checkpoint has each tensor that some rank wants, in its shape; with
    ``weights_only`` it must also have no further weights."""
    plain, _, _ = load_preprocess(wanted)
    mine = {t.key: (t.global_shape, t.allow_shape_mismatch) for t in _tensors(plain)}
    expected: dict[str, tuple] = {}
    for theirs in _from_all_ranks(mine):
        expected |= theirs
    stored = _on_rank_0(lambda: _stored_shapes(path))
    faults = [f"{key} is missing" for key in sorted(expected.keys() - stored.keys())]
    if weights_only:
        extra = (key for key in stored.keys() - expected.keys() if not key.startswith(_NOT_WEIGHTS))
        faults += [f"{key} is unexpected" for key in sorted(extra)]
    for key in sorted(expected.keys() & stored.keys()):
        shape, padded = expected[key]
        if padded and stored[key][1:] == tuple(shape[1:]):
            if vocab_size is not None and stored[key][0] < vocab_size:
                faults.append(f"{key} has {stored[key][0]} rows, expected at least {vocab_size}")
        elif stored[key] != tuple(shape):
            faults.append(f"{key} has shape {list(stored[key])}, expected {list(shape)}")
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise CheckpointError(f"{path} does not fit this model: {'; '.join(faults[:_SHOWN])}{more}")


def _stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    metadata = dist_checkpointing.load_tensors_metadata(str(path))
    return {key: tuple(tensor.global_shape) for key, tensor in metadata.items()}


def _tensors(contents: dict[str, Any]) -> Iterator[ShardedTensor]:
    return (value for value in nested_values(contents) if isinstance(value, ShardedTensor))


def _num_bytes(contents: dict[str, Any]) -> int:
    """Of the tensors that this rank is the first holder of."""
    data = [v.data for v in nested_values(contents) if is_main_replica(getattr(v, "replica_id", 1))]
    return sum(tensor.numel() * tensor.element_size() for tensor in data if torch.is_tensor(tensor))


class _NothingInCommon(TorchCommonLoadStrategy):
    """Leave common.pt unread: it holds a lab's pickled arguments, whose classes need not exist here."""

    def load_common(self, checkpoint_dir: Any) -> dict[str, Any]:
        return {}


def _on_rank_0(do: Callable[[], T]) -> T:
    """What ``do()`` returns on rank 0, on every rank; what it raises there is raised on every rank."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = do()
        except Exception as error:
            outcome[1] = _describe(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise CheckpointError(outcome[1])
    return outcome[0]


def _on_rank_0_keeping(do: Callable[[], T]) -> T | None:
    """`_on_rank_0` for a result that stays there; None elsewhere."""
    kept: list[T] = []
    _on_rank_0(lambda: kept.append(do()))
    return kept[0] if kept else None


def _on_each_rank(do: Callable[[], Any]) -> None:
    """Run ``do()``; if it raises on any rank, raise on all."""
    problem = None
    try:
        do()
    except Exception as error:
        problem = f"rank {dist.get_rank()}: {_describe(error)}"
    problems = [p for p in _from_all_ranks(problem) if p is not None]
    if problems:
        raise CheckpointError("; ".join(problems[:_SHOWN]))


def _from_all_ranks(value: T) -> list[T]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
