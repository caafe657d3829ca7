# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The formats of checkpoints, each read and written without a process group."""
