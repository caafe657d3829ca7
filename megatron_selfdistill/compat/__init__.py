# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What Megatron Core 0.16 needs on a CPU, what Megatron Core computes wrongly, and its harmless warnings."""
