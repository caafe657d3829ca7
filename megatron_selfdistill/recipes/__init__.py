# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The literature's recipes: what is rewarded, and how each response token is weighted."""
