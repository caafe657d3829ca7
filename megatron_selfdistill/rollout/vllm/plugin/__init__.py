# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Inside vLLM's processes: how weights arrive, guided decoding, access control.  Needs vLLM, never Megatron."""
