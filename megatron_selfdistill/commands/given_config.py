# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The configuration that a command line gives, before the model is known.  Nothing here imports torch."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_selfdistill import config as configuration
from megatron_selfdistill.config import Config
from megatron_selfdistill.config.command_line import with_files
from megatron_selfdistill.distributed.roll_call import world_size
from megatron_selfdistill.errors import ConfigError


def given_config(
    arguments: argparse.Namespace, reserved: Mapping[str, str], evaluation: Mapping[str, Any]
) -> tuple[Config, frozenset[str]]:
    """Return the configuration of the command line ``arguments``, and the keys that the user has set.

    ``reserved``: the keys that options of the command set -> the options.  ``evaluation``: values of that section.
    The problems come from options, too.  Nothing is trained, so the size of a batch limits no layout.
    Raises: `ConfigError` for an override of a reserved key, and for an impossible configuration.
    """
    named = (with_files(arguments.overrides), arguments.config_name, arguments.config_dir)
    config, keys = configuration.load(*named), configuration.given_keys(*named)
    if taken := sorted(overridden_keys(arguments) & reserved.keys()):
        raise ConfigError(f"{taken[0]} cannot be set here: use {reserved[taken[0]]}")
    data = dataclasses.replace(config.data, path=None, global_batch_size=world_size())
    measured = dataclasses.replace(config.evaluation, **evaluation)
    return dataclasses.replace(config, data=data, evaluation=measured), keys


def overridden_keys(arguments: argparse.Namespace) -> frozenset[str]:
    """Return the keys that the user has set on the command line."""
    return frozenset(override.lstrip("+~").partition("=")[0] for override in arguments.overrides)
