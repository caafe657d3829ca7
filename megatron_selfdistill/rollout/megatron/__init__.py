# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Sampling in process, with the training weights and Megatron's KV cache."""
