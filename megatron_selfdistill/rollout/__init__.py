# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Where responses come from: what a sampler is, and the one that shares the trainer's weights."""
