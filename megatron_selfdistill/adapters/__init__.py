# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Low-rank adapters on frozen weights: their layers, their checkpoints, and the weights below them."""
