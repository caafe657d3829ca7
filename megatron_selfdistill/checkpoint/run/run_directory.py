# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The files of a run folder that a launch writes once: the configuration, and what conversions need."""

from __future__ import annotations

from pathlib import Path

from megatron_selfdistill import config as configuration
from megatron_selfdistill.checkpoint.conversion import carry_companions
from megatron_selfdistill.config import Config

CONFIGURATION_FILE = "config.yaml"


class RunFolder:
    """The run folder as one rank writes it: the reporter.  Checkpoints and metrics are others' files."""

    def __init__(self, config: Config, step: int) -> None:
        """``step``: the steps that are done at the start of this launch."""
        self.path, self._config, self._step = Path(config.run_dir), config, step

    def write(self) -> None:
        """Write config.yaml and the Hugging Face files of ``checkpoint.load``.

        A config.yaml with other contents is of an earlier launch, up to the present step: it is kept under the name
        ``config.until_step_<step>.yaml``.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        file, text = self.path / CONFIGURATION_FILE, configuration.to_yaml(self._config)
        if file.is_file() and file.read_text(encoding="utf-8", errors="replace") != text:
            file.rename(self._unused_name())
        file.write_text(text, encoding="utf-8")
        if self._config.checkpoint.load:
            carry_companions(Path(self._config.checkpoint.load), self.path)

    def is_whole(self) -> bool:
        """Whether config.yaml is still there."""
        return (self.path / CONFIGURATION_FILE).is_file()

    def _unused_name(self) -> Path:
        number, name = 1, f"config.until_step_{self._step}"
        while (kept := self.path / f"{name}{f'.{number}' if number > 1 else ''}.yaml").exists():
            number += 1
        return kept
