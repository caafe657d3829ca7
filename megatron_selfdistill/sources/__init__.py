# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The sources of responses: the student itself, a log of conversations, or solutions."""
