# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The loggers of a run: TensorBoard, wandb, and classes of the user."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_selfdistill.config import function_named, user_code
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.metrics.run_log import replace_file
from megatron_selfdistill.metrics.samples import Sample, sample_html

logger = logging.getLogger(__name__)

WANDB_RUN_ID = "wandb_run_id.txt"
"""The file in the run directory with the id of the run on wandb, which all launches of the run share."""
WANDB_SETTINGS: Mapping[str, Any] = {"console": "off", "disable_git": True, "save_code": False, "finish_timeout": 60.0}
"""The settings of wandb whose defaults differ here: no copy of the output and of the sources leaves the machine, and
the end of a run waits at most 60 seconds for uploads.  wandb's own variables (WANDB_CONSOLE, ...) change them back."""


@dataclass(frozen=True)
class LoggedRun:
    """What a logger learns about the run when a launch begins."""

    run_dir: Path
    """The run directory."""
    step: int
    """The number of steps that are done: 0 in a new run.  A resumed run may repeat later steps that a killed launch has
    logged."""
    config: Mapping[str, Any]
    """The configuration as nested plain values, as config.yaml has it."""


class MetricsLogger(Protocol):
    """A place that shows the metrics and samples of a run.  Only rank 0 of the world has loggers.

    A logger is made by calling its class, or any other function, with a `LoggedRun`.
    """

    def add_scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a step or of an evaluation, after which ``step`` steps are done.

        A value may be NaN or infinite.
        """

    def add_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Show the samples of the step after which ``step`` steps are done."""

    def close(self) -> None:
        """Write what is still in memory; no other call follows."""


class TensorBoardLogger:
    """A `MetricsLogger` that writes TensorBoard's event files into ``run_dir/tensorboard``.

    A resumed run makes TensorBoard drop the steps that the run repeats.
    """

    def __init__(self, run: LoggedRun) -> None:
        """Begin a new event file."""
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        first = run.step + 1 if run.step else 0
        self._writer: Any = SummaryWriter(str(run.run_dir / "tensorboard"), purge_step=first, flush_secs=10)

    def add_scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one scalar per metric."""
        for key, value in metrics.items():
            self._writer.add_scalar(key, float(value), step)

    def add_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Write each sample as a text."""
        for number, sample in enumerate(samples, 1):
            self._writer.add_text(f"samples/{number}", sample_html(sample), step)

    def close(self) -> None:
        """Write the last events."""
        self._writer.close()


class WandbLogger:
    """A `MetricsLogger` that logs to wandb; all launches of a run are one run there, whose id `WANDB_RUN_ID` holds.

    wandb's own variables choose the project, the entity, the mode, the server and the directory of wandb's
    files, which is the run directory without WANDB_DIR.  The horizontal axis of every curve is the metric ``step``, not
    wandb's own count of rows: a resumed run may repeat steps, which are then in the history twice.
    """

    def __init__(self, run: LoggedRun) -> None:
        """Begin the run on wandb, or continue it.

        Raises: an error of wandb if there is no key or no connection.
        """
        import wandb

        self._wandb, id_file = wandb, run.run_dir / WANDB_RUN_ID
        has_id = id_file.exists()
        run_id = id_file.read_text().strip() if has_id else os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:12]
        replace_file(id_file, f"{run_id}\n")  # first, so that a launch that is killed meanwhile has used the same id
        settings = {key: value for key, value in WANDB_SETTINGS.items() if f"WANDB_{key.upper()}" not in os.environ}
        self._run = wandb.init(
            id=run_id,
            resume="allow",
            reinit="create_new",
            # A resumed run does not take back the name that somebody has given to it on wandb's pages.
            name=None if has_id and run.step else os.environ.get("WANDB_NAME") or run.run_dir.name,
            dir=os.environ.get("WANDB_DIR") or str(run.run_dir),
            config=dict(run.config),
            settings=wandb.Settings(**settings),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def add_scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics as one row of the history."""
        self._run.log({"step": step, **{key: float(value) for key, value in metrics.items()}})

    def add_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Log the samples as one row of HTML pages."""
        pages = [f'<meta charset="utf-8">{sample_html(sample)}' for sample in samples]
        rows = {f"samples/{n}": self._wandb.Html(page, data_is_not_path=True) for n, page in enumerate(pages, 1)}
        self._run.log({"step": step, **rows})

    def close(self) -> None:
        """Mark the run as finished, and wait for uploads as long as the setting ``finish_timeout`` says."""
        self._run.finish()


BUILT_IN: Mapping[str, Callable[[LoggedRun], MetricsLogger]] = {"tensorboard": TensorBoardLogger, "wandb": WandbLogger}
"""The function that makes each logger of `choices.LOGGERS`."""


class Loggers:
    """The loggers of a launch.  A logger that raises an error is dropped with a warning: it never stops the run."""

    def __init__(self, names: Sequence[str], run: LoggedRun) -> None:
        """Start a logger for each of ``names``, the values of metrics.loggers.

        Raises: `ConfigError` if a logger cannot start in a new run.  A resumed run, which may have been requeued while
        nobody watches, continues without this logger and warns.
        """
        self._running: dict[str, MetricsLogger] = {}
        for name in names:
            try:
                self._running[name] = function_named("metrics.loggers", name, BUILT_IN)(run)
            except Exception as error:
                if run.step:
                    logger.warning("metrics.loggers: this launch runs without %s: %s", name, _one_line(error))
                    continue
                self.close()
                raise ConfigError(
                    f"metrics.loggers: {name} cannot start: {_one_line(error)}; remove {name} from metrics.loggers to "
                    "run without it"
                ) from error

    def add_scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """Call `MetricsLogger.add_scalars` of each logger."""
        self._each(lambda one: one.add_scalars(step, metrics))

    def add_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Call `MetricsLogger.add_samples` of each logger."""
        self._each(lambda one: one.add_samples(step, samples))

    def close(self) -> None:
        """Call `MetricsLogger.close` of each logger; a second call does nothing."""
        self._each(lambda one: one.close(), "may lack the last lines")
        self._running = {}

    def _each(self, work: Callable[[MetricsLogger], None], outcome: str = "gets nothing more in this launch") -> None:
        for name, one in list(self._running.items()):
            try:
                with user_code(f"metrics.loggers={name}"):
                    work(one)
            except Exception as error:
                del self._running[name]
                logger.warning("metrics.loggers: %s %s: %s", name, outcome, _one_line(error))


def _one_line(error: Exception) -> str:
    text = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())
