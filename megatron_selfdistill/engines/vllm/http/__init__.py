# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""HTTP with one vLLM server: patience with silence, and the forms of a response."""
