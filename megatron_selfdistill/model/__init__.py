# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The model: its architecture, the layers that Megatron's local spec lacks, and the model chunks of this rank."""
