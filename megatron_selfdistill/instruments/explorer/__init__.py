# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The target explorer: pages that show the target of every token of a response."""
