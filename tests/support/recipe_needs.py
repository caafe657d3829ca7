# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What a recipe cannot name for its user."""

from __future__ import annotations

import yaml

from megatron_selfdistill.config.key_list import config_dir


def needed_by(recipe: str) -> list[str]:
    """Return the overrides without which a recipe is refused: an environment, where the recipe has episodes."""
    settings = yaml.safe_load((config_dir() / "recipe" / f"{recipe}.yaml").read_text(encoding="utf-8"))
    return ["environment.name=replying.Replying"] if "environment" in settings else []
