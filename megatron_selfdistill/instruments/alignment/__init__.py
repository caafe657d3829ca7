# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The gradient alignment: whether distillation pushes a model towards tokens with which it succeeds."""
