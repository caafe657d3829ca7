# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The files that a run writes into its directory, and the resumption of a run."""
