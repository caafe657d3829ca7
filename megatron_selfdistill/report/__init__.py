# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What is said of finished runs and evaluations: pictures of their curves, comparisons of two models."""
