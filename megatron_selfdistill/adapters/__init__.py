# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Low-rank adapters on frozen weights: their layers, their checkpoints, and the weights below them."""

ADAPTER_SUFFIX = "_adapter"
"""The name of an adapter is the name of its linear layer and this suffix; both are children of the same module."""
