# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The ranks of a run: their process groups, what they exchange, how a hang is found and how a run stops."""
