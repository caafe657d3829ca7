# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The data: records, problems, prompts, contexts and packed microbatches, in this order."""
