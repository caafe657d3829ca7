# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What a node has and lacks for a run."""
