# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The commands that write a data set with a model: own solutions, and explanations of given ones."""
