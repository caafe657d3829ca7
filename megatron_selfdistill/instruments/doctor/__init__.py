# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The software and hardware of a node, and what the node lacks for a run."""
