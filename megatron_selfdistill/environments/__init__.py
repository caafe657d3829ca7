# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Environments, which reply to the model's responses, so that a problem becomes an episode of several turns.

An environment of yours imports `Reply` from here; `protocol` says what it must be.
"""

from __future__ import annotations

from megatron_selfdistill.data.episode_reply import Reply

__all__ = ["Reply"]
