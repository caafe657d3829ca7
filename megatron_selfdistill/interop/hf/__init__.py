# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The mapping between Hugging Face and Megatron: one rule per tensor, and the config.json of each family."""
