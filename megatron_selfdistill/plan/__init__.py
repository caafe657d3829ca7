# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What a run will need, without running it: shapes on the meta device, memory by arithmetic, the schedule simulated."""
