# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The parts that several methods share."""
