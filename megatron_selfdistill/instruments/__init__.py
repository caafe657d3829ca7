# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The instruments that people read and that no step reads: report, explorer, plan, doctor, self-test."""
