# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Sampling with vLLM: inside the trainer's processes, or on servers."""
