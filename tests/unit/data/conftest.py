# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The tokenizers of `trained_tokenizers`, as fixtures."""

from trained_tokenizers import *  # noqa: F403
