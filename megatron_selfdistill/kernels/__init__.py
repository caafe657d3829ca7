# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The loss over a tensor-parallel group as Triton kernels; each file names its twin in `loss/sharded`."""
