# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The exceptions whose message is one sentence for the user: expected, got, what to do."""

from __future__ import annotations


class CheckpointError(Exception):
    """A checkpoint that is missing, incomplete, corrupt or of another model; the message is one sentence."""


class EngineError(Exception):
    """A rollout engine that failed; the message is one sentence, and no response of the failed step is used."""
