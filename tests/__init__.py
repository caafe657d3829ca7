# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The tests: `unit` mirrors the package, the other directories say what they need; `support` holds the helpers."""
