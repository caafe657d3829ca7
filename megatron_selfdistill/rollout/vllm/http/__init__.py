# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The process that speaks HTTP with vLLM servers for rank 0; it imports no torch."""
