# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The key ``teachers``: teachers with weights of directories of their own, and their products."""
