# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The layers of rarer architectures: gated delta nets, sliding windows, sinks, other norms, experts with biases."""
