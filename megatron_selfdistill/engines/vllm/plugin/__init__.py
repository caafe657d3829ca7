# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Code that runs inside vLLM's processes; it imports vLLM and never Megatron."""
