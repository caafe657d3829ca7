# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The self-test of a launch: the proofs of ``selfdistill doctor --selftest``."""
