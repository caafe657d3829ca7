# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""From problems with solutions to microbatches: problems, prompts, contexts, packing, in that order."""
