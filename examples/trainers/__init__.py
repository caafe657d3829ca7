# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The loss inside the trainers of other libraries, each in one file to copy."""
