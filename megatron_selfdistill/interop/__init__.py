# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Formats of checkpoints, families of Hugging Face models, conversion and peft adapters."""
