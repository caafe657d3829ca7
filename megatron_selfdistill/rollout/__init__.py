# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The samplers of responses: their protocol, sampling in process, and sampling with vLLM."""
