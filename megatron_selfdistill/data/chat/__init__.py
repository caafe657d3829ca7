# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Logged conversations: their turns, which replies count as accepted, and the replies as tokens."""
