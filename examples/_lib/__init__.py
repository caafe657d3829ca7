# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The code that several examples share: tasks, base models, variants of training, tables of results."""
