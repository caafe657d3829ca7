# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What goes wrong with an engine, in one sentence."""

from __future__ import annotations


class EngineError(RuntimeError):
    """An engine died, hung, refused a request or returned fewer responses than were asked for: one sentence that says
    which engine, what was expected and what came; on many ranks, raised on every one."""
