# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What a run writes into its directory, and how it resumes."""
