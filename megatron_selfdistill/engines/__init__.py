# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The engines of other projects that sample responses."""
