# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Checkpoints: Megatron's torch_dist directories, written so that a killed run always leaves one that loads."""
