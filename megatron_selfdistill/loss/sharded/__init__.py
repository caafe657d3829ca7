# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The loss over a tensor-parallel group in PyTorch: the definition of what other backends compute."""
