# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The command `selfdistill evaluate`: the quality of a model, and what the first step of a run would see."""
