# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The trainer's configuration on the command line of a command that trains nothing.  Nothing here imports torch."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from megatron_selfdistill import config as configuration
from megatron_selfdistill.config import Config
from megatron_selfdistill.distributed.roll_call import world_size
from megatron_selfdistill.errors import ConfigError


class GivenConfig(NamedTuple):
    """The configuration before the model is known, and what the user has set."""

    config: Config
    keys: frozenset[str]
    """The keys that the user has set, in files or on the command line."""
    overridden: frozenset[str]
    """The keys that the user has set on the command line."""


def given_config(
    arguments: argparse.Namespace, reserved: Mapping[str, str], evaluation: Mapping[str, Any]
) -> GivenConfig:
    """Return the configuration of ``arguments`` (overrides, config_name, config_dir).

    ``reserved``: the keys that options of the command set -> the options.  ``evaluation``: values of that section.
    The problems come from options, too.  Nothing is trained, so the size of a batch limits no layout.
    Raises: `ConfigError` for an override of a reserved key, and for an impossible configuration.
    """
    named = (arguments.overrides, arguments.config_name, arguments.config_dir)
    config, keys = configuration.load(*named), configuration.given_keys(*named)
    overridden = frozenset(override.lstrip("+~").partition("=")[0] for override in arguments.overrides)
    if taken := sorted(overridden & reserved.keys()):
        raise ConfigError(f"{taken[0]} cannot be set here: use {reserved[taken[0]]}")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=None, global_batch_size=world_size()),
        evaluation=dataclasses.replace(config.evaluation, **evaluation),
    )
    return GivenConfig(config, keys, overridden)
