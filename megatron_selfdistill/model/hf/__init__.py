# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What `model/hf/mapping.py` is made of: one rule per tensor, the rules of a decoder, and each family's config.json."""
