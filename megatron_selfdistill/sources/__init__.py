# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Where the responses of a step come from: the student itself, a log of conversations, solutions, or a recording."""
