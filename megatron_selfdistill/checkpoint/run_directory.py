# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The directory of a run: what is written there besides checkpoints, and whose it is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from megatron_selfdistill import config as configuration
from megatron_selfdistill.annexes import door
from megatron_selfdistill.checkpoint.formats.directory import HF_ASSETS, hf_assets_of, tracked
from megatron_selfdistill.checkpoint.formats.saved_run import RUN_TEMPLATE
from megatron_selfdistill.config import Config
from megatron_selfdistill.data.tokenizer import chat_template_text
from megatron_selfdistill.distributed.collectives import run_on_rank_0
from megatron_selfdistill.errors import CheckpointError

logger = logging.getLogger(__name__)

CONFIGURATION_FILE = "config.yaml"
"""The name of the file in a run directory with the configuration of its last launch."""


class RunDirectory:
    """The run directory: the files that the reporter writes once per launch, and the proof of its ownership.

    ``is_owned`` is the only state of the object; it becomes False once another run has taken the directory over.
    """

    def __init__(self, config: Config, step: int, prove_ownership: Callable[[], None] | None = None) -> None:
        """Remember the configuration and the number of steps that are done at the start of this launch, ``step``.

        ``prove_ownership``: a function for rank 0, which raises `CheckpointError` where another run has taken the
        directory over (`RunLock.renew`).
        """
        self.path, self._config, self._step = Path(config.run_dir), config, step
        self._prove_ownership = prove_ownership
        self.is_owned = True

    def require_ownership(self) -> None:
        """Raise `CheckpointError` on all ranks where another run has taken the run directory over.  Collective."""
        if self._prove_ownership is not None:
            try:
                run_on_rank_0(self._prove_ownership)
            except CheckpointError:
                self.is_owned = False
                raise

    def write(self) -> None:
        """Write config.yaml, ``data.chat_template`` as `RUN_TEMPLATE`, and the Hugging Face files of the checkpoint.

        A config.yaml with other contents belongs to an earlier launch; this method renames it to
        ``config.until_step_<step>.yaml``.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        file, text = self.path / CONFIGURATION_FILE, configuration.to_yaml(self._config)
        if file.is_file() and file.read_text(encoding="utf-8", errors="replace") != text:
            file.rename(self._unused_name())
        file.write_text(text, encoding="utf-8")
        template = chat_template_text(self._config.data.chat_template)
        if template is not None:
            (self.path / RUN_TEMPLATE).write_text(template, encoding="utf-8")
        load = self._config.checkpoint.load
        assets = hf_assets_of(tracked(Path(load)) or Path(load)) if load else None
        if assets is not None and assets.absolute() != (self.path / HF_ASSETS).absolute():
            door("hugging_face").copy_description(assets, self.path / HF_ASSETS)  # for conversions of its checkpoints

    def restore(self) -> None:
        """Write the files of `write` again if the run directory was removed since the launch."""
        if not (self.path / CONFIGURATION_FILE).is_file():
            logger.warning("%s is not there any more: it is written again", self.path)
            self.write()

    def _unused_name(self) -> Path:
        number, name = 1, f"config.until_step_{self._step}"
        while (unused := self.path / f"{name}{f'.{number}' if number > 1 else ''}.yaml").exists():
            number += 1
        return unused
