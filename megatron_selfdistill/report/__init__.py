# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Pictures of runs, drawn from what they logged."""
