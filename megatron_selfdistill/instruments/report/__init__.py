# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Reports on runs: pictures of their curves, and the commands that come next."""
