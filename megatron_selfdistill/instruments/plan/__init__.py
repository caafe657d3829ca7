# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The plan of a run, without running it: shapes on the meta device, memory by arithmetic, a simulated schedule."""
