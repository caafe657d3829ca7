# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Guided rollouts: responses that are sampled from the target itself, from all its contexts at once."""
