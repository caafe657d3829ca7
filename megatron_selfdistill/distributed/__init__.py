# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The ranks of a run: their process groups and messages, the detection of a hang, and the stop of a run."""
