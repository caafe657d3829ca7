# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Chat logs: conversations and their turns, the accepted replies, and the replies as tokens."""
