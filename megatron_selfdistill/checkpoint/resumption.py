# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Decide whether a run may continue from its checkpoint, by the configuration and the problems of the checkpoint.

A launch writes some files of a run directory once: the configuration, and the files that conversions need.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_selfdistill.checkpoint.formats import directory
from megatron_selfdistill.checkpoint.formats.saved_run import CONFIGURATION, SavedRun
from megatron_selfdistill.checkpoint.formats.stored_model import architecture_from_args, fields_set, reconcile
from megatron_selfdistill.checkpoint.run_directory import CONFIGURATION_FILE
from megatron_selfdistill.choices import ANCHORS
from megatron_selfdistill.config import Config, ModelConfig, YarnConfig, to_yaml
from megatron_selfdistill.config.bound_keys import (
    BOUND,
    FIXED,
    FREE,
    KeyDifference,
    differences,
    refusal,
    stored_values,
)
from megatron_selfdistill.data.prompt_checks import FIXED_DATE
from megatron_selfdistill.distributed.collectives import raise_on_all_ranks
from megatron_selfdistill.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from megatron_selfdistill.checkpoint.checkpointer import Checkpointer
    from megatron_selfdistill.data.run_data import RunData
    from megatron_selfdistill.distributed.ranks import RankGrid


logger = logging.getLogger(__name__)

PROMPTS = "prompts_digest"
"""The key of a trainer's state under which a checkpoint keeps the digest of the first prompts."""
_PROBLEMS = "the problems that data.path gives (their digest)"
LONGEST_WARMUP = 10
"""The largest number of warm-up steps of a run that sets none."""


@dataclass(frozen=True)
class Resumption:
    """The checkpoint from which the run continues, and the differences to the run that saved it."""

    saved: SavedRun
    changes: tuple[str, ...]
    """One line for every key that has changed and may."""
    warnings: tuple[str, ...]
    """One line for every key that has changed by force, and one for every consequence."""
    same_problems: bool
    """Whether the stored position in the data still refers to the same problems."""


def latest_resumption(
    config: Config, run_data: RunData, checkpointer: Checkpointer, grid: RankGrid
) -> Resumption | None:
    """Return the checkpoint from which the run in ``run_dir`` continues, and log its warnings; None for a new run.

    Collective.  Raises: `ConfigError` on all ranks where the run may not continue, `CheckpointError` where no
    checkpoint is usable.
    """
    latest = checkpointer.latest()
    if latest is None:
        return None
    if not config.checkpoint.resume:
        raise ConfigError(f"checkpoint.resume=false, but {config.run_dir} holds {latest.name}: choose another run_dir")
    found = resumption(config, run_data.problems.fingerprint, checkpointer.read(latest))
    if grid.is_reporter:
        for line in (*found.warnings, *_other_prompts(found, run_data.prompts_digest)):
            logger.warning("%s", line)
    return found


def _other_prompts(found: Resumption, digest: str) -> Iterator[str]:
    """Yield a line if the first prompts of the same problems, or the ends of responses, are not those of the run."""
    if found.same_problems and found.saved.trainer_state.get(PROMPTS, digest) != digest:
        yield (
            f"the first prompts, or the tokens that end a response, differ from those of {found.saved.path}, although "
            "the problems are the same: the chat template writes the date of the day, or a file of the model's "
            f"directory has changed. To go on with the former prompts {FIXED_DATE}, and set checkpoint.resume=force"
        )


def resumption(config: Config, fingerprint: str, saved: SavedRun) -> Resumption:
    """Return the `Resumption` of the run from ``saved``; collective.

    ``fingerprint``: the digest of the problems that this rank has read.

    Raises: `ConfigError` on all ranks where a bound key or the problems have changed, unless checkpoint.resume=force.
    """
    found, sampler = _changed(saved, config), saved.trainer_state.get("problem_sampler")
    if sampler is not None and sampler["fingerprint"] != fingerprint:
        found.append(KeyDifference(_PROBLEMS, sampler["fingerprint"], fingerprint, BOUND))
    forced = config.checkpoint.resume == "force" and not any(difference.rule == FIXED for difference in found)
    message = None if forced else refusal(found, str(saved.path))
    with raise_on_all_ranks():
        if message is not None:
            raise ConfigError(message)
    same_problems = not any(difference.key in (_PROBLEMS, "seed") for difference in found)
    free, bound = ([str(one) for one in found if (one.rule == FREE) == is_free] for is_free in (True, False))
    if bound:
        bound.append(
            f"checkpoint.resume=force: weights, optimizer and teacher are those of {saved.path}; everything else is "
            "as configured now"
        )
    if not same_problems:
        bound.append("the data starts from its beginning; success rates and own solutions start empty")
    return Resumption(saved, tuple(free), tuple(bound), same_problems)


def with_warmup(config: Config, found: Resumption | None) -> Config:
    """Return ``config`` with a number for optimizer.lr_warmup_steps if it is null.

    The number is that of the checkpoint ``found``, so that a run keeps its learning rates if this default or num_steps
    changes.  For a new run (None), and for a number that the checkpoint has as the text of an interpolation, it is a
    tenth of num_steps, at most `LONGEST_WARMUP`.
    """
    if config.optimizer.lr_warmup_steps is not None:
        return config
    stored = None if found is None else found.saved.trainer_state[CONFIGURATION]["optimizer"]["lr_warmup_steps"]
    number = stored if isinstance(stored, int) else min(LONGEST_WARMUP, config.num_steps // 10)
    return replace(config, optimizer=replace(config.optimizer, lr_warmup_steps=number))


def finished_run(config: Config, as_given: Config) -> Path | None:
    """Return the last checkpoint of a complete run whose last launch had this configuration; None for other runs.

    ``as_given``: the configuration that the user gave.  ``config``: ``as_given`` with the architecture of the
    checkpoint.
    """
    run_dir = Path(config.run_dir)
    file = run_dir / CONFIGURATION_FILE
    if config.dry_run or not config.checkpoint.resume or not file.is_file():
        return None
    # The first launch wrote the file without the architecture of a checkpoint, the later launches with it.
    possible = [one for given in (as_given, config) for one in _decided(given)]
    if file.read_text(encoding="utf-8", errors="replace") not in map(to_yaml, possible):
        return None  # `resumption` judges the differences
    latest = directory.latest(run_dir / "checkpoints")
    if latest is None or directory.iteration_of(latest) < config.num_steps:
        return None
    return None if directory.incomplete(latest) or directory.unverifiable(latest) else latest


def _decided(config: Config) -> list[Config]:
    """Return ``config`` with each anchor that the data of the run may have decided."""
    if config.target.anchor != "auto":
        return [config]
    return [replace(config, target=replace(config.target, anchor=anchor)) for anchor in ANCHORS]


def _changed(saved: SavedRun, config: Config) -> list[KeyDifference]:
    stored, now = saved.trainer_state[CONFIGURATION], stored_values(config)
    if "method" not in stored:
        raise CheckpointError(f"{saved.path}: an earlier version wrote it, with other keys: start from its weights")
    args = saved.common.get("args")
    if args is not None and config.model.provider is None and stored["model"].get("provider") is None:
        before = {
            field.name: getattr(config.model, field.name) if now["model"][field.name] == value else value
            for field in fields(ModelConfig)
            if (value := stored["model"].get(field.name, field.default)) is not MISSING
        }
        architecture = architecture_from_args(args)
        if isinstance(before.get("yarn"), dict):
            before["yarn"] = YarnConfig(**before["yarn"])
        try:
            stored = stored | {"model": _completed(ModelConfig(**before), architecture)}
            now = now | {"model": _completed(config.model, architecture)}
        except ConfigError as error:
            raise ConfigError(f"{saved.path}: {error}, or another run_dir") from None
    return differences(stored, now)


def _completed(model: ModelConfig, stored: ModelConfig) -> dict[str, Any]:
    """Return ``model`` as plain values, with its null fields filled from the stored architecture."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(reconcile(model, fields_set(model), stored))))
    return plain
