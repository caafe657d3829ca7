# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Evaluation: sampling on held-out problems, verifying answers, comparing two models."""
