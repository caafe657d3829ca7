# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The log of a run: metrics of a step over the global batch, seconds per phase, samples, and files."""
